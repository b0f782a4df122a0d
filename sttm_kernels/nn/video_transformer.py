"""A small, plain video Transformer (ViViT's joint space-time attention) with token merging after chosen blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels import validate
from sttm_kernels.nn.attention import METHODS, proportional_attention
from sttm_kernels.nn.sttm import STTM
from sttm_kernels.plan import MergedTokens


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

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = proportional_attention(q, k, v, size, method=self.attention)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VideoTransformer(nn.Module):
    """Classifies clips: tubelet embedding, class token, learned positions, blocks, STTM after some of them, head.

    Args:
        num_frames, image_size: T and the side of the clip's frames, in pixels; multiples of `tubelet` and `patch`.
        tubelet, patch: a token is `tubelet` frames of `patch` x `patch` pixels.
        dim, depth, heads, mlp_ratio: of the blocks; the defaults are ViT-B.
        num_classes: of the head.
        merge: which STTM follows which block, counted from 1; a dict holds the arguments of an STTM, of which `dim` and
            `num_prefix` = 1 are given. Each merges the grid that the one before it left; counts and positions go along.
        in_channels: of the clip.
        attention: `method` of `proportional_attention`.

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
        num_classes: int = 400,
        merge: Mapping[int, STTM | dict[str, Any]] | None = None,
        *,
        in_channels: int = 3,
        attention: str = "mask",
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
        self.clip_shape = (in_channels, num_frames, image_size, image_size)
        self.grid = (num_frames // tubelet, image_size // patch, image_size // patch)
        self.embed = nn.Conv3d(in_channels, dim, (tubelet, patch, patch), stride=(tubelet, patch, patch))
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1] * self.grid[2], dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, attention) for _ in range(depth))
        self.merges = nn.ModuleDict()
        for after, sttm in sorted((merge or {}).items()):
            if after not in range(1, depth + 1):
                raise ValueError(f"merge must name blocks from 1 to depth = {depth}, got {after!r}")
            self.merges[str(after)] = _sttm(after, sttm, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        for layer in (*self.blocks.modules(), self.head):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def features(self, clip: Tensor) -> MergedTokens:
        """The tokens after the last norm, class token first, with their counts and positions in the tubelet grid.

        `clip` is `(B, in_channels, num_frames, image_size, image_size)`. positions is None if nothing was merged.
        """
        validate.floating("clip", clip)
        validate.shape("clip", clip, "(B, in_channels, num_frames, height, width)", (len(clip), *self.clip_shape))
        x = self.embed(clip).flatten(2).mT
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1) + self.positions
        grid, size, positions = self.grid, None, None
        for i, block in enumerate(self.blocks, 1):
            x = block(x, size)
            if str(i) in self.merges:
                sttm = self.merges[str(i)]
                assert isinstance(sttm, STTM)
                merged = sttm(x, grid, size, positions)
                x, size, positions = merged.x, merged.size, merged.positions
                grid = sttm.output_grid(grid)
        if size is None:
            size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        return MergedTokens(self.norm(x), size, positions)

    def forward(self, clip: Tensor) -> Tensor:
        """`(B, in_channels, num_frames, image_size, image_size)` to logits `(B, num_classes)`."""
        return self.head(self.features(clip).x[:, 0])


def _sttm(after: int, sttm: STTM | dict[str, Any], dim: int) -> STTM:
    if isinstance(sttm, dict):
        return STTM(dim, num_prefix=1, **sttm)
    if not isinstance(sttm, STTM):
        raise TypeError(f"merge[{after}] must be an STTM or a dict, got {type(sttm).__name__}")
    if (sttm.dim, sttm.num_prefix) != (dim, 1):
        raise ValueError(
            f"merge[{after}] must have dim = {dim} and num_prefix = 1, got {sttm.dim} and {sttm.num_prefix}"
        )
    return sttm
