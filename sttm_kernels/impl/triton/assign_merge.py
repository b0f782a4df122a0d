"""`assign` and `merge` of short sequences in one launch: the spatial stage of STTM, one frame per program.

First the similarities of the frame, some tokens at a time, end in an index and a weight per token. Then these turn into
a weighted one-hot matrix on chip, whose product with the features is the merge: nothing but the results is written.

If the metric is not x, x is read once. If it is x, it is streamed twice, once for the similarities and once, last
channels first, for the merge. A frame of 196 tokens and 1024 bfloat16 channels is 392 KiB, more than the shared memory
of an SM, so the second pass comes from the L2 cache for as long as that holds the frames in flight (52 MB for 132 of
them), and from memory for what it lost: somewhere between one read of x and two.

A token whose features are not finite spoils its own group alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.assign import assign
from sttm_kernels.impl.triton.config import INTERPRET, Config, configured
from sttm_kernels.impl.triton.launch import aligned, launch
from sttm_kernels.impl.triton.merge import dense, items, merge
from sttm_kernels.impl.triton.similarity import (
    alignment,
    features,
    paired,
    precision,
    product,
    rows_at,
    similarity_of,
    squares,
    to_tf32,
)
from sttm_kernels.plan import Merged, MergePlan, Similarity

MAX_TOKENS = 256
MAX_GROUPS = 128


@triton.jit
def _shares(index, weight, size, mass, item, n, N, K, SOFT: tl.constexpr):
    """Of tokens n: the group, -1 if none, and w_n over the mass of that group."""
    chosen = tl.load(index + item * N + n, mask=n < N, other=-1)
    real = chosen >= 0
    w = tl.where(real, 1.0, 0.0)
    if SOFT:
        w = tl.load(weight + item * N + n, mask=real, other=0.0)
    if size is not None:
        w *= tl.load(size + item * N + n, mask=real, other=0.0)
    whole = tl.load(mass + item * K + chosen, mask=real, other=0.0)
    return chosen, w / tl.where(whole == 0, 1.0, whole)


@triton.jit
def _store_means(y, total, rounded, empty, fill, item, stride_fb, k, K, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [start, start + BLOCK_C) of all groups from sums of shares; groups without mass are filled."""
    c = (start + tl.arange(0, BLOCK_C))[None, :]
    inside = (k < K)[:, None] & (c < C)
    mean = total / rounded[:, None]
    if fill is not None:
        instead = tl.load(fill + item * stride_fb + k[:, None] * C + c, mask=inside & empty[:, None], other=0.0)
        mean = tl.where(empty[:, None], instead.to(tl.float32), mean)
    tl.store(y + (item * K + k)[:, None] * C + c, mean.to(y.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "N", "K", "stride_xb", "stride_xn", "stride_qb", "stride_qh", "stride_qn", "stride_mb", "stride_mk",
        "stride_pb", "stride_fb",
    ]
)  # fmt: skip
def assign_merge_kernel(
    x, stride_xb, stride_xn, stride_xc,
    q, stride_qb, stride_qh, stride_qn, stride_qd,
    m, stride_mb, stride_mk, stride_md,
    mask, size, positions, stride_pb, fill, stride_fb,
    index, score, lse, weight, y, size_out, positions_out, mass_out,
    N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    SOFT: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_N holds all tokens, BLOCK_K all groups; similarities exist for BLOCK_R tokens at a time."""
    item = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    m_at = rows_at(m + item * aligned(stride_mb, ALIGN), 0, k, stride_mk, ALIGN)
    q_item = q + item * aligned(stride_qb, ALIGN)
    head = aligned(stride_qh, ALIGN)
    is_group = (k < K)[:, None]

    mass = tl.zeros([BLOCK_K], tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, N, BLOCK_R):
        n = first + tl.arange(0, BLOCK_R)
        real = n < N
        if mask is not None:
            real = real & (tl.load(mask + item * N + n, mask=n < N, other=0) != 0)
        q_at = rows_at(q_item, first, tl.arange(0, BLOCK_R), stride_qn, ALIGN)
        dot = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        q_sq = tl.zeros([BLOCK_R], tl.float32)
        m_sq = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_D):
            own = features(q_at, real[:, None], start, stride_qd, head, D, HEADS, WIDEN, BLOCK_D)
            other = features(m_at, is_group, start, stride_md, 0, D, 1, WIDEN, BLOCK_D)
            dot = product(own, tl.trans(other), dot, PRECISION, WIDEN)
            if SIMILARITY != "dot":
                q_sq += squares(own)
                m_sq += squares(other)
        S = similarity_of(dot, q_sq, m_sq, inverse_temperature, SIMILARITY)
        S = tl.where((k < K)[None, :], S, float("-inf"))

        best = tl.max(S, 1)
        chosen = tl.min(tl.where(best[:, None] == S, k[None, :], BLOCK_K), 1)  # a tie goes to the lowest k
        chosen = tl.where(real, tl.minimum(chosen, K - 1), -1)  # features that are not numbers
        tl.store(index + item * N + n, chosen, mask=n < N)
        tl.store(score + item * N + n, tl.where(real, best, 0.0), mask=n < N)
        w = tl.where(real, 1.0, 0.0)
        tokens = w
        if SOFT:
            total = tl.sum(tl.exp(S - best[:, None]), 1)
            w = tl.where(real, 1.0 / total, 0.0)
            tl.store(lse + item * N + n, tl.where(real, best + tl.log(total), 0.0), mask=n < N)
            tl.store(weight + item * N + n, w, mask=n < N)
        if size is not None:
            tokens = tl.load(size + item * N + n, mask=real, other=0.0)
            w *= tokens
        member = chosen[:, None] == k[None, :]
        mass += tl.sum(tl.where(member, w[:, None], 0.0), 0)
        count += tl.sum(tl.where(member, tokens[:, None], 0.0), 0)

    empty = mass == 0
    group = item * K + k
    tl.store(mass_out + group, mass, mask=k < K)
    tl.store(size_out + group, count, mask=k < K)
    tl.debug_barrier()  # what other threads of this program stored is read from here on

    rows = tl.arange(0, BLOCK_R)
    rounded = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, N, BLOCK_R):
        chosen, share = _shares(index, weight, size, mass_out, item, first + rows, N, K, SOFT)
        share = share.to(x.dtype.element_ty).to(tl.float32)
        rounded += tl.sum(tl.where(chosen[:, None] == k[None, :], share[:, None], 0.0), 0)
    if positions is not None:
        for p in range(P):
            mean = tl.zeros([BLOCK_K], tl.float32)
            for first in range(0, N, BLOCK_R):
                n = first + rows
                chosen, share = _shares(index, weight, size, mass_out, item, n, N, K, SOFT)
                share *= tl.load(positions + item * stride_pb + n * P + p, mask=chosen >= 0, other=0.0)
                mean += tl.sum(tl.where(chosen[:, None] == k[None, :], share[:, None], 0.0), 0)
            tl.store(positions_out + group * P + p, mean, mask=k < K)

    # Shares are rounded to the dtype of x, so the sum of the rounded ones divides: equal tokens keep their value.
    n = tl.arange(0, BLOCK_N)
    chosen, share = _shares(index, weight, size, mass_out, item, n, N, K, SOFT)
    real = chosen >= 0
    shares = tl.where(chosen[None, :] == k[:, None], share.to(x.dtype.element_ty)[None, :], 0.0).to(x.dtype.element_ty)
    if shares.dtype == tl.float32 and not WIDEN:
        shares = to_tf32(shares)
    rounded = tl.where(rounded == 0, 1.0, rounded)
    x_item = x + item * aligned(stride_xb, ALIGN_X)
    x_at = rows_at(x_item, 0, n, stride_xn, ALIGN_X)
    spoiled = tl.zeros([BLOCK_N], tl.int32)
    for back in range(0, C, BLOCK_C):
        start = (C - 1) // BLOCK_C * BLOCK_C - back
        tile = features(x_at, real[:, None], start, stride_xc, 0, C, 1, WIDEN, BLOCK_C)
        spoiled += tl.sum((tile - tile != 0).to(tl.int32), 1)
        total = product(shares, tile, tl.zeros([BLOCK_K, BLOCK_C], tl.float32), PRECISION, WIDEN, True)
        _store_means(y, total, rounded, empty, fill, item, stride_fb, k, K, start, C, BLOCK_C)
    if tl.sum(spoiled, 0) > 0:
        # 0 times what is not finite spoils groups that the token is not in: add up again, token by token.
        tl.debug_barrier()
        for start in range(0, C, BLOCK_C):
            c = (start + tl.arange(0, BLOCK_C))[None, :]
            total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
            for one in range(N):
                group_of_one, its_share = _shares(index, weight, size, mass_out, item, one, N, K, SOFT)
                its_share = its_share.to(x.dtype.element_ty).to(tl.float32)
                row = x_item + one * aligned(stride_xn, ALIGN_X).to(tl.int64)
                value = tl.load(row + c * stride_xc, mask=c < C, other=0.0).to(tl.float32)
                total = tl.where((k == group_of_one)[:, None], total + its_share * value, total)
            _store_means(y, total, rounded, empty, fill, item, stride_fb, k, K, start, C, BLOCK_C)


def assign_merge(
    x: Tensor,
    q: Tensor | None,
    meta: Tensor,
    similarity: Similarity,
    weight: str,
    mask: Tensor | None,
    size: Tensor | None,
    positions: Tensor | None,
    fill: Tensor | None,
) -> tuple[Merged, MergePlan]:
    C, x_strides = x.shape[2], x.stride()
    q = x if q is None else q
    places, B, H, N, K, D, align = paired(q, meta)
    rounding = precision(x.dtype)
    config = None
    if N <= MAX_TOKENS and K <= MAX_GROUPS and rounding != "ieee":
        block_k = 16 if K <= 16 else 64 if K <= 64 else MAX_GROUPS
        config = _config(x.device, 64 if N <= 64 else MAX_TOKENS, block_k, x.element_size())
    if config is None:
        plan = assign(q, meta, similarity, weight, mask)
        return merge(x, plan, size, positions, "mean", fill), plan

    P = 0 if positions is None else positions.shape[2]
    index = x.new_empty(B, N, dtype=torch.int32)
    score = x.new_empty(B, N, dtype=torch.float32)
    soft = weight == "softmax"
    lse, w = (torch.empty_like(score) if soft else None for _ in range(2))
    y = x.new_empty(B, K, C)
    size_out = score.new_empty(B, K)
    mass, positions_out = torch.empty_like(size_out), score.new_empty(B, K, P)
    launch(
        assign_merge_kernel,
        (B,),
        x, *x_strides, *places,
        dense(mask), dense(size), *items(positions), *items(fill),
        index, score, lse, w, y, size_out, positions_out, mass,
        N, K, 1.0 / similarity.temperature,
        config=config,
        C=C, D=D, P=P, HEADS=H, SIMILARITY=similarity.kind, SOFT=soft,
        ALIGN_X=alignment(x_strides), ALIGN=align, PRECISION=rounding, WIDEN=INTERPRET,
    )  # fmt: skip
    merged = Merged(y, size_out, None if positions is None else positions_out, mass)
    return merged, MergePlan(index, K, score, lse, w)


def _bytes_needed(config: Config, block_n: int, block_k: int, itemsize: int) -> int:
    rows, d, c = (config.blocks[name] for name in ("BLOCK_R", "BLOCK_D", "BLOCK_C"))
    similarity = config.num_stages * (rows + block_k) * d
    product = block_n * block_k + config.num_stages * block_n * c + block_k * c
    return itemsize * max(similarity, product)


@configured("assign_merge", _bytes_needed)
def _config(arch: int, block_n: int, block_k: int, itemsize: int) -> tuple[Config | None, ...]:
    """For the bucket that holds N and K: nothing is compiled for N or K itself. None: it takes two launches."""
    warps = 4 if block_n == 64 else 8
    widths = [(64, 3), (64, 2), (32, 2), (16, 2)] if itemsize == 2 else [(32, 3), (32, 2), (16, 2)]
    if arch < 90:
        widths = widths[1:]  # a third stage spills there
    if arch >= 90 and itemsize == 4 and block_k == MAX_GROUPS:
        widths = widths[2:]  # and so do wider tiles
    blocks = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": 64}
    return *(Config(warps, stages, {**blocks, "BLOCK_D": width, "BLOCK_C": width}) for width, stages in widths), None
