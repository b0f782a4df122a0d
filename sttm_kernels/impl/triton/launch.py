"""Launching: empty grids, the device guard, and something else in place of launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.impl.triton.config import INTERPRET, MAX_INT32, Config

if INTERPRET:
    from sttm_kernels.impl.triton import interpreter

    interpreter.mend()

MAX_ACROSS = 65535
"""The most programs along the second and third axis of a grid."""
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_known: dict[int, tuple[Any, tuple[int, ...]]] = {}
"""By the address of a kernel: the kernel, so that no other gets that address, and the `_hinted` of it."""
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
    if INTERPRET:
        kernel[grid](*args, **config.blocks, **constexprs)
        return
    lead = None
    for at in _hinted(kernel):  # this loop is most of what a launch costs here, so it is no more than it must be
        arg = args[at]
        if arg is not None:
            lead = arg
            if type(arg) in _TENSORS and arg.data_ptr() & 15:
                args = (*args[:at], _realigned(arg), *args[at + 1 :])
    if lead is not None and lead.is_cuda and lead.get_device() != torch.cuda.current_device():
        with torch.cuda.device(lead.device):
            kernel[grid](*args, **config.blocks, **constexprs, **config.options)
    elif lead is not None and lead.is_xpu and lead.get_device() != torch.xpu.current_device():
        with torch.xpu.device(lead.device):
            kernel[grid](*args, **config.blocks, **constexprs, **config.options)
    else:
        kernel[grid](*args, **config.blocks, **constexprs, **config.options)


def _hinted(kernel: Any) -> tuple[int, ...]:
    """Where a kernel takes what Triton compiles by its alignment: pointers, for numbers are kept out of it."""
    known = _known.get(id(kernel))
    if known is None:
        marked = (one.do_not_specialize or one.do_not_specialize_on_alignment for one in kernel.params)
        free = (not (one.is_constexpr or mark) for one, mark in zip(kernel.params, marked, strict=True))
        known = _known[id(kernel)] = kernel, tuple(at for at, one in enumerate(free) if one)
    return known[1]


def _realigned(given: Tensor) -> Tensor:
    """An input in memory of its own, as its address is no multiple of 16.

    Triton compiles such an address into other code, which adds up in another order: the same values would give other
    bits. What kernels write is allocated by their callers, and aligned unless marked.
    """
    copy = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)
    once = [1 if stride == 0 else extent for extent, stride in zip(given.shape, given.stride(), strict=True)]
    copy.as_strided(once, copy.stride()).copy_(given.as_strided(once, given.stride()))
    return copy


@contextlib.contextmanager
def launching_instead(run: Callable[..., None]) -> Iterator[None]:
    """Within it every launch calls `run(kernel, grid, args, config, constexprs)` and no kernel."""
    _instead.append(run)
    try:
        yield
    finally:
        _instead.pop()
