"""How tensors lie in memory as kernels take them: features are read in place, what comes beside them lies densely."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor


def by_heads(q: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of (B, H, N, D), also of (B, N, D), which has one head."""
    shape, strides = q.shape, q.stride()
    if len(shape) == 4:
        return shape, strides
    (B, N, D), (stride_b, stride_n, stride_d) = shape, strides
    return (B, 1, N, D), (stride_b, 0, stride_n, stride_d)


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def items(t: Tensor | None) -> tuple[Tensor | None, int]:
    """(B, rows, columns) with contiguous items, which may all be the same one, and the stride from item to item."""
    if t is None:
        return None, 0
    (_, rows, columns), (item, row, column) = t.shape, t.stride()
    if column != 1 or row != columns:
        return t.contiguous(), rows * columns
    return t, item


def alignment(*strides: tuple[int, ...]) -> int:
    """The largest power of two up to 16 that divides all strides of these tensors but the last: ALIGN of `aligned`.

    It is 1 if features are not adjacent, as nothing is won.
    """
    divisor = 16
    for each in strides:
        if each[-1] != 1:
            return 1
        divisor = math.gcd(divisor, *each[:-1])
    return divisor


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A stride that Triton does not specialise on, known to be a multiple of ALIGN: loads stay vectorised."""
    return stride // ALIGN * ALIGN
