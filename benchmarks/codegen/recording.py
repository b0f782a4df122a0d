"""How kernels would be compiled by a call, from a record of its launches: nothing is compiled or launched.

`recorded` runs a verb on tensors without data (device "meta"), so that what is compiled ahead of time, counted or timed
is what is shipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.codegen.combinations import products
from sttm_kernels.impl.triton.config import ARCHITECTURES, MAX_INT32, Config, forced_architecture
from sttm_kernels.impl.triton.launch import launching_instead
from sttm_kernels.impl.triton.similarity import precision


@dataclass(frozen=True)
class Specialization:
    """One way in which a kernel is compiled, with everything that the compiler must know and nothing else.

    Attributes:
        name: verb, dtype and case, for tables and test names.
        kernel: the `triton.jit` function.
        signature: type of every argument by name, as Triton writes it: "*bf16", "i32", "fp32", "constexpr".
        constexprs: value of every argument of type "constexpr", None included.
        divisible: names of the pointers and integers known to be multiples of 16.
        options: warps, stages and registers, as `Config.options`.
        expect_dot: tensor-core instructions must appear in its code.
        archs: the architectures that launch it.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: frozenset[str] = field(default_factory=frozenset)
    options: Mapping[str, int] = field(default_factory=dict)
    expect_dot: bool = False
    archs: tuple[int, ...] = ARCHITECTURES


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


KINDS = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False))
"""(dtype, whether PyTorch allows TF32): what the kernels are compiled for."""


def recorded_everywhere(
    name: str, run: Callable[[], Any], dtype: torch.dtype, tf32: bool, dots: tuple[str, ...]
) -> list[Specialization]:
    """`recorded` on every architecture, with TF32 allowed or not."""
    with products("tf32" if tf32 else "ieee"):
        exact = precision(dtype) == "ieee"
        kind = str(dtype).removeprefix("torch.")
        return [one for arch in ARCHITECTURES for one in recorded(f"{name} {kind}", run, arch, () if exact else dots)]
