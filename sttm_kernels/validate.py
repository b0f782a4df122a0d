"""Checks of arguments. Every message names the argument, what it must be and what it got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.partition import PARTITIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIMILARITIES = ("cosine", "dot", "l2")
WEIGHTS = ("softmax", "uniform")
REDUCTIONS = ("mean", "sum", "max", "first")
NORMALIZATIONS = ("meta", "tokens")


def shape_text(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(int(extent)) for extent in shape) + ")"


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def floating(name: str, value: Any) -> None:
    tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def boolean(name: str, value: Any) -> None:
    tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")


def dims(name: str, value: Tensor, layout: str, *counts: int, batched: int = 3) -> None:
    """`layout` is the shape as the docstring writes it; no extent may be 0 but the batch, which comes first in values
    of at least `batched` dimensions."""
    if value.dim() not in counts:
        raise ValueError(f"{name} must have shape {layout}, got {shape_text(value.shape)}")
    if 0 in (value.shape[1:] if value.dim() >= batched else value.shape):
        raise ValueError(f"{name} must have shape {layout} with no empty dimension, got {shape_text(value.shape)}")


def shape(name: str, value: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {layout} = {shape_text(expected)}, got {shape_text(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def extents(name: str, value: Any, count: int, layout: str) -> Any:
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise ValueError(f"{name} must be {layout}, {count} positive integers, got {value!r}")
    for extent in value:
        integer(f"every extent of {name} {layout}", extent, 1)
    return tuple(value)


def partition(value: Any) -> None:
    if isinstance(value, Tensor):
        boolean("partition", value)
    else:
        one_of("partition", value, (*PARTITIONS, "a bool tensor"))
