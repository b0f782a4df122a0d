"""How `match` splits tokens into src and dst, and which pairs a window lets meet. Pure tensor arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

PARTITIONS = ("alternate", "frames", "random2d")
Grid = tuple[int, int, int]


def destinations(
    partition: str | Tensor,
    num_tokens: int,
    num_prefix: int,
    grid: Grid | None,
    cell: tuple[int, int],
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """Bool `(1 or B, N)`: True where a token is dst. Prefix tokens are False here and never src either."""
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
        is_dst = torch.cat(
            [token.new_zeros(num_prefix, dtype=torch.bool), _random_cells(grid, cell, generator, device)]
        )[None]
    return is_dst & (token >= num_prefix)


def _random_cells(grid: Grid, cell: tuple[int, int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Bool `(T * H * W,)`: one True, drawn uniformly, in every whole sy x sx cell of every frame."""
    (t, h, w), (sy, sx) = grid, cell
    rows, cols = h // sy, w // sx
    draw_on = device if generator is None else generator.device
    pick = torch.randint(sy * sx, (t, rows, cols, 1), generator=generator, device=draw_on).to(device)
    inside = (pick == torch.arange(sy * sx, device=device)).view(t, rows, cols, sy, sx)
    is_dst = torch.zeros(t, h, w, dtype=torch.bool, device=device)
    is_dst[:, : rows * sy, : cols * sx] = inside.transpose(2, 3).reshape(t, rows * sy, cols * sx)
    return is_dst.flatten()


def num_destinations(
    partition: str | Tensor, num_tokens: int, num_prefix: int, grid: Grid | None, cell: tuple[int, int]
) -> int:
    """How many dst tokens a batch item has; known from shapes alone except for a mask, whose values are read."""
    if isinstance(partition, Tensor):
        return int(partition.reshape(-1, num_tokens)[0, num_prefix:].sum())
    if partition == "alternate":
        return num_tokens // 2 - num_prefix // 2
    assert grid is not None
    t, h, w = grid
    return t // 2 * h * w if partition == "frames" else t * (h // cell[0]) * (w // cell[1])


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


def window_lists(
    is_dst: Tensor, num_prefix: int, grid: Grid, window: Grid, bound: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Token indices per window, ascending and padded with -1: src `(1 or B, G, S)` and dst `(1 or B, G, T)`, int32.

    `bound` is (S, T): no window may hold more src or dst tokens than that.
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

    def compact(keep: Tensor, width: int) -> Tensor:
        ascending = torch.where(keep & (token < outside), token, outside).sort(dim=-1).values[..., :width]
        return torch.where(ascending < outside, ascending, -1).to(torch.int32)

    return compact(~dst_here, bound[0]), compact(dst_here, bound[1])


def window_bound(partition: str | Tensor, window: Grid) -> tuple[int, int]:
    """The most src and the most dst tokens that any one window can hold."""
    t, h, w = window
    if isinstance(partition, Tensor):
        return t * h * w, t * h * w
    if partition == "frames":
        return -(-t // 2) * h * w, -(-t // 2) * h * w
    return t * h * -(-w // 2), t * h * -(-w // 2)


def num_matchable(partition: str | Tensor, num_tokens: int, num_prefix: int, grid: Grid, window: Grid) -> int:
    """How many src tokens have a dst token in their window (for a mask: the fewest of any batch item)."""
    device = torch.device("cpu")
    if not isinstance(partition, Tensor):
        (t, h, w), (wt, _, ww) = grid, window
        if partition == "frames":
            frames = [range(start, min(start + wt, t)) for start in range(0, t, wt)]
            return sum(sum(f % 2 == 0 for f in here) for here in frames if any(f % 2 for f in here)) * h * w
        if ww > 1 and w % ww != 1:
            return num_tokens - num_prefix - num_destinations(partition, num_tokens, num_prefix, grid, (1, 1))
    is_dst = destinations(partition, num_tokens, num_prefix, grid, (1, 1), None, device)[:, num_prefix:]
    block = blocks(grid, window, device).expand_as(is_dst)
    has_dst = torch.zeros(is_dst.shape, dtype=torch.bool).scatter_reduce(1, block, is_dst, "amax")
    return int((~is_dst & has_dst.gather(1, block)).sum(1).min())
