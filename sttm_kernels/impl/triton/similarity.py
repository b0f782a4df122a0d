"""What the kernels of `assign` and `soft_merge` share: tiles of similarities, and the way back through them.

A program owns a tile of rows of one side (tokens or meta tokens) and streams the rows of the other. Features are read
in place, norms are added up from the tiles that feed the products, and nothing is normalised in memory. Weights that
multiply features stay in a format with the exponents of float32: bfloat16 features take bfloat16 weights, float16
features are widened, because a softmax over many tokens falls below the range of float16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels import dispatch
from sttm_kernels.impl.triton.launch import aligned
from sttm_kernels.reference import NORM_FLOOR

FLOOR: tl.constexpr = tl.constexpr(NORM_FLOOR)


def by_heads(q: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of (B, H, N, D), also of (B, N, D), which has one head."""
    shape, strides = q.shape, q.stride()
    if len(shape) == 4:
        return shape, strides
    (B, N, D), (stride_b, stride_n, stride_d) = shape, strides
    return (B, 1, N, D), (stride_b, 0, stride_n, stride_d)


Pair = tuple[tuple[Any, ...], int, int, int, int, int, int]


def paired(q: Tensor, meta: Tensor) -> Pair:
    """q and meta (B, K, D) as kernels take them, each with its strides; B, H, N, K, D; the `alignment` of both."""
    (B, H, N, D), q_strides = by_heads(q)
    m_strides = meta.stride()
    return (q, *q_strides, meta, *m_strides), B, H, N, meta.shape[1], D, alignment(q_strides, m_strides)


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


def precision(*dtypes: torch.dtype) -> str:
    """How tensor cores may round float32 operands: as PyTorch is told to for its own products."""
    if torch.float32 in dtypes and not dispatch.tf32():
        return "ieee"
    return "tf32"


def power_of_two(extent: int, least: int = 16) -> int:
    """The smallest block that covers `extent`; a product takes no less than 16."""
    return max(least, 1 << (extent - 1).bit_length())


@triton.jit
def rows_at(item, first, rows, stride, ALIGN: tl.constexpr):
    """Where rows [first, first + len(rows)) of a batch item start, (rows, 1); widened before it is multiplied."""
    stride = aligned(stride, ALIGN)
    return item + first * stride.to(tl.int64) + (rows.to(tl.int64) * stride)[:, None]


@triton.jit
def features(
    at, inside, start, stride, stride_head,
    D: tl.constexpr, HEADS: tl.constexpr, WIDEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Features [start, start + BLOCK_D) of the rows that `at` (rows, 1) points to, 0 outside; the mean over heads."""
    d = start + tl.arange(0, BLOCK_D)[None, :]
    if D % BLOCK_D != 0:
        inside = inside & (d < D)
    at = at + d.to(tl.int64) * stride
    tile = tl.load(at, mask=inside, other=0.0)
    if HEADS > 1:
        total = tile.to(tl.float32)
        for _ in range(1, HEADS):
            at += stride_head
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total = total / HEADS
        tile = total if WIDEN else total.to(tile.dtype)  # rounded, as a mean taken before the product would be
    return tile


@triton.jit
def to_tf32(a):
    """float32 rounded to the nearest TF32; tensor cores drop the low bits of what they are given."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr, A_ROUNDED: tl.constexpr = False):
    """acc + a @ b; A_ROUNDED: a is TF32 already.

    WIDEN is for the interpreter, which would multiply the bit patterns of bfloat16.
    """
    if WIDEN or a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32 and PRECISION == "tf32" and not WIDEN:
        if not A_ROUNDED:
            a = to_tf32(a)
        b = to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def as_operand(weights, like, WIDEN: tl.constexpr):
    """Weights (float32) in the format in which they may multiply features of the type of `like`."""
    if like.dtype == tl.bfloat16 and not WIDEN:
        weights = weights.to(tl.bfloat16)
    return weights


@triton.jit
def squares(tile):
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def sum_of_squares(
    at, inside, stride, stride_head,
    D: tl.constexpr, HEADS: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|row|^2 of the rows that `at` (BLOCK, 1) points to."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        total += squares(features(at, inside, start, stride, stride_head, D, HEADS, WIDEN, BLOCK_D))
    return total


@triton.jit
def products(
    own_tile, own_at, own_inside, own_stride, own_head,
    other_at, other_inside, other_stride, other_head,
    D: tl.constexpr, OWN_HEADS: tl.constexpr, OTHER_HEADS: tl.constexpr, NORMS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<own row, other row>, (BLOCK_OWN, BLOCK_OTHER), and |other row|^2 if NORMS.

    `own_tile` holds the own rows if they fit one block of features; otherwise they are read again.
    """
    dot = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
    other_sq = tl.zeros([BLOCK_OTHER], tl.float32)
    if D <= BLOCK_D:
        other = features(other_at, other_inside, 0, other_stride, other_head, D, OTHER_HEADS, WIDEN, BLOCK_D)
        dot = product(own_tile, tl.trans(other), dot, PRECISION, WIDEN)
        if NORMS:
            other_sq = squares(other)
    else:
        for start in range(0, D, BLOCK_D):
            own = features(own_at, own_inside, start, own_stride, own_head, D, OWN_HEADS, WIDEN, BLOCK_D)
            other = features(other_at, other_inside, start, other_stride, other_head, D, OTHER_HEADS, WIDEN, BLOCK_D)
            dot = product(own, tl.trans(other), dot, PRECISION, WIDEN)
            if NORMS:
                other_sq += squares(other)
    return dot, other_sq


@triton.jit
def inverse_norm(sq):
    return 1.0 / tl.maximum(tl.sqrt(sq), FLOOR)


@triton.jit
def similarity_of(dot, own_sq, other_sq, inverse_temperature, SIMILARITY: tl.constexpr):
    """S of a tile, worked out alike whichever side owns it: its exponentials are compared across passes."""
    if SIMILARITY == "cosine":
        S = dot * inverse_temperature * (inverse_norm(own_sq)[:, None] * inverse_norm(other_sq)[None, :])
    elif SIMILARITY == "l2":
        S = (2.0 * dot - (own_sq[:, None] + other_sq[None, :])) * inverse_temperature
    else:
        S = dot * inverse_temperature
    return S


@triton.jit
def pull_back(
    acc, along, dS, dot, other_sq, other,
    SIMILARITY: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds the share of a tile to the gradient of the own rows: acc = sum dS m and along, what `finish` takes off.

    WHOLE: acc holds all features of a row, not a slice of them. If it does not, `along` is added up from the very
    weights that multiply the features, so that rounding them leaves the gradient orthogonal to the row (cosine) or
    pointing between the two rows (l2). dS has the factor 1 / temperature.
    """
    if SIMILARITY == "cosine":
        dS = dS * inverse_norm(other_sq)[None, :]
    weights = as_operand(dS, other, WIDEN)
    if SIMILARITY == "cosine" and not WHOLE:
        along += tl.sum(weights.to(tl.float32) * dot, 1)
    if SIMILARITY == "l2":
        along += tl.sum(weights.to(tl.float32), 1)
    return product(weights, other, acc, PRECISION, WIDEN), along


@triton.jit
def finish(acc, along, own, own_sq, SIMILARITY: tl.constexpr, WHOLE: tl.constexpr):
    """The gradient of the own rows from the sums of `pull_back`: through the norm, or through -|q - m|^2."""
    own = own.to(tl.float32)
    if SIMILARITY == "cosine":
        if WHOLE:
            along = tl.sum(acc * own, 1)
        inverse = inverse_norm(own_sq)
        along = tl.where(tl.sqrt(own_sq) >= FLOOR, along * inverse, 0.0)  # below the floor rows are scaled alone
        acc = (acc - own * inverse[:, None] * along[:, None]) * inverse[:, None]
    elif SIMILARITY == "l2":
        acc = 2.0 * (acc - own * along[:, None])
    return acc


@triton.jit
def store_to_heads(out, value, inside, stride_head, HEADS: tl.constexpr):
    """Every head gets the same share of a gradient with respect to their mean."""
    for head in range(HEADS):
        tl.store(out + head * stride_head, value / HEADS, mask=inside)
