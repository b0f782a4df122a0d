"""`assign` and `merge` of short sequences in one launch: the spatial stage of STTM, one frame per program.

First the similarities of the frame, some tokens at a time, end in an index and a weight per token. Then these turn into
a weighted one-hot matrix on chip, whose product with the features is the merge: nothing but the results is written.

If the metric is not x, x is read once. If it is x, it is streamed twice, once for the similarities and once, last
channels first, for the merge. A frame of 196 tokens and 1024 bfloat16 channels is 392 KiB, more than the shared memory
of an SM, so the second pass comes from the L2 cache for as long as that holds the frames in flight (52 MB for 132 of
them), and from memory for what it lost: somewhere between one read of x and two.

A token whose features are not finite spoils its own group alone.

Packed, the long sequences take two verbs, in which the short ones have no groups; then programs of their own write what
the short ones have, as they would alone.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.assign import assign
from sttm_kernels.impl.triton.config import Config, configured
from sttm_kernels.impl.triton.csr import sort_tokens
from sttm_kernels.impl.triton.launch import launch
from sttm_kernels.impl.triton.layout import aligned, alignment, dense, items
from sttm_kernels.impl.triton.merge import merge
from sttm_kernels.impl.triton.similarity import (
    WIDEN,
    Place,
    Rows,
    Tile,
    features,
    paired,
    place_of_program,
    precision,
    product,
    rows_at,
    rows_of_tokens,
    similarity_of,
    squares,
    to_tf32,
    told,
)
from sttm_kernels.plan import Merged, MergePlan, Similarity

MAX_TOKENS = 256
MAX_GROUPS = 128
SORTED_AT_ONCE: tl.constexpr = tl.constexpr(32)
"""Tokens that are compared with one another to sort them."""


class Frame(NamedTuple):
    """What a batch item has beside features, of its tokens (they start at `token`) and groups (at `group`).

    In `index` its groups are numbered from `first_group`.
    """

    mask: Any
    size: Any
    index: Any
    score: Any
    lse: Any
    weight: Any
    mass: Any
    token: Any
    group: Any
    first_group: Any
    N: Any
    K: Any


@triton.jit
def _assign(
    tokens, metas, frame, k, inverse_temperature,
    D: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes index, score, lse and weight of all tokens; returns mass_k and size'_k of all groups."""
    is_group = k < frame.K
    mass = tl.zeros(k.shape, tl.float32)
    count = tl.zeros(k.shape, tl.float32)
    lanes = tl.arange(0, BLOCK_R)
    other = Tile(metas, rows_at(metas, 0, k), is_group[:, None])
    for first in range(0, frame.N, BLOCK_R):
        n = first + lanes
        inside, at = n < frame.N, frame.token + n
        real = inside
        if frame.mask is not None:
            real = real & (tl.load(frame.mask + at, mask=inside, other=0) != 0)
        own = Tile(tokens, rows_at(tokens, first, lanes), real[:, None])
        dot = tl.zeros([BLOCK_R, k.shape[0]], tl.float32)
        q_sq = tl.zeros([BLOCK_R], tl.float32)
        m_sq = tl.zeros(k.shape, tl.float32)
        for start in range(0, D, BLOCK_D):
            token, meta = features(own, start, D, HEADS, BLOCK_D), features(other, start, D, HEADS, BLOCK_D)
            dot = product(token, tl.trans(meta), dot, "tf32")
            if SIMILARITY != "dot":
                q_sq += squares(token)
                m_sq += squares(meta)
        S = similarity_of(dot, q_sq, m_sq, inverse_temperature, SIMILARITY)
        S = tl.where(is_group[None, :], S, float("-inf"))

        best = tl.max(S, 1)
        chosen = tl.min(tl.where(best[:, None] == S, k[None, :], k.shape[0]), 1)  # a tie goes to the lowest k
        chosen = tl.where(real, tl.minimum(chosen, frame.K - 1), -1)  # features that are not numbers
        tl.store(frame.index + at, tl.where(real, frame.first_group + chosen, -1), mask=inside)
        tl.store(frame.score + at, tl.where(real, best, 0.0), mask=inside)
        w = tl.where(real, 1.0, 0.0)
        one = w
        if frame.lse is not None:
            total = tl.sum(tl.exp(S - best[:, None]), 1)
            w = tl.where(real, 1.0 / total, 0.0)
            tl.store(frame.lse + at, tl.where(real, best + tl.log(total), 0.0), mask=inside)
            tl.store(frame.weight + at, w, mask=inside)
        if frame.size is not None:
            one = tl.load(frame.size + at, mask=real, other=0.0)
            w *= one
        member = chosen[:, None] == k[None, :]
        mass += tl.sum(tl.where(member, w[:, None], 0.0), 0)
        count += tl.sum(tl.where(member, one[:, None], 0.0), 0)
    return mass, count


@triton.jit
def _shares(frame, n):
    """Of tokens n: the group, -1 if none, and w_n over the mass of that group."""
    at = frame.token + n
    chosen = tl.load(frame.index + at, mask=n < frame.N, other=-1)
    real = chosen >= 0
    chosen = tl.where(real, chosen - frame.first_group, -1)
    w = tl.where(real, 1.0, 0.0)
    if frame.weight is not None:
        w = tl.load(frame.weight + at, mask=real, other=0.0)
    if frame.size is not None:
        w *= tl.load(frame.size + at, mask=real, other=0.0)
    whole = tl.load(frame.mass + frame.group + chosen, mask=real, other=0.0)
    return chosen, w / tl.where(whole == 0, 1.0, whole)


@triton.jit
def _merge_positions(positions, out, frame, k, P: tl.constexpr, BLOCK_R: tl.constexpr):
    for p in range(P):
        mean = tl.zeros(k.shape, tl.float32)
        for first in range(0, frame.N, BLOCK_R):
            n = first + tl.arange(0, BLOCK_R)
            chosen, share = _shares(frame, n)
            share *= tl.load(positions + n * P + p, mask=chosen >= 0, other=0.0)
            mean += tl.sum(tl.where(chosen[:, None] == k[None, :], share[:, None], 0.0), 0)
        tl.store(out + (frame.group + k) * P + p, mean, mask=k < frame.K)


@triton.jit
def _store_means(y, fill, total, rounded, empty, frame, k, start, C: tl.constexpr):
    """Channels from `start` on of all groups from sums of shares; groups without mass are filled."""
    c = (start + tl.arange(0, total.shape[1]))[None, :]
    inside = (k < frame.K)[:, None] & (c < C)
    mean = total / rounded[:, None]
    if fill is not None:
        instead = tl.load(fill + k[:, None] * C + c, mask=inside & empty[:, None], other=0.0)
        mean = tl.where(empty[:, None], instead.to(tl.float32), mean)
    tl.store(y + (frame.group + k)[:, None] * C + c, mean.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _merge_one_by_one(y, fill, x, rounded, empty, frame, k, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Every token into its own group alone: 0 times what is not finite would spoil the groups that it is not in."""
    dtype = y.dtype.element_ty
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C))[None, :]
        total = tl.zeros([k.shape[0], BLOCK_C], tl.float32)
        for n in range(frame.N):
            chosen, share = _shares(frame, n)
            at = x.start + n * tl.cast(x.stride, tl.int64) + c * x.stride_d
            value = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
            grown = total + share.to(dtype).to(tl.float32) * value
            total = tl.where((k == chosen)[:, None], grown, total)
        _store_means(y, fill, total, rounded, empty, frame, k, start, C)


@triton.jit(
    do_not_specialize=[
        "N", "K", "inverse_temperature", "stride_xb", "stride_xn", "stride_qb", "stride_qh", "stride_qn", "stride_mb",
        "stride_pb", "stride_fb", "longer", "most",
    ],
    do_not_specialize_on_alignment=["stride_xc", "stride_qd", "offsets"],
)  # fmt: skip
def assign_merge_kernel(
    x, stride_xb, stride_xn, stride_xc, q, stride_qb, stride_qh, stride_qn, stride_qd, m, stride_mb,
    mask, size, positions, stride_pb, fill, stride_fb,
    index, score, lse, weight, y, size_out, positions_out, mass_out, order, offsets, rank,
    sequences, longer, most, N, K, inverse_temperature,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr, SIMILARITY: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N holds all tokens, BLOCK_K all groups; similarities exist for BLOCK_R tokens at a time.

    Of `sequences`, whose groups are those of one item, the ones longer than `longer` and of at most `most` tokens.
    `rank` (B, N) is scratch of those who want `order` and `offsets`, of items.
    """
    width = C
    if sequences is not None:
        place = place_of_program(sequences, 0, 0, N, K, False, BLOCK_K)
        mine = (place.N > longer) & (place.N <= most)
        N, K, width = tl.where(mine, place.N, 0), tl.where(mine, K, 0), tl.where(mine, C, 0)
        group = place.group.to(tl.int64)
    else:
        item = tl.program_id(0).to(tl.int64)
        place = Place(0, 0, item, item, 0, item * N, N, 0)
        group = item * K
    tokens = rows_of_tokens(q, place, stride_qb, stride_qh, stride_qn, stride_qd, ALIGN)
    metas = Rows(m + place.item * aligned(stride_mb, ALIGN), D, 1, None, K)
    values = rows_of_tokens(x, place, stride_xb, 0, stride_xn, stride_xc, ALIGN)
    values = Rows(values.start, values.stride, stride_xc, None, N)
    frame = Frame(mask, size, index, score, lse, weight, mass_out, place.token, group, place.group, N, K)
    if fill is not None:
        fill += place.batch * stride_fb + place.group * tl.full([], C, tl.int64)

    k = tl.arange(0, BLOCK_K)
    mass, count = _assign(tokens, metas, frame, k, inverse_temperature, D, HEADS, SIMILARITY, BLOCK_R, BLOCK_D)
    empty = mass == 0
    tl.store(mass_out + frame.group + k, mass, mask=k < K)
    tl.store(size_out + frame.group + k, count, mask=k < K)
    tl.debug_barrier()  # what other threads of this program stored is read from here on

    # Shares are rounded to the dtype of x, so the sum of the rounded ones divides: equal tokens keep their value.
    rounded = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, N, BLOCK_R):
        chosen, share = _shares(frame, first + tl.arange(0, BLOCK_R))
        share = share.to(x.dtype.element_ty).to(tl.float32)
        rounded += tl.sum(tl.where(chosen[:, None] == k[None, :], share[:, None], 0.0), 0)
    rounded = tl.where(rounded == 0, 1.0, rounded)
    if positions is not None:
        _merge_positions(positions + place.batch * stride_pb + place.origin * P, positions_out, frame, k, P, BLOCK_R)

    n = tl.arange(0, BLOCK_N)
    chosen, share = _shares(frame, n)
    shares = tl.where(chosen[None, :] == k[:, None], share.to(x.dtype.element_ty)[None, :], 0.0).to(x.dtype.element_ty)
    if shares.dtype == tl.float32 and not WIDEN:
        shares = to_tf32(shares)
    tile = Tile(values, rows_at(values, 0, n), (chosen >= 0)[:, None])
    spoiled = tl.zeros([BLOCK_N], tl.int32)
    for back in range(0, width, BLOCK_D):
        start = (C - 1) // BLOCK_D * BLOCK_D - back
        slice_of_x = features(tile, start, C, 1, BLOCK_D)
        spoiled += tl.sum((slice_of_x - slice_of_x != 0).to(tl.int32), 1)
        total = product(shares, slice_of_x, tl.zeros([BLOCK_K, BLOCK_D], tl.float32), "tf32", True)
        _store_means(y, fill, total, rounded, empty, frame, k, start, C)
    if tl.sum(spoiled, 0) > 0:
        tl.debug_barrier()
        _merge_one_by_one(y, fill, values, rounded, empty, frame, k, C, BLOCK_D)
    if order is not None:  # last, when registers are free
        sort_tokens(
            index + frame.token, rank + frame.token, order + frame.token, offsets + frame.group + place.item,
            N, K, BLOCK_N, SORTED_AT_ONCE,
        )  # fmt: skip


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
    sequences: Tensor | None = None,
) -> tuple[Merged, MergePlan]:
    C, x_strides = x.shape[2], x.stride()
    q = x if q is None else q
    places, B, H, N, K, D, align = paired(q, meta)
    rank = None
    fits = K <= MAX_GROUPS and precision(x.dtype) == "tf32"
    block_k = 16 if K <= 16 else 64 if K <= 64 else MAX_GROUPS
    sizes = (
        (64, MAX_TOKENS) if sequences is not None else (64,) if N <= 64 else (MAX_TOKENS,) if N <= MAX_TOKENS else ()
    )
    found = [(n, _config(x.device, n, block_k, x.element_size())) for n in sizes if fits]
    launches = [(n, config) for n, config in found if config is not None]
    P = 0 if positions is None else positions.shape[2]
    longest = max((n for n, _ in launches), default=0)
    if sequences is not None or not launches:
        plan = assign(q, meta, similarity, weight, mask, sequences, longest)
        merged = merge(x, plan, size, positions, "mean", fill)
        if sequences is not None:
            merged = merged._replace(order=None, offsets=None)
        if not launches:
            return merged, plan
    else:
        index = x.new_empty(B, N, dtype=torch.int32)
        score = x.new_empty(B, N, dtype=torch.float32)
        lse, w = (torch.empty_like(score) if weight == "softmax" else None for _ in range(2))
        plan = MergePlan(index, K, score, lse, w)
        size_out = score.new_empty(B, K)
        positions_out = None if positions is None else score.new_empty(B, K, P)
        y, mass, order, rank = x.new_empty(B, K, C), torch.empty_like(size_out), *map(torch.empty_like, (index, index))
        merged = Merged(y, size_out, positions_out, mass, order, index.new_empty(B, K + 1))
    longer = 0
    for most, config in launches:
        launch(
            assign_merge_kernel,
            (B if sequences is None else sequences.shape[0],),
            x, *x_strides, *places,
            dense(mask), dense(size), *items(positions), *items(fill),
            plan.index, plan.score, plan.lse, plan.weight, *merged, rank, told(sequences)[0], longer, most,
            N, K, 1.0 / similarity.temperature,
            config=config, C=C, D=D, P=P, HEADS=H, SIMILARITY=similarity.kind, ALIGN=gcd(align, alignment(x_strides)),
        )  # fmt: skip
        longer = most
    return merged, plan


def _bytes_needed(config: Config, block_n: int, block_k: int, itemsize: int) -> int:
    rows, width = config.blocks["BLOCK_R"], config.blocks["BLOCK_D"]
    similarity = config.num_stages * (rows + block_k) * width
    product = block_n * block_k + config.num_stages * block_n * width + block_k * width
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
    return *(Config(warps, stages, {**blocks, "BLOCK_D": width}) for width, stages in widths), None
