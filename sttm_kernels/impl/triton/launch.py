"""Launching: empty grids, the device guard, and something else in place of launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import INTERPRET, Config

if INTERPRET:
    from sttm_kernels.impl.triton import interpreter

    interpreter.mend()

_instead: list[Callable[..., None]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constexprs: Any) -> None:
    """Runs `kernel` over `grid` on the current stream of the device of its first tensor argument.

    Block sizes, warps and stages come from `config`. An empty grid launches nothing.
    """
    if 0 in grid:
        return
    if _instead:
        _instead[-1](kernel, grid, args, config, constexprs)
        return
    lead = next(arg for arg in args if isinstance(arg, Tensor))
    if lead.is_cuda and lead.get_device() != torch.cuda.current_device():
        with torch.cuda.device(lead.device):
            kernel[grid](*args, **config.blocks, **constexprs, **config.options)
    else:
        kernel[grid](*args, **config.blocks, **constexprs, **config.options)


@contextlib.contextmanager
def launching_instead(run: Callable[..., None]) -> Iterator[None]:
    """Within it every launch calls `run(kernel, grid, args, config, constexprs)` and no kernel."""
    _instead.append(run)
    try:
        yield
    finally:
        _instead.pop()


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A stride that Triton does not specialise on, known to be a multiple of ALIGN: loads stay vectorised."""
    return stride // ALIGN * ALIGN
