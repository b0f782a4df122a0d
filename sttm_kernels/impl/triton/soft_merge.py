"""soft_merge: every token is merged into every meta token by its softmax weight; the weights exist a tile at a time.

C is split over programs and the tile of weights is worked out again for every slice of C: an accumulator of all C does
not fit the registers, a slice of 256 keeps the repeated work (D for every 256 of C) below the product itself for
head-sized metrics, and the slices of one tile run side by side and share its rows in the L2 cache. Sizes, positions and
the weights' sums ride along with the first slice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.assign import forward
from sttm_kernels.impl.triton.config import Config, configured, fixed
from sttm_kernels.impl.triton.launch import launch
from sttm_kernels.impl.triton.layout import aligned, alignment, dense, items
from sttm_kernels.impl.triton.similarity import (
    Rows,
    Tile,
    as_operand,
    features,
    finish,
    paired,
    place_of_program,
    power_of_two,
    precision,
    product,
    products,
    pull_back,
    resident,
    rows_at,
    rows_for,
    rows_of_tokens,
    similarity_of,
    store_rows,
    tile_of_program,
    tiles,
    told,
)
from sttm_kernels.plan import MergedGrads, OfSoftMerge, Similarity, SoftMerged

_NUMBERS = [
    "N", "K", "num_sequences", "halvings", "inverse_temperature", "stride_qb", "stride_qh", "stride_qn", "stride_mb",
    "stride_xb", "stride_xn", "stride_pb", "stride_gb",
]  # fmt: skip
_ADJACENT = ["stride_qd", "stride_xd"]
_UP = tl.constexpr(2.0**24)
"""Takes the least number above 0 to where its inverse is finite."""


class Side(NamedTuple):
    """What the tokens or the meta tokens of a batch item bring."""

    metric: Any
    """`Rows` of q, or of the meta tokens."""
    merged: Any
    """`Rows` of x, or of dL/dy; None for a zero one."""
    positions: Any
    """Where positions, or dL/dpositions, start; None if there are none."""


class Frame(NamedTuple):
    """What a batch item has beside these, of its tokens (they start at `token`) and groups (at `group`)."""

    size: Any
    mask: Any
    lse: Any
    mass: Any
    shift: Any
    grad_size: Any
    centre: Any
    token: Any
    group: Any
    N: Any
    K: Any


@triton.jit
def _rows_of_x(x, place, stride_b, stride, stride_d, ALIGN: tl.constexpr):
    tokens = rows_of_tokens(x, place, stride_b, 0, stride, stride_d, ALIGN)
    return Rows(tokens.start, tokens.stride, stride_d, None, place.N)


@triton.jit
def _counts(frame, n):
    """Whether tokens n are real, and their sizes, 0 if not."""
    real = n < frame.N
    if frame.mask is not None:
        real = tl.load(frame.mask + frame.token + n, mask=real, other=0) != 0
    count = tl.where(real, 1.0, 0.0)
    if frame.size is not None:
        count = tl.load(frame.size + frame.token + n, mask=real, other=0.0)
    return real, count


@triton.jit
def _column(positions, rows, axis, inside, P: tl.constexpr):
    return tl.load(positions + rows.to(tl.int64) * P + axis, mask=inside, other=0.0)


@triton.jit
def _add_positions(acc, weights, positions, rows, inside, P: tl.constexpr):
    """acc + weights @ positions of these rows, a column at a time."""
    axes = tl.arange(0, acc.shape[1])[None, :]
    for axis in tl.static_range(P):
        moment = tl.sum(weights * _column(positions, rows, axis, inside, P)[None, :], 1)
        acc += tl.where(axes == axis, moment[:, None], 0.0)
    return acc


@triton.jit
def _add_values(acc, weights, tile, start, C: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr):
    """acc + weights @ the features of a tile from `start` on."""
    values = features(tile, start, C, 1, SLICE)
    return product(as_operand(weights, values), values, acc, PRECISION)


@triton.jit(do_not_specialize=_NUMBERS[:-1], do_not_specialize_on_alignment=_ADJACENT)
def soft_merge_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb, x, stride_xb, stride_xn, stride_xd,
    size, mask, p, stride_pb,
    y, size_out, p_out, lse, sequences, num_sequences, halvings,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OVER_META: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One program per tile of meta tokens and slice of C. OVER_META: A = exp(S - lse_n), with lse_n worked out before;
    otherwise lse_k is found on the way, the sums being rescaled as the maximum over tokens rises.
    """
    place = place_of_program(sequences, num_sequences, halvings, N, K, False, BLOCK_K, C, SLICE)
    part, first = place.part, place.first
    tokens = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    metas = Rows(m + place.item * aligned(stride_mb, ALIGN), D, 1, None, K)
    x_rows = _rows_of_x(x, place, stride_xb, stride_xn, stride_xd, ALIGN)
    frame = Frame(size, mask, lse, None, None, None, None, place.token, place.item * K, place.N, K)
    if p is not None:
        p += place.batch * stride_pb + place.origin * P
    lanes, token_lanes = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    k = first + lanes
    inside = k < K
    own = Tile(metas, rows_at(metas, first, lanes), inside[:, None])
    features_of_m, m_sq = resident(own, D, HEADS, SIMILARITY != "dot", BLOCK_D)

    acc = tl.zeros([BLOCK_K, SLICE], tl.float32)
    acc_p = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    mass = tl.zeros([BLOCK_K], tl.float32)
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, place.N, BLOCK_N):
        n = start + token_lanes
        real, count = _counts(frame, n)
        other = Tile(tokens, rows_at(tokens, start, token_lanes), real[:, None])
        dot, q_sq = products(features_of_m, own, other, D, HEADS, SIMILARITY != "dot", PRECISION, BLOCK_D)
        S = similarity_of(dot, m_sq, q_sq, inverse_temperature, SIMILARITY)
        S = tl.where(real[None, :], S, float("-inf"))
        if OVER_META:
            level = tl.load(lse + frame.token + n, mask=real, other=0.0)
            W = tl.exp(S - level[None, :]) * count[None, :]
        else:
            top = tl.maximum(best, tl.max(S, 1))
            floor = tl.where(top == float("-inf"), 0.0, top)  # no real token yet
            rescale = tl.exp(best - floor)
            best = top
            A = tl.exp(S - floor[:, None])
            total = total * rescale + tl.sum(A, 1)
            W = A * count[None, :]
            mass *= rescale
            acc *= rescale[:, None]
            acc_p *= rescale[:, None]
        mass += tl.sum(W, 1)
        x_tile = Tile(x_rows, rows_at(x_rows, start, token_lanes), real[:, None])
        acc = _add_values(acc, W, x_tile, part, C, PRECISION, SLICE)
        acc_p = _add_positions(acc_p, W, p, n, real, P)

    empty = mass == 0.0
    divisor = tl.where(empty, 1.0, mass)
    c = part + tl.arange(0, SLICE)[None, :]
    row = frame.group + k
    acc = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    tl.store(y + row[:, None] * C + c, acc, mask=inside[:, None] & (c < C))
    if part == 0:
        if P > 0:
            axis = tl.arange(0, BLOCK_P)[None, :]
            acc_p = tl.where(empty[:, None], 0.0, acc_p / divisor[:, None])
            tl.store(p_out + row[:, None] * P + axis, acc_p, mask=inside[:, None] & (axis < P))
        if OVER_META:
            tl.store(size_out + row, mass, mask=inside)
        else:
            none = total == 0.0
            tl.store(size_out + row, tl.where(none, 0.0, mass / tl.where(none, 1.0, total)), mask=inside)
            tl.store(lse + row, tl.where(none, 0.0, best + tl.log(tl.where(none, 1.0, total))), mask=inside)


@triton.jit(do_not_specialize=["K", "stride_gb"])
def soft_merge_shift_kernel(
    g, stride_gb, u, y, p_out, shift,
    K, C: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """shift_k = -<g_k, y_k> - <dL/dp_k, p_k>."""
    _, first, item = tile_of_program(K, BLOCK_K)
    k = first + tl.arange(0, BLOCK_K)
    inside = k < K
    row = item * K + k
    dot = tl.zeros([BLOCK_K], tl.float32)
    if g is not None:
        g_at = g + item * stride_gb + k.to(tl.int64)[:, None] * C
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)[None, :]
            here = inside[:, None] & (c < C)
            g_tile = tl.load(g_at + c, mask=here, other=0.0).to(tl.float32)
            dot += tl.sum(g_tile * tl.load(y + row[:, None] * C + c, mask=here, other=0.0).to(tl.float32), 1)
    if u is not None:
        for axis in range(P):
            dot += _column(u, row, axis, inside, P) * _column(p_out, row, axis, inside, P)
    tl.store(shift + row, -dot, mask=inside)


@triton.jit
def _level(frame, n, real, k, is_group, OVER_META: tl.constexpr, ACROSS: tl.constexpr):
    """The logsumexp that normalises a tile of weights, of its tokens or of its meta tokens."""
    if OVER_META:
        level = tl.expand_dims(tl.load(frame.lse + frame.token + n, mask=real, other=0.0), ACROSS)
    else:
        level = tl.expand_dims(tl.load(frame.lse + frame.group + k, mask=is_group, other=0.0), 1 - ACROSS)
    return level


@triton.jit
def _over_mass(weights, total, AXIS: tl.constexpr):
    """weights / mass_k, 0 for an empty group, in two steps: weights are not greater than mass_k where sizes are 1, but
    1 / mass_k overflows for a group far from every token.
    """
    inverse = tl.where(total == 0.0, 0.0, 1.0 / (total * _UP))
    return weights * _UP * tl.expand_dims(inverse, AXIS)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["stride_qd"])
def soft_merge_grad_x_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb, size, mask,
    g, stride_gb, u, lse, mass, grad_x, grad_p, sequences, num_sequences, halvings,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OVER_META: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dL/dx_n = sum_k W[n, k] g_k / mass_k and dL/dp_n alike: one program per tile of tokens and slice of C."""
    place = place_of_program(sequences, num_sequences, halvings, N, K, True, BLOCK_OWN, C, SLICE)
    part, first = place.part, place.first
    tokens = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    metas = Rows(m + place.item * aligned(stride_mb, ALIGN), D, 1, None, K)
    frame = Frame(size, mask, lse, mass, None, None, None, place.token, place.item * K, place.N, K)
    if g is not None:
        g_rows = Rows(g + place.item * aligned(stride_gb, ALIGN), C, 1, None, K)
    lanes, meta_lanes = tl.arange(0, BLOCK_OWN), tl.arange(0, BLOCK_OTHER)
    n = first + lanes
    real, count = _counts(frame, n)
    own = Tile(tokens, rows_at(tokens, first, lanes), real[:, None])
    features_of_q, q_sq = resident(own, D, HEADS, SIMILARITY != "dot", BLOCK_D)

    acc = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    acc_p = tl.zeros([BLOCK_OWN, BLOCK_P], tl.float32)
    for start in range(0, rows_for(sequences, place, K), BLOCK_OTHER):
        k = start + meta_lanes
        inside = k < K
        other = Tile(metas, rows_at(metas, start, meta_lanes), inside[:, None])
        dot, m_sq = products(features_of_q, own, other, D, HEADS, SIMILARITY != "dot", PRECISION, BLOCK_D)
        S = similarity_of(dot, q_sq, m_sq, inverse_temperature, SIMILARITY)
        S = tl.where(real[:, None] & inside[None, :], S, float("-inf"))
        level = _level(frame, n, real, k, inside, OVER_META, 1)
        total = tl.load(mass + frame.group + k, mask=inside, other=0.0)
        share = _over_mass(tl.exp(S - level) * count[:, None], total, 0)
        if g is not None:
            g_tile = Tile(g_rows, rows_at(g_rows, start, meta_lanes), inside[:, None])
            acc = _add_values(acc, share, g_tile, part, C, PRECISION, SLICE)
        if u is not None:
            acc_p = _add_positions(acc_p, share, u, frame.group + k, inside, P)

    row = frame.token + n
    if grad_x is not None:
        c = part + tl.arange(0, SLICE)[None, :]
        tl.store(grad_x + row[:, None] * C + c, acc, mask=(n < place.N)[:, None] & (c < C))
    if grad_p is not None and part == 0:
        axis = tl.arange(0, BLOCK_P)[None, :]
        tl.store(grad_p + row[:, None] * P + axis, acc_p, mask=(n < place.N)[:, None] & (axis < P))


@triton.jit
def _value_products(own, other, C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """<x_n, g_k> of two tiles."""
    total = tl.zeros([own.at.shape[0], other.at.shape[0]], tl.float32)
    for c in range(0, C, BLOCK_D):
        own_values, other_values = features(own, c, C, 1, BLOCK_D), features(other, c, C, 1, BLOCK_D)
        total = product(own_values, tl.trans(other_values), total, PRECISION)
    return total


@triton.jit
def _through_weights(weights, T, total, frame, k, is_group, DOWN: tl.constexpr):
    """weights (T / mass_k + dL/dsize'_k)."""
    grad = _over_mass(weights, total, DOWN) * T
    if frame.grad_size is not None:
        grad += weights * tl.expand_dims(tl.load(frame.grad_size + frame.group + k, mask=is_group, other=0.0), DOWN)
    return grad


@triton.jit
def _through_softmax(A, T, count, total, frame, n, real, k, is_group, OVER_META: tl.constexpr, ACROSS: tl.constexpr):
    """dS: over meta tokens size_n A (T' - mean_n), over tokens A (size_n T' - mass_k dL/dsize'_k), with
    T' = T / mass_k + dL/dsize'_k.
    """
    W = A * tl.expand_dims(count, ACROSS)
    dS = _through_weights(W, T, total, frame, k, is_group, 1 - ACROSS)
    if OVER_META:
        centre = tl.load(frame.centre + frame.token + n, mask=real & (count != 0.0), other=0.0)
        dS -= W * tl.expand_dims(centre, ACROSS)
    elif frame.grad_size is not None:
        centre = total * tl.load(frame.grad_size + frame.group + k, mask=is_group, other=0.0)
        dS -= A * tl.expand_dims(centre, 1 - ACROSS)
    return dS


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ADJACENT)
def soft_merge_grad_metric_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb, x, stride_xb, stride_xn, stride_xd,
    size, mask, p, stride_pb,
    g, stride_gb, u, lse, mass, shift, grad_size, centre, grad, sequences, num_sequences, halvings,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OVER_META: tl.constexpr, OF: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dL/dsize_n (OF "size"), dL/dq (OF "q") by tiles of tokens, or dL/dm (OF "meta") by tiles of meta tokens.

    With T[n, k] = <g_k, x_n> + <dL/dp_k, p_n> + shift_k: dL/dA = size_n (T / mass_k + dL/dsize'_k), and dL/dsize_n =
    mean_n = sum_k A (T / mass_k + dL/dsize'_k), which is `centre` over meta tokens. S and T are worked out again a tile
    at a time, for every slice of D.
    """
    TOKENS: tl.constexpr = OF != "meta"
    ACROSS: tl.constexpr = 1 if TOKENS else 0  # where the vectors of tokens are broadcast; those of meta tokens: DOWN
    DOWN: tl.constexpr = 1 - ACROSS
    WIDTH: tl.constexpr = SLICE if OF == "size" else D
    place = place_of_program(sequences, num_sequences, halvings, N, K, TOKENS, BLOCK_OWN, WIDTH, SLICE)
    part, first, item = place.part, place.first, place.item
    q_rows = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    x_rows = _rows_of_x(x, place, stride_xb, stride_xn, stride_xd, ALIGN)
    m_rows = Rows(m + item * aligned(stride_mb, ALIGN), D, 1, None, K)
    g_rows = None if g is None else Rows(g + item * aligned(stride_gb, ALIGN), C, 1, None, K)
    tokens = Side(q_rows, x_rows, None if p is None else p + place.batch * stride_pb + place.origin * P)
    metas = Side(m_rows, g_rows, None if u is None else u + item * K * P)
    own, other = (tokens, metas) if TOKENS else (metas, tokens)
    frame = Frame(size, mask, lse, mass, shift, grad_size, centre, place.token, item * K, place.N, K)

    lanes, other_lanes = tl.arange(0, BLOCK_OWN), tl.arange(0, BLOCK_OTHER)
    own_n = first + lanes
    inside = own_n < own.metric.count
    own_real = inside
    if TOKENS:
        own_real, count = _counts(frame, own_n)
    mine = Tile(own.metric, rows_at(own.metric, first, lanes), own_real[:, None])
    values, own_sq = resident(mine, D, HEADS, SIMILARITY != "dot", BLOCK_D)
    acc = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    along = tl.zeros([BLOCK_OWN], tl.float32)
    for start in range(0, rows_for(sequences, place, K) if TOKENS else place.N, BLOCK_OTHER):
        other_n = start + other_lanes
        other_real = other_n < other.metric.count
        if not TOKENS:
            other_real, count = _counts(frame, other_n)
        n, real = (own_n, own_real) if TOKENS else (other_n, other_real)
        k, is_group = (other_n, other_real) if TOKENS else (own_n, own_real)
        theirs = Tile(other.metric, rows_at(other.metric, start, other_lanes), other_real[:, None])
        dot, other_sq = products(values, mine, theirs, D, HEADS, SIMILARITY != "dot", PRECISION, BLOCK_D)

        T = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        if g is not None:
            my_values = Tile(own.merged, rows_at(own.merged, first, lanes), own_real[:, None])
            their_values = Tile(other.merged, rows_at(other.merged, start, other_lanes), other_real[:, None])
            T = _value_products(my_values, their_values, C, PRECISION, BLOCK_D)
        if u is not None:
            for axis in tl.static_range(P):
                mine_along = _column(own.positions, own_n, axis, own_real, P)
                T += mine_along[:, None] * _column(other.positions, other_n, axis, other_real, P)[None, :]
        total = tl.load(mass + frame.group + k, mask=is_group, other=0.0)
        T += tl.expand_dims(tl.load(shift + frame.group + k, mask=is_group, other=0.0), DOWN)

        S = similarity_of(dot, own_sq, other_sq, inverse_temperature, SIMILARITY)
        S = tl.where(own_real[:, None] & other_real[None, :], S, float("-inf"))
        A = tl.exp(S - _level(frame, n, real, k, is_group, OVER_META, ACROSS))
        if OF == "size":
            along += tl.sum(_through_weights(A, T, total, frame, k, is_group, DOWN), 1)
        else:
            dS = _through_softmax(A, T, count, total, frame, n, real, k, is_group, OVER_META, ACROSS)
            dS *= inverse_temperature
            their_slice = features(theirs, part, D, HEADS, SLICE)
            acc, along = pull_back(acc, along, dS, dot, other_sq, their_slice, SIMILARITY, D <= SLICE, PRECISION)

    if OF == "size":
        tl.store(grad + frame.token + own_n, along, mask=inside)
    else:
        acc = finish(acc, along, features(mine, part, D, HEADS, SLICE), own_sq, SIMILARITY, D <= SLICE)
        if TOKENS:
            acc = tl.where(own_real[:, None], acc, 0.0)
        if sequences is not None and not OVER_META:  # a softmax over one token is 1 whatever the metric
            acc = tl.where(place.N == 1, 0.0, acc)
        store_rows(grad, acc, own.metric, place, own_n, part, N if TOKENS else K, D, HEADS)


def _configs(
    arch: int, dtype: torch.dtype, q_dtype: torch.dtype, exact: bool, D: int, width: int, own: str, other: str
) -> tuple[Config, ...]:
    """Blocks of the rows of both sides, of D, and of the slice of `width` features that a product fills.

    `dtype` is that of x.
    """
    element = max(dtype.itemsize, q_dtype.itemsize)
    # mma of sm_80 keeps its operands in registers, and float32 ones are twice as wide.
    widest = 32 if arch == 80 or element == 4 else 64
    block_d = power_of_two(D) if D <= widest else widest
    part = min(power_of_two(width), 256)
    if exact:
        shapes = [(8, 1, 32, 16, 16, min(part, 64)), (4, 1, 16, 16, 16, 16)]
    elif dtype == torch.bfloat16:
        stages = 2 if arch == 80 else 3  # a third costs sm_80 its last registers
        shapes = [(8, stages, 64, 32, block_d, part), (8, 2, 64, 32, block_d, min(part, 128)), (4, 1, 32, 32, 32, 64)]
    else:
        part = min(part, 128)
        shapes = [(8, 2, 64, 32, block_d, part), (8, 2, 32, 32, min(block_d, 32), part), (4, 1, 32, 32, 32, 64)]
    return tuple(Config(w, s, {own: a, other: b, "BLOCK_D": d, "SLICE": c}) for w, s, a, b, d, c in shapes)


def _shared(
    config: Config, dtype: torch.dtype, q_dtype: torch.dtype, exact: bool, D: int, width: int, own: str, other: str
) -> int:
    blocks, element = config.blocks, max(dtype.itemsize, q_dtype.itemsize)
    a, b, d, part = blocks[own], blocks[other], blocks["BLOCK_D"], blocks["SLICE"]
    wide = 4 if dtype == torch.float16 else element  # float16 values are widened before they are multiplied
    return config.num_stages * (element * d * (a + b) + element * part * b) + (wide - element) * part * b + 4 * a * b


def _config(name: str, own: str = "BLOCK_OWN", other: str = "BLOCK_OTHER") -> Callable[..., Config]:
    return configured(name, partial(_shared, own=own, other=other))(partial(_configs, own=own, other=other))


_forward_config = _config("soft_merge", "BLOCK_K", "BLOCK_N")
_grad_x_config = _config("soft_merge_grad_x")
_grad_metric_config = _config("soft_merge_grad_metric")


def soft_merge(
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    normalize: str,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    sequences: Tensor | None = None,
) -> SoftMerged:
    C, x_strides, mask = x.shape[2], x.stride(), dense(mask)
    pair = paired(q, meta)
    places, B, H, N, K, D, align = pair
    sets = B if sequences is None else meta.shape[0]
    P = 0 if positions is None else positions.shape[-1]
    y = x.new_empty(sets, K, C)
    size_out = x.new_empty(sets, K, dtype=torch.float32)
    positions_out = size_out.new_empty(sets, K, P)
    over_meta = normalize == "meta"
    lse = size_out.new_empty((B, N) if over_meta else (sets, K))
    if over_meta:
        forward(pair, mask, similarity, None, None, lse, None, sequences)
    rounding = precision(x.dtype, q.dtype)
    config = _forward_config(x.device, x.dtype, q.dtype, rounding == "ieee", D, C)
    blocks = config.blocks
    launch(
        soft_merge_kernel,
        (sets * -(-K // blocks["BLOCK_K"]) * -(-C // blocks["SLICE"]),),
        *places, x, *x_strides, dense(size), mask, *items(positions),
        y, size_out, positions_out, lse, *told(sequences), N, K, 1.0 / similarity.temperature,
        config=config, C=C, D=D, P=P, HEADS=H, SIMILARITY=similarity.kind, OVER_META=over_meta,
        ALIGN=gcd(align, alignment(x_strides)), PRECISION=rounding, BLOCK_P=power_of_two(P, 1),
    )  # fmt: skip
    return SoftMerged(y, size_out, None if positions is None else positions_out, lse)


def soft_merge_backward(
    grads: MergedGrads,
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    normalize: str,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    out: SoftMerged,
    needs: OfSoftMerge,
    sequences: Tensor | None = None,
) -> OfSoftMerge:
    (grad_y, grad_size, grad_positions), (y, mass, positions_out, lse) = grads, out
    need_x, need_q, need_meta, need_size, need_positions = needs
    need_positions = need_positions and positions is not None
    if positions is None:
        grad_positions = None
    C, x_strides = x.shape[2], x.stride()
    metric, B, H, N, K, D, align = paired(q, meta)
    sets = B if sequences is None else meta.shape[0]
    P = 0 if positions is None else positions.shape[-1]
    over_meta = normalize == "meta"
    grad_x, grad_q, grad_meta = (
        t.new_empty(t.shape) if needed else None for t, needed in ((x, need_x), (q, need_q), (meta, need_meta))
    )
    grad_p = mass.new_empty(B, N, P) if need_positions else None
    if (K if over_meta else N) == 1:  # a softmax over one thing is 1 whatever the metric
        for constant in (grad_q, grad_meta):
            if constant is not None:
                constant.zero_()
        need_q = need_meta = False

    rounding = precision(x.dtype, q.dtype)
    size, mask, grad_size, grad_positions = dense(size), dense(mask), dense(grad_size), dense(grad_positions)
    grad_y, stride_gb = items(grad_y)
    extents = (*told(sequences), N, K, 1.0 / similarity.temperature)
    common: dict[str, Any] = {
        "C": C,
        "D": D,
        "P": P,
        "HEADS": H,
        "SIMILARITY": similarity.kind,
        "OVER_META": over_meta,
        "ALIGN": gcd(align, alignment(x_strides, (stride_gb, 1))),
        "PRECISION": rounding,
    }
    if need_x or need_positions:
        config = _grad_x_config(x.device, x.dtype, q.dtype, rounding == "ieee", D, C)
        blocks = config.blocks
        launch(
            soft_merge_grad_x_kernel,
            (tiles(B, N, blocks["BLOCK_OWN"], sequences) * -(-C // blocks["SLICE"]),),
            *metric, size, mask, grad_y, stride_gb, grad_positions, lse, mass, grad_x, grad_p, *extents,
            config=config, BLOCK_P=power_of_two(P, 1), **common,
        )  # fmt: skip

    if not (need_q or need_meta or need_size):
        return OfSoftMerge(grad_x, grad_q, grad_meta, None, grad_p)
    shift = torch.empty_like(mass)
    config = fixed("soft_merge_shift", SHIFT)
    launch(
        soft_merge_shift_kernel,
        (sets * -(-K // config.blocks["BLOCK_K"]),),
        grad_y, stride_gb, grad_positions, y, positions_out, shift, K, config=config, C=C, P=P,
    )  # fmt: skip
    need_mean = need_size or (over_meta and (need_q or need_meta))
    grad_size_in = mass.new_empty(B, N) if need_mean else None
    centre = grad_size_in if over_meta else None
    config = _grad_metric_config(x.device, x.dtype, q.dtype, rounding == "ieee", D, min(D, 128))
    blocks = config.blocks
    of_tokens, of_sets = tiles(B, N, blocks["BLOCK_OWN"], sequences), sets * -(-K // blocks["BLOCK_OWN"])
    passes = (
        ("size", of_tokens, grad_size_in, None),
        ("q", of_tokens, grad_q, centre),
        ("meta", of_sets, grad_meta, centre),
    )
    for (of, count, grad, centre), needed in zip(passes, (need_mean, need_q, need_meta), strict=True):
        if needed:
            slices = 1 if of == "size" else -(-D // blocks["SLICE"])
            launch(
                soft_merge_grad_metric_kernel,
                (count * slices,),
                *metric, x, *x_strides, size, mask, *items(positions), grad_y, stride_gb, grad_positions,
                lse, mass, shift, grad_size, centre, grad, *extents,
                config=config, OF=of, **common,
            )  # fmt: skip
    return OfSoftMerge(grad_x, grad_q, grad_meta, grad_size_in if need_size else None, grad_p)


SHIFT = Config(4, 1, {"BLOCK_K": 8, "BLOCK_C": 256})
