"""A small, plain video Transformer (ViViT's joint space-time attention) with token merging at chosen blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels import validate
from sttm_kernels.functional import compose
from sttm_kernels.nn.attention import METHODS, proportional_attention
from sttm_kernels.nn.sttm import STTM, Grid
from sttm_kernels.plan import MergedTokens, MergePlan

PLACES = ("after", "inside")


class Block(nn.Module):
    """Pre-norm Transformer block with fused attention in proportion to token counts."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, attention: str) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def attend(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first half: the tokens after attention, and the keys `(B, heads, N, D)`."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = proportional_attention(q, k, v, size, method=self.attention)
        return x + self.proj(attended.transpose(1, 2).flatten(2)), k

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        return self.feed_forward(self.attend(x, size)[0])


@dataclass(frozen=True)
class Layer:
    """The tokens behind a block.

    Attributes:
        x: `(B, N, C)`.
        grid: (T, H, W) of the tokens that are not prefix.
        size: `(B, N)` counts, or None where nothing has been merged.
        positions: `(B, N, P)`, (t, y, x) in the grid of the tubelets, or None where nothing has been merged.
        plan: from the first tokens to these, if it was asked for and something has been merged.
    """

    x: Tensor
    grid: Grid
    size: Tensor | None = None
    positions: Tensor | None = None
    plan: MergePlan | None = None

    def merged(self, merger: nn.Module, metric: Tensor | None, trace: bool) -> Layer:
        """The tokens behind a merger that is called as STTM is."""
        out = merger(self.x, self.grid, self.size, self.positions, metric, return_plan=trace)
        plan = None
        if trace:
            out, plan = out
            plan = plan if self.plan is None else compose(self.plan, plan)
        grid = merger.output_grid(self.grid)  # type: ignore[operator]
        return Layer(out.x, grid, out.size, out.positions, plan)


class VideoTransformer(nn.Module):
    """Classifies clips: tubelet embedding, class token, learned positions, blocks, STTM at some of them, head.

    Args:
        num_frames, image_size: T and the side of the clip's frames, in pixels; multiples of `tubelet` and `patch`.
        tubelet, patch: a token is `tubelet` frames of `patch` x `patch` pixels.
        dim, depth, heads, mlp_ratio: of the blocks; the defaults are ViT-B.
        num_classes: of the head. None leaves the head out, for heads of one's own behind `features`.
        merge: which STTM stands at which block, counted from 1; a dict holds the arguments of an STTM, of which `dim`
            and `num_prefix` are given. Each merges the grid that the one before it left; counts and positions go along.
            A module of one's own that is called like STTM and has `output_grid` is a merger too.
        in_channels: of the clip.
        attention: `method` of `proportional_attention`.
        stem: in place of the tubelet embedding, from the clip to `(B, dim, num_frames / tubelet, image_size / patch,
            image_size / patch)`.
        position_embedding: in place of the learned one: called without arguments, it gives `(1, N, dim)`.
        class_token: whether there is one. Without it the head sees the mean of the tokens by their counts.
        merge_place: "after" the block, by similarity of the tokens; or "inside" it, between attention and MLP, by
            similarity of the attention's keys, as Token Merging does.

    Deterministic where PyTorch's own layers are. The backbone is ViViT's model 1 (Arnab et al., arXiv 2103.15691).
    """

    def __init__(
        self,
        num_frames: int = 16,
        image_size: int = 224,
        tubelet: int = 2,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4,
        num_classes: int | None = 400,
        merge: Mapping[int, nn.Module | dict[str, Any]] | None = None,
        *,
        in_channels: int = 3,
        attention: str = "mask",
        stem: nn.Module | None = None,
        position_embedding: nn.Module | None = None,
        class_token: bool = True,
        merge_place: str = "after",
    ) -> None:
        super().__init__()
        for name, value, step_name, step in (
            ("num_frames", num_frames, "tubelet", tubelet),
            ("image_size", image_size, "patch", patch),
            ("dim", dim, "heads", heads),
        ):
            validate.integer(name, value, 1)
            validate.integer(step_name, step, 1)
            if value % step:
                raise ValueError(f"{name} must be a multiple of {step_name} = {step}, got {value}")
        validate.one_of("attention", attention, METHODS)
        validate.one_of("merge_place", merge_place, PLACES)
        self.clip_shape = (in_channels, num_frames, image_size, image_size)
        self.grid = (num_frames // tubelet, image_size // patch, image_size // patch)
        self.num_prefix = int(class_token)
        self.merge_place = merge_place
        if stem is None:
            stem = nn.Conv3d(in_channels, dim, (tubelet, patch, patch), stride=(tubelet, patch, patch))
        self.embed = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        tokens = self.num_prefix + self.grid[0] * self.grid[1] * self.grid[2]
        self.positions = position_embedding or nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, attention) for _ in range(depth))
        self.merges = nn.ModuleDict()
        for at, merger in sorted((merge or {}).items()):
            if at not in range(1, depth + 1):
                raise ValueError(f"merge must name blocks from 1 to depth = {depth}, got {at!r}")
            self.merges[str(at)] = _merger(at, merger, dim, self.num_prefix)
        self.norm = nn.LayerNorm(dim)
        self.head = None if num_classes is None else nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.class_token, self.positions):
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=0.02)
        for layer in (*self.blocks.modules(), self.head):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def layers(self, clip: Tensor, trace: bool = False) -> Iterator[Layer]:
        """The tokens behind every block, one after the other, merged if there is a merger at it.

        Args:
            clip: `(B, in_channels, num_frames, image_size, image_size)`.
            trace: whether they come with the plan from the first tokens to them.
        """
        validate.floating("clip", clip)
        validate.shape("clip", clip, "(B, in_channels, num_frames, height, width)", (clip.shape[0], *self.clip_shape))
        x = self.embed(clip).flatten(2).mT
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1)
        here = Layer(x + (self.positions() if isinstance(self.positions, nn.Module) else self.positions), self.grid)
        mergers = dict(self.merges.items())
        for i, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            merger = mergers.get(str(i))
            x, keys = block.attend(here.x, here.size)
            here = Layer(x, here.grid, here.size, here.positions, here.plan)
            if merger is not None and self.merge_place == "inside":
                here = here.merged(merger, keys, trace)
            here = Layer(block.feed_forward(here.x), here.grid, here.size, here.positions, here.plan)
            if merger is not None and self.merge_place == "after":
                here = here.merged(merger, None, trace)
            yield here

    def features(self, clip: Tensor) -> MergedTokens:
        """The tokens after the last norm, class token first, with their counts and positions in the tubelet grid.

        `clip` is `(B, in_channels, num_frames, image_size, image_size)`. positions is None if nothing was merged.
        """
        *_, last = self.layers(clip)
        size = last.size
        if size is None:
            size = torch.ones(last.x.shape[:2], dtype=torch.float32, device=last.x.device)
        return MergedTokens(self.norm(last.x), size, last.positions)

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, in_channels, num_frames, image_size, image_size)` to logits `(B, num_classes)`, without a head to
        features `(B, dim)`."""
        tokens = self.features(clip)
        if self.num_prefix:
            x = tokens.x[:, 0]
        else:
            share = tokens.size / tokens.size.sum(1, keepdim=True)
            x = (share[:, None].to(tokens.x.dtype) @ tokens.x)[:, 0]
        return x if self.head is None else self.head(x)


def _merger(at: int, merger: nn.Module | dict[str, Any], dim: int, num_prefix: int) -> nn.Module:
    if isinstance(merger, dict):
        return STTM(dim, num_prefix=num_prefix, **merger)
    if not isinstance(merger, nn.Module) or not hasattr(merger, "output_grid"):
        raise TypeError(f"merge[{at}] must be an STTM, a module like it or a dict, got {type(merger).__name__}")
    if isinstance(merger, STTM) and (merger.dim, merger.num_prefix) != (dim, num_prefix):
        raise ValueError(
            f"merge[{at}] must have dim = {dim} and num_prefix = {num_prefix}, got {merger.dim} and {merger.num_prefix}"
        )
    return merger
