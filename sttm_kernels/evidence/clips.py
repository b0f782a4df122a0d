"""The task: which digit moves how. Clips of scikit-learn's digits over drifting textures, among moving distractors.

Reversing time swaps eight of the ten motions in pairs and the two orbits, so no order-blind look at the frames can tell
more than half of them; and a single frame hardly tells any. Every clip follows from its split, seed and index alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sttm_kernels.console import extra

FRAMES, SIZE = 8, 24
DIGITS = 10
MOTIONS = (
    "right",
    "down right",
    "down",
    "down left",
    "left",
    "up left",
    "up",
    "up right",
    "clockwise",
    "anticlockwise",
)
SPLITS = {"train": 1297, "choose": 150, "report": 350}
"""How many of scikit-learn's 1797 digits are in which: no image is in two. Settings are chosen on "choose" alone."""
DISTRACTORS = 2
TEXTURE, OPACITY, NOISE = 0.5, 0.6, 0.08
"""Contrast of the texture, opacity of the distractors, standard deviation of the noise."""
CELLS = ((6.0, 0.6), (3.0, 0.4))
"""Octaves of the texture: pixels from one value to the next, and weight."""
MARGIN = 3.5
"""How far from the edge of the frame the centre of whatever moves stays, in pixels."""


@dataclass(frozen=True)
class Clips:
    """B clips. pixels float32 `(B, T, S, S)`; digit and motion int64 `(B,)`; where float32 `(B, T, S, S)`, how much of
    a pixel is the digit's, from 0 to 1."""

    pixels: Tensor
    digit: Tensor
    motion: Tensor
    where: Tensor


@cache
def _images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images `(n, 8, 8)` from 0 to 1 and their digits, by split."""
    datasets = extra("sklearn.datasets", "scikit-learn", "evidence", "evidence")
    bundle = datasets.load_digits()
    shuffled = np.random.default_rng(0).permutation(len(bundle.target))
    bounds = np.cumsum([0, *SPLITS.values()])
    parts = {name: shuffled[first:end] for name, first, end in zip(SPLITS, bounds, bounds[1:], strict=False)}
    return {name: ((bundle.images[at] / 16).astype(np.float32), bundle.target[at]) for name, at in parts.items()}


def draw(split: str, seed: int, index: int, count: int, clutter: float = 1.0) -> Clips:
    """`count` clips: the same for the same arguments.

    Args:
        split: of SPLITS.
        seed, index: of a run, and of a batch of it.
        count: how many.
        clutter: from 0 to 1, how much of the texture, of the distractors and of the noise there is.
    """
    images, labels = _images()[split]
    rng = np.random.default_rng([list(SPLITS).index(split), seed, index])
    chosen = rng.integers(len(images), size=(count, 1 + DISTRACTORS))
    motion = rng.integers(len(MOTIONS), size=(count, 1 + DISTRACTORS))
    things = images[chosen]
    things[:, 1:] = _scrambled(things[:, 1:], rng)
    scale = rng.uniform(1, 1.2, size=chosen.shape)

    covered = _paste(_tensor(things), _tensor(_path(motion, rng)), _tensor(scale))
    pixels = TEXTURE * clutter * _texture(count, rng)
    for layer in range(DISTRACTORS, -1, -1):
        opacity = covered[:, layer] * (OPACITY * clutter if layer else 1.0)
        pixels = pixels * (1 - opacity) + opacity
    pixels += NOISE * clutter * _tensor(rng.standard_normal(pixels.shape, dtype=np.float32))
    return Clips(pixels, torch.from_numpy(labels[chosen[:, 0]]).long(), torch.from_numpy(motion[:, 0]), covered[:, 0])


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32, copy=False))


def _path(motion: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the centre is in every frame, (y, x) in pixels: `(*motion.shape, T, 2)`, inside the margin."""
    shape, time = motion.shape, np.arange(FRAMES) - (FRAMES - 1) / 2
    angle = motion * (math.pi / 4) + rng.uniform(-0.2, 0.2, shape)
    speed = rng.uniform(0.7, 1.5, shape)
    straight = (speed[..., None] * time)[..., None] * np.stack((np.sin(angle), np.cos(angle)), -1)[..., None, :]
    turn = rng.uniform(0.5, 0.85, shape) * np.where(motion == MOTIONS.index("clockwise"), 1, -1)
    phase = rng.uniform(0, 2 * math.pi, shape)[..., None] + turn[..., None] * time
    orbit = rng.uniform(3, 5, shape)[..., None, None] * np.stack((np.sin(phase), np.cos(phase)), -1)
    path = np.where((motion >= MOTIONS.index("clockwise"))[..., None, None], orbit, straight)
    path = path + rng.normal(0, 0.3, path.shape)
    low, high = MARGIN - path.min(-2, keepdims=True), SIZE - 1 - MARGIN - path.max(-2, keepdims=True)
    return path + low + rng.uniform(size=low.shape) * (high - low)


def _scrambled(things: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With their quadrants in another order: strokes of digits, but no digits."""
    flat = things.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4, 4)
    order = (np.arange(4) + rng.integers(1, 4, size=(len(flat), 1))) % 4
    mixed = np.take_along_axis(flat, order[..., None, None], 1).reshape(-1, 2, 2, 4, 4)
    return mixed.transpose(0, 1, 3, 2, 4).reshape(things.shape)


def _paste(things: Tensor, path: Tensor, scale: Tensor) -> Tensor:
    """Images `(B, n, 8, 8)` at their places `(B, n, T, 2)`, of their scale `(B, n)`: `(B, n, T, S, S)`."""
    at = torch.arange(SIZE, dtype=torch.float32)
    # Half of an image is 4 pixels times its scale; `grid_sample` counts from -1 to 1 over the image.
    y, x = ((at - path[..., axis, None]) / (4 * scale[..., None, None]) for axis in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), -1)
    B, n = scale.shape
    drawn = F.grid_sample(things.reshape(B * n, 1, 8, 8), grid.reshape(B * n, -1, SIZE, 2), align_corners=False)
    return drawn.view(B, n, FRAMES, SIZE, SIZE)


def _texture(count: int, rng: np.random.Generator) -> Tensor:
    """Noise of two octaves that drifts by up to a pixel a frame, from 0 to 1: `(count, T, S, S)`."""
    angle, speed = rng.uniform(0, 2 * math.pi, count), rng.uniform(0, 1, count)
    drift = np.stack((np.sin(angle), np.cos(angle)), -1) * speed[:, None]
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    at = np.arange(SIZE) - (SIZE - 1) / 2
    y, x = (at + (drift[:, None, axis] * time[:, None].T)[..., None] for axis in (0, 1))
    texture = torch.zeros(count, FRAMES, SIZE, SIZE)
    for cell, weight in CELLS:
        values = math.ceil((SIZE + FRAMES) / cell) + 2
        noise = _tensor(rng.uniform(size=(count, 1, values, values)))
        half = cell * (values - 1) / 2
        grid = _tensor(np.stack(np.broadcast_arrays(x[..., None, :] / half, y[..., :, None] / half), -1))
        drawn = F.grid_sample(noise, grid.reshape(count, -1, SIZE, 2), align_corners=True)
        texture += weight * drawn.view(count, FRAMES, SIZE, SIZE)
    return texture
