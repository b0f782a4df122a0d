"""What merging saves a classifier: a small ViT, run on a clip with and without it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sttm_kernels.console import threads
from sttm_kernels.nn.video_transformer import VideoTransformer

KEEP = 0.5
"""The share of the tokens that a classifier keeps: half of each frame's."""
SIDE, PATCH, TUBELET = 224, 16, 2
DIM, DEPTH, HEADS = 192, 4, 3
ROUNDS = 2


@dataclass(frozen=True)
class Measured:
    """A small ViT on a clip.

    Attributes:
        tokens: of the clip, merged to `KEEP` of them behind the first block.
        unmerged, merged: seconds of a forward pass, the faster of two, the merging itself included.
        where: it ran, in words.
    """

    tokens: int
    unmerged: float
    merged: float
    where: str


def vit_flops(tokens: int, dim: int = 768, depth: int = 12) -> int:
    """Of the blocks of a ViT (the defaults: a ViT-B) on one clip of so many tokens, 2 per multiply-add: linear layers
    and attention."""
    return depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)


def measure(frames: Tensor, impl: str, device: torch.device) -> Measured:
    """Runs a ViT of random weights, of which its time does not depend, on the frames as a classifier sees them.

    Args:
        frames: uint8 `(T, H, W, 3)`. They are scaled to 224 x 224; a token is 2 frames of 16 x 16 pixels, or 1 of a
            single frame.
        impl: of the verbs, see `help(sttm_kernels)`.
        device: to run on.
    """
    tubelet = min(TUBELET, len(frames))
    frames = frames[: len(frames) // tubelet * tubelet]
    clip = F.interpolate(frames.permute(0, 3, 1, 2).float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
    clip = clip.to(device).transpose(0, 1)[None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = (len(frames), SIDE, tubelet, PATCH, DIM, DEPTH, HEADS)
        merge = {1: {"spatial_keep": KEEP, "temporal_keep": None, "impl": impl}}
        networks = [VideoTransformer(*shape, merge=how).to(device).eval() for how in (None, merge)]
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode(), threads(1):
        for turn in range(ROUNDS + 1):
            for network, taken in zip(networks, seconds, strict=True):
                began = time.perf_counter()
                network(clip)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:  # the first compiles and loads
                    taken.append(time.perf_counter() - began)
    grid = networks[0].grid
    where = "one CPU thread" if device.type == "cpu" else str(device)
    return Measured(grid[0] * grid[1] * grid[2], min(seconds[0]), min(seconds[1]), where)
