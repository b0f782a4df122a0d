"""assign: every token finds its most similar meta token; the similarities exist one tile at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import Config, configured
from sttm_kernels.impl.triton.launch import launch
from sttm_kernels.impl.triton.layout import aligned, dense
from sttm_kernels.impl.triton.similarity import (
    FLOOR,
    Pair,
    Place,
    Rows,
    Tile,
    features,
    finish,
    inverse_norm,
    paired,
    place_of_program,
    power_of_two,
    precision,
    products,
    pull_back,
    resident,
    rows_at,
    rows_for,
    rows_of_tokens,
    similarity_of,
    store_rows,
    sum_of_squares,
    tiles,
    told,
)
from sttm_kernels.plan import MergedToo, MergePlan, OfAssign, PlanGrads, Similarity

_NUMBERS = [
    "N", "K", "num_sequences", "halvings", "left_out", "inverse_temperature", "stride_qb", "stride_qh", "stride_qn",
    "stride_mb",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["stride_qd"])
def assign_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb, mask,
    index, score, lse, weight, sequences, num_sequences, halvings, left_out,
    N, K, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    EARLIER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens. Without `index` no choice is wanted, without `lse` no softmax.

    With EARLIER the meta tokens are the tokens, which look at those before them alone; the last tiles of all items,
    which see most, come first. In sequences of at most `left_out` tokens these have no group.
    """
    if EARLIER:
        count = tl.cdiv(N, BLOCK_N)
        items = tl.num_programs(0) // count
        item = (tl.program_id(0) % items).to(tl.int64)
        place = Place(0, (count - 1 - tl.program_id(0) // items) * BLOCK_N, item, item, 0, item * N, N, 0)
    else:
        place = place_of_program(sequences, num_sequences, halvings, N, K, True, BLOCK_N)
    lanes, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    tokens = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    metas = Rows(m + place.item * aligned(stride_mb, ALIGN), D, 1, None, K)
    n = place.first + lanes
    inside = n < place.N
    own = Tile(tokens, rows_at(tokens, place.first, lanes), inside[:, None])
    values, q_sq = resident(own, D, HEADS, SIMILARITY != "dot", BLOCK_D)

    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    chosen = tl.zeros([BLOCK_N], tl.int32)
    count = rows_for(sequences, place, K)
    if sequences is not None:
        count = tl.where(place.N > left_out, count, 0)
    if EARLIER:
        count = tl.minimum(count, place.first + BLOCK_N)
    for start in range(0, count, BLOCK_K):
        real = start + k < K
        other = Tile(metas, rows_at(metas, start, k), real[:, None])
        dot, m_sq = products(values, own, other, D, HEADS, SIMILARITY != "dot", PRECISION, BLOCK_D)
        S = similarity_of(dot, q_sq, m_sq, inverse_temperature, SIMILARITY)
        sees = real[None, :]
        if EARLIER:
            sees = sees & ((start + k)[None, :] < n[:, None])
        S = tl.where(sees, S, float("-inf"))
        top = tl.max(S, 1)
        higher = top > best  # strictly, and the lowest k within a tile: a tie goes to the lowest k
        if index is not None:
            at = tl.min(tl.where(top[:, None] == S, (start + k)[None, :], 2147483647), 1)
            chosen = tl.where(higher, at, chosen)
        new = tl.where(higher, top, best)
        if lse is not None:
            total = total * tl.exp(best - new) + tl.sum(tl.exp(S - new[:, None]), 1)
        best = new

    out = place.token + n
    real = inside
    if mask is not None:
        real = tl.load(mask + out, mask=inside, other=0) != 0
    if sequences is not None:
        real = real & (place.N > left_out)
    if index is not None:
        chosen = tl.minimum(chosen, K - 1)  # features that are not numbers
        tl.store(index + out, tl.where(real, place.group + chosen, -1), mask=inside)
        if lse is not None:
            tl.store(weight + out, tl.where(real, 1.0 / total, 0.0), mask=inside)
    if score is not None:
        tl.store(score + out, tl.where(real, best, 0.0), mask=inside)
    if lse is not None:
        tl.store(lse + out, tl.where(real, best + tl.log(total), 0.0), mask=inside)


class Chosen(NamedTuple):
    """What is known of the tokens of an item, which start at `first`, and the gradients of its results."""

    index: Any
    lse: Any
    weight: Any
    grad_score: Any
    grad_lse: Any
    grad_weight: Any
    """Gradients are None where there are none."""
    first: Any
    group: Any
    """The number of the first group in `index`."""
    N: Any
    K: Any


@triton.jit
def _terms(plan, n):
    """Of tokens n: index, dL/dscore, dL/dlse, lse, and whether they have a group; 0 if not.

    What comes by weight = exp(score - lse) is in both gradients.
    """
    at = plan.first + n
    chosen = tl.load(plan.index + at, mask=n < plan.N, other=-1) - plan.group
    real = (chosen >= 0) & (chosen < plan.K)
    score_grad = tl.zeros(n.shape, tl.float32)
    lse_grad, level = score_grad, score_grad
    if plan.grad_score is not None:
        score_grad += tl.load(plan.grad_score + at, mask=real, other=0.0)
    if plan.grad_lse is not None:
        lse_grad += tl.load(plan.grad_lse + at, mask=real, other=0.0)
    if plan.grad_weight is not None:
        through = tl.load(plan.grad_weight + at, mask=real, other=0.0)
        if plan.weight is not None:
            through *= tl.load(plan.weight + at, mask=real, other=0.0)
        score_grad += through
        lse_grad -= through
    if plan.grad_lse is not None or plan.grad_weight is not None:
        level = tl.load(plan.lse + at, mask=real, other=0.0)
    return chosen, score_grad, lse_grad, level, real


@triton.jit
def _merged_share(plan, size, mass, place, n, chosen, real):
    """The share that tokens n have of their groups where they were merged, too, and where the rows of these are."""
    at, group = plan.first + n, place.item * plan.K + chosen
    share = tl.where(real, 1.0, 0.0)
    if plan.weight is not None:
        share *= tl.load(plan.weight + at, mask=real, other=0.0)
    if size is not None:
        share *= tl.load(size + at, mask=real, other=0.0)
    whole = tl.load(mass + group, mask=real, other=0.0)
    return tl.where(whole == 0, 0.0, share / tl.where(whole == 0, 1.0, whole)), group


@triton.jit
def _merged_rows(grad_merged, share, group, start, D: tl.constexpr, WIDTH: tl.constexpr):
    """Features from `start` on of what comes back from the groups of tokens."""
    d = start + tl.arange(0, WIDTH)[None, :]
    inside = (share != 0)[:, None] & (d < D)
    rows = tl.load(grad_merged + group.to(tl.int64)[:, None] * D + d, mask=inside, other=0.0)
    return share[:, None] * rows.to(tl.float32)


@triton.jit
def _pull_back_one_by_one(
    own, tokens, plan, k, part, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """`pull_back` of every token into its own meta token alone: 0 times what is not finite would spoil the others."""
    acc = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    along = tl.zeros([BLOCK_OWN], tl.float32)
    lane = tl.arange(0, 1)
    for n in range(plan.N):
        chosen, score_grad, _, _, real = _terms(plan, n + lane)
        token = Tile(tokens, rows_at(tokens, n, lane), real[:, None])
        mine = k == chosen
        weight = score_grad * inverse_temperature
        share = tl.zeros([BLOCK_OWN], tl.float32)
        if SIMILARITY == "l2":
            share += weight
        if SIMILARITY == "cosine":
            weight *= inverse_norm(sum_of_squares(token, D, HEADS, BLOCK_D))
            if D > SLICE:
                for start in range(0, D, BLOCK_D):
                    values = features(token, start, D, HEADS, BLOCK_D).to(tl.float32)
                    share += weight * tl.sum(features(own, start, D, HEADS, BLOCK_D).to(tl.float32) * values, 1)
        along = tl.where(mine, along + share, along)
        values = features(token, part, D, HEADS, SLICE).to(tl.float32)
        acc = tl.where(mine[:, None], acc + weight[:, None] * values, acc)
    return acc, along


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["stride_qd"])
def assign_backward_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb,
    index, lse, weight, grad_score, grad_lse, grad_weight, grad_merged, size, mass, grad,
    sequences, num_sequences, halvings,
    N, K, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, TOKENS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dL/dq by tiles of tokens (TOKENS) or dL/dm by tiles of meta tokens; `grad` has one owner per row and slice of D.

    dS[n, k] = g_n [k = index_n] + h_n exp(S[n, k] - lse_n), with S worked out again a tile at a time: once for every
    slice of D, which only D > 128 has more than one of. Without `grad_lse` and `grad_weight` h is 0. With `grad_merged`
    (B, K, D), the gradient of what tokens were merged to along the plan, dL/dq has what comes back from there.
    """
    SOFT: tl.constexpr = (grad_lse is not None) or (grad_weight is not None)
    ACROSS: tl.constexpr = 1 if TOKENS else 0  # where the vectors of tokens are broadcast
    place = place_of_program(sequences, num_sequences, halvings, N, K, TOKENS, BLOCK_OWN, D, SLICE)
    part, first = place.part, place.first
    tokens = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    metas = Rows(m + place.item * aligned(stride_mb, ALIGN), D, 1, None, K)
    own, other = (tokens, metas) if TOKENS else (metas, tokens)
    plan = Chosen(index, lse, weight, grad_score, grad_lse, grad_weight, place.token, place.group, place.N, K)

    lanes, other_lanes = tl.arange(0, BLOCK_OWN), tl.arange(0, BLOCK_OTHER)
    inside = first + lanes < own.count
    real = inside
    if TOKENS:
        chosen, score_grad, lse_grad, level, real = _terms(plan, first + lanes)
    mine = Tile(own, rows_at(own, first, lanes), real[:, None])
    values, own_sq = resident(mine, D, HEADS, SIMILARITY != "dot", BLOCK_D)
    acc = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    along = tl.zeros([BLOCK_OWN], tl.float32)
    for start in range(0, rows_for(sequences, place, K) if TOKENS else place.N, BLOCK_OTHER):
        other_real = start + other_lanes < other.count
        if not TOKENS:
            chosen, score_grad, lse_grad, level, other_real = _terms(plan, start + other_lanes)
        theirs = Tile(other, rows_at(other, start, other_lanes), other_real[:, None])
        dot = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        other_sq = tl.zeros([BLOCK_OTHER], tl.float32)
        if SOFT or SIMILARITY == "cosine":
            dot, other_sq = products(values, mine, theirs, D, HEADS, SIMILARITY != "dot", PRECISION, BLOCK_D)
        k = tl.expand_dims(start + other_lanes if TOKENS else first + lanes, 1 - ACROSS)
        dS = tl.where(k == tl.expand_dims(chosen, ACROSS), tl.expand_dims(score_grad, ACROSS), 0.0)
        if SOFT:
            S = similarity_of(dot, own_sq, other_sq, inverse_temperature, SIMILARITY)
            P = tl.exp(tl.where(k < K, S, float("-inf")) - tl.expand_dims(level, ACROSS))
            dS += P * tl.expand_dims(lse_grad, ACROSS)
        their_slice = features(theirs, part, D, HEADS, SLICE)
        acc, along = pull_back(
            acc, along, dS * inverse_temperature, dot, other_sq, their_slice, SIMILARITY, D <= SLICE, PRECISION
        )

    if not (SOFT or TOKENS):
        spoiled = (along - along != 0).to(tl.int32)
        for _ in range(0, K, K):  # one round: Triton 3.6 and 3.7 cannot lay out this sum for sm_100 outside of a loop
            spoiled += tl.sum((acc - acc != 0).to(tl.int32), 1)
        if tl.sum(spoiled, 0) > 0:
            acc, along = _pull_back_one_by_one(
                mine, other, plan, first + lanes, part, inverse_temperature,
                D, HEADS, SIMILARITY, BLOCK_OWN, BLOCK_D, SLICE,
            )  # fmt: skip
    acc = finish(acc, along, features(mine, part, D, HEADS, SLICE), own_sq, SIMILARITY, D <= SLICE)
    if TOKENS:
        acc = tl.where(real[:, None], acc, 0.0)
        if grad_merged is not None:
            share, group = _merged_share(plan, size, mass, place, first + lanes, chosen, real)
            acc += _merged_rows(grad_merged, share, group, part, D, SLICE)
    store_rows(grad, acc, own, place, first + lanes, part, N if TOKENS else K, D, HEADS)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["stride_qd"])
def assign_gather_kernel(
    q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb,
    index, score, weight, grad_score, grad_merged, size, mass, grad, sequences, num_sequences, halvings,
    N, K, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dL/dq where only score has a gradient: dS is g at the chosen meta token, whose row is gathered."""
    place = place_of_program(sequences, num_sequences, halvings, N, K, True, BLOCK_N)
    lanes = tl.arange(0, BLOCK_N)
    tokens = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    metas = Rows(m + place.item * aligned(stride_mb, ALIGN), D, 1, None, K)
    plan = Chosen(index, None, weight, grad_score, None, None, place.token, place.group, place.N, K)
    n = place.first + lanes
    chosen, score_grad, _, _, real = _terms(plan, n)
    dS = score_grad * inverse_temperature
    own = Tile(tokens, rows_at(tokens, place.first, lanes), real[:, None])
    other = Tile(metas, rows_at(metas, 0, tl.where(real, chosen, 0)), real[:, None])

    q_sq = tl.zeros([BLOCK_N], tl.float32)
    m_sq = q_sq
    cosine = q_sq
    if SIMILARITY == "cosine":
        q_sq = sum_of_squares(own, D, HEADS, BLOCK_D)
        m_sq = sum_of_squares(other, D, HEADS, BLOCK_D)
        cosine = tl.load(score + place.token + n, mask=real, other=0.0) / inverse_temperature
        cosine = tl.where(tl.sqrt(q_sq) >= FLOOR, cosine, 0.0)  # below the floor a row is scaled, not normalised
        dS *= inverse_norm(q_sq)
    if grad_merged is not None:
        share, group = _merged_share(plan, size, mass, place, n, chosen, real)
    for start in range(0, D, BLOCK_D):
        away = features(other, start, D, HEADS, BLOCK_D).to(tl.float32)
        here = features(own, start, D, HEADS, BLOCK_D).to(tl.float32)
        if SIMILARITY == "cosine":
            away = away * inverse_norm(m_sq)[:, None] - here * (inverse_norm(q_sq) * cosine)[:, None]
        if SIMILARITY == "l2":
            away = 2.0 * (away - here)
        value = tl.where(real[:, None], dS[:, None] * away, 0.0)
        if grad_merged is not None:
            value += _merged_rows(grad_merged, share, group, start, D, BLOCK_D)
        store_rows(grad, value, tokens, place, n, start, N, D, HEADS)


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
    pair: Pair, mask: Tensor | None, similarity: Similarity,
    index: Tensor | None, score: Tensor | None, lse: Tensor | None, weight: Tensor | None,
    sequences: Tensor | None = None, left_out: int = 0, earlier: bool = False,
) -> None:  # fmt: skip
    """Launches the kernel; what is not given is not wanted: lse is logsumexp_k S[n, k]."""
    places, B, H, N, K, D, align = pair
    q = places[0]
    rounding = precision(q.dtype)
    config = _forward_config(q.device, q.dtype, rounding == "ieee", D)
    launch(
        assign_kernel,
        (tiles(B, N, config.blocks["BLOCK_N"], sequences),),
        *places, dense(mask), index, score, lse, weight, *told(sequences), left_out,
        N, K, 1.0 / similarity.temperature,
        config=config, D=D, HEADS=H, SIMILARITY=similarity.kind, ALIGN=align, PRECISION=rounding, EARLIER=earlier,
    )  # fmt: skip


def assign(
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    weight: str,
    mask: Tensor | None,
    sequences: Tensor | None = None,
    left_out: int = 0,
) -> MergePlan:
    """Tokens of sequences of at most `left_out` have no group."""
    pair = paired(q, meta)
    B, N = pair[1], pair[3]
    index = q.new_empty(B, N, dtype=torch.int32)
    score = q.new_empty(B, N, dtype=torch.float32)
    lse, w = (torch.empty_like(score) if weight == "softmax" else None for _ in range(2))
    forward(pair, mask, similarity, index, score, lse, w, sequences, left_out)
    return MergePlan(index, pair[4] * (1 if sequences is None else meta.shape[0]), score, lse, w)


def assign_earlier(q: Tensor, similarity: Similarity) -> Tensor:
    score = q.new_empty(q.shape[:2], dtype=torch.float32)
    forward(paired(q, q), None, similarity, None, score, None, None, earlier=True)
    return score


def assign_backward(
    grads: PlanGrads,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    plan: MergePlan,
    needs: OfAssign,
    sequences: Tensor | None = None,
    merged: MergedToo | None = None,
) -> OfAssign:
    grad_score, grad_lse, grad_weight = map(dense, grads)
    weight, (grad_merged, size, mass) = dense(plan.weight), map(dense, merged or (None,) * 3)
    places, B, H, N, K, D, align = paired(q, meta)
    need_q, need_meta = needs
    grad_q, grad_meta = q.new_empty(q.shape) if need_q else None, meta.new_empty(meta.shape) if need_meta else None
    table, extents = told(sequences), (N, K, 1.0 / similarity.temperature)
    constants = {"D": D, "HEADS": H, "SIMILARITY": similarity.kind, "ALIGN": align}
    if need_q and grad_lse is None and grad_weight is None:
        config = _gather_config(q.device, D)
        grid = (tiles(B, N, config.blocks["BLOCK_N"], sequences),)
        args = (
            *places, plan.index, plan.score, weight, grad_score, grad_merged, size, mass, grad_q, *table, *extents,
        )  # fmt: skip
        launch(assign_gather_kernel, grid, *args, config=config, **constants)
        need_q = False
    rounding = precision(q.dtype)
    config = _backward_config(q.device, q.dtype, rounding == "ieee", D)
    slices = -(-D // config.blocks["SLICE"])
    own = config.blocks["BLOCK_OWN"]
    sets = B if sequences is None else meta.shape[0]
    owners = tiles(B, N, own, sequences), sets * -(-K // own)
    for tokens, count, needed, grad in ((True, owners[0], need_q, grad_q), (False, owners[1], need_meta, grad_meta)):
        if needed:
            grid = (count * slices,)
            args = (
                *places, plan.index, plan.lse, weight, grad_score, grad_lse, grad_weight,
                *((grad_merged, size, mass) if tokens else (None,) * 3), grad, *table, *extents,
            )  # fmt: skip
            constants |= {"TOKENS": tokens, "PRECISION": rounding}
            launch(assign_backward_kernel, grid, *args, config=config, **constants)
    return OfAssign(grad_q, grad_meta)


GATHERED = 4096
"""Elements of a tile of gathered rows."""


@configured("assign_gather")
def _gather_config(arch: int, D: int) -> tuple[Config, ...]:
    block_d = min(power_of_two(D), 1024)
    return (Config(4, 1, {"BLOCK_N": GATHERED // block_d, "BLOCK_D": block_d}),)
