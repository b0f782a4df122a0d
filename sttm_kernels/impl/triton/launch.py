"""Launching: empty grids, the device guard, and a record of launches in place of launches.

`recorded` runs a verb on tensors without data (device "meta") and returns how it would have compiled its kernels, so
that what is compiled ahead of time, counted or timed is what is shipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import INTERPRET, MAX_INT32, Config, Specialization, forced_architecture

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


def specialization(
    name: str, kernel: Any, args: tuple[Any, ...], config: Config, constexprs: dict[str, Any], expect_dot: bool = False
) -> Specialization:
    """How Triton compiles `kernel` for these arguments: its rules for types, values of 1 and multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {**config.blocks, **constexprs}
    divisible: set[str] = set()
    for param, arg in zip(kernel.params, args, strict=False):
        free = not param.do_not_specialize
        if param.is_constexpr or arg is None or (type(arg) is int and arg == 1 and free):
            constants[param.name] = arg
            continue
        if isinstance(arg, Tensor):
            signature[param.name] = "*" + _TYPES[arg.dtype]
            multiple = arg.data_ptr() % 16 == 0
        elif isinstance(arg, bool):
            signature[param.name], multiple = "u1", False
        elif isinstance(arg, int):
            signature[param.name] = "i32" if -MAX_INT32 - 1 <= arg <= MAX_INT32 else "i64"
            multiple = arg % 16 == 0
        else:
            signature[param.name], multiple = "fp32", False
        if multiple and free and not param.do_not_specialize_on_alignment:
            divisible.add(param.name)
    ordered = {param.name: signature.get(param.name, "constexpr") for param in kernel.params}
    constants = {n: constants.get(n, _default(kernel, n)) for n, kind in ordered.items() if kind == "constexpr"}
    return Specialization(name, kernel, ordered, constants, frozenset(divisible), config.options, expect_dot)


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


def _default(kernel: Any, name: str) -> Any:
    return next(param.default for param in kernel.params if param.name == name)


def recorded(name: str, run: Callable[[], Any], arch: int, dots: tuple[str, ...] = ()) -> list[Specialization]:
    """The specializations that `run` launches on the architecture `arch`, launching none.

    Args:
        name: put before the name of each kernel.
        run: calls functions of this package on tensors of device "meta".
        dots: names of the kernels that multiply matrices.
    """
    found: list[Specialization] = []

    def record(kernel: Any, grid: Any, args: Any, config: Config, constexprs: dict[str, Any]) -> None:
        here = kernel.__name__
        one = specialization(f"{name} {here}", kernel, args, config, constexprs, here in dots)
        found.append(_for_architecture(one, arch))

    with launching_instead(record), forced_architecture(arch):
        run()
    return found


def _for_architecture(one: Specialization, arch: int) -> Specialization:
    return dataclasses.replace(one, archs=(arch,))
