"""How `match` splits tokens into src and dst, and which pairs a window lets meet. Pure tensor arithmetic.

`protected` is the tokens behind the prefix that are neither, ascending.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

PARTITIONS = ("alternate", "frames", "random2d")
Grid = tuple[int, int, int]


class Moved(NamedTuple):
    """The sequence with its protected tokens moved behind the prefix, where they are a longer prefix.

    Attributes:
        protected: bool `(N,)`: which tokens are moved there.
        place: int64 `(N,)`: where each token is now.
        token: int64 `(N,)`: which token is at each place.
    """

    protected: Tensor
    place: Tensor
    token: Tensor


def mark(protected: tuple[int, ...], num_tokens: int, device: torch.device) -> Tensor:
    """Bool `(N,)`: True at these tokens."""
    marked = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    return marked.index_fill(0, torch.tensor(protected, dtype=torch.int64, device=device), True)


def move(protected: tuple[int, ...], num_tokens: int, num_prefix: int, device: torch.device) -> Moved:
    n, is_protected = torch.arange(num_tokens, device=device), mark(protected, num_tokens, device)
    rank = is_protected.cumsum(0)
    place = torch.where(is_protected, num_prefix + rank - 1, n + (n >= num_prefix) * (len(protected) - rank))
    return Moved(is_protected, place, torch.zeros_like(n).scatter(0, place, n))


def destinations(
    partition: str | Tensor,
    num_tokens: int,
    num_prefix: int,
    grid: Grid | None,
    cell: tuple[int, int],
    generator: torch.Generator | None,
    device: torch.device,
    protected: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Bool `(1 or B, N)`: True where a token is dst. Prefix tokens and those of `protected`, bool `(N,)`, are False
    here and never src either. Of `mask`, bool `(B, N)`, "random2d" alone takes note."""
    token = torch.arange(num_tokens, device=device)
    if isinstance(partition, Tensor):
        is_dst = partition.to(device).reshape(-1, num_tokens)
    elif partition == "alternate":
        is_dst = (token % 2 == 1)[None]
    elif partition == "frames":
        assert grid is not None
        is_dst = ((token - num_prefix) // (grid[1] * grid[2]) % 2 == 1)[None]
    else:
        assert grid is not None
        free = None if protected is None else ~protected[num_prefix:]
        real = None if mask is None else mask[:, num_prefix:]
        drawn = _random_cells(grid, cell, generator, device, free, real)
        is_dst = torch.nn.functional.pad(drawn, (num_prefix, 0)).reshape(-1, num_tokens)
    is_dst = is_dst & (token >= num_prefix)
    return is_dst if protected is None else is_dst & ~protected


def _random_cells(
    grid: Grid,
    cell: tuple[int, int],
    generator: torch.Generator | None,
    device: torch.device,
    free: Tensor | None,
    real: Tensor | None,
) -> Tensor:
    """Bool `(T * H * W,)`: one True, drawn uniformly, in every whole sy x sx cell of every frame; where `free`, of the
    same shape, is given, one of those of the cell. With `real`, bool `(B, T * H * W)`, so is the result, and a cell
    whose draw is not real has another one that is, if it has any."""
    (t, h, w), (sy, sx) = grid, cell
    rows, cols = h // sy, w // sx
    draw_on = device if generator is None else generator.device

    def in_cells(marked: Tensor) -> Tensor:
        """(..., T * H * W) as (..., T, rows, cols, sy * sx)."""
        whole = marked.unflatten(-1, (t, h, w))[..., : rows * sy, : cols * sx]
        return whole.unflatten(-2, (rows, sy)).unflatten(-1, (cols, sx)).transpose(-3, -2).flatten(-2)

    def one_of(may: Tensor) -> Tensor:
        drawn = torch.rand((t, rows, cols, 1), generator=generator, device=draw_on).to(device)
        return may & (may.cumsum(-1) == (drawn * may.sum(-1, keepdim=True)).long() + 1)

    may = None if free is None else in_cells(free)
    if may is None:
        pick = torch.randint(sy * sx, (t, rows, cols, 1), generator=generator, device=draw_on).to(device)
        inside = pick == torch.arange(sy * sx, device=device)
    else:
        inside = one_of(may)
    if real is not None:
        may = in_cells(real) if may is None else in_cells(real) & may
        lost = may.any(-1, keepdim=True) & ~(inside & may).any(-1, keepdim=True)
        inside = torch.where(lost, one_of(may), inside)
    whole = inside.unflatten(-1, (sy, sx)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return torch.nn.functional.pad(whole, (0, w - cols * sx, 0, h - rows * sy)).flatten(-3)


def num_destinations(
    partition: str | Tensor,
    num_tokens: int,
    num_prefix: int,
    grid: Grid | None,
    cell: tuple[int, int],
    protected: tuple[int, ...] = (),
) -> int:
    """How many dst tokens a batch item has; known from shapes alone except for a mask, whose values are read and none
    of whose dst is protected."""
    if isinstance(partition, Tensor):
        return int(partition.reshape(-1, num_tokens)[0, num_prefix:].sum())
    if partition == "alternate":
        return num_tokens // 2 - num_prefix // 2 - sum(n % 2 for n in protected)
    assert grid is not None
    (t, h, w), (sy, sx) = grid, cell
    places = [((n - num_prefix) // (h * w), (n - num_prefix) // w % h, (n - num_prefix) % w) for n in protected]
    if partition == "frames":
        return t // 2 * h * w - sum(frame % 2 for frame, _, _ in places)
    in_cell = Counter((frame, y // sy, x // sx) for frame, y, x in places if y < h // sy * sy and x < w // sx * sx)
    return t * (h // sy) * (w // sx) - sum(count == sy * sx for count in in_cell.values())


def blocks(grid: Grid, window: Grid, device: torch.device) -> Tensor:
    """int64 `(T * H * W,)`: the window that each token of the grid lies in."""
    (t, h, w), (wt, wh, ww) = grid, window
    token = torch.arange(t * h * w, device=device)
    across, down = -(-w // ww), -(-h // wh)
    return (token // (h * w) // wt * down + token // w % h // wh) * across + token % w // ww


def lists(is_dst: Tensor, num_dst: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Token indices, ascending, of src `(1 or B, 1, S)` and dst `(1 or B, 1, T)`, int32."""
    num_src = is_dst.shape[1] - num_prefix - num_dst
    ascending = is_dst[:, num_prefix:].to(torch.uint8).argsort(dim=1, stable=True) + num_prefix
    return tuple(part[:, None].to(torch.int32) for part in ascending.split([num_src, num_dst], dim=1))


def alternate_lists(moved: Moved, num_prefix: int, protected: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Places, ascending, of src `(1, 1, S)` and dst `(1, 1, T)` of "alternate", int32."""
    last = moved.place.shape[0]
    place = torch.where(moved.protected, last, moved.place)

    def every_second(first: int) -> Tensor:
        ascending = place[first::2].sort().values
        width = ascending.shape[0] - sum((n - first) % 2 == 0 for n in protected)
        return ascending[:width].to(torch.int32)[None, None]

    odd = num_prefix % 2
    return every_second(num_prefix + odd), every_second(num_prefix + 1 - odd)


def window_lists(
    is_dst: Tensor, num_prefix: int, grid: Grid, window: Grid, bound: tuple[int, int], moved: Moved | None = None
) -> tuple[Tensor, Tensor]:
    """Token indices per window, ascending and padded with -1: src `(1 or B, G, S)` and dst `(1 or B, G, T)`, int32.

    `bound` is (S, T): no window may hold more src or dst tokens than that. With `moved`, places in place of tokens.
    """
    (t, h, w), (wt, wh, ww) = grid, window
    device = is_dst.device

    def axis(extent: int, step: int, stride: int) -> Tensor:
        at = torch.arange(-(-extent // step) * step, device=device)
        return torch.where(at < extent, at * stride, t * h * w).view(-1, step)

    token = (
        axis(t, wt, h * w)[:, None, None, :, None, None]
        + axis(h, wh, w)[None, :, None, None, :, None]
        + axis(w, ww, 1)[None, None, :, None, None, :]
    ).reshape(-1, wt * wh * ww)
    outside = t * h * w + num_prefix
    token = torch.where(token < t * h * w, token + num_prefix, outside)
    dst_here = torch.nn.functional.pad(is_dst, (0, 1))[:, token]
    if moved is not None:
        place = torch.where(moved.protected, outside, moved.place)
        token = torch.nn.functional.pad(place, (0, 1), value=outside)[token]

    def compact(keep: Tensor, width: int) -> Tensor:
        ascending = torch.where(keep & (token < outside), token, outside).sort(dim=-1).values[..., :width]
        return torch.where(ascending < outside, ascending, -1).to(torch.int32)

    return compact(~dst_here, bound[0]), compact(dst_here, bound[1])


def src_and_dst(
    partition: str | Tensor,
    is_dst: Tensor,
    num_prefix: int,
    grid: Grid | None,
    num_dst: int,
    window: Grid | None,
    protected: tuple[int, ...],
    moved: Moved | None,
) -> tuple[Tensor, Tensor]:
    """`window_lists` or, without a window, `lists`; with `moved` of places."""
    if window is not None:
        assert grid is not None
        return window_lists(is_dst, num_prefix, grid, window, window_bound(partition, window), moved)
    return lists(is_dst if moved is None else is_dst[:, moved.token], num_dst, num_prefix + len(protected))


def known_src_and_dst(
    partition: str,
    num_tokens: int,
    num_prefix: int,
    grid: Grid | None,
    num_dst: int,
    window: Grid | None,
    protected: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`src_and_dst` of "alternate" and "frames", which follow from these numbers."""
    moved = move(protected, num_tokens, num_prefix, device) if protected else None
    if moved is not None and window is None and partition == "alternate":
        return alternate_lists(moved, num_prefix, protected)
    kept = None if moved is None else moved.protected
    is_dst = destinations(partition, num_tokens, num_prefix, grid, (1, 1), None, device, kept)
    return src_and_dst(partition, is_dst, num_prefix, grid, num_dst, window, protected, moved)


class PackedLists(NamedTuple):
    """The src and dst of packed sequences.

    Attributes:
        src, dst: int32 `(1, G, S)` and `(1, G, T)`, as of `window_lists`, of the windows of all sequences one after
            another; a sequence without windows is one, and long ones come first.
        most: how many tokens of each sequence may merge.
        pairs: how many pairs of src and dst are compared.
    """

    src: Tensor
    dst: Tensor
    most: tuple[int, ...]
    pairs: int


def packed_lists(
    partition: str | Tensor, lengths: tuple[int, ...], num_prefix: int, grids: Sequence[Grid | None],
    window: Grid | None, kept: Tensor,
) -> PackedLists:  # fmt: skip
    """On the CPU, where it is looked at how long they are. A partition other than by name is bool `(T,)`, True = dst;
    `kept`, bool `(T,)`, are tokens that are neither."""
    S, T = len(lengths), len(kept)
    token, length = torch.arange(T), torch.tensor(lengths)
    sequence = torch.arange(S).repeat_interleave(length, output_size=T)
    in_sequence = token - (length.cumsum(0) - length)[sequence]
    place = in_sequence - num_prefix

    def of_each(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers)[sequence]

    shapes = [(1, 1, 1) if grid is None else grid for grid in grids]
    frame = of_each([h * w for _, h, w in shapes]) if window is not None or isinstance(partition, str) else place
    if isinstance(partition, Tensor):
        is_dst = partition.to(kept.device)
    else:
        is_dst = (in_sequence if partition == "alternate" else place // frame) % 2 == 1
    num_windows, block = S, sequence
    if window is not None:
        t, h, w = window
        across, down = ([-(-grid[axis] // window[axis]) for grid in shapes] for axis in (2, 1))
        count = [
            -(-grid[0] // t) * a * b if n else 0 for grid, n, a, b in zip(shapes, lengths, across, down, strict=True)
        ]
        num_windows, before = sum(count), [0, *accumulate(count)][:-1]
        columns = of_each([grid[2] for grid in shapes])
        row = place // frame // t * of_each(down) + place % frame // columns // h
        block = of_each(before) + row * of_each(across) + place % columns // w

    stays = kept | (place < 0)
    key = torch.where(stays, 2 * num_windows, 2 * block + is_dst)
    counts = key.bincount(minlength=2 * num_windows + 1)
    listed = key.argsort(stable=True)[: T - int(counts[-1])]
    key = key[listed]
    sizes = counts[:-1].view(-1, 2)
    num_src, num_dst = (max(1, int(most)) for most in sizes.amax(0))
    lists = torch.full((2 * num_windows, max(num_src, num_dst)), -1, dtype=torch.int32)
    lists[key, torch.arange(len(key)) - (counts.cumsum(0) - counts)[key]] = listed.to(torch.int32)
    lists = lists.view(num_windows, 2, -1)
    if window is None:
        lists = lists[length.argsort(descending=True)]  # what takes longest begins first
    src, dst = lists.unbind(1)

    matchable = sizes[:, 0] * (sizes[:, 1] > 0)
    if window is None:
        most = matchable.tolist()
    else:
        ends = torch.nn.functional.pad(matchable.cumsum(0), (1, 0))[torch.tensor([*before, num_windows])]
        most = ends.diff().tolist()
    if isinstance(partition, str) and partition == "alternate":
        free = torch.zeros(S, dtype=torch.int64).index_add(0, sequence, (~stays).long())
        most = torch.tensor(most).minimum(free // 2).tolist()
    pairs = int(sizes.prod(1).sum())
    return PackedLists(src[None, :, :num_src].contiguous(), dst[None, :, :num_dst].contiguous(), tuple(most), pairs)


def window_bound(partition: str | Tensor, window: Grid) -> tuple[int, int]:
    """The most src and the most dst tokens that any one window can hold."""
    t, h, w = window
    if isinstance(partition, Tensor):
        return t * h * w, t * h * w
    if partition == "frames":
        return -(-t // 2) * h * w, -(-t // 2) * h * w
    return t * h * -(-w // 2), t * h * -(-w // 2)


def num_matchable(
    partition: str | Tensor,
    num_tokens: int,
    num_prefix: int,
    grid: Grid,
    window: Grid,
    protected: tuple[int, ...] = (),
) -> int:
    """How many src tokens have a dst token in their window (for a mask, whose values are read: the fewest of any item
    of the batch)."""
    if isinstance(partition, Tensor):
        device = torch.device("cpu")
        kept = mark(protected, num_tokens, device)
        is_dst = destinations(partition, num_tokens, num_prefix, grid, (1, 1), None, device, kept)[:, num_prefix:]
        block = blocks(grid, window, device).expand_as(is_dst)
        has_dst = torch.zeros_like(is_dst).scatter_reduce(1, block, is_dst, "amax")
        return int((~is_dst & ~kept[num_prefix:] & has_dst.gather(1, block)).sum(1).min())
    if partition == "alternate" and not protected and window[2] > 1 and grid[2] % window[2] != 1:
        return num_tokens - num_prefix - num_destinations(partition, num_tokens, num_prefix, grid, (1, 1))
    return _num_matchable_by_name(partition, num_prefix, grid, window, protected)


def _num_matchable_by_name(
    partition: str, num_prefix: int, grid: Grid, window: Grid, protected: tuple[int, ...]
) -> int:
    """Without tensors, which hold no values while a program is exported: a token is dst where `first` and the strides
    times its coordinates add up to an odd number."""
    by_frame = partition == "frames"
    first, strides = (0, (1, 0, 0)) if by_frame else (num_prefix, (grid[1] * grid[2], grid[2], 1))

    def pieces(extent: int, step: int, stride: int) -> list[tuple[int, int]]:
        """How many coordinates of each piece of an axis give even and odd numbers."""
        ranges = [range(start, min(start + step, extent)) for start in range(0, extent, step)]
        odd = [sum(at * stride % 2 for at in here) for here in ranges]
        return [(len(here) - n, n) for here, n in zip(ranges, odd, strict=True)]

    axes = [pieces(*axis) for axis in zip(grid, window, strides, strict=True)]

    def src_and_dst_of(counts: Sequence[tuple[int, int]]) -> list[int]:
        even, odd = (1, 0) if first % 2 == 0 else (0, 1)
        for e, o in counts:
            even, odd = even * e + odd * o, even * o + odd * e
        return [even, odd]

    total = 0
    for alike in product(*(Counter(axis).items() for axis in axes)):
        src, dst = src_and_dst_of([counts for counts, _ in alike])
        total += math.prod(times for _, times in alike) * (src if dst else 0)
    changed: dict[tuple[int, ...], list[int]] = {}
    for n in protected:
        at = n - num_prefix
        place = at // (grid[1] * grid[2]), at // grid[2] % grid[1], at % grid[2]
        key = tuple(coordinate // step for coordinate, step in zip(place, window, strict=True))
        if key not in changed:
            changed[key] = src_and_dst_of([axis[k] for axis, k in zip(axes, key, strict=True)])
            total -= changed[key][0] if changed[key][1] else 0
        changed[key][(first + sum(s * c for s, c in zip(strides, place, strict=True))) % 2] -= 1
    return total + sum(src for src, dst in changed.values() if dst)


def clamped(
    r: int,
    partition: str | Tensor,
    num_tokens: int,
    num_prefix: int,
    num_dst: int,
    windows: tuple[Grid, Grid] | None = None,
    protected: tuple[int, ...] = (),
) -> int:
    """r, at most the src with a dst to go to, and of "alternate" at most half of the tokens, as in ToMe.

    `windows` is a grid and the window that tiles it. Extents are spelled so that tracers can compare them.
    """
    tokens = num_tokens - num_prefix - len(protected)
    alternate = isinstance(partition, str) and partition == "alternate"
    if alternate:
        r = min(r, tokens // 2)
    if windows is not None:
        return min(r, num_matchable(partition, num_tokens, num_prefix, *windows, protected))
    if alternate and not protected:  # half of the tokens are no more than the src
        return r
    num_src = tokens - num_dst
    if alternate:
        num_src = (num_tokens + 1) // 2 - (num_prefix + 1) // 2 - sum(n % 2 == 0 for n in protected)
    return min(r, num_src) if num_dst > 0 else 0


def most_groups(
    r: int,
    partition: str | Tensor,
    num_tokens: int,
    num_prefix: int,
    grid: Grid | None,
    in_windows: bool,
    protected: tuple[int, ...],
    whole: bool,
    all_merge: bool,
) -> int:
    """The most groups of any item that merges r tokens, or as many as it can: N - r, or all if not `all_merge`.

    Unless the items are `whole`, padding may be at their end: then all tokens up to the first dst may stay.
    """
    if not all_merge:
        return num_tokens
    if whole or (isinstance(partition, str) and not protected):
        return num_tokens - r
    if in_windows or (isinstance(partition, str) and partition == "random2d"):
        return num_tokens
    if isinstance(partition, Tensor):
        first = partition.reshape(-1, num_tokens)[:, num_prefix:].to(torch.uint8).argmax(1)
        return max(num_tokens - r, num_prefix + int(first.max()))
    frame = 1 if grid is None or partition == "alternate" else grid[1] * grid[2]
    origin = 0 if partition == "alternate" else num_prefix
    dst = (n for n in range(num_prefix, num_tokens) if (n - origin) // frame % 2 and n not in protected)
    return max(num_tokens - r, next(dst, 0))


def amounts(each: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 `(B,)`."""
    return torch.tensor(each, dtype=torch.int32, device=device)
