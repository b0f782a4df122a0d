"""match: every src finds its most similar dst, the best r merge, and the index map and its CSR follow on the device.

`nearest_kernel` streams the dst of a tile of src and keeps the best; `select_kernel`, one program per batch item, finds
the r-th highest score by four passes over the digits of its bits, numbers the groups, and up to `ONE_PROGRAM` tokens
sorts the tokens by group: two launches, three with `merge`. Two things take more: the mean over heads is taken by a
launch of its own when several programs would read it again, and longer sequences are sorted by `csr.sort_chunks`.
Where every src merges nothing is selected: the groups of dst follow from their places, and tokens are only sorted.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import INTERPRET, Config, configured, fixed
from sttm_kernels.impl.triton.csr import ONE_PROGRAM, SORT, sort_chunks, sort_tokens
from sttm_kernels.impl.triton.launch import launch
from sttm_kernels.impl.triton.layout import alignment, by_heads, dense
from sttm_kernels.impl.triton.similarity import (
    Tile,
    features,
    inverse_norm,
    power_of_two,
    precision,
    products,
    resident,
    rows_at,
    rows_of_item,
    sum_of_squares,
    tile_of_program,
    tile_of_sequence,
    told,
)
from sttm_kernels.plan import MatchBounds, MergePlan, Packed
from sttm_kernels.sequences import TILE

NO_PARTNER = tl.constexpr(-1)
"""In place of a partner: a src token that has no dst token to go to, a dst token, a prefix token, no real token."""
IS_DST = tl.constexpr(-2)
IS_PREFIX = tl.constexpr(-3)
IS_MASKED = tl.constexpr(-4)
FIRST_STAY = tl.constexpr(-5)
"""Less k: a token that stays in group k."""
TILE_SRC = tl.constexpr(TILE // 2)
"""Src in a tile of the table of sequences."""


@triton.jit(do_not_specialize=["N", "stride_b", "stride_h", "stride_n"], do_not_specialize_on_alignment=["stride_d"])
def mean_over_heads_kernel(
    metric, stride_b, stride_h, stride_n, stride_d, mean, N,
    D: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens."""
    _, first, item = tile_of_program(N, BLOCK_N)
    tokens = rows_of_item(metric, item, stride_b, stride_h, stride_n, stride_d, N, ALIGN)
    lanes = tl.arange(0, BLOCK_N)
    n = first + lanes
    tile = Tile(tokens, rows_at(tokens, first, lanes), (n < N)[:, None])
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        values = features(tile, start, D, HEADS, BLOCK_D)
        tl.store(mean + (item * N + n[:, None]) * D + d, values, mask=tile.inside & (d < D))


@triton.jit(
    do_not_specialize=[
        "N", "windows", "num_src", "num_dst", "num_prefix", "stride_b", "stride_h", "stride_n", "stride_src",
        "stride_dst", "halvings", "num_sequences", "whole",
    ],
    do_not_specialize_on_alignment=["stride_d"],
)  # fmt: skip
def nearest_kernel(
    metric, stride_b, stride_h, stride_n, stride_d,
    src, stride_src, dst, stride_dst, mask, score, partner, sequences, num_sequences, halvings,
    N, windows, num_src, num_dst, num_prefix, whole,
    D: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of the src of a window, or of one of the `sequences`, among which it finds its own by so
    many `halvings`. A similarity that is not a number counts as -inf.

    Every token gets a score and a partner: dst and prefix tokens are shared out among the programs. If `whole`, all src
    merge, without lists and masks, and every token gets its group in place of a partner.
    """
    if sequences is not None:
        row, tile = tile_of_sequence(sequences, num_sequences, halvings, tl.program_id(0), BLOCK_S, TILE_SRC)
        origin, N = tl.load(row).to(tl.int64), tl.load(row + 1)
        window, item = 0, tl.full([], 0, tl.int64)
        num_dst = tl.maximum(N - num_prefix + num_prefix % 2, 0) // 2
        num_src = tl.maximum(N - num_prefix, 0) - num_dst
        tiles = tl.maximum(tl.cdiv(num_src, BLOCK_S), 1)
        # More programs than tiles, where they are small beside the tiles of the table: these have nothing to do.
        num_src, num_dst = tl.where(tile < tiles, num_src, 0), tl.where(tile < tiles, num_dst, 0)
        score += origin
        partner += origin
    else:
        tiles = tl.maximum(tl.cdiv(num_src, BLOCK_S), 1)
        tile = tl.program_id(0) % tiles
        window = tl.program_id(0) // tiles % windows
        item = (tl.program_id(0) // tiles // windows).to(tl.int64)
        origin = 0
    score += item * N
    partner += item * N
    if mask is not None:
        mask += item * N
    tokens = rows_of_item(metric, item, stride_b, stride_h, stride_n, stride_d, N, ALIGN)
    first_dst = num_prefix + 1 - num_prefix % 2
    listed = num_dst
    if src is not None:
        src += item * stride_src + window * tl.cast(num_src, tl.int64)
        dst += item * stride_dst + window * tl.cast(num_dst, tl.int64)
        any_dst = tl.load(dst, mask=num_dst > 0, other=-1) >= 0
    else:
        any_dst = num_dst > 0

    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    token = _token(src, s, num_src, num_prefix + num_prefix % 2, N)
    if src is not None:
        listed = tl.where(tl.max(token, 0) >= 0, _listed(dst, num_dst, BLOCK_T), 0)
    own = Tile(tokens, rows_at(tokens, origin, token), (token >= 0)[:, None])
    values, _ = resident(own, D, HEADS, False, BLOCK_D)
    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, listed, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        partner_token = _token(dst, t, num_dst, first_dst, N)
        real = _real(mask, partner_token)
        other = Tile(tokens, rows_at(tokens, origin, partner_token), real[:, None])
        dot, sq = products(values, own, other, D, HEADS, True, PRECISION, BLOCK_D)
        S = dot * inverse_norm(sq)[None, :]
        S = tl.where(real[None, :] & (S == S), S, float("-inf"))
        top = tl.max(S, 1)
        at = tl.min(tl.where(S == top[:, None], t[None, :], 2147483647), 1)
        higher = top > best  # strictly, and the lowest t within a tile: a tie goes to the lowest dst
        best = tl.where(higher, top, best)
        best_at = tl.where(higher, at, best_at)

    best *= inverse_norm(sum_of_squares(own, D, HEADS, BLOCK_D))
    best = tl.where(any_dst & (best == best), best, float("-inf"))
    chosen = tl.where(any_dst, _token(dst, best_at, num_dst, first_dst, N), NO_PARTNER)
    if mask is not None:
        real = _real(mask, token)
        chosen = tl.where(real, tl.where(_real(mask, chosen), chosen, NO_PARTNER), IS_MASKED)
        best = tl.where(real, best, float("-inf"))
    chosen = tl.where(whole != 0, num_prefix + best_at, chosen)
    tl.store(score + token, best, mask=token >= 0)
    tl.store(partner + token, chosen.to(tl.int32), mask=token >= 0)

    for start in range(tile * BLOCK_S, num_dst, tiles * BLOCK_S):
        t = start + tl.arange(0, BLOCK_S)
        role = tl.where(whole != 0, num_prefix + t, IS_DST)
        _mark(score, partner, mask, _token(dst, t, num_dst, first_dst, N), role)
    if tile + window == 0:
        for start in range(0, num_prefix, BLOCK_S):
            n = start + tl.arange(0, BLOCK_S)
            role = tl.where(whole != 0, n, IS_PREFIX)
            _mark(score, partner, mask, tl.where(n < num_prefix, n, -1).to(tl.int64), role)


@triton.jit
def _token(tokens, at, count, first, N):
    """Tokens `at` these places of a list, int64; without a list every second one from `first` on. -1 outside."""
    inside = at < count
    if tokens is not None:
        token = tl.load(tokens + at, mask=inside, other=-1)
    else:
        token = tl.where(inside, first + 2 * at, -1)
    return tl.where((token >= 0) & (token < N), token, -1).to(tl.int64)


@triton.jit
def _listed(tokens, count, BLOCK: tl.constexpr):
    """Up to where blocks of a list have tokens, which come first."""
    end = 0
    for start in range(0, count, BLOCK * 128):
        at = start + tl.arange(0, 128) * BLOCK
        end += BLOCK * tl.sum((tl.load(tokens + at, mask=at < count, other=-1) >= 0).to(tl.int32), 0)
    return tl.minimum(end, count)


@triton.jit
def _real(mask, token):
    """Which of these are tokens, and real ones."""
    here = token >= 0
    if mask is not None:
        here = tl.load(mask + token, mask=here, other=0) != 0
    return here


@triton.jit
def _mark(score, partner, mask, token, role):
    here = token >= 0
    tl.store(score + token, tl.full(token.shape, float("-inf"), tl.float32), mask=here)
    if mask is not None:
        role = tl.where(_real(mask, token), role, IS_MASKED)
    tl.store(partner + token, role, mask=here)


@triton.jit
def _candidates(score, partner, start, N, BLOCK: tl.constexpr):
    """Tokens from `start` on: their partner, and as unsigned integers in the same order their scores."""
    n = start + tl.arange(0, BLOCK)
    other = tl.load(partner + n, mask=n < N, other=IS_PREFIX)
    value = tl.load(score + n, mask=n < N, other=float("-inf"))
    return n, other, _key(value)


@triton.jit
def _key(value):
    value = tl.where(value == 0, 0.0, value)  # -0 equals 0
    bits = value.to(tl.uint32, bitcast=True)
    sign = tl.full(bits.shape, 0x80000000, tl.uint32)
    ones = tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    return bits ^ tl.where((bits & sign) != 0, ones, sign)


@triton.jit
def _select(
    score, partner, index, N, K, r, num_prefix, first_group, floor, FEWER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The groups of the tokens of one item, numbered from `first_group`; of scores above `floor` if FEWER."""
    # The r-th highest score, digit by digit, and how many of the tokens that have exactly it are among the r.
    need = r
    num_src, able = 0, 0
    threshold = tl.full([], 0, tl.uint32)
    digits = tl.arange(0, 256)
    for step in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, N, BLOCK):
            _, other, key = _candidates(score, partner, start, N, BLOCK)
            live = other >= 0
            if step == 0:
                num_src += tl.sum((other >= NO_PARTNER).to(tl.int32), 0)
                if FEWER:
                    able += tl.sum((live & (key > floor)).to(tl.int32), 0)
            else:
                live = live & (key >> (32 - 8 * step) == threshold)
            counts += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=live)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.maximum(tl.sum((at_least >= need).to(tl.int32), 0) - 1, 0)
        need -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        threshold = (threshold << 8) | digit.to(tl.uint32)

    merges_in_all = r
    if FEWER:
        need = tl.where(threshold > floor, need, 0)
        threshold = tl.maximum(threshold, floor)
        merges_in_all = tl.minimum(r, able)

    # Groups of all tokens but the merged ones, which take that of their partner once it is written.
    first_dst = num_prefix + num_src - merges_in_all
    ties, unmerged, dst = 0, 0, 0
    for start in range(0, N, BLOCK):
        n, other, key = _candidates(score, partner, start, N, BLOCK)
        tie = (other >= 0) & (key == threshold)
        tie_rank = ties + tl.cumsum(tie.to(tl.int32), 0)
        merges = ((other >= 0) & (key > threshold)) | (tie & (tie_rank <= need))
        is_dst = other == IS_DST
        stays = (other >= NO_PARTNER) & (merges == 0)
        counted = tl.cumsum(is_dst.to(tl.int32) * 65536 + stays.to(tl.int32), 0)
        group = tl.where(is_dst, first_dst + dst + (counted >> 16) - 1, num_prefix + unmerged + (counted & 65535) - 1)
        group = tl.where(other == IS_PREFIX, n, tl.where(other <= FIRST_STAY, FIRST_STAY - other, group))
        group = first_group + tl.minimum(group, K - 1)
        tl.store(index + n, tl.where(merges | (other == IS_MASKED), -1, group), mask=n < N)
        ties += tl.sum(tie.to(tl.int32), 0)
        unmerged += tl.sum(stays.to(tl.int32), 0)
        dst += tl.sum(is_dst.to(tl.int32), 0)
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        merged = tl.load(index + n, mask=n < N, other=0) < 0
        other = tl.load(partner + n, mask=merged, other=0)
        merged = merged & (other >= 0)
        group = tl.load(index + other, mask=merged, other=0)
        tl.debug_barrier()  # threads may share a token
        tl.store(index + n, group, mask=merged)
    tl.debug_barrier()


@triton.jit
def _settle(score, partner, start, N, BLOCK: tl.constexpr):
    """Of a sequence that starts at token `start`, whose src and dst were listed, as if it were alone: partners counted
    from its start, and for tokens of no list the group that they stay in. Returns how many these are."""
    before = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        other = tl.load(partner + n, mask=n < N, other=IS_DST)
        stays = other == IS_PREFIX
        group = before + tl.cumsum(stays.to(tl.int32), 0) - 1
        before += tl.sum(stays.to(tl.int32), 0)
        own = tl.where(other >= 0, other - start, other).to(tl.int32)
        tl.debug_barrier()  # threads may share a token
        tl.store(partner + n, tl.where(stays, FIRST_STAY - group, own), mask=n < N)
        tl.store(score + n, tl.full([BLOCK], float("-inf"), tl.float32), mask=stays)
    tl.debug_barrier()
    return before


@triton.jit(do_not_specialize=["N", "K", "r", "num_prefix", "selecting", "sorting"])
def select_kernel(
    score, partner, limit, least, index, order, offsets, sequences, N, K, r, num_prefix, selecting, sorting,
    FEWER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """One program per batch item, of whose src r merge; fewer, if FEWER, where `limit` says so or fewer have a partner
    and a score above `least`. The groups are there already unless `selecting`; sorts the tokens by them, if `sorting`,
    in the place of `partner`.

    Of `sequences` each is an item, whose groups are numbered from its first one; sorted they are together. If
    `selecting` is 2, their src and dst were listed, and tokens without a partner of any kind stay."""
    item = tl.program_id(0).to(tl.int64)
    first_group = 0
    if sequences is not None:
        row = sequences + item * 6
        start = tl.load(row).to(tl.int64)
        N, first_group, K, r = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
        item = tl.full([], 0, tl.int64)
        score += start
        partner += start
        index += start
        if selecting == 2:
            num_prefix = _settle(score, partner, start, N, BLOCK)
    if limit is not None:
        r = tl.minimum(r, tl.load(limit + item))
    score += item * N
    partner += item * N
    index += item * N

    if selecting != 0:
        floor = tl.full([], 0, tl.uint32)
        if least is not None:
            floor = _key(tl.full([], least, tl.float32))
        _select(score, partner, index, N, K, r, num_prefix, first_group, floor, FEWER, BLOCK)
    if sorting != 0:
        sort_tokens(index, partner, order + item * N, offsets + item * (K + 1), N, K, BLOCK, BLOCK_PAIRS)


READ_AGAIN = 2
"""The most programs per batch item that each take the mean over heads of all dst."""
RESIDENT = 128
"""Features that a tile of src keeps on chip; with more, both sides are read block by block for every tile."""


def _shared_nearest(config: Config, dtype: torch.dtype, exact: bool, D: int) -> int:
    s, t, d = (config.blocks[name] for name in ("BLOCK_S", "BLOCK_T", "BLOCK_D"))
    if d >= D:
        return dtype.itemsize * d * (s + config.num_stages * t)
    return dtype.itemsize * d * (s + t) * config.num_stages


@configured("nearest", _shared_nearest)
def _nearest_config(arch: int, dtype: torch.dtype, exact: bool, D: int) -> tuple[Config, ...]:
    if exact:
        shapes = [(8, 2, 64, 64, 16)]
    elif D <= RESIDENT:
        shapes = [(4, 3, 64, 128 if arch < 100 else 64, power_of_two(D)), (4, 2, 64, 64, power_of_two(D))]
    else:
        width = 64 if dtype != torch.float32 else 32
        shapes = [(8, 3, 128, 128 if arch >= 90 else 64, width), (4, 3, 64, 64, width)]
    return tuple(Config(w, st, {"BLOCK_S": s, "BLOCK_T": t, "BLOCK_D": d}) for w, st, s, t, d in shapes)


def _mean_over_heads(metric: Tensor) -> Tensor:
    (B, H, N, D), strides = metric.shape, metric.stride()
    # The interpreter cuts bfloat16 off where a GPU rounds.
    mean = metric.new_empty(B, N, D, dtype=torch.float32 if INTERPRET else metric.dtype)
    config = _mean_config(metric.device, D)
    launch(
        mean_over_heads_kernel,
        (B * -(-N // config.blocks["BLOCK_N"]),),
        metric, *strides, mean, N,
        config=config, D=D, HEADS=H, ALIGN=alignment(strides),
    )  # fmt: skip
    return mean


@configured("mean_over_heads")
def _mean_config(arch: int, D: int) -> tuple[Config, ...]:
    block_d = min(power_of_two(D), 128)
    return (Config(4, 1, {"BLOCK_N": 2048 // block_d, "BLOCK_D": block_d}),)


def match(
    metric: Tensor, r: int, num_prefix: int, src: Tensor | None, dst: Tensor | None, bounds: MatchBounds | None = None
) -> MergePlan:
    (B, H, N, D), strides = by_heads(metric)
    K, mask, limit, threshold = bounds or MatchBounds(N - r)
    if src is None or dst is None:
        windows, num_dst = 1, (N - num_prefix + num_prefix % 2) // 2
        num_src = N - num_prefix - num_dst
        lists: tuple[Tensor | int | None, ...] = (None, 0, None, 0)
    else:
        src, dst = src.contiguous(), dst.contiguous()
        windows, num_src, num_dst = src.shape[1], src.shape[2], dst.shape[2]
        lists = (src, src.stride(0) * (src.shape[0] > 1), dst, dst.stride(0) * (dst.shape[0] > 1))
    rounding = precision(metric.dtype)
    config = _nearest_config(metric.device, metric.dtype, rounding == "ieee", D)
    tiles = max(1, -(-num_src // config.blocks["BLOCK_S"]))
    if H > 1 and tiles > READ_AGAIN:
        metric = _mean_over_heads(metric)
        (_, H, _, _), strides = by_heads(metric)

    score = metric.new_empty(B, N, dtype=torch.float32)
    index = metric.new_empty(B, N, dtype=torch.int32)
    partner = torch.empty_like(index)
    whole = src is None and bounds is None and 0 < num_src <= r
    launch(
        nearest_kernel,
        (B * windows * tiles,),
        metric, *strides, *lists, dense(mask), score, index if whole else partner, None, 0, 0,
        N, windows, num_src, num_dst, num_prefix, int(whole),
        config=config, D=D, HEADS=H, ALIGN=alignment(strides), PRECISION=rounding,
    )  # fmt: skip
    least = threshold if threshold > -math.inf else None
    select = score, partner, dense(limit), least, index
    numbers, config, fewer = (N, K, r, num_prefix), fixed("select", SORT), bounds is not None
    if mask is not None:  # without an order, which takes a group for every token
        launch(select_kernel, (B,), *select, index, index, None, *numbers, 1, 0, config=config, FEWER=fewer)
        return MergePlan(index, K, score)
    order, offsets = torch.empty_like(index), index.new_empty(B, K + 1)
    sorting = N <= ONE_PROGRAM
    if sorting or not whole:
        steps = int(not whole), int(sorting)
        launch(select_kernel, (B,), *select, order, offsets, None, *numbers, *steps, config=config, FEWER=fewer)
    if not sorting:
        sort_chunks(index, order, offsets)
    return MergePlan(index, K, score, order=order, offsets=offsets)


def match_packed(
    metric: Tensor, num_prefix: int, packed: Packed, src: Tensor | None = None, dst: Tensor | None = None
) -> MergePlan:
    (_, H, T, D), strides = by_heads(metric)
    K, sequences, tiles, _, threshold = packed
    sequences, S = sequences.contiguous(), sequences.shape[0]
    rounding = precision(metric.dtype)
    config = _nearest_config(metric.device, metric.dtype, rounding == "ieee", D)
    if H > 1:
        metric = _mean_over_heads(metric)
        (_, H, _, _), strides = by_heads(metric)
    score = metric.new_empty(1, T, dtype=torch.float32)
    index = metric.new_empty(1, T, dtype=torch.int32)
    lists: tuple[Tensor | None, int, Tensor | None, int]
    if src is None or dst is None:
        partner, lists, windows = torch.empty_like(index), (None, 0, None, 0), (1, 0, 0)
        programs, where = tiles * max(1, TILE // 2 // config.blocks["BLOCK_S"]), told(sequences)
    else:  # windows of one row, whatever sequences they are of
        partner = torch.full_like(index, IS_PREFIX.value)
        lists, windows = (src.contiguous(), 0, dst.contiguous(), 0), (src.shape[1], src.shape[2], dst.shape[2])
        programs, where = src.shape[1] * -(-src.shape[2] // config.blocks["BLOCK_S"]), (None, 0, 0)
    launch(
        nearest_kernel,
        (programs,),
        metric, *strides, *lists, None, score, partner, *where,
        T, *windows, 0 if src is not None else num_prefix, 0,
        config=config, D=D, HEADS=H, ALIGN=alignment(strides), PRECISION=rounding,
    )  # fmt: skip
    fewer = threshold > -math.inf
    launch(
        select_kernel, (S,), score, partner, None, threshold if fewer else None, index, index, index, sequences,
        T, K, 0, num_prefix, 1 if src is None else 2, 0,
        config=fixed("select", SORT), FEWER=fewer,
    )  # fmt: skip
    order, offsets = torch.empty_like(index), index.new_empty(1, K + 1)
    sort_chunks(index, order, offsets)
    return MergePlan(index, K, score, order=order, offsets=offsets)
