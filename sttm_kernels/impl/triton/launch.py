"""Launching: empty grids, the device guard, and something else in place of launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import INTERPRET, MAX_INT32, Config

if INTERPRET:
    from sttm_kernels.impl.triton import interpreter

    interpreter.mend()

MAX_ACROSS = 65535
"""The most programs along the second and third axis of a grid."""
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_instead: list[Callable[..., None]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constexprs: Any) -> None:
    """Runs `kernel` over `grid` on the current stream of the device of its first tensor argument.

    Block sizes, warps and stages come from `config`. An empty grid launches nothing.
    """
    if 0 in grid:
        return
    if grid[0] > MAX_INT32 or (len(grid) > 1 and max(grid[1:]) > MAX_ACROSS):
        raise ValueError(
            f"{kernel.__name__} would take {' x '.join(map(str, grid))} programs, at most {MAX_INT32} x {MAX_ACROSS}: "
            "the batch times the blocks of tokens or groups, or the channels, are too many; split the batch"
        )
    if _instead:
        _instead[-1](kernel, grid, args, config, constexprs)
        return
    if not INTERPRET:
        for arg in args:  # this loop is most of what a launch costs here, so it is no more than it must be
            if type(arg) in _TENSORS and arg.data_ptr() & 15:
                args = tuple(_realigned(kernel, at, one) for at, one in enumerate(args))
                break
    lead = next(arg for arg in args if isinstance(arg, Tensor))
    if lead.is_cuda and lead.get_device() != torch.cuda.current_device():
        with torch.cuda.device(lead.device):
            kernel[grid](*args, **config.blocks, **constexprs, **config.options)
    else:
        kernel[grid](*args, **config.blocks, **constexprs, **config.options)


def _realigned(kernel: Any, at: int, arg: Any) -> Any:
    """An input as it is, or in memory of its own if its address is no multiple of 16.

    Triton compiles such an address into other code, which adds up in another order: the same values would give other
    bits. What kernels write is allocated by their callers, and aligned unless marked.
    """
    if type(arg) not in _TENSORS or arg.data_ptr() & 15 == 0 or kernel.params[at].do_not_specialize_on_alignment:
        return arg
    copy = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device)
    once = [1 if stride == 0 else extent for extent, stride in zip(arg.shape, arg.stride(), strict=True)]
    copy.as_strided(once, copy.stride()).copy_(arg.as_strided(once, arg.stride()))
    return copy


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
