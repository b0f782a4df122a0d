"""A small clip of moving shapes whose every trajectory is known: the demo's own video, and a test's ground truth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sttm_kernels.console import InputError
from sttm_kernels.demo.video import DEFAULT_FRAMES, Clip, crop

FRAMES, RATE, HEIGHT, WIDTH, RADIUS = 64, 25.0, 216, 384, 26
COLOURS = {"disc": (226, 61, 48), "square": (250, 195, 44), "triangle": (52, 103, 214)}


@dataclass(frozen=True)
class MovingShapes:
    """A rendered clip and the truth about it.

    Attributes:
        frames: uint8 `(T, H, W, 3)`, RGB.
        centres: float32 `(T, 3, 2)`, the centre of mass of each shape, (y, x) in pixels.
        inside: bool `(T, 3, H, W)`, the pixels of each shape.
        names: of the shapes.
    """

    frames: Tensor
    centres: Tensor
    inside: Tensor
    names: tuple[str, ...]


def render(num_frames: int, seed: int = 0) -> MovingShapes:
    """Three shapes crossing a still landscape, each along a sine in a lane of its own, so that none hides another.

    Args:
        num_frames: T.
        seed: draws the directions, the lengths and the phases of the paths and the grain of the landscape.
    """
    draw = torch.Generator().manual_seed(seed)
    lane = HEIGHT / len(COLOURS)
    swing = lane / 2 - RADIUS - 2
    y, x = torch.arange(HEIGHT)[:, None] + 0.5, torch.arange(WIDTH) + 0.5
    progress = torch.linspace(0, 1, num_frames)
    reach = WIDTH - 3 * RADIUS
    mirrored = int(torch.randint(2, (), generator=draw))

    frames = _landscape(y, x, draw).round().to(torch.uint8).repeat(num_frames, 1, 1, 1)
    centres = torch.zeros(num_frames, len(COLOURS), 2)
    inside = torch.zeros(num_frames, len(COLOURS), HEIGHT, WIDTH, dtype=torch.bool)
    for k, (name, colour) in enumerate(COLOURS.items()):
        phase, shortened = torch.rand(2, generator=draw).tolist()
        along = (1 - 0.4 * shortened) * progress
        centres[:, k, 0] = lane * (k + 0.5) + swing * (2 * math.pi * (progress + phase)).sin()
        centres[:, k, 1] = 1.5 * RADIUS + reach * (along if (k + mirrored) % 2 else 1 - along)
        for t in range(num_frames):
            near = tuple(slice(int(at) - RADIUS - 2, int(at) + RADIUS + 3) for at in centres[t, k])
            cover = _cover(name, y[near[0]] - centres[t, k, 0], x[near[1]] - centres[t, k, 1])
            inside[t, k][near] = cover > 0.5
            behind = frames[t][near]
            behind.copy_(behind.float().lerp(torch.tensor(colour).float(), cover[..., None]).round())
    return MovingShapes(frames, centres, inside, tuple(COLOURS))


def clip(patch: int, start: float, frames: int | None, step: float | None, seed: int) -> Clip:
    """A piece of the rendered clip, as `video.read` gives one of a file.

    Raises:
        InputError: `start` is past its end, or a frame holds no patch.
    """
    step = step or (1 if frames else FRAMES // DEFAULT_FRAMES) / RATE
    count = frames or DEFAULT_FRAMES
    shown = [int((start + number * step) * RATE + 0.25) for number in range(count)]
    shown = [number for number in shown if number < FRAMES]
    if not shown:
        raise InputError(f"--start {start:g} is past the end of the moving shapes, {FRAMES / RATE:.2f} s long")
    return Clip("moving shapes", crop(render(FRAMES, seed).frames[shown], patch), start, step, (WIDTH, HEIGHT))


def _cover(name: str, dy: Tensor, dx: Tensor) -> Tensor:
    """How much of a pixel at this offset from the centre the shape covers, in [0, 1]: a ramp one pixel wide."""
    if name == "disc":
        outside = (dy.square() + dx.square()).sqrt() - RADIUS
    elif name == "square":
        outside = torch.maximum(dy.abs(), dx.abs()) - 0.85 * RADIUS
    else:
        slant = math.sqrt(3) / 2
        outside = torch.maximum(dy, dx.abs() * slant - dy / 2) - 0.58 * RADIUS
    return (0.5 - outside).clamp(0, 1)


def _landscape(y: Tensor, x: Tensor, draw: torch.Generator) -> Tensor:
    """float32 `(H, W, 3)`: a muted country scene, slightly graded and grained."""
    turn = 2 * math.pi * x / WIDTH
    ground = torch.tensor((176, 205, 219)).expand(HEIGHT, WIDTH, 3).float()
    for region, colour in (
        (_disc(y, x, 0.12, 0.30, 0.07, 0.13) | _disc(y, x, 0.20, 0.78, 0.07, 0.15), (238, 240, 243)),
        (y > HEIGHT * (0.40 + 0.06 * (3 * turn + 1).sin()), (141, 160, 186)),
        (y > HEIGHT * (0.54 - 0.12 * turn.sin()), (112, 148, 120)),
        (_disc(y, x, 0.60, 0.56, 0.13, 0.06) | _disc(y, x, 0.62, 0.66, 0.11, 0.05), (58, 92, 70)),
        (y > HEIGHT * 0.70, (201, 195, 166)),
        ((y > HEIGHT * 0.82) & (x > WIDTH * 0.55), (160, 142, 98)),
        ((y - HEIGHT * 0.93 + 0.08 * (x - WIDTH / 2)).abs() < HEIGHT * 0.05, (128, 126, 130)),
    ):
        ground = torch.where(region[..., None], torch.tensor(colour).float(), ground)
    light = 8 * (x / WIDTH - 0.5) + 6 * (y / HEIGHT - 0.5)
    return ground + light[..., None] + 2 * torch.randn(HEIGHT, WIDTH, 1, generator=draw)


def _disc(y: Tensor, x: Tensor, down: float, across: float, high: float, wide: float) -> Tensor:
    """Pixels in an ellipse; its centre and half axes as fractions of the frame."""
    return ((y / HEIGHT - down) / high).square() + ((x / WIDTH - across) / wide).square() < 1
