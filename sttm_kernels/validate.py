"""Checks of arguments. Every message names the argument, what it must be and what it got."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.partition import PARTITIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIMILARITIES = ("cosine", "dot", "l2")
WEIGHTS = ("softmax", "uniform")
REDUCTIONS = ("mean", "sum", "max", "first")
NORMALIZATIONS = ("meta", "tokens")
_NUMBERS: tuple[Any, ...] = (numbers.Real, torch.SymFloat, torch.SymInt)


def shape_text(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(int(extent)) for extent in shape) + ")"


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, of layout torch.strided, got {value.layout}")


def floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype not in FLOATS or value.layout != torch.strided:
        tensor(name, value)
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def boolean(name: str, value: Any) -> None:
    tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")


def dims(name: str, value: Tensor, layout: str, *counts: int, batched: int = 3) -> torch.Size:
    """`layout` is the shape as the docstring writes it; no extent may be 0 but the batch, which comes first in values
    of at least `batched` dimensions. Returns the shape, which costs time to read."""
    found = value.shape
    if len(found) not in counts:
        raise ValueError(f"{name} must have shape {layout}, got {shape_text(found)}")
    first, *rest = found
    if 0 in rest or (len(found) < batched and first == 0):
        raise ValueError(f"{name} must have shape {layout} with no empty dimension, got {shape_text(found)}")
    return found


def features(name: str, value: Any, layout: str, *counts: int) -> torch.Size:
    """`floating` and `dims`."""
    floating(name, value)
    return dims(name, value, layout, *counts)


def shape(name: str, value: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {layout} = {shape_text(expected)}, got {shape_text(value.shape)}")


def beside(name: str, value: Any, layout: str, expected: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """`tensor`, `shape` and `same_device`, for less than half of their time."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    if not (dense and value.shape == expected and value.device == other.device):
        tensor(name, value)
        shape(name, value, layout, expected)
        same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def generator(value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(value).__name__}: a seed is "
            "torch.Generator().manual_seed(seed)"
        )


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def integer(name: str, value: Any, least: int) -> int:
    """Returns it as Python's: NumPy's integers are taken too."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        value = int(value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def amounts(name: str, value: Any, count: int | None, items: str = "B") -> tuple[int, ...] | None:
    """One number for each item, of which there are `count` if that is known, from a sequence or a tensor; None for what
    is neither."""
    if isinstance(value, Tensor) and value.dim() > 0:
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the CPU, where it is read without waiting for a device, got a tensor on "
                f"{value.device}"
            )
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {value.dtype}")
        if count is None:
            dims(name, value, f"({items},)", 1, batched=1)
        else:
            shape(name, value, f"({items},)", (count,))
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    if count is not None and len(value) != count:
        raise ValueError(f"{name} must have {items} = {count} numbers, one for each item, got {len(value)}")
    return tuple(integer(f"every number of {name}", each, 0) for each in value)


def lengths(name: str, value: Any, total: int) -> tuple[int, ...]:
    """The tokens of each sequence, which are `total` together."""
    found = amounts(name, value, None, "S")
    if found is None:
        raise TypeError(f"{name} must be a sequence of ints or an integer tensor (S,), got {type(value).__name__}")
    if not found or sum(found) != total:
        text = found if len(found) <= 8 else f"{len(found)} numbers"
        offsets = found and found[0] == 0 and found[-1] == total  # as cu_seqlens of other packages
        raise ValueError(
            f"{name} must be the tokens of each sequence, {total} together, got {text}, {sum(found)} together"
            + "; of offsets, as these seem to be, give the differences" * bool(offsets)
        )
    return found


def finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def positive(name: str, value: Any) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _NUMBERS)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def extents(name: str, value: Any, count: int, layout: str) -> Any:
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise ValueError(f"{name} must be {layout}, {count} positive integers, got {value!r}")
    return tuple(
        extent if type(extent) is int and extent > 0 else integer(f"every extent of {name} {layout}", extent, 1)
        for extent in value
    )


def tokens(name: str, value: Any, count: int | None) -> list[int]:
    """Indices of tokens, of `count` if that is known, from a bool mask `(N,)` or indices, ascending and each once."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the CPU, where it is read without waiting for a device, got a tensor on "
                f"{value.device}: make it there, or give the indices as a list"
            )
        if value.dtype == torch.bool:
            if count is None:
                dims(name, value, "(N,)", 1, batched=1)
            else:
                shape(name, value, "(N,)", (count,))
            value = value.nonzero().flatten()
        elif value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must be a bool mask or integer indices, got {value.dtype}")
        dims(name, value, "(P,)", 1, batched=1)
        found = value.tolist()
    elif isinstance(value, Iterable) and not isinstance(value, str):
        found = [integer(f"every entry of {name}", n, 0) for n in value]
    else:
        raise TypeError(f"{name} must be a bool mask (N,) or token indices, got {type(value).__name__}")
    for n in found:
        if n < 0 or (count is not None and n >= count):
            raise ValueError(f"{name} must hold tokens in [0, N), N = {count}, got {n}")
    return sorted(set(found))


def partition(value: Any) -> None:
    if isinstance(value, Tensor):
        boolean("partition", value)
    elif value not in PARTITIONS:
        one_of("partition", value, (*PARTITIONS, "a bool tensor"))
