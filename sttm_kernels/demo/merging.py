"""One clip through STTM, stage by stage, and where its groups go."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sttm_kernels.functional import assign, merge
from sttm_kernels.nn.generators import KMeans
from sttm_kernels.nn.sttm import STTM, Grid, Keep, grid_positions
from sttm_kernels.plan import MergedTokens, MergePlan

NEARNESS = 1.0
"""What a patch of distance counts beside a unit of colour within a frame. Through time colour alone counts: an object
may go far."""
TEMPERATURE = 10.0


@dataclass(frozen=True)
class Stage:
    """What one stage of STTM did.

    Attributes:
        tokens: that came out, with counts and (t, y, x) positions.
        plan: from the tokens that went in.
        seconds: it took.
    """

    tokens: MergedTokens
    plan: MergePlan
    seconds: float

    @property
    def empty(self) -> int:
        """How many of its groups no token went to."""
        return int((self.tokens.size == 0).sum())


class Spread(nn.Module):
    """Meta tokens far from each other and with many tokens near: k-means++ without its dice, then k-means.

    The next one is the token of most size times squared distance to those there are. See
    `sttm_kernels.nn.generators` for what a generator is given and returns.
    """

    def __init__(self, rounds: int, impl: str = "auto") -> None:
        super().__init__()
        self.rounds = rounds
        self.impl = impl

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square"
    ) -> Tensor:
        size = torch.ones_like(q[..., 0]) if size is None else size
        everything = MergePlan(torch.zeros_like(size, dtype=torch.int32), 1)
        chosen = [merge(q, everything, size, impl=self.impl).x]
        squared = self._squared(q, chosen[0])
        for i in range(num_meta):
            best = (squared * size).argmax(1)
            chosen.append(q.gather(1, best[:, None, None].expand(-1, -1, q.shape[-1])))
            here = self._squared(q, chosen[-1])
            squared = here if i == 0 else torch.minimum(squared, here)
        meta = torch.cat(chosen[1:], 1)
        for _ in range(self.rounds):
            plan = assign(q, meta, "l2", weight="uniform", impl=self.impl)
            meta = merge(q, plan, size, fill=meta, impl=self.impl).x
        return meta

    def _squared(self, q: Tensor, point: Tensor) -> Tensor:
        score = assign(q, point, "l2", weight="uniform", impl=self.impl).score
        assert score is not None
        return -score


def merge_clip(x: Tensor, grid: Grid, spatial_keep: Keep, temporal_keep: Keep, impl: str) -> tuple[Stage, Stage]:
    """Merges the tokens of a clip in every frame, then through time.

    Each stage is an `STTM` of its own, so that it can be timed and has its own metric: colour and place within a frame,
    colour alone through time.

    Args:
        x: `(1, T * H * W, C)` from `patch_tokens`.
        grid: (T, H, W).
        spatial_keep, temporal_keep, impl: of `STTM`.
    """
    shared: dict[str, Any] = {"motion": False, "similarity": "l2", "temperature": TEMPERATURE, "impl": impl}
    spatial = STTM(x.shape[-1], spatial_keep, None, KMeans(2, "l2", impl), **shared)
    temporal = STTM(x.shape[-1], None, temporal_keep, Spread(4, impl), **shared)
    ones = torch.ones_like(x[..., 0])
    positions = grid_positions(grid, 0, x.dtype, x.device)[None]

    metric = torch.cat([x, NEARNESS * positions[..., 1:]], -1)
    first = _run(spatial, grid, MergedTokens(x, ones, positions), metric)
    second = _run(temporal, spatial.output_grid(grid), first.tokens, first.tokens.x)
    return first, second


def _run(sttm: STTM, grid: Grid, tokens: MergedTokens, metric: Tensor) -> Stage:
    def stage() -> Any:
        return sttm(tokens.x, grid, tokens.size, tokens.positions, metric, return_plan=True)

    if tokens.x.is_cuda:
        stage()  # compiles and loads kernels, which is not to be timed
    start = time.perf_counter()
    merged, plan = stage()
    if tokens.x.is_cuda:
        torch.cuda.synchronize(tokens.x.device)
    return Stage(merged, plan, time.perf_counter() - start)


def centres(
    positions: Tensor,
    plan: MergePlan,
    frames: int,
    size: Tensor | None = None,
    reduce: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Where every group is in every frame: the positions of its tokens merged once more, by group and frame.

    Args:
        positions: `(1, T * M, 3)`, (t, y, x) of M tokens a frame, frame after frame; for instance those that the
            spatial stage aggregated.
        plan: from these tokens to K groups.
        frames: T.
        size: `(1, T * M)`, the counts behind the tokens.
        reduce: of `merge`. "first" keeps the position of one token a group, which is what merging leaves that does
            not aggregate positions.
        impl: of `merge`.

    Returns:
        `(K, T, 2)`, (y, x) in the units of positions; NaN where a group has no token.
    """
    frame = torch.arange(positions.shape[1], device=positions.device) * frames // positions.shape[1]
    taking_part = plan.index >= 0 if size is None else (plan.index >= 0) & (size > 0)
    cell = torch.where(taking_part, plan.index * frames + frame, -1).to(torch.int32)
    merged = merge(positions, MergePlan(cell, plan.num_groups * frames), size, reduce=reduce, impl=impl)
    paths = merged.x[0, :, 1:].masked_fill((merged.size[0] == 0)[:, None], torch.nan)
    return paths.view(plan.num_groups, frames, 2)
