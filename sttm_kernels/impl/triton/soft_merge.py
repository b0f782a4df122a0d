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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.assign import forward
from sttm_kernels.impl.triton.config import INTERPRET, Config, configured, fixed
from sttm_kernels.impl.triton.launch import aligned, launch
from sttm_kernels.impl.triton.similarity import (
    alignment,
    as_operand,
    features,
    finish,
    paired,
    power_of_two,
    precision,
    product,
    products,
    pull_back,
    rows_at,
    similarity_of,
    store_to_heads,
    sum_of_squares,
)
from sttm_kernels.plan import MergedGrads, OfSoftMerge, Similarity, SoftMerged

_EXTENTS = [
    "N", "K", "stride_qb", "stride_qh", "stride_qn", "stride_mb", "stride_mk", "stride_xb", "stride_xn",
    "stride_sb", "stride_sn", "stride_rb", "stride_rn", "stride_pb", "stride_pn", "stride_pd",
]  # fmt: skip
_GRADS = ["stride_gb", "stride_gk", "stride_zb", "stride_zk", "stride_ub", "stride_uk", "stride_ud"]
_ADJACENT = ["stride_qd", "stride_md", "stride_xd"]


@triton.jit
def _tokens(size, stride_sb, stride_sn, mask, stride_rb, stride_rn, item, n, N):
    """Whether tokens n are real, and their sizes, 0 if not."""
    real = n < N
    if mask is not None:
        real = tl.load(mask + item * stride_rb + n * stride_rn.to(tl.int64), mask=real, other=0) != 0
    count = tl.where(real, 1.0, 0.0)
    if size is not None:
        count = tl.load(size + item * stride_sb + n * stride_sn.to(tl.int64), mask=real, other=0.0)
    return real, count


@triton.jit
def _column(at, rows, stride, inside):
    return tl.load(at + rows * stride.to(tl.int64), mask=inside, other=0.0)


@triton.jit(do_not_specialize=_EXTENTS, do_not_specialize_on_alignment=_ADJACENT)
def soft_merge_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    x, stride_xb, stride_xn, stride_xd,
    size, stride_sb, stride_sn, mask, stride_rb, stride_rn, p, stride_pb, stride_pn, stride_pd,
    y, size_out, p_out, lse,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OVER_META: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One program per tile of meta tokens and slice of C. OVER_META: A = exp(S - lse_n), with lse_n worked out before;
    otherwise lse_k is found on the way, the sums being rescaled as the maximum over tokens rises.
    """
    SLICES: tl.constexpr = (C + SLICE - 1) // SLICE
    tiles = tl.cdiv(K, BLOCK_K)
    part = tl.program_id(0) % SLICES * SLICE
    first = tl.program_id(0) // SLICES % tiles * BLOCK_K
    item = (tl.program_id(0) // (SLICES * tiles)).to(tl.int64)
    own_rows = tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_N)
    k = first + own_rows
    inside = k < K
    head = aligned(stride_qh, ALIGN)
    m_at = rows_at(m + item * aligned(stride_mb, ALIGN), first, own_rows, stride_mk, ALIGN)
    q_item = q + item * aligned(stride_qb, ALIGN)
    x_item = x + item * aligned(stride_xb, ALIGN)

    own = 0
    if D <= BLOCK_D:
        own = features(m_at, inside[:, None], 0, stride_md, 0, D, 1, WIDEN, BLOCK_D)
    m_sq = tl.zeros([BLOCK_K], tl.float32)
    if SIMILARITY != "dot":
        m_sq = sum_of_squares(m_at, inside[:, None], stride_md, 0, D, 1, WIDEN, BLOCK_K, BLOCK_D)

    acc = tl.zeros([BLOCK_K, SLICE], tl.float32)
    acc_p = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    mass = tl.zeros([BLOCK_K], tl.float32)
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + rows
        real, count = _tokens(size, stride_sb, stride_sn, mask, stride_rb, stride_rn, item, n, N)
        q_at = rows_at(q_item, start, rows, stride_qn, ALIGN)
        dot, q_sq = products(
            own, m_at, inside[:, None], stride_md, 0, q_at, real[:, None], stride_qd, head,
            D, 1, HEADS, SIMILARITY != "dot", PRECISION, WIDEN, BLOCK_K, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        S = similarity_of(dot, m_sq, q_sq, inverse_temperature, SIMILARITY)
        S = tl.where(real[None, :], S, float("-inf"))
        if OVER_META:
            level = tl.load(lse + item * N + n, mask=real, other=0.0)
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
        x_at = rows_at(x_item, start, rows, stride_xn, ALIGN)
        values = features(x_at, real[:, None], part, stride_xd, 0, C, 1, WIDEN, SLICE)
        acc = product(as_operand(W, values, WIDEN), values, acc, PRECISION, WIDEN)
        for axis in tl.static_range(P):
            p_axis = _column(p + item * stride_pb + axis * stride_pd, n, stride_pn, real)
            moment = tl.sum(W * p_axis[None, :], 1)
            acc_p += tl.where(tl.arange(0, BLOCK_P)[None, :] == axis, moment[:, None], 0.0)

    empty = mass == 0.0
    divisor = tl.where(empty, 1.0, mass)
    c = part + tl.arange(0, SLICE)[None, :]
    row = item * K + k
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


@triton.jit(do_not_specialize=["K", *_GRADS], do_not_specialize_on_alignment=["stride_gd"])
def soft_merge_shift_kernel(
    g, stride_gb, stride_gk, stride_gd, grad_size, stride_zb, stride_zk, u, stride_ub, stride_uk, stride_ud,
    y, p_out, mass, shift,
    K, C: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """shift_k = dL/dsize'_k - (<g_k, y_k> + <dL/dp_k, p_k>) / mass_k: what dL/dA[n, k] has in common for all n."""
    tiles = tl.cdiv(K, BLOCK_K)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < K
    row = item * K + k
    dot = tl.zeros([BLOCK_K], tl.float32)
    if g is not None:
        g_at = g + item * stride_gb + (k * stride_gk.to(tl.int64))[:, None]
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)[None, :]
            here = inside[:, None] & (c < C)
            g_tile = tl.load(g_at + c.to(tl.int64) * stride_gd, mask=here, other=0.0).to(tl.float32)
            dot += tl.sum(g_tile * tl.load(y + row[:, None] * C + c, mask=here, other=0.0).to(tl.float32), 1)
    if u is not None:
        for axis in range(P):
            grad = _column(u + item * stride_ub + axis * stride_ud, k, stride_uk, inside)
            dot += grad * tl.load(p_out + row * P + axis, mask=inside, other=0.0)
    total = tl.load(mass + row, mask=inside, other=0.0)
    value = -dot * tl.where(total == 0.0, 0.0, 1.0 / total)
    if grad_size is not None:
        value += _column(grad_size + item * stride_zb, k, stride_zk, inside)
    tl.store(shift + row, value, mask=inside)


@triton.jit(do_not_specialize=[*_EXTENTS, *_GRADS], do_not_specialize_on_alignment=[*_ADJACENT, "stride_gd"])
def soft_merge_grad_x_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    size, stride_sb, stride_sn, mask, stride_rb, stride_rn,
    g, stride_gb, stride_gk, stride_gd, u, stride_ub, stride_uk, stride_ud,
    lse, mass, grad_x, grad_p,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OVER_META: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dL/dx_n = sum_k W[n, k] g_k / mass_k and dL/dp_n alike: one program per tile of tokens and slice of C."""
    SLICES: tl.constexpr = (C + SLICE - 1) // SLICE
    tiles = tl.cdiv(N, BLOCK_OWN)
    part = tl.program_id(0) % SLICES * SLICE
    first = tl.program_id(0) // SLICES % tiles * BLOCK_OWN
    item = (tl.program_id(0) // (SLICES * tiles)).to(tl.int64)
    own_rows = tl.arange(0, BLOCK_OWN)
    rows = tl.arange(0, BLOCK_OTHER)
    n = first + own_rows
    real, count = _tokens(size, stride_sb, stride_sn, mask, stride_rb, stride_rn, item, n, N)
    head = aligned(stride_qh, ALIGN)
    q_at = rows_at(q + item * aligned(stride_qb, ALIGN), first, own_rows, stride_qn, ALIGN)
    m_item = m + item * aligned(stride_mb, ALIGN)
    if g is not None:
        g_item = g + item * aligned(stride_gb, G_ALIGN)

    own = 0
    if D <= BLOCK_D:
        own = features(q_at, real[:, None], 0, stride_qd, head, D, HEADS, WIDEN, BLOCK_D)
    q_sq = tl.zeros([BLOCK_OWN], tl.float32)
    if SIMILARITY != "dot":
        q_sq = sum_of_squares(q_at, real[:, None], stride_qd, head, D, HEADS, WIDEN, BLOCK_OWN, BLOCK_D)
    if OVER_META:
        level = tl.load(lse + item * N + n, mask=real, other=0.0)[:, None]

    acc = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    acc_p = tl.zeros([BLOCK_OWN, BLOCK_P], tl.float32)
    for start in range(0, K, BLOCK_OTHER):
        k = start + rows
        inside = k < K
        m_at = rows_at(m_item, start, rows, stride_mk, ALIGN)
        dot, m_sq = products(
            own, q_at, real[:, None], stride_qd, head, m_at, inside[:, None], stride_md, 0,
            D, HEADS, 1, SIMILARITY != "dot", PRECISION, WIDEN, BLOCK_OWN, BLOCK_OTHER, BLOCK_D,
        )  # fmt: skip
        S = similarity_of(dot, q_sq, m_sq, inverse_temperature, SIMILARITY)
        S = tl.where(real[:, None] & inside[None, :], S, float("-inf"))
        if not OVER_META:
            level = tl.load(lse + item * K + k, mask=inside, other=0.0)[None, :]
        total = tl.load(mass + item * K + k, mask=inside, other=0.0)
        share = tl.exp(S - level) * count[:, None] * tl.where(total == 0.0, 0.0, 1.0 / total)[None, :]
        if g is not None:
            g_at = rows_at(g_item, start, rows, stride_gk, G_ALIGN)
            values = features(g_at, inside[:, None], part, stride_gd, 0, C, 1, WIDEN, SLICE)
            acc = product(as_operand(share, values, WIDEN), values, acc, PRECISION, WIDEN)
        if u is not None:
            for axis in tl.static_range(P):
                grad = _column(u + item * stride_ub + axis * stride_ud, k, stride_uk, inside)
                moment = tl.sum(share * grad[None, :], 1)
                acc_p += tl.where(tl.arange(0, BLOCK_P)[None, :] == axis, moment[:, None], 0.0)

    row = item * N + n
    if grad_x is not None:
        c = part + tl.arange(0, SLICE)[None, :]
        tl.store(grad_x + row[:, None] * C + c, acc, mask=(n < N)[:, None] & (c < C))
    if grad_p is not None and part == 0:
        axis = tl.arange(0, BLOCK_P)[None, :]
        tl.store(grad_p + row[:, None] * P + axis, acc_p, mask=(n < N)[:, None] & (axis < P))


@triton.jit(do_not_specialize=[*_EXTENTS, *_GRADS], do_not_specialize_on_alignment=[*_ADJACENT, "stride_gd"])
def soft_merge_grad_metric_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    x, stride_xb, stride_xn, stride_xd,
    size, stride_sb, stride_sn, mask, stride_rb, stride_rn, p, stride_pb, stride_pn, stride_pd,
    g, stride_gb, stride_gk, stride_gd, grad_size, stride_zb, stride_zk, u, stride_ub, stride_uk, stride_ud,
    lse, mass, shift, mean, grad,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OVER_META: tl.constexpr, OF: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dL/dsize_n (OF "size"), dL/dq (OF "q") by tiles of tokens, or dL/dm (OF "meta") by tiles of meta tokens.

    With T[n, k] = (<g_k, x_n> + <dL/dp_k, p_n>) / mass_k + shift_k: dL/dA = size_n T, dL/dsize_n = sum_k A T, kept in
    `mean`, and dS = size_n A (T - mean_n) over meta tokens, A (size_n T - mass_k dL/dsize'_k) over tokens. S and T are
    worked out again a tile at a time, for every slice of D.
    """
    TOKENS: tl.constexpr = OF != "meta"
    if TOKENS:
        num_own, num_other = N, K
        own, stride_a, stride_ad, stride_ai = q + 0, stride_qn, stride_qd, stride_qb
        other, stride_b, stride_bd, stride_bi = m + 0, stride_mk, stride_md, stride_mb
        own_head, other_head = aligned(stride_qh, ALIGN), 0
    else:
        num_own, num_other = K, N
        own, stride_a, stride_ad, stride_ai = m + 0, stride_mk, stride_md, stride_mb
        other, stride_b, stride_bd, stride_bi = q + 0, stride_qn, stride_qd, stride_qb
        own_head, other_head = 0, aligned(stride_qh, ALIGN)
    OWN_HEADS: tl.constexpr = HEADS if TOKENS else 1
    OTHER_HEADS: tl.constexpr = 1 if TOKENS else HEADS
    ACROSS: tl.constexpr = 1 if TOKENS else 0  # where the vectors of tokens are broadcast; those of meta tokens: DOWN
    DOWN: tl.constexpr = 1 - ACROSS
    SLICES: tl.constexpr = 1 if OF == "size" else (D + SLICE - 1) // SLICE

    tiles = tl.cdiv(num_own, BLOCK_OWN)
    part = tl.program_id(0) % SLICES * SLICE
    first = tl.program_id(0) // SLICES % tiles * BLOCK_OWN
    item = (tl.program_id(0) // (SLICES * tiles)).to(tl.int64)
    own_rows = tl.arange(0, BLOCK_OWN)
    other_rows = tl.arange(0, BLOCK_OTHER)
    inside = first + own_rows < num_own
    own_at = rows_at(own + item * aligned(stride_ai, ALIGN), first, own_rows, stride_a, ALIGN)
    other += item * aligned(stride_bi, ALIGN)
    x_item = x + item * aligned(stride_xb, ALIGN)
    if g is not None:
        g_item = g + item * aligned(stride_gb, G_ALIGN)

    own_real = inside
    if TOKENS:
        n = first + own_rows
        real, count = _tokens(size, stride_sb, stride_sn, mask, stride_rb, stride_rn, item, n, N)
        own_real = real
    else:
        k = first + own_rows
        k_real = inside
    own_tile = 0
    if D <= BLOCK_D:
        own_tile = features(own_at, own_real[:, None], 0, stride_ad, own_head, D, OWN_HEADS, WIDEN, BLOCK_D)
    own_sq = tl.zeros([BLOCK_OWN], tl.float32)
    if SIMILARITY != "dot":
        own_sq = sum_of_squares(own_at, own_real[:, None], stride_ad, own_head, D, OWN_HEADS, WIDEN, BLOCK_OWN, BLOCK_D)

    acc = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    along = tl.zeros([BLOCK_OWN], tl.float32)
    for start in range(0, num_other, BLOCK_OTHER):
        other_at = rows_at(other, start, other_rows, stride_b, ALIGN)
        if TOKENS:
            k = start + other_rows
            k_real = k < K
            other_real = k_real
            n_first, n_rows, k_first, k_rows = first, own_rows, start, other_rows
        else:
            n = start + other_rows
            real, count = _tokens(size, stride_sb, stride_sn, mask, stride_rb, stride_rn, item, n, N)
            other_real = real
            n_first, n_rows, k_first, k_rows = start, other_rows, first, own_rows
        dot, other_sq = products(
            own_tile, own_at, own_real[:, None], stride_ad, own_head,
            other_at, other_real[:, None], stride_bd, other_head,
            D, OWN_HEADS, OTHER_HEADS, SIMILARITY != "dot", PRECISION, WIDEN, BLOCK_OWN, BLOCK_OTHER, BLOCK_D,
        )  # fmt: skip
        T = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        if g is not None:
            x_at = rows_at(x_item, n_first, n_rows, stride_xn, ALIGN)
            g_at = rows_at(g_item, k_first, k_rows, stride_gk, G_ALIGN)
            for c in range(0, C, BLOCK_D):
                x_tile = features(x_at, real[:, None], c, stride_xd, 0, C, 1, WIDEN, BLOCK_D)
                g_tile = features(g_at, k_real[:, None], c, stride_gd, 0, C, 1, WIDEN, BLOCK_D)
                if TOKENS:
                    T = product(x_tile, tl.trans(g_tile), T, PRECISION, WIDEN)
                else:
                    T = product(g_tile, tl.trans(x_tile), T, PRECISION, WIDEN)
        if u is not None:
            for axis in tl.static_range(P):
                p_axis = _column(p + item * stride_pb + axis * stride_pd, n, stride_pn, real)
                u_axis = _column(u + item * stride_ub + axis * stride_ud, k, stride_uk, k_real)
                T += tl.expand_dims(p_axis, ACROSS) * tl.expand_dims(u_axis, DOWN)
        total = tl.load(mass + item * K + k, mask=k_real, other=0.0)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        common = tl.load(shift + item * K + k, mask=k_real, other=0.0)
        T = T * tl.expand_dims(inverse, DOWN) + tl.expand_dims(common, DOWN)

        S = similarity_of(dot, own_sq, other_sq, inverse_temperature, SIMILARITY)
        S = tl.where(tl.expand_dims(real, ACROSS) & tl.expand_dims(k_real, DOWN), S, float("-inf"))
        if OVER_META:
            level = tl.expand_dims(tl.load(lse + item * N + n, mask=real, other=0.0), ACROSS)
        else:
            level = tl.expand_dims(tl.load(lse + item * K + k, mask=k_real, other=0.0), DOWN)
        A = tl.exp(S - level)
        if OF == "size":
            along += tl.sum(A * T, 1)
        else:
            if OVER_META:
                centre = tl.load(mean + item * N + n, mask=real, other=0.0)
                dS = A * tl.expand_dims(count, ACROSS) * (T - tl.expand_dims(centre, ACROSS))
            else:
                dS = tl.expand_dims(count, ACROSS) * T
                if grad_size is not None:
                    centre = total * _column(grad_size + item * stride_zb, k, stride_zk, k_real)
                    dS -= tl.expand_dims(centre, DOWN)
                dS *= A
            values = features(other_at, other_real[:, None], part, stride_bd, other_head, D, OTHER_HEADS, WIDEN, SLICE)
            acc, along = pull_back(
                acc, along, dS * inverse_temperature, dot, other_sq, values, SIMILARITY, D <= SLICE, PRECISION, WIDEN
            )

    if OF == "size":
        tl.store(mean + item * N + first + own_rows, along, mask=inside)
    else:
        values = features(own_at, own_real[:, None], part, stride_ad, own_head, D, OWN_HEADS, WIDEN, SLICE)
        acc = finish(acc, along, values, own_sq, SIMILARITY, D <= SLICE)
        if TOKENS:
            acc = tl.where(own_real[:, None], acc, 0.0)
        d = part + tl.arange(0, SLICE)[None, :]
        out = grad + (item * OWN_HEADS * num_own + (first + own_rows)[:, None]) * D + d
        store_to_heads(out, acc, inside[:, None] & (d < D), num_own.to(tl.int64) * D, OWN_HEADS)


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
        shapes = [(8, 3, 64, 32, block_d, part), (8, 2, 64, 32, block_d, min(part, 128)), (4, 1, 32, 32, 32, 64)]
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


def _strided(t: Tensor | None, dims: int) -> tuple[Any, ...]:
    """A tensor that may be absent, and its strides."""
    return (None, 0, 0, 0)[: dims + 1] if t is None else (t, *t.stride())


def soft_merge(
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    normalize: str,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
) -> SoftMerged:
    C, x_strides = x.shape[2], x.stride()
    pair = paired(q, meta)
    places, B, H, N, K, D, align = pair
    P = 0 if positions is None else positions.shape[-1]
    y = x.new_empty(B, K, C)
    size_out = x.new_empty(B, K, dtype=torch.float32)
    positions_out = size_out.new_empty(B, K, P)
    over_meta = normalize == "meta"
    lse = size_out.new_empty(B, N if over_meta else K)
    if over_meta:
        forward(pair, mask, similarity, True, None, None, lse, None)
    rounding = precision(x.dtype, q.dtype)
    config = _forward_config(x.device, x.dtype, q.dtype, rounding == "ieee", D, C)
    blocks = config.blocks
    launch(
        soft_merge_kernel,
        (B * -(-K // blocks["BLOCK_K"]) * -(-C // blocks["SLICE"]),),
        *places, x, *x_strides, *_strided(size, 2), *_strided(mask, 2), *_strided(positions, 3),
        y, size_out, positions_out, lse, N, K, 1.0 / similarity.temperature,
        config=config, C=C, D=D, P=P, HEADS=H, SIMILARITY=similarity.kind, OVER_META=over_meta,
        ALIGN=gcd(align, alignment(x_strides)), PRECISION=rounding, WIDEN=INTERPRET, BLOCK_P=power_of_two(P, 1),
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
) -> OfSoftMerge:
    (grad_y, grad_size, grad_positions), (y, mass, positions_out, lse) = grads, out
    need_x, need_q, need_meta, need_size, need_positions = needs
    need_positions = need_positions and positions is not None
    if positions is None:
        grad_positions = None
    C, x_strides = x.shape[2], x.stride()
    metric, B, H, N, K, D, align = paired(q, meta)
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
    extents = (N, K, 1.0 / similarity.temperature)
    token = (*_strided(size, 2), *_strided(mask, 2))
    common: dict[str, Any] = {
        "C": C,
        "D": D,
        "P": P,
        "HEADS": H,
        "SIMILARITY": similarity.kind,
        "OVER_META": over_meta,
        "ALIGN": gcd(align, alignment(x_strides)),
        "G_ALIGN": 1 if grad_y is None else alignment(grad_y.stride()),
        "PRECISION": rounding,
        "WIDEN": INTERPRET,
    }
    if need_x or need_positions:
        config = _grad_x_config(x.device, x.dtype, q.dtype, rounding == "ieee", D, C)
        blocks = config.blocks
        launch(
            soft_merge_grad_x_kernel,
            (B * -(-N // blocks["BLOCK_OWN"]) * -(-C // blocks["SLICE"]),),
            *metric, *token, *_strided(grad_y, 3), *_strided(grad_positions, 3), lse, mass,
            grad_x, grad_p, *extents,
            config=config, BLOCK_P=power_of_two(P, 1), **common,
        )  # fmt: skip

    if not (need_q or need_meta or need_size):
        return OfSoftMerge(grad_x, grad_q, grad_meta, None, grad_p)
    shift = torch.empty_like(mass)
    config = fixed("soft_merge_shift", SHIFT)
    incoming = (*_strided(grad_y, 3), *_strided(grad_size, 2), *_strided(grad_positions, 3))
    launch(
        soft_merge_shift_kernel,
        (B * -(-K // config.blocks["BLOCK_K"]),),
        *incoming, y, positions_out, mass, shift, K, config=config, C=C, P=P,
    )  # fmt: skip
    need_mean = need_size or (over_meta and (need_q or need_meta))
    passes = (("size", N, need_mean, None), ("q", N, need_q, grad_q), ("meta", K, need_meta, grad_meta))
    grad_size_in = mass.new_empty(B, N) if need_mean else None
    config = _grad_metric_config(x.device, x.dtype, q.dtype, rounding == "ieee", D, min(D, 128))
    blocks = config.blocks
    for of, rows, needed, grad in passes:
        if needed:
            slices = 1 if of == "size" else -(-D // blocks["SLICE"])
            launch(
                soft_merge_grad_metric_kernel,
                (B * -(-rows // blocks["BLOCK_OWN"]) * slices,),
                *metric, x, *x_strides, *token, *_strided(positions, 3), *incoming, lse, mass, shift, grad_size_in,
                grad, *extents, config=config, OF=of, **common,
            )  # fmt: skip
    return OfSoftMerge(grad_x, grad_q, grad_meta, grad_size_in if need_size else None, grad_p)


SHIFT = Config(4, 1, {"BLOCK_K": 8, "BLOCK_C": 256})
