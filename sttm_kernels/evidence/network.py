"""The network: `VideoTransformer` with a convolutional stem, joint space-time positions, and heads for two answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels.evidence.clips import DIGITS, FRAMES, MOTIONS, SIZE, Clips
from sttm_kernels.functional import merge
from sttm_kernels.nn import VideoTransformer

PATCH = 4
DIM, DEPTH, HEADS, MLP_RATIO = 64, 4, 4, 2
STEM_CHANNELS = 32
FREQUENCIES, BANDWIDTH = 64, 2.0
"""How many Fourier frequencies of (t, y, x) positions have, and their standard deviation in cycles per clip."""
LOCATE, RECOGNISE, RECOGNISE_AGAIN, FOLLOW = 0.5, 1.0, 1.0, 0.2
"""Weights of the auxiliary losses, token by token: where the digit is, and which it is, behind block 1; which it is,
and how it moves, at the end."""


class Stem(nn.Module):
    """Frames and their differences to the frame before, `(B, 2, T, S, S)`, to tokens `(B, dim, T, S / 4, S / 4)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, STEM_CHANNELS, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.GELU(),
            nn.Conv2d(STEM_CHANNELS, dim, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, clip: Tensor) -> Tensor:
        frames = clip.transpose(1, 2)
        return self.layers(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class JointPositions(nn.Module):
    """A learned linear map of random Fourier features of (t, y, x) together."""

    features: Tensor

    def __init__(self, dim: int, frames: tuple[int, ...], side: int) -> None:
        super().__init__()
        times = torch.tensor(frames, dtype=torch.float32) / FRAMES
        along = torch.arange(side, dtype=torch.float32) / side
        frequencies = BANDWIDTH * torch.randn(3, FREQUENCIES)
        angle = 2 * math.pi * torch.cartesian_prod(times, along, along) @ frequencies
        self.register_buffer("features", torch.cat((angle.sin(), angle.cos()), -1)[None])
        self.linear = nn.Linear(2 * FREQUENCIES, dim)

    def forward(self) -> Tensor:
        return self.linear(self.features)


@dataclass(frozen=True)
class Answers:
    """Logits of the digit `(B, 10)` and of the motion `(B, 10)`, and the auxiliary loss where it was asked for."""

    digit: Tensor
    motion: Tensor
    auxiliary: Tensor | None = None


class Network(nn.Module):
    """Says which digit moves how.

    Args:
        merge, merge_place: of `VideoTransformer`.
        dim, depth: of the blocks.
        frames: which are looked at; the others are seen in differences alone.
        shuffle: whether the frames of every clip come in an order of their own, drawn by PyTorch's generator.
    """

    def __init__(
        self,
        merge: Mapping[int, nn.Module | dict[str, Any]] | None = None,
        merge_place: str = "after",
        dim: int = DIM,
        depth: int = DEPTH,
        frames: tuple[int, ...] = tuple(range(FRAMES)),
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.frames = list(frames)
        self.backbone = VideoTransformer(
            len(frames), SIZE, 1, PATCH, dim, depth, HEADS, MLP_RATIO, None, merge,
            in_channels=2, stem=Stem(dim), position_embedding=JointPositions(dim, frames, SIZE // PATCH),
            class_token=False, merge_place=merge_place,
        )  # fmt: skip
        # A standard deviation of 0.02, that of wide Transformers, makes layers of this width learn digits much later.
        for layer in self.backbone.blocks.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        self.last = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.attention = nn.Linear(dim, 1)
        self.digit = nn.Linear(dim, DIGITS)
        self.motion = nn.Linear(2 * dim, len(MOTIONS))
        self.early = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1 + DIGITS))
        self.late = nn.Linear(dim, DIGITS + len(MOTIONS))

    def forward(self, clip: Tensor, target: Clips | None = None) -> Answers:
        """`clip` is `(B, T, S, S)`; with `target`, the auxiliary loss is computed."""
        where = None if target is None else target.where
        if self.shuffle:
            order = torch.rand(clip.shape[:2], device=clip.device).argsort(1)[..., None, None].expand_as(clip)
            clip, where = clip.gather(1, order), None if where is None else where.gather(1, order)
        before = torch.cat((clip[:, :1], clip[:, :-1]), 1)
        seen = torch.stack((clip, clip - before), 1)[:, :, self.frames]
        where = None if where is None else self._of_tokens(where)
        auxiliary = None
        for layer in self.backbone.layers(seen, trace=where is not None):
            if where is not None and target is not None and auxiliary is None:
                here = where if layer.plan is None else merge(where, layer.plan).x
                located, recognised = self.early(layer.x).split([1, DIGITS], -1)
                auxiliary = LOCATE * F.binary_cross_entropy_with_logits(located, here.clamp(0, 1))
                auxiliary = auxiliary + RECOGNISE * _recognition(recognised, target.digit, here)
        x = self.backbone.norm(layer.x)
        if where is not None and target is not None and auxiliary is not None:
            here = where if layer.plan is None else merge(where, layer.plan).x
            recognised, followed = self.late(x).split([DIGITS, len(MOTIONS)], -1)
            auxiliary = auxiliary + RECOGNISE_AGAIN * _recognition(recognised, target.digit, here)
            auxiliary = auxiliary + FOLLOW * _recognition(followed, target.motion, here)

        x = self.last(x)
        size = torch.ones(x.shape[:2], device=x.device) if layer.size is None else layer.size
        looked_at = (self.attention(x)[..., 0] + size.log()).softmax(-1)
        share = size / size.sum(1, keepdim=True)
        pooled = torch.stack((looked_at, share), 1) @ x
        return Answers(self.digit(pooled[:, 0]), self.motion(pooled.flatten(1)), auxiliary)

    def _of_tokens(self, where: Tensor) -> Tensor:
        """How much of each token is the digit's, from `(B, T, S, S)`: `(B, N, 1)`, up to 1 for the most covered."""
        share = F.avg_pool2d(where[:, self.frames], PATCH)
        return (2 * share).clamp(max=1).flatten(1)[..., None]


def _recognition(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of every token, weighted by how much of it is the digit's."""
    of_tokens = F.cross_entropy(logits.mT, label[:, None].expand(logits.shape[:2]), reduction="none")
    return (of_tokens * weight[..., 0]).sum() / weight.sum().clamp_min(1e-6)
