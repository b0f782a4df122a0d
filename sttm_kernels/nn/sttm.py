"""The Spatial-temporal Token Merger: tokens of one object become one token, in space and then in time."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels import packed, sequences, validate
from sttm_kernels.autocast import without_autocast
from sttm_kernels.functional import assign_merge, check_rows, compose, merge, size_and_positions
from sttm_kernels.nn.generators import make
from sttm_kernels.plan import MergedTokens, MergePlan
from sttm_kernels.reference import acc_dtype, mean_over_heads

Grid = tuple[int, int, int]
Keep = float | int | None


def checked_keep(name: str, keep: Keep) -> Keep:
    """Checked, as a number of Python."""
    if keep is None:
        return None
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise TypeError(f"{name} must be a float, an int or None, got {type(keep).__name__}")
    if keep < 1 if isinstance(keep, numbers.Integral) else not 0 < keep <= 1:
        raise ValueError(f"{name} must be a fraction in (0, 1] or a count of at least 1, got {keep}")
    return int(keep) if isinstance(keep, numbers.Integral) else float(keep)


def kept_count(name: str, keep: Keep, tokens: int) -> int:
    """The number of meta tokens that `keep` means for so many tokens."""
    assert keep is not None
    if isinstance(keep, float):
        return max(1, int(keep * tokens + 0.5))
    if keep > tokens:
        raise ValueError(f"{name} must be at most the {tokens} tokens there are to merge, got {keep}")
    return keep


def grid_positions(grid: Grid, num_prefix: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(num_prefix + T * H * W, 3)`: (t, y, x) in frames, patch rows and patch columns; 0 for prefix tokens."""
    axes = [torch.arange(extent, dtype=dtype, device=device) for extent in grid]
    return F.pad(torch.cartesian_prod(*axes), (0, 0, num_prefix, 0))


def grids_of(grid: Grid | Sequence[Grid] | Tensor) -> list[Grid]:
    """The grid of each clip, from one, one for each, or an integer tensor `(clips, 3)` on the CPU."""
    if isinstance(grid, Tensor):
        if grid.device.type != "cpu" or grid.is_floating_point():
            raise ValueError(
                f"grid must be of integers on the CPU, where it is read without waiting for a device, got {grid.dtype} "
                f"on {grid.device}"
            )
        grid = grid.tolist()
    if not isinstance(grid, (tuple, list)) or len(grid) == 0:
        raise ValueError(f"grid must be (T, H, W), or one of each clip, got {grid!r}")
    several = isinstance(grid[0], (tuple, list, Tensor))
    each = [tuple(g.tolist()) if isinstance(g, Tensor) else g for g in (grid if several else [grid])]
    return [validate.extents("grid", g, 3, "(T, H, W)") for g in each]


def nearest_place(positions: Tensor, grid: Grid) -> Tensor:
    """int64 `(B, K)`: the token of the grid nearest to each of the positions `(B, K, 3 or more)`, (t, y, x) first."""
    t, y, x = positions[..., :3].detach().round().long().unbind(-1)
    return (t * grid[1] + y) * grid[2] + x


class _Tokens(NamedTuple):
    """The tokens between stages, prefix aside; q is None where the metric is x, size where every token counts 1, mask
    where all are real."""

    x: Tensor
    q: Tensor | None
    size: Tensor | None
    positions: Tensor
    mask: Tensor | None


def _spread(variances: Tensor, covariances: Tensor) -> Tensor:
    """Central second moments `(..., 3)` of (tt, yy, xx) and (ty, tx, yx) on one scale, each about 1 wide: how many
    times as far as a token a group extends along each axis, as a logarithm, and correlations. A token, a cell of 1
    frame by 1 patch by 1 patch, has the variance 1 / 12 itself, so that nothing is divided by 0 and a lone token has 0
    in all."""
    extent = (12 * variances.clamp_min(0) + 1).log() / 2  # rounding may leave less than 0
    t, y, x = extent.unbind(-1)
    return torch.cat((extent, 12 * covariances * torch.stack((-t - y, -t - x, -y - x), -1).exp()), -1)


def _products(p: Tensor) -> Tensor:
    """(tt, ty, tx, yy, yx, xx) of (t, y, x)."""
    t, y, x = p.unbind(-1)
    return torch.stack((t * t, t * y, t * x, y * y, y * x, x * x), -1)


class Motion(nn.Linear):
    """The bias-free linear map of positions that motion features are; zero at first. It computes in the dtype of the
    positions, whatever its own, and has a class of its own: quantisation leaves it, of a few columns, as it is."""

    def __init__(self, positions: int, dim: int) -> None:
        super().__init__(positions, dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, positions: Tensor) -> Tensor:
        """Column after column, for the bits of a library's product may depend on how many rows it has."""
        rows = self.weight.to(positions.dtype).T.contiguous()  # along which products are faster
        columns = zip(positions.split(1, -1), rows.unbind(), strict=True)
        return reduce(torch.add, (p * w for p, w in columns))


class STTM(nn.Module):
    """Spatial-temporal token merger.

    (1) Spatial: in every frame, a generator gives K_s meta tokens; every token is assigned to one, and each group is
    merged. (2) Temporal: the T * K_s survivors of a clip, or of each of its temporal windows, are merged into K_t in
    the same way. Counts and positions ride along through both. (3) Motion: out_k = y_k + W p_k, with p_k the aggregated
    position of the group and W a bias-free linear map that starts at zero.

    Args:
        dim: C, the width of the tokens.
        spatial_keep: K_s as a fraction of the H * W tokens of a frame, a float in (0, 1] (to the nearest count, at
            least 1), or as a count, an int: note that 1.0 is all and 1 is one. None leaves the stage out.
        temporal_keep: K_t, likewise, of the T * K_s survivors of a clip or of the tokens of each temporal window.
        meta: the generator: "pool", "kmeans", "distinct", "farthest", "topk", "learned", "dpc_knn", of which each
            stage gets its own, or a module, which both stages share. See `sttm_kernels.nn.generators`. A module whose
            attribute `told` names "positions" or "stage" is given them by name.
        motion: whether to add motion features.
        num_prefix: how many tokens at the front (class, distillation, registers) are left as they are, bit for bit.
        similarity, temperature, weight: of `sttm_kernels.assign`. The parameters of "topk" and "learned" learn through
            the weights of tokens alone: not with `weight="uniform"`, nor from a single meta token.
        temporal_window: how many frames the temporal stage looks at together; None is the whole clip.
        second_moment: also aggregate the products (tt, ty, tx, yy, yx, xx) of positions, so that the motion features
            see how far a group spreads and which way it moves. Beside the 3 means, W then takes the logarithms of the
            group's extents in t, y and x, log(12 var + 1) / 2, 0 for a single token, and the correlations ty, tx and yx
            of cells of 1 frame by 1 patch by 1 patch, 12 cov / sqrt((12 var + 1)(12 var' + 1)): all of about one scale,
            where the moments themselves differ by a factor of 50.
        impl: of the verbs, see `help(sttm_kernels)`.
        metric_dim: D of the metric features that meta tokens are made from, if `forward` is given others than x.

    State: `motion.weight` `(dim, 3)`, or `(dim, 9)` with `second_moment`, and the generators' parameters under
    `spatial_meta.` and `temporal_meta.`; nothing else.

    Precision: autocast is disabled inside; the verbs run in the dtypes they are given, motion in float32 (float64 for
    float64 tokens), and the result has x's dtype.

    Source: Feng et al., Efficient Video Transformers via Spatial-temporal Token Merging for Action Recognition,
    doi 10.1145/3633781. The defaults here are choices of this package; the abstract leaves them open.
    """

    def __init__(
        self,
        dim: int,
        spatial_keep: Keep = 0.5,
        temporal_keep: Keep = 0.5,
        meta: str | nn.Module = "distinct",
        motion: bool = True,
        *,
        num_prefix: int = 0,
        similarity: str = "cosine",
        temperature: float = 0.1,
        weight: str = "softmax",
        temporal_window: int | None = None,
        second_moment: bool = False,
        impl: str = "auto",
        metric_dim: int | None = None,
    ) -> None:
        super().__init__()
        validate.integer("dim", dim, 1)
        width = dim if metric_dim is None else validate.integer("metric_dim", metric_dim, 1)
        validate.one_of("similarity", similarity, validate.SIMILARITIES)
        validate.positive("temperature", temperature)
        validate.one_of("weight", weight, validate.WEIGHTS)
        if temporal_window is not None:
            temporal_window = validate.integer("temporal_window", temporal_window, 1)
        self.dim = dim
        self.spatial_keep = checked_keep("spatial_keep", spatial_keep)
        self.temporal_keep = checked_keep("temporal_keep", temporal_keep)
        self.num_prefix = validate.integer("num_prefix", num_prefix, 0)
        self.similarity = similarity
        self.temperature = temperature
        self.weight = weight
        self.temporal_window = temporal_window
        self.second_moment = second_moment
        self.impl = impl
        self.spatial_meta = None if spatial_keep is None else make(meta, width, similarity, impl)
        self.temporal_meta = None if temporal_keep is None else make(meta, width, similarity, impl)
        self.motion = Motion(9 if second_moment else 3, dim) if motion else None

    def output_grid(self, grid: Grid) -> Grid:
        """The grid (T, H, W) of the tokens that come out, for the next STTM.

        Spatial only: (T, 1, K_s). With the temporal stage: (number of windows, 1, K_t).
        """
        frames, height, width = validate.extents("grid", grid, 3, "(T, H, W)")
        if self.spatial_keep is not None:
            height, width = 1, kept_count("spatial_keep", self.spatial_keep, height * width)
        if self.temporal_keep is not None:
            window = self._window(frames)
            width = kept_count("temporal_keep", self.temporal_keep, window * height * width)
            frames, height = frames // window, 1
        return frames, height, width

    def forward(
        self,
        x: Tensor,
        grid: Grid | Sequence[Grid] | Tensor,
        size: Tensor | None = None,
        positions: Tensor | None = None,
        metric: Tensor | None = None,
        return_plan: bool = False,
        mask: Tensor | None = None,
    ) -> MergedTokens | tuple[MergedTokens, MergePlan]:
        """Merges the tokens of each clip.

        Args:
            x: `(B, N, C)`, N = num_prefix + T * H * W, frame after frame, row after row. Or `(sum of N, C)`, clips of
                any grids one after another, each with its prefix; then what is `(B, N, ...)` below is `(sum of N, ...)`
                and `(B, H, N, D)` is `(H, sum of N, D)`.
            grid: (T, H, W); of clips one after another that of each, as a sequence or an integer tensor `(clips, 3)` on
                the CPU.
            size: `(B, N)`, how many tokens stand behind each; default ones.
            positions: `(B, N, 3)` or `(N, 3)`, (t, y, x) in frames, patch rows and patch columns; default the
                coordinates in the grid, 0 for prefix tokens. Or 9 channels, with the products that an earlier STTM with
                `second_moment` aggregated.
            metric: `(B, N, D)` or `(B, H, N, D)`, what similarity is measured on, the mean over heads; default x.
            return_plan: also return the plan that leads from the N tokens to those that come out: where tokens went,
                without their weights, so that `merge(x, plan)` takes plain means.
            mask: bool `(B, N)`, True = a real token. The others, frames at the end of a short clip, or rows and columns
                of small frames, take part in nothing, whatever they hold. Counts of meta tokens are of the whole grid;
                where they are the same for a clip without its padding (`keep` is a number, or padding fills temporal
                windows), its groups are those of that clip, in the same order, and followed by empty ones. For a
                fraction of each clip's own tokens give the clips one after another, which need no mask.

        Returns:
            `MergedTokens` with x `(B, num_prefix + K, C)` in x's dtype, size and positions; or that and a `MergePlan`.
            A group that nothing went to has size 0 and x, positions and motion 0: attention must leave it out, as
            `sttm_kernels.nn.proportional_attention` does.
            Of clips one after another, packed, with their `lengths`: each has the counts and the bits that it has
            alone. Clips of one grid are merged together, other grids one after another.

        Differentiable: x and positions with respect to x, metric, size, positions and all parameters. The choice of
        groups is not, nor is the plan.

        Errors: `TypeError` for a wrong type or dtype; `ValueError` for a wrong shape or device, a grid that does not
        hold the tokens or that temporal windows do not divide, and a count of meta tokens above the tokens there are.
        """
        if packed.without_batch(x):
            out, plan = self._of_each(x, grids_of(grid), size, positions, metric, return_plan, mask)
        else:
            shape = validate.extents("grid", grid, 3, "(T, H, W)")
            out, plan = self._of_batch(x, shape, size, positions, metric, return_plan, mask)
        return out if plan is None else (out, plan)

    def _of_batch(
        self, x: Tensor, grid: Grid, size: Tensor | None, positions: Tensor | None, metric: Tensor | None,
        return_plan: bool, mask: Tensor | None,
    ) -> tuple[MergedTokens, MergePlan | None]:  # fmt: skip
        frames, height, width = grid
        self._check(x, frames * height * width, grid, metric)
        acc, prefix = acc_dtype(x.dtype), self.num_prefix
        if positions is None:
            positions = grid_positions((frames, height, width), prefix, acc, x.device)
        size, positions = size_and_positions(x, size, positions)
        assert positions is not None
        if mask is not None:
            validate.boolean("mask", mask)
            validate.beside("mask", mask, "(B, N)", (x.shape[0], x.shape[1]), "x", x)
            size = mask.to(acc) if size is None else torch.where(mask, size, 0)
            if metric is not None:
                metric = None if metric is x else torch.where(mask[..., None], mean_over_heads(metric), 0)
            x, positions = (torch.where(mask[..., None], t, 0) for t in (x, positions))
        positions = self._with_products(positions)

        with without_autocast(x.device.type):
            q = None if metric is None or metric is x else mean_over_heads(metric)[:, prefix:]
            size_here, mask_here = (None if t is None else t[:, prefix:] for t in (size, mask))
            here = _Tokens(x[:, prefix:], q, size_here, positions[:, prefix:], mask_here)
            plans = []
            if self.spatial_meta is not None:
                num_meta = kept_count("spatial_keep", self.spatial_keep, height * width)
                here, plan = self._stage("spatial", here, frames, (height, width), num_meta)
                plans.append(plan)
                height, width = 1, num_meta
            if self.temporal_meta is not None:
                window = self._window(frames)
                num_meta = kept_count("temporal_keep", self.temporal_keep, window * height * width)
                shape = (window, height * width)
                here, plan = self._stage("temporal", here, frames // window, shape, num_meta)
                plans.append(plan)

            y = here.x
            if self.motion is not None:
                y = (y.to(acc) + self.motion(self._motion_input(here.positions))).to(x.dtype)
            ones = torch.ones(x.shape[:2], dtype=acc, device=x.device) if size is None else size
            kept = ones if here.size is None else torch.cat((ones[:, :prefix], here.size), 1)
            out = MergedTokens(
                torch.cat((x[:, :prefix], y), 1), kept, torch.cat((positions[:, :prefix], here.positions), 1)
            )
        return out, self._whole_plan(plans, x, mask) if return_plan else None

    def _of_each(
        self, x: Tensor, grids: Sequence[Grid], size: Tensor | None, positions: Tensor | None, metric: Tensor | None,
        return_plan: bool, mask: Tensor | None,
    ) -> tuple[MergedTokens, MergePlan | None]:  # fmt: skip
        """Clips one after another; those of one grid are a batch."""
        lengths = tuple(self.num_prefix + math.prod(grid) for grid in grids)
        if sum(lengths) != x.shape[0]:
            raise ValueError(
                f"grid must hold the {x.shape[0]} tokens of x, {self.num_prefix} of every clip before it, got "
                f"{list(grids)}, with which they are {sum(lengths)}"
            )
        if mask is not None:
            raise ValueError(
                f"mask must be None for clips one after another, whose tokens are all real, got {type(mask).__name__}"
            )
        row, _ = packed.checked("x", x, lengths, None, "(T, C)", 2)
        validate.shape("x", x, "(sum of N, C)", (x.shape[0], self.dim))
        q, size, positions = packed.beside(row, None if metric is x else metric, size, positions, "metric")
        given = {"x": row, "size": size, "positions": None if positions is None else positions[None], "metric": q}
        parts = {
            name: packed.split(value, lengths, -2 if name == "metric" else 1)
            for name, value in given.items()
            if value is not None
        }
        alike: dict[Grid, list[int]] = {}
        for clip, each in enumerate(grids):
            alike.setdefault(each, []).append(clip)

        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        plans: dict[int, MergePlan] = {}
        for each, clips in alike.items():
            own: dict[str, Any] = dict.fromkeys(given)
            own |= {name: torch.cat([of_clip[clip] for clip in clips]) for name, of_clip in parts.items()}
            out, plan = self._of_batch(grid=each, mask=None, return_plan=return_plan, **own)
            assert out.positions is not None
            found |= zip(clips, zip(out.x, out.size, out.positions, strict=True), strict=True)
            if plan is not None:
                indices = zip(clips, plan.index, strict=True)
                plans |= {clip: MergePlan(index[None], plan.num_groups) for clip, index in indices}
        merged = [found[clip] for clip in range(len(grids))]
        y, sizes, places = (torch.cat(tensors) for tensors in zip(*merged, strict=True))
        out = MergedTokens(y, sizes, places, tuple(len(each) for each, *_ in merged))
        return out, sequences.joined(dict(sorted(plans.items())), lengths) if plans else None

    def _stage(
        self, stage: str, here: _Tokens, parts: int, shape: tuple[int, int], num_meta: int
    ) -> tuple[_Tokens, MergePlan]:
        """Merges each of the `parts` equal pieces of the sequence, rows x columns tokens, into num_meta; the plan says
        for every token of the sequence where in the new sequence it went."""
        B = here.x.shape[0]

        def split(t: Tensor) -> Tensor:
            return t.reshape(B * parts, shape[0] * shape[1], *t.shape[2:])

        def join(t: Tensor) -> Tensor:
            return t.reshape(B, parts * num_meta, *t.shape[2:])

        x, positions = split(here.x), split(here.positions)
        q = x if here.q is None else split(here.q)
        size, mask = (None if t is None else split(t) for t in (here.size, here.mask))
        generator, cells = (self.spatial_meta, "square") if stage == "spatial" else (self.temporal_meta, "tall")
        assert generator is not None
        more = {name: {"positions": positions, "stage": stage}[name] for name in getattr(generator, "told", ())}
        if mask is not None:
            more["mask"] = mask
        meta = generator(q, *shape, num_meta, size, cells, **more)
        out, plan = assign_merge(
            x, None if here.q is None else q, meta, self.similarity, self.temperature, self.weight,
            mask, size, positions, impl=self.impl,
        )  # fmt: skip
        assert out.positions is not None
        later_q = None if here.q is None else join(merge(q, plan, size, impl=self.impl).x)
        first = num_meta * torch.arange(parts, dtype=torch.int32, device=x.device)
        index = (plan.index.unflatten(0, (B, parts)) + first[:, None]).flatten(1)
        later_mask = None
        if here.mask is not None and mask is not None:
            index = index.masked_fill(~here.mask, -1)
            later_mask = mask.any(1, keepdim=True).expand(-1, num_meta).reshape(B, -1)  # all groups of a part or none
        later = _Tokens(join(out.x), later_q, join(out.size), join(out.positions), later_mask)
        return later, MergePlan(index, parts * num_meta)

    def _whole_plan(self, plans: list[MergePlan], x: Tensor, mask: Tensor | None) -> MergePlan:
        """From all N tokens to all that come out, the prefix to itself."""
        B, N, prefix = x.shape[0], x.shape[1], self.num_prefix
        index, num_groups = torch.arange(N, dtype=torch.int32, device=x.device).expand(B, -1).contiguous(), N
        if plans:
            plan = plans[0] if len(plans) == 1 else compose(plans[0], plans[1], impl=self.impl)
            index, num_groups = torch.cat((index[:, :prefix], plan.index + prefix), 1), prefix + plan.num_groups
        return MergePlan(index if mask is None else index.masked_fill(~mask, -1), num_groups)

    def _with_products(self, positions: Tensor) -> Tensor:
        channels = positions.shape[-1]
        if channels not in (3, 9):
            raise ValueError(f"positions must have 3 or 9 channels, got {channels}")
        if self.second_moment and channels == 3:
            return torch.cat((positions, _products(positions)), -1)
        return positions

    def _motion_input(self, positions: Tensor) -> Tensor:
        mean = positions[..., :3]
        if not self.second_moment:
            return mean
        tt, ty, tx, yy, yx, xx = (positions[..., 3:] - _products(mean)).unbind(-1)
        return torch.cat((mean, _spread(torch.stack((tt, yy, xx), -1), torch.stack((ty, tx, yx), -1))), -1)

    def _window(self, frames: int) -> int:
        window = frames if self.temporal_window is None else self.temporal_window
        if frames % window:
            raise ValueError(f"temporal_window must divide the T = {frames} frames of the grid, got {window}")
        return window

    def _check(self, x: Tensor, grid_tokens: int, grid: Grid, metric: Tensor | None) -> None:
        validate.features("x", x, "(B, N, C)", 3)
        validate.shape("x", x, "(B, N, C)", (x.shape[0], x.shape[1], self.dim))
        if x.shape[1] != self.num_prefix + grid_tokens:
            raise ValueError(f"grid must hold the N - num_prefix = {x.shape[1] - self.num_prefix} tokens, got {grid}")
        if metric is not None:
            check_rows("metric", metric, x, (x.shape[0], x.shape[1]))

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, spatial_keep={self.spatial_keep}, temporal_keep={self.temporal_keep},"
            f" num_prefix={self.num_prefix}, similarity={self.similarity!r}, temperature={self.temperature},"
            f" weight={self.weight!r}, temporal_window={self.temporal_window}, second_moment={self.second_moment}"
        )
