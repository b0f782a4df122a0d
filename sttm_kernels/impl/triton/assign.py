"""assign: every token finds its most similar meta token; the similarities exist one tile at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import INTERPRET, Config, configured
from sttm_kernels.impl.triton.launch import aligned, launch
from sttm_kernels.impl.triton.similarity import (
    FLOOR,
    Pair,
    features,
    finish,
    inverse_norm,
    paired,
    power_of_two,
    precision,
    products,
    pull_back,
    rows_at,
    similarity_of,
    store_to_heads,
    sum_of_squares,
)
from sttm_kernels.plan import MergePlan, OfAssign, PlanGrads, Similarity

_EXTENTS = ["N", "K", "stride_qb", "stride_qh", "stride_qn", "stride_mb", "stride_mk"]
_ADJACENT = ["stride_qd", "stride_md"]


@triton.jit(
    do_not_specialize=[*_EXTENTS, "stride_rb", "stride_rn"],
    do_not_specialize_on_alignment=_ADJACENT,
)
def assign_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    mask, stride_rb, stride_rn,
    index, score, lse, weight,
    N, K, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, CHOOSE: tl.constexpr, SOFT: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens. CHOOSE: index and score; SOFT: lse, and with CHOOSE weight."""
    tiles = tl.cdiv(N, BLOCK_N)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n = first + rows
    inside = n < N
    head = aligned(stride_qh, ALIGN)
    q_at = rows_at(q + item * aligned(stride_qb, ALIGN), first, rows, stride_qn, ALIGN)
    m_item = m + item * aligned(stride_mb, ALIGN)

    own = 0
    if D <= BLOCK_D:
        own = features(q_at, inside[:, None], 0, stride_qd, head, D, HEADS, WIDEN, BLOCK_D)
    q_sq = tl.zeros([BLOCK_N], tl.float32)
    if SIMILARITY != "dot":
        q_sq = sum_of_squares(q_at, inside[:, None], stride_qd, head, D, HEADS, WIDEN, BLOCK_N, BLOCK_D)

    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    chosen = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        real = start + k < K
        m_at = rows_at(m_item, start, k, stride_mk, ALIGN)
        dot, m_sq = products(
            own, q_at, inside[:, None], stride_qd, head, m_at, real[:, None], stride_md, 0,
            D, HEADS, 1, SIMILARITY != "dot", PRECISION, WIDEN, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        S = similarity_of(dot, q_sq, m_sq, inverse_temperature, SIMILARITY)
        S = tl.where(real[None, :], S, float("-inf"))
        top = tl.max(S, 1)
        higher = top > best  # strictly, and the lowest k within a tile: a tie goes to the lowest k
        if CHOOSE:
            at = tl.min(tl.where(top[:, None] == S, (start + k)[None, :], 2147483647), 1)
            chosen = tl.where(higher, at, chosen)
        new = tl.where(higher, top, best)
        if SOFT:
            total = total * tl.exp(best - new) + tl.sum(tl.exp(S - new[:, None]), 1)
        best = new

    if mask is not None:
        real = tl.load(mask + item * stride_rb + n * stride_rn.to(tl.int64), mask=inside, other=0) != 0
    else:
        real = inside
    out = item * N + n
    if CHOOSE:
        chosen = tl.minimum(chosen, K - 1)  # features that are not numbers
        tl.store(index + out, tl.where(real, chosen, -1), mask=inside)
        tl.store(score + out, tl.where(real, best, 0.0), mask=inside)
        if SOFT:
            tl.store(weight + out, tl.where(real, 1.0 / total, 0.0), mask=inside)
    if SOFT:
        tl.store(lse + out, tl.where(real, best + tl.log(total), 0.0), mask=inside)


@triton.jit
def _token_terms(index, lse, g, stride_gb, stride_gn, h, stride_hb, stride_hn, item, n, N, K, SOFT: tl.constexpr):
    """Of tokens n: index, dL/dscore, dL/dlse, lse, and whether they have a group; 0 if not."""
    chosen = tl.load(index + item * N + n, mask=n < N, other=-1)
    real = (chosen >= 0) & (chosen < K)
    score_grad = tl.load(g + item * stride_gb + n * stride_gn.to(tl.int64), mask=real, other=0.0)
    if SOFT:
        lse_grad = tl.load(h + item * stride_hb + n * stride_hn.to(tl.int64), mask=real, other=0.0)
        level = tl.load(lse + item * N + n, mask=real, other=0.0)
    else:
        lse_grad, level = score_grad, score_grad
    return chosen, score_grad, lse_grad, level, real


@triton.jit(
    do_not_specialize=[*_EXTENTS, "stride_gb", "stride_gn", "stride_hb", "stride_hn"],
    do_not_specialize_on_alignment=_ADJACENT,
)
def assign_backward_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    index, lse, g, stride_gb, stride_gn, h, stride_hb, stride_hn, grad,
    N, K, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, SOFT: tl.constexpr, TOKENS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dL/dq by tiles of tokens (TOKENS) or dL/dm by tiles of meta tokens; `grad` has one owner per row and slice of D.

    dS[n, k] = g_n [k = index_n] + h_n exp(S[n, k] - lse_n), with S worked out again a tile at a time: once for every
    slice of D, which only D > 128 has more than one of. Without SOFT h is 0.
    """
    if TOKENS:
        num_own, num_other = N, K
        own, stride_a, stride_ad = q + 0, stride_qn, stride_qd
        other, stride_b, stride_bd = m + 0, stride_mk, stride_md
        stride_ai, stride_bi = stride_qb, stride_mb
        own_head, other_head = aligned(stride_qh, ALIGN), 0
    else:
        num_own, num_other = K, N
        own, stride_a, stride_ad = m + 0, stride_mk, stride_md
        other, stride_b, stride_bd = q + 0, stride_qn, stride_qd
        stride_ai, stride_bi = stride_mb, stride_qb
        own_head, other_head = 0, aligned(stride_qh, ALIGN)
    OWN_HEADS: tl.constexpr = HEADS if TOKENS else 1
    OTHER_HEADS: tl.constexpr = 1 if TOKENS else HEADS
    ACROSS: tl.constexpr = 1 if TOKENS else 0  # where the vectors of tokens are broadcast
    SLICES: tl.constexpr = (D + SLICE - 1) // SLICE

    tiles = tl.cdiv(num_own, BLOCK_OWN)
    part = tl.program_id(0) % SLICES * SLICE
    first = tl.program_id(0) // SLICES % tiles * BLOCK_OWN
    item = (tl.program_id(0) // (SLICES * tiles)).to(tl.int64)
    own_rows = tl.arange(0, BLOCK_OWN)
    other_rows = tl.arange(0, BLOCK_OTHER)
    own_at = rows_at(own + item * aligned(stride_ai, ALIGN), first, own_rows, stride_a, ALIGN)
    other += item * aligned(stride_bi, ALIGN)
    inside = first + own_rows < num_own
    own_real = inside
    if TOKENS:
        chosen, score_grad, lse_grad, level, own_real = _token_terms(
            index, lse, g, stride_gb, stride_gn, h, stride_hb, stride_hn, item, first + own_rows, N, K, SOFT
        )

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
            real = start + other_rows < K
            k = tl.expand_dims(start + other_rows, 0)
            k_real = real[None, :]
        else:
            chosen, score_grad, lse_grad, level, real = _token_terms(
                index, lse, g, stride_gb, stride_gn, h, stride_hb, stride_hn, item, start + other_rows, N, K, SOFT
            )
            k = tl.expand_dims(first + own_rows, 1)
            k_real = inside[:, None]
        dot = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        other_sq = tl.zeros([BLOCK_OTHER], tl.float32)
        if SOFT or SIMILARITY == "cosine":
            dot, other_sq = products(
                own_tile, own_at, own_real[:, None], stride_ad, own_head,
                other_at, real[:, None], stride_bd, other_head,
                D, OWN_HEADS, OTHER_HEADS, SIMILARITY != "dot", PRECISION, WIDEN, BLOCK_OWN, BLOCK_OTHER, BLOCK_D,
            )  # fmt: skip
        dS = tl.where(k == tl.expand_dims(chosen, ACROSS), tl.expand_dims(score_grad, ACROSS), 0.0)
        if SOFT:
            S = similarity_of(dot, own_sq, other_sq, inverse_temperature, SIMILARITY)
            P = tl.exp(tl.where(k_real, S, float("-inf")) - tl.expand_dims(level, ACROSS))
            dS += P * tl.expand_dims(lse_grad, ACROSS)
        values = features(other_at, real[:, None], part, stride_bd, other_head, D, OTHER_HEADS, WIDEN, SLICE)
        acc, along = pull_back(
            acc, along, dS * inverse_temperature, dot, other_sq, values, SIMILARITY, D <= SLICE, PRECISION, WIDEN
        )

    values = features(own_at, own_real[:, None], part, stride_ad, own_head, D, OWN_HEADS, WIDEN, SLICE)
    acc = finish(acc, along, values, own_sq, SIMILARITY, D <= SLICE)
    if TOKENS:
        acc = tl.where(own_real[:, None], acc, 0.0)
    d = part + tl.arange(0, SLICE)[None, :]
    out = grad + (item * OWN_HEADS * num_own + (first + own_rows)[:, None]) * D + d
    store_to_heads(out, acc, inside[:, None] & (d < D), num_own.to(tl.int64) * D, OWN_HEADS)


@triton.jit(
    do_not_specialize=[*_EXTENTS, "stride_gb", "stride_gn"],
    do_not_specialize_on_alignment=_ADJACENT,
)
def assign_gather_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    index, score, g, stride_gb, stride_gn, grad,
    N, K, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, ALIGN: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dL/dq where only score has a gradient: dS is g at the chosen meta token, whose row is gathered."""
    tiles = tl.cdiv(N, BLOCK_N)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    n = first + rows
    chosen = tl.load(index + item * N + n, mask=n < N, other=-1)
    real = (chosen >= 0) & (chosen < K)
    dS = tl.load(g + item * stride_gb + n * stride_gn.to(tl.int64), mask=real, other=0.0) * inverse_temperature
    head = aligned(stride_qh, ALIGN)
    q_at = rows_at(q + item * aligned(stride_qb, ALIGN), first, rows, stride_qn, ALIGN)
    m_row = tl.where(real, chosen, 0).to(tl.int64) * aligned(stride_mk, ALIGN)
    m_at = m + item * aligned(stride_mb, ALIGN) + m_row[:, None]

    q_sq = tl.zeros([BLOCK_N], tl.float32)
    m_sq = q_sq
    cosine = q_sq
    if SIMILARITY == "cosine":
        q_sq = sum_of_squares(q_at, real[:, None], stride_qd, head, D, HEADS, WIDEN, BLOCK_N, BLOCK_D)
        m_sq = sum_of_squares(m_at, real[:, None], stride_md, 0, D, 1, WIDEN, BLOCK_N, BLOCK_D)
        cosine = tl.load(score + item * N + n, mask=real, other=0.0) / inverse_temperature
        cosine = tl.where(tl.sqrt(q_sq) >= FLOOR, cosine, 0.0)  # below the floor a row is scaled, not normalised
        dS *= inverse_norm(q_sq)
    for start in range(0, D, BLOCK_D):
        own = features(q_at, real[:, None], start, stride_qd, head, D, HEADS, WIDEN, BLOCK_D).to(tl.float32)
        other = features(m_at, real[:, None], start, stride_md, 0, D, 1, WIDEN, BLOCK_D).to(tl.float32)
        if SIMILARITY == "cosine":
            other = other * inverse_norm(m_sq)[:, None] - own * (inverse_norm(q_sq) * cosine)[:, None]
        if SIMILARITY == "l2":
            other = 2.0 * (other - own)
        value = tl.where(real[:, None], dS[:, None] * other, 0.0)
        d = start + tl.arange(0, BLOCK_D)[None, :]
        out = grad + (item * HEADS * N + n[:, None]) * D + d
        store_to_heads(out, value, (n < N)[:, None] & (d < D), N.to(tl.int64) * D, HEADS)


RESIDENT = 128
"""Features that a tile of own rows keeps on chip; beyond it both sides are read block by block for every tile of S."""


def _shared_forward(config: Config, dtype: torch.dtype, exact: bool, D: int) -> int:
    blocks = config.blocks
    n, k, d = blocks["BLOCK_N"], blocks["BLOCK_K"], blocks["BLOCK_D"]
    if d >= D:
        return dtype.itemsize * d * (n + config.num_stages * k)
    return dtype.itemsize * d * (n + k) * config.num_stages


@configured("assign", _shared_forward)
def _forward_config(arch: int, dtype: torch.dtype, exact: bool, D: int) -> tuple[Config, ...]:
    if exact:
        shapes = [(8, 2, 128, 32, 16), (4, 2, 32, 32, 16)]
    else:
        width = 64 if dtype != torch.float32 else 32
        block_d = power_of_two(D) if D <= RESIDENT else width
        shapes = [(8, 3, 128, 128, block_d), (8, 3, 128, 64, block_d), (4, 3, 64, 64, block_d), (4, 2, 32, 32, block_d)]
    return tuple(Config(w, s, {"BLOCK_N": n, "BLOCK_K": k, "BLOCK_D": d}) for w, s, n, k, d in shapes)


def _shared_backward(config: Config, dtype: torch.dtype, exact: bool, D: int) -> int:
    blocks, element = config.blocks, dtype.itemsize
    own, other, d = blocks["BLOCK_OWN"], blocks["BLOCK_OTHER"], blocks["BLOCK_D"]
    if d >= D:
        return element * (d * own + config.num_stages * d * other) + 4 * own * other
    return element * config.num_stages * (d * (own + other) + blocks["SLICE"] * other) + 4 * own * other


@configured("assign_backward", _shared_backward)
def _backward_config(arch: int, dtype: torch.dtype, exact: bool, D: int) -> tuple[Config, ...]:
    part = power_of_two(D) if D <= RESIDENT else 128
    if exact:
        shapes = [(8, 1, 64, 16, 16, 64), (4, 1, 32, 16, 16, 32)]
    elif dtype == torch.float32:
        shapes = [(8, 2, 64, 32, 32, part), (4, 1, 32, 32, 32, part)]
    else:
        block_d = part if D <= RESIDENT else 64
        # mma of sm_80 keeps its operands in registers
        rows = 64 if dtype == torch.bfloat16 and block_d <= 64 and arch > 80 else 32
        shapes = [(8, 3, 64, rows, block_d, part), (8, 2, 64, rows, block_d, part), (4, 1, 32, 32, block_d, part)]
    return tuple(
        Config(w, s, {"BLOCK_OWN": a, "BLOCK_OTHER": b, "BLOCK_D": d, "SLICE": c}) for w, s, a, b, d, c in shapes
    )


def forward(
    pair: Pair, mask: Tensor | None, similarity: Similarity, soft: bool,
    index: Tensor | None, score: Tensor | None, lse: Tensor | None, weight: Tensor | None,
) -> None:  # fmt: skip
    """Launches the kernel; without an index only lse, logsumexp_k S[n, k], is wanted."""
    places, B, H, N, K, D, align = pair
    q = places[0]
    rounding = precision(q.dtype)
    config = _forward_config(q.device, q.dtype, rounding == "ieee", D)
    launch(
        assign_kernel,
        (B * -(-N // config.blocks["BLOCK_N"]),),
        *places, mask, *((0, 0) if mask is None else mask.stride()),
        index, score, lse, weight, N, K, 1.0 / similarity.temperature,
        config=config, D=D, HEADS=H, SIMILARITY=similarity.kind, CHOOSE=index is not None, SOFT=soft,
        ALIGN=align, PRECISION=rounding, WIDEN=INTERPRET,
    )  # fmt: skip


def assign(q: Tensor, meta: Tensor, similarity: Similarity, weight: str, mask: Tensor | None) -> MergePlan:
    pair = paired(q, meta)
    B, N = pair[1], pair[3]
    index = q.new_empty(B, N, dtype=torch.int32)
    score = q.new_empty(B, N, dtype=torch.float32)
    lse, w = (torch.empty_like(score) if weight == "softmax" else None for _ in range(2))
    forward(pair, mask, similarity, lse is not None, index, score, lse, w)
    return MergePlan(index, pair[4], score, lse, w)


def assign_backward(
    grads: PlanGrads, q: Tensor, meta: Tensor, similarity: Similarity, plan: MergePlan, needs: OfAssign
) -> OfAssign:
    (grad_score, grad_lse), index, score, lse = grads, plan.index, plan.score, plan.lse
    places, B, H, N, K, D, align = paired(q, meta)
    need_q, need_meta = needs
    grad_q, grad_meta = q.new_empty(q.shape) if need_q else None, meta.new_empty(meta.shape) if need_meta else None
    soft = grad_lse is not None
    extents = (N, K, 1.0 / similarity.temperature)
    if need_q and not soft:
        config = _gather_config(q.device, D)
        launch(
            assign_gather_kernel,
            (B * -(-N // config.blocks["BLOCK_N"]),),
            *places, index, score, grad_score, *grad_score.stride(), grad_q, *extents,
            config=config, D=D, HEADS=H, SIMILARITY=similarity.kind, ALIGN=align, WIDEN=INTERPRET,
        )  # fmt: skip
        need_q = False
    rounding = precision(q.dtype)
    config = _backward_config(q.device, q.dtype, rounding == "ieee", D)
    slices = -(-D // config.blocks["SLICE"])
    for tokens, rows, needed, grad in ((True, N, need_q, grad_q), (False, K, need_meta, grad_meta)):
        if not needed:
            continue
        launch(
            assign_backward_kernel,
            (B * -(-rows // config.blocks["BLOCK_OWN"]) * slices,),
            *places, index, lse, grad_score, *grad_score.stride(),
            grad_lse, *((0, 0) if grad_lse is None else grad_lse.stride()), grad, *extents,
            config=config, D=D, HEADS=H, SIMILARITY=similarity.kind, SOFT=soft, TOKENS=tokens,
            ALIGN=align, PRECISION=rounding, WIDEN=INTERPRET,
        )  # fmt: skip
    return OfAssign(grad_q, grad_meta)


GATHERED = 4096
"""Elements of a tile of gathered rows."""


@configured("assign_gather")
def _gather_config(arch: int, D: int) -> tuple[Config, ...]:
    block_d = min(power_of_two(D), 1024)
    return (Config(4, 1, {"BLOCK_N": GATHERED // block_d, "BLOCK_D": block_d}),)
