"""The tokens of each group, in token order, from an index: a stable counting sort without atomics.

A token's place is where its group starts plus how many tokens of the group come before it. Tokens are counted in
blocks, in order, by comparing all pairs of a block; a cursor per group carries the count from one block to the next.
Up to ONE_PROGRAM tokens one program sorts a batch item, in one launch. More are cut into chunks that count at once,
each with cursors of its own; these are then added up from chunk to chunk, and the tokens placed: three launches.

Tokens without a group count as group K: they follow all others in `order`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sttm_kernels.impl.triton.config import Config, fixed
from sttm_kernels.impl.triton.launch import launch

ONE_PROGRAM = 4096
"""The most tokens that one program sorts."""
MAX_CHUNKS = 32
LEAST_CHUNK = 1024


@triton.jit
def group_of(index, n, inside, K):
    group = tl.load(index + n, mask=inside, other=-1)
    return tl.where((group >= 0) & (group < K), group, K)


@triton.jit
def count_tokens(index, rank, cursor, first, end, K, BLOCK: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """rank_n = how many of tokens [first, n) are in the group of n, for n < end; leaves the sizes at `cursor`."""
    for start in range(0, K + 1, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tl.store(cursor + k, tl.zeros([BLOCK], tl.int32), mask=k <= K)
    tl.debug_barrier()
    at = tl.arange(0, BLOCK_PAIRS)
    earlier = at[None, :] < at[:, None]
    for start in range(first, end, BLOCK_PAIRS):
        n = start + at
        inside = n < end
        group = tl.where(inside, group_of(index, n, inside, K), -1)
        # Two counts in one sum: how many are in my group (low half) and how many of these come before me (high half).
        pairs = tl.where(earlier, 65537, 1)
        pairs = tl.sum(tl.where(group[:, None] == group[None, :], pairs, 0), 1)
        before, members = pairs >> 16, pairs & 65535
        seen = tl.load(cursor + group, mask=inside, other=0)
        tl.store(rank + n, seen + before, mask=inside)
        tl.debug_barrier()
        tl.store(cursor + group, seen + members, mask=inside & (before + 1 == members))
        tl.debug_barrier()


@triton.jit
def sort_tokens(index, rank, order, offsets, N, K, BLOCK: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """`order` and `offsets` of one batch item by one program. All pointers are those of the item."""
    count_tokens(index, rank, offsets, 0, N, K, BLOCK, BLOCK_PAIRS)
    placed = 0
    for start in range(0, K + 1, BLOCK):
        k = start + tl.arange(0, BLOCK)
        members = tl.load(offsets + k, mask=k <= K, other=0)
        tl.debug_barrier()  # starts take the places of the counts
        tl.store(offsets + k, placed + tl.cumsum(members, 0) - members, mask=k <= K)
        placed += tl.sum(members, 0)
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < N
        group = group_of(index, n, inside, K)
        at = tl.load(offsets + group, mask=inside, other=0) + tl.load(rank + n, mask=inside, other=0)
        tl.store(order + at, n, mask=inside)


@triton.jit(do_not_specialize=["N", "K"])
def sort_kernel(index, groups, N, K, BLOCK: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """One program per batch item; ranks go behind what `csr` returns."""
    item, B = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    order = groups + item * N
    offsets = groups + B * N + item * (K + 1)
    sort_tokens(index + item * N, order + B * (N + K + 1), order, offsets, N, K, BLOCK, BLOCK_PAIRS)


@triton.jit(do_not_specialize=["N", "K", "chunk", "chunks"])
def count_kernel(index, rank, cursor, N, K, chunk, chunks, BLOCK: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """One program per chunk of tokens of a batch item; `cursor` is (B, chunks, K + 1)."""
    row = tl.program_id(0).to(tl.int64)
    item, first = row // chunks, tl.program_id(0) % chunks * chunk
    end = tl.minimum(first + chunk, N)
    count_tokens(
        index + item * N, rank + item * N, cursor + row * (K + 1), first, end, K, BLOCK, BLOCK_PAIRS
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "K", "chunks"], do_not_specialize_on_alignment=["offsets"])
def start_kernel(index, cursor, offsets, N, K, chunks, BLOCK: tl.constexpr):
    """One program per block of groups of a batch item: where they start, and from where each chunk fills them."""
    tiles = tl.cdiv(K + 1, BLOCK)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK
    k = first + tl.arange(0, BLOCK)
    below = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        group = group_of(index + item * N, n, n < N, K)
        below += ((n < N) & (group < first)).to(tl.int32)
    members = tl.zeros([BLOCK], tl.int32)
    at = cursor + item * chunks * (K + 1) + k
    for _ in range(chunks):
        here = tl.load(at, mask=k <= K, other=0)
        tl.debug_barrier()  # threads may share an element
        tl.store(at, members, mask=k <= K)
        members += here
        at += K + 1
    starts = tl.sum(below, 0) + tl.cumsum(members, 0) - members
    tl.store(offsets + item * (K + 1) + k, starts, mask=k <= K)


@triton.jit(do_not_specialize=["N", "K", "chunk", "chunks"], do_not_specialize_on_alignment=["offsets"])
def place_kernel(index, rank, cursor, order, offsets, N, K, chunk, chunks, BLOCK: tl.constexpr):
    """One program per block of tokens of a batch item."""
    tiles = tl.cdiv(N, BLOCK)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    group = group_of(index + item * N, n, inside, K)
    row = item * chunks + n // chunk
    at = tl.load(offsets + item * (K + 1) + group, mask=inside, other=0)
    at += tl.load(cursor + row * (K + 1) + group, mask=inside, other=0)
    at += tl.load(rank + item * N + n, mask=inside, other=0)
    tl.store(order + item * N + at, n, mask=inside)


SORT = Config(16, 1, {"BLOCK": 2048, "BLOCK_PAIRS": 64})  # more pairs than 64 spill
COUNT = Config(16, 1, {"BLOCK": 1024, "BLOCK_PAIRS": 64})
PLACE = Config(4, 1, {"BLOCK": 1024})


def csr(index: Tensor, num_groups: int) -> Tensor:
    """`order` (B, N) and behind it `offsets` (B, K + 1) of an index (B, N), contiguous, in one allocation."""
    (B, N), K = index.shape, num_groups
    if N <= ONE_PROGRAM:
        groups = index.new_empty(B * (2 * N + K + 1))
        launch(sort_kernel, (B,), index, groups, N, K, config=fixed("sort", SORT))
    else:
        groups = index.new_empty(B * (N + K + 1))
        sort_chunks(index, *parts(groups, B, N, K))
    return groups


def parts(groups: Tensor, B: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of what `csr` returns; where the second starts, and so how it is aligned, varies with N."""
    return groups[: B * N].view(B, N), groups[B * N : B * (N + K + 1)].view(B, K + 1)


def sort_chunks(index: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Fills `order` and `offsets` by several programs per batch item."""
    (B, N), K = index.shape, offsets.shape[1] - 1
    count, place = fixed("count", COUNT), fixed("place", PLACE)
    block = count.blocks["BLOCK_PAIRS"]
    chunk = -(-max(LEAST_CHUNK, -(-N // MAX_CHUNKS)) // block) * block
    chunks = -(-N // chunk)
    rank = torch.empty_like(index)
    cursor = index.new_empty(B, chunks, K + 1)
    launch(count_kernel, (B * chunks,), index, rank, cursor, N, K, chunk, chunks, config=count)
    tiles = -(-(K + 1) // place.blocks["BLOCK"])
    launch(start_kernel, (B * tiles,), index, cursor, offsets, N, K, chunks, config=place)
    tiles = -(-N // place.blocks["BLOCK"])
    args = (index, rank, cursor, order, offsets, N, K, chunk, chunks)
    launch(place_kernel, (B * tiles,), *args, config=place)
