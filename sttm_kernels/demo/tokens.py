"""Patch tokens that need no network: every patch as the colour that most of it has."""

from __future__ import annotations

import torch
from torch import Tensor

LIGHTNESS = 0.7
"""L* counts less than a* and b*, so that shading divides an object less than paint does."""
RMS = 10.0


def lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1], channels last, to CIE L*a*b* (D65): distances there are close to those that people see."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    over_white = [[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]]
    xyz = linear @ rgb.new_tensor(over_white)
    root = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def patches(frame: Tensor, patch: int) -> Tensor:
    """A frame `(H, W, C)` as `(H/patch * W/patch, patch * patch, C)`, row after row."""
    grid = frame.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).transpose(1, 2)
    return grid.flatten(2, 3).flatten(0, 1)


def dominant(colours: Tensor, cuts: int = 2) -> Tensor:
    """`(M, S, C)` to `(M, C)`: the mean of what is left after cutting `cuts` times in two and keeping the larger part.

    Each cut is in the middle of the channel that varies most. On the edge of an object this is the colour of the object
    or of what lies behind, never a mixture, as a mean or a median may be.
    """
    kept = torch.ones_like(colours[..., :1], dtype=torch.bool)
    for _ in range(cuts):
        low = colours.masked_fill(~kept, torch.inf).amin(1)
        high = colours.masked_fill(~kept, -torch.inf).amax(1)
        channel = (high - low).argmax(1)[:, None]
        middle = ((low + high) / 2).gather(1, channel)
        above = kept & (colours.gather(2, channel[:, None].expand(-1, colours.shape[1], -1)) > middle[:, None])
        below = kept & ~above
        kept = torch.where(above.sum(1, keepdim=True) > below.sum(1, keepdim=True), above, below)
    return (colours * kept).sum(1) / kept.sum(1)


def patch_tokens(frames: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Tokens of a clip.

    Args:
        frames: uint8 `(T, H, W, 3)`, H and W multiples of `patch`.
        patch: in pixels.

    Returns:
        float32 `(1, T * H/patch * W/patch, 3)`: the dominant L*a*b* colour of every patch, centred, at a root mean
        square of 10 over the clip; and the grid (T, H/patch, W/patch).
    """
    colours = torch.stack([dominant(lab(patches(frame, patch).float() / 255)) for frame in frames])
    colours = colours * colours.new_tensor([LIGHTNESS, 1, 1])
    x = colours - colours.mean((0, 1))
    x = x * (RMS / x.square().sum(-1).mean().sqrt().clamp_min(1e-3))
    grid = (len(frames), frames.shape[1] // patch, frames.shape[2] // patch)
    return x.reshape(1, -1, 3), grid


def mean_colours(frames: Tensor, patch: int) -> Tensor:
    """float32 `(1, T * H/patch * W/patch, 3)`: the mean sRGB of every patch, in [0, 255]."""
    return torch.stack([patches(frame, patch).float().mean(1) for frame in frames]).reshape(1, -1, 3)
