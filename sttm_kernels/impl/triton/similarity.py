"""What the kernels of `assign` and `soft_merge` share: tiles of similarities, and the way back through them.

A program owns a tile of rows of one side (tokens or meta tokens) and streams the rows of the other. Features are read
in place, norms are added up from the tiles that feed the products, and nothing is normalised in memory. Weights that
multiply features stay in a format with the exponents of float32: bfloat16 features take bfloat16 weights, float16
features are widened, because a softmax over many tokens falls below the range of float16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels import dispatch
from sttm_kernels.impl.triton.config import INTERPRET, NVIDIA
from sttm_kernels.impl.triton.layout import aligned, alignment, by_heads, items
from sttm_kernels.reference import NORM_FLOOR
from sttm_kernels.sequences import TILE

FLOOR: tl.constexpr = tl.constexpr(NORM_FLOOR)
WIDEN: tl.constexpr = tl.constexpr(INTERPRET)
"""The interpreter would multiply the bit patterns of bfloat16."""
HAS_TF32: tl.constexpr = tl.constexpr(NVIDIA)
"""GPUs of other makers multiply float32 as it is."""


TILE_ROWS: tl.constexpr = tl.constexpr(TILE)
"""Tokens in a tile of the table of sequences."""

Pair = tuple[tuple[Any, ...], int, int, int, int, int, int]


def paired(q: Tensor, meta: Tensor) -> Pair:
    """q with its strides, and meta (B, K, D) with that of its items, as kernels take them; B, H, N, K, D; ALIGN."""
    (B, H, N, D), strides = by_heads(q)
    m, stride_mb = items(meta)
    return (q, *strides, m, stride_mb), B, H, N, meta.shape[1], D, alignment(strides, (stride_mb, 1))


def precision(*dtypes: torch.dtype) -> str:
    """How tensor cores may round float32 operands: as PyTorch is told to for its own products."""
    if torch.float32 in dtypes and not dispatch.tf32():
        return "ieee"
    return "tf32"


def power_of_two(extent: int, least: int = 16) -> int:
    """The smallest block that covers `extent`; a product takes no less than 16."""
    return max(least, 1 << (extent - 1).bit_length())


class Rows(NamedTuple):
    """Feature rows of one side, tokens or meta tokens, of a batch item, as kernels hold them."""

    start: Any
    """Pointer to the first row."""
    stride: Any
    """From row to row."""
    stride_d: Any
    stride_head: Any
    """None if there are no heads to take the mean over."""
    count: Any


class Tile(NamedTuple):
    """Some of these rows: pointers to where they start and whether they are read, 0 if not, both (rows, 1)."""

    rows: Any
    at: Any
    inside: Any


@triton.jit
def tile_of_program(count, BLOCK: tl.constexpr, WIDTH: tl.constexpr = 1, SLICE: tl.constexpr = 1):
    """First feature, first row and batch item of this program: the slices of one tile of rows run side by side."""
    SLICES: tl.constexpr = (WIDTH + SLICE - 1) // SLICE
    program, tiles = tl.program_id(0), tl.cdiv(count, BLOCK)
    item = (program // (SLICES * tiles)).to(tl.int64)
    return program % SLICES * SLICE, program // SLICES % tiles * BLOCK, item


class Place(NamedTuple):
    """Where a program works: on features from `part` and rows from `first` on, of a batch item or of a sequence."""

    part: Any
    first: Any
    item: Any
    """Whose set of meta tokens, and of groups, it is."""
    batch: Any
    """The item that has the tokens, of which the first is row `origin` there, and `token` among all tokens."""
    origin: Any
    token: Any
    N: Any
    """How many tokens there are."""
    group: Any
    """The number of the first group in `index`."""


@triton.jit
def place_of_program(
    sequences, num_sequences, halvings, N, K, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr = 1, SLICE: tl.constexpr = 1,
):  # fmt: skip
    """The place of a program that owns a tile of tokens, or if not TOKENS of the K meta tokens of a set.

    Without `sequences` N is that of every item. With them, there are as many tiles of tokens as `tiles` says, and sets
    come in the order of the table.
    """
    if sequences is None:
        part, first, item = tile_of_program(N if TOKENS else K, BLOCK, WIDTH, SLICE)
        place = Place(part, first, item, item, 0, item * N, N, 0)
    else:
        SLICES: tl.constexpr = (WIDTH + SLICE - 1) // SLICE
        part, program = tl.program_id(0) % SLICES * SLICE, tl.program_id(0) // SLICES
        if TOKENS:
            row, tile = tile_of_sequence(sequences, num_sequences, halvings, program, BLOCK, TILE_ROWS)
        else:
            row, tile = sequences + program // tl.cdiv(K, BLOCK) * 6, program % tl.cdiv(K, BLOCK)
        start, count, group = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)
        place = Place(part, tile * BLOCK, (group // K).to(tl.int64), 0, start, start, count, group)
    return place


@triton.jit
def rows_for(sequences, place, count):
    """The `count` rows that the tokens of a program meet; none if there are more programs than tiles of tokens."""
    if sequences is not None:
        count = tl.where(place.first < place.N, count, 0)
    return count


@triton.jit
def tile_of_sequence(sequences, num_sequences, halvings, program, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Of a program over the tiles of the table, each for ROWS rows: where in the table its sequence stands, found by so
    many `halvings`, and which tile of BLOCK rows of the sequence it has."""
    each: tl.constexpr = ROWS // BLOCK if BLOCK < ROWS else 1
    unit = program // each
    low, high = 0, num_sequences
    for _ in range(halvings):
        middle = (low + high) // 2
        here = tl.load(sequences + middle * 6 + 5) <= unit
        low, high = tl.where(here, middle, low), tl.where(here, high, middle)
    row = sequences + low * 6
    return row, (unit - tl.load(row + 5)) * each + program % each


def tiles(items: int, tokens: int, block: int, sequences: Tensor | None) -> int:
    """How many programs own tiles of `block` tokens. Of sequences enough, as their lengths are not known here."""
    if sequences is None:
        return items * -(-tokens // block)
    return (tokens // TILE + sequences.shape[0]) * max(1, TILE // block)


def told(sequences: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A table of sequences as kernels take it, how many there are, and how often it is halved to find one."""
    if sequences is None:
        return None, 0, 0
    return sequences.contiguous(), sequences.shape[0], sequences.shape[0].bit_length()


@triton.jit
def rows_of_tokens(t, place, stride_b, stride_h, stride, stride_d, ALIGN: tl.constexpr):
    start = t + place.batch * aligned(stride_b, ALIGN) + place.origin * aligned(stride, ALIGN)
    return Rows(start, aligned(stride, ALIGN), stride_d, aligned(stride_h, ALIGN), place.N)


@triton.jit
def rows_of_item(t, item, stride_b, stride_h, stride, stride_d, count, ALIGN: tl.constexpr):
    start = t + item * aligned(stride_b, ALIGN)
    return Rows(start, aligned(stride, ALIGN), stride_d, aligned(stride_h, ALIGN), count)


@triton.jit
def rows_at(rows, first, lanes):
    """Where rows [first, first + len(lanes)) start, (lanes, 1); widened before it is multiplied."""
    return rows.start + first * tl.cast(rows.stride, tl.int64) + (lanes.to(tl.int64) * rows.stride)[:, None]


@triton.jit
def features(tile, start, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features [start, start + BLOCK_D) of the rows of a tile, 0 outside; the mean over heads."""
    d = start + tl.arange(0, BLOCK_D)[None, :]
    inside = tile.inside
    if D % BLOCK_D != 0:
        inside = inside & (d < D)
    at = tile.at + d.to(tl.int64) * tile.rows.stride_d
    values = tl.load(at, mask=inside, other=0.0)
    if HEADS > 1 and tile.rows.stride_head is not None:
        total = values.to(tl.float32)
        for _ in range(1, HEADS):
            at += tile.rows.stride_head
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total = total / HEADS
        values = total if WIDEN else total.to(values.dtype)  # rounded, as a mean taken before the product would be
    return values


@triton.jit
def to_tf32(a):
    """float32 rounded to the nearest TF32; tensor cores drop the low bits of what they are given."""
    if not HAS_TF32:
        return a
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, A_ROUNDED: tl.constexpr = False):
    """acc + a @ b; A_ROUNDED: a is TF32 already."""
    if WIDEN or a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == tl.float32 and PRECISION == "tf32" and not WIDEN:
        if not A_ROUNDED:
            a = to_tf32(a)
        b = to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION if HAS_TF32 else "ieee")


@triton.jit
def as_operand(weights, like):
    """Weights (float32) in the format in which they may multiply features of the type of `like`."""
    if like.dtype == tl.bfloat16 and not WIDEN:
        weights = weights.to(tl.bfloat16)
    return weights


@triton.jit
def squares(values):
    wide = values.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def sum_of_squares(tile, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """|row|^2 of the rows of a tile."""
    total = tl.zeros([tile.at.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        total += squares(features(tile, start, D, HEADS, BLOCK_D))
    return total


@triton.jit
def resident(tile, D: tl.constexpr, HEADS: tl.constexpr, SQUARES: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a program keeps of its own rows: their features if they fit one block, else 0, and |row|^2 if SQUARES."""
    values = 0
    if D <= BLOCK_D:
        values = features(tile, 0, D, HEADS, BLOCK_D)
    sq = tl.zeros([tile.at.shape[0]], tl.float32)
    if SQUARES:
        sq = sum_of_squares(tile, D, HEADS, BLOCK_D)
    return values, sq


@triton.jit
def products(
    values, own, other,
    D: tl.constexpr, HEADS: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<own row, other row>, (own rows, other rows), and |other row|^2 if SQUARES.

    `values` are the features of the own rows if they fit one block; otherwise they are read again.
    """
    dot = tl.zeros([own.at.shape[0], other.at.shape[0]], tl.float32)
    other_sq = tl.zeros([other.at.shape[0]], tl.float32)
    if D <= BLOCK_D:
        other_values = features(other, 0, D, HEADS, BLOCK_D)
        dot = product(values, tl.trans(other_values), dot, PRECISION)
        if SQUARES:
            other_sq = squares(other_values)
    else:
        for start in range(0, D, BLOCK_D):
            own_values = features(own, start, D, HEADS, BLOCK_D)
            other_values = features(other, start, D, HEADS, BLOCK_D)
            dot = product(own_values, tl.trans(other_values), dot, PRECISION)
            if SQUARES:
                other_sq += squares(other_values)
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
    SIMILARITY: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the share of a tile to the gradient of the own rows: acc = sum dS m and along, what `finish` takes off.

    WHOLE: acc holds all features of a row, not a slice of them. If it does not, `along` is added up from the very
    weights that multiply the features, so that rounding them leaves the gradient orthogonal to the row (cosine) or
    pointing between the two rows (l2). dS has the factor 1 / temperature.
    """
    if SIMILARITY == "cosine":
        dS = dS * inverse_norm(other_sq)[None, :]
    weights = as_operand(dS, other)
    if SIMILARITY == "cosine" and not WHOLE:
        along += tl.sum(weights.to(tl.float32) * dot, 1)
    if SIMILARITY == "l2":
        along += tl.sum(weights.to(tl.float32), 1)
    return product(weights, other, acc, PRECISION), along


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
def store_rows(out, value, rows, place, n, start, all_rows, D: tl.constexpr, HEADS: tl.constexpr):
    """Features from `start` on of rows n of a dense gradient, which has `all_rows` in a head of an item.

    Every head gets the same share of that of their mean.
    """
    heads: tl.constexpr = 1 if rows.stride_head is None else HEADS
    d = start + tl.arange(0, value.shape[1])[None, :]
    first = place.item * all_rows
    if rows.stride_head is not None:
        first = place.batch * heads * tl.cast(all_rows, tl.int64) + place.origin
    at = out + (first + n[:, None]) * D + d
    inside = (n < rows.count)[:, None] & (d < D)
    for head in range(heads):
        tl.store(at + head * (tl.cast(all_rows, tl.int64) * D), value / heads, mask=inside)
