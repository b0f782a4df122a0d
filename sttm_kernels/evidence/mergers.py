"""What STTM is compared with, each a module that is called as STTM is and leaves as many tokens as it is told.

    merger(x, grid, size, positions, metric, return_plan) -> MergedTokens, or that and the plan
    merger.output_grid(grid) -> (1, 1, K)

Without a metric, similarity is that of x. What is drawn at random comes from PyTorch's generator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels.functional import assign, compose, match, merge, soft_merge
from sttm_kernels.nn.generators import Distinct, pool_plan
from sttm_kernels.nn.sttm import STTM, Grid, Motion
from sttm_kernels.plan import MergedTokens, MergePlan


class Merger(nn.Module):
    """Merges along the plan that a contender's `plan` finds."""

    def keep(self, tokens: int) -> int:
        """How many are left of so many."""
        raise NotImplementedError

    def plan(self, x: Tensor, grid: Grid, metric: Tensor) -> MergePlan:
        raise NotImplementedError

    def output_grid(self, grid: Grid) -> Grid:
        return 1, 1, self.keep(math.prod(grid))

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        size: Tensor | None = None,
        positions: Tensor | None = None,
        metric: Tensor | None = None,
        return_plan: bool = False,
    ) -> MergedTokens | tuple[MergedTokens, MergePlan]:
        plan = self.plan(x.detach(), grid, (x if metric is None else metric).detach())
        out = merge(x, plan, size, positions)
        return (out, plan) if return_plan else out


class Counted(Merger):
    """Leaves `count` tokens of however many."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def keep(self, tokens: int) -> int:
        return self.count


class Drop(Counted):
    """Keeps the tokens that `chosen` picks, `(B, count)`, ascending; the others are gone."""

    def chosen(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def plan(self, x: Tensor, grid: Grid, metric: Tensor) -> MergePlan:
        index = torch.full(x.shape[:2], -1, dtype=torch.int32, device=x.device)
        group = torch.arange(self.count, dtype=torch.int32, device=x.device).expand(len(x), -1)
        return MergePlan(index.scatter_(1, self.chosen(x), group), self.count)


def _drawn(x: Tensor, keep: int) -> Tensor:
    """Tokens drawn at random, another draw for every clip: `(B, keep)`, ascending."""
    return torch.rand(x.shape[:2], device=x.device).argsort(1)[:, :keep].sort(1).values


class RandomDrop(Drop):
    """Keeps tokens drawn at random."""

    def chosen(self, x: Tensor) -> Tensor:
        return _drawn(x, self.count)


class NormPruning(Drop):
    """Keeps the tokens of largest norm."""

    def chosen(self, x: Tensor) -> Tensor:
        return x.norm(dim=-1).argsort(dim=1, descending=True, stable=True)[:, : self.count].sort(1).values


class RandomMerging(Counted):
    """Every token that is not drawn to stay goes to one that is, drawn at random too."""

    def plan(self, x: Tensor, grid: Grid, metric: Tensor) -> MergePlan:
        index = torch.randint(self.count, x.shape[:2], dtype=torch.int32, device=x.device)
        group = torch.arange(self.count, dtype=torch.int32, device=x.device).expand(len(x), -1)
        return MergePlan(index.scatter_(1, _drawn(x, self.count), group), self.count)


class AveragePooling(Counted):
    """The mean over cells of the grid: first within frames, then over two frames where that leaves too many."""

    def plan(self, x: Tensor, grid: Grid, metric: Tensor) -> MergePlan:
        frames, height, width = grid
        in_frame = -(-self.count // frames) if 2 * self.count >= len(x[0]) else -(-2 * self.count // frames)
        in_frame = min(in_frame, height * width)
        space = pool_plan(height, width, in_frame, frames, "square", x.device)
        first = in_frame * torch.arange(frames, dtype=torch.int32, device=x.device)[:, None]
        space = MergePlan((space.index + first).reshape(1, -1).expand(len(x), -1).contiguous(), frames * in_frame)
        return compose(space, pool_plan(frames, in_frame, self.count, len(x), "tall", x.device))


class Matching(Merger):
    """Token Merging (Bolya et al., arXiv 2210.09461): the r most similar pairs of every second token with the others.

    One matching takes away half of the tokens at most: that is all, or with `again` what is left is matched again.
    `window` is that of the first matching.
    """

    def __init__(self, r: int, again: bool = False, window: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.r = r
        self.again = again
        self.window = window

    def keep(self, tokens: int) -> int:
        return tokens - (self.r if self.again else min(self.r, tokens // 2))

    def plan(self, x: Tensor, grid: Grid, metric: Tensor) -> MergePlan:
        keep = self.keep(x.shape[1])
        whole = plan = match(metric, x.shape[1] - keep, grid=grid if self.window else None, window=self.window)
        while whole.num_groups > keep:
            metric = merge(metric.mean(1) if metric.dim() == 4 else metric, plan).x
            plan = match(metric, whole.num_groups - keep)
            whole = compose(whole, plan)
        return whole


class Near(nn.Module):
    """A generator told positions and stage: the distinct tokens, where what is near counts as alike.

    The distance of two tokens is |q_n / |q_n| - q_m / |q_m||^2 + (nearness * |p_n - p_m|)^2, of positions in frames and
    patches; `nearness` is one number for each stage.
    """

    told = ("positions", "stage")

    def __init__(self, spatial: float, temporal: float) -> None:
        super().__init__()
        self.nearness = {"spatial": spatial, "temporal": temporal}

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square", *,
        positions: Tensor, stage: str,
    ) -> Tensor:  # fmt: skip
        placed = torch.cat((F.normalize(q, dim=-1), self.nearness[stage] * positions[..., :3]), -1).detach()
        chosen = Distinct.choose(placed, num_meta, None if size is None else size.detach(), "l2", "auto")
        return q.gather(1, chosen[..., None].expand(-1, -1, q.shape[-1]))


class PlacedMotion(STTM):
    """STTM whose motion features see positions centred in the grid and of unit variance over it, or, without `means`,
    extents and correlations alone.

    Other arguments are STTM's.
    """

    centre: Tensor
    deviation: Tensor

    def __init__(self, dim: int, *args: Any, grid: Grid, means: bool = True, **settings: Any) -> None:
        super().__init__(dim, *args, **settings)
        extent = torch.tensor(grid)
        self.register_buffer("centre", (extent - 1) / 2, persistent=False)
        self.register_buffer("deviation", ((extent**2 - 1) / 12) ** 0.5, persistent=False)
        self.means = means
        if not means:
            self.motion = Motion(6, dim)

    def _motion_input(self, positions: Tensor) -> Tensor:
        seen = super()._motion_input(positions)
        means = (seen[..., :3] - self.centre) / self.deviation
        return torch.cat((means, seen[..., 3:]), -1) if self.means else seen[..., 3:]


class SoftMerging(nn.Module):
    """STTM's two stages by `soft_merge`: every token into every meta token, no groups.

    Its plan is where tokens would go by hard assignment. `keep` tokens of each frame, then of each window of frames.
    """

    def __init__(self, in_frame: int, in_window: int, window: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.keep = in_frame, in_window
        self.window = window
        self.temperature = temperature
        self.generator = Distinct()

    def output_grid(self, grid: Grid) -> Grid:
        return grid[0] // self.window, 1, self.keep[1]

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        size: Tensor | None = None,
        positions: Tensor | None = None,
        metric: Tensor | None = None,
        return_plan: bool = False,
    ) -> MergedTokens | tuple[MergedTokens, MergePlan]:
        B, (frames, height, width) = len(x), grid
        stages = (frames, (height, width), "square"), (frames // self.window, (self.window, self.keep[0]), "tall")
        plans: list[MergePlan] = []
        for keep, (parts, shape, cells) in zip(self.keep, stages, strict=True):
            q = x.reshape(B * parts, -1, x.shape[-1])
            size = None if size is None else size.reshape(B * parts, -1)
            meta = self.generator(q, *shape, keep, size, cells)
            out = soft_merge(q, q, meta, temperature=self.temperature, size=size)
            out = MergedTokens(out.x.reshape(B, parts * keep, -1), out.size.reshape(B, -1))
            x, size = out.x, out.size
            if return_plan:
                first = keep * torch.arange(parts, dtype=torch.int32, device=x.device)[:, None]
                index = assign(q, meta, weight="uniform").index.view(B, parts, -1) + first
                plans.append(MergePlan(index.flatten(1), parts * keep))
        return (out, compose(plans[0], plans[1])) if return_plan else out
