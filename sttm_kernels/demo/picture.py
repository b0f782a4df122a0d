"""The picture of a merge: frames, and beneath them the same frames with every group in its mean colour."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.console import extra, progress

PANEL_WIDTH, COLUMNS, SHOWN = 480, 4, 8
MARGIN, GAP = 28, 12
SUPERSAMPLE = 2
INK, FAINT, PAPER = (24, 26, 30), (110, 114, 122), (255, 255, 255)
GOLDEN_ANGLE = 0.381966
LEAP = 0.1


@dataclass(frozen=True)
class Groups:
    """What became of the tokens of a clip.

    Attributes:
        label: int64 `(T, h, w)`, the group of every token.
        colours: uint8 `(K, 3)`, RGB, the mean colour of every group.
        paths: float32 `(K, T, 2)`, the centre (y, x) of every group in every frame in patches, NaN where it has no
            token; the middle of the first patch is (0, 0).
    """

    label: Tensor
    colours: Tensor
    paths: Tensor

    def moves(self) -> Tensor:
        """bool `(K,)`: most of its patches are elsewhere than where the group is at least half of its time."""
        frames, places, K = len(self.label), self.label[0].numel(), len(self.colours)
        label = self.label.flatten()
        frame = torch.arange(frames).repeat_interleave(places)
        present = (label * frames + frame).unique().div(frames, rounding_mode="floor").bincount(minlength=K)
        place = label * places + torch.arange(places).repeat(frames)
        _, which, often = place.unique(return_inverse=True, return_counts=True)
        at_home = (often[which] * 2 >= present[label]).long()
        away = torch.zeros(K, dtype=torch.int64).index_add(0, label, 1 - 2 * at_home)
        return away > 0


def border_colours(groups: Groups) -> Tensor:
    """uint8 `(K, 3)`: one hue a group; groups that move come first, and are bright."""
    moves = groups.moves()
    size = groups.label.flatten().bincount(minlength=len(moves))
    order = (moves * (size.max() + 1) + size).argsort(descending=True, stable=True).tolist()
    colours = torch.empty(len(moves), 3, dtype=torch.uint8)
    for rank, group in enumerate(order):
        saturation, value = (0.95, 1.0) if moves[group] else (0.6, 0.8)
        rgb = colorsys.hsv_to_rgb((0.02 + rank * GOLDEN_ANGLE) % 1, saturation, value)
        colours[group] = torch.tensor([round(255 * channel) for channel in rgb])
    return colours


def overlay(groups: Groups, borders: Tensor, frame: int, scale: int) -> Any:
    """One frame: groups in their mean colour, borders inside each group, paths up to this frame.

    Args:
        groups: of the clip.
        borders: uint8 `(K, 3)`.
        frame: in [0, T).
        scale: pixels a patch.

    Returns:
        A `PIL.Image` of `(w * scale, h * scale)`.
    """
    from PIL import Image, ImageDraw

    fine = scale * SUPERSAMPLE
    label = groups.label[frame].repeat_interleave(fine, 0).repeat_interleave(fine, 1)
    moves = groups.moves()
    pixels = groups.colours[label]
    for width, chosen in ((max(1, fine // 10), torch.ones_like(moves)), (max(2, fine // 4), moves)):
        edge = _near_other(label, width) & chosen[label]
        pixels[edge] = borders[label[edge]]

    image = Image.fromarray(pixels.numpy())
    canvas = ImageDraw.Draw(image)
    for group in moves.argsort(stable=True).tolist():
        path = [tuple(((point.flip(0) + 0.5) * fine).tolist()) for point in groups.paths[group, : frame + 1]]
        runs, colour = _runs(path, LEAP * image.width), tuple(borders[group].tolist())
        width = max(2, round(fine * (0.3 if moves[group] else 0.12)))
        if moves[group]:
            _draw_path(canvas, runs, path[-1], INK, width, 2)
        _draw_path(canvas, runs, path[-1], colour, width, 0)
    return image.resize((image.width // SUPERSAMPLE, image.height // SUPERSAMPLE), Image.Resampling.LANCZOS)


def _draw_path(canvas: Any, runs: list[list[Any]], end: Any, colour: tuple[int, ...], width: int, rim: int) -> None:
    """A line to where the group is now, and a dot there, both wider by a rim."""
    for run in runs:
        canvas.line(run, fill=colour, width=width + 2 * rim, joint="curve")
    if not math.isnan(end[0]):
        (x, y), radius = end, width * 1.4 + rim
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _near_other(label: Tensor, width: int) -> Tensor:
    """bool `(H, W)`: pixels within `width` of one of another group."""
    near = torch.zeros_like(label, dtype=torch.bool)
    for step in range(1, width + 1):
        down, across = label[step:] != label[:-step], label[:, step:] != label[:, :-step]
        near[step:] |= down
        near[:-step] |= down
        near[:, step:] |= across
        near[:, :-step] |= across
    return near


def _runs(path: list[Any], farthest: float) -> list[list[Any]]:
    """The pieces of a path between the frames where the group is absent or its centre leaps."""
    runs: list[list[Any]] = [[]]
    for point in path:
        if runs[-1] and not math.dist(runs[-1][-1], point) <= farthest:
            runs.append([])
        if not math.isnan(point[0]):
            runs[-1].append(point)
    return [run for run in runs if len(run) > 1]


def _original(frame: Tensor, size: tuple[int, int]) -> Any:
    from PIL import Image

    return Image.fromarray(frame.numpy()).resize(size, Image.Resampling.LANCZOS)


def sheet(frames: Tensor, groups: Groups, captions: list[str], title: str, lines: list[str]) -> Any:
    """The whole picture.

    Args:
        frames: uint8 `(T, H, W, 3)`.
        groups: of the same clip.
        captions: T, one for every frame.
        title, lines: what stands above.

    Returns:
        A `PIL.Image`: up to 8 frames spread over the clip, 4 a row, each above its merged self.
    """
    extra("PIL", "Pillow")
    from PIL import Image, ImageDraw, ImageFont

    count, (height, width) = len(frames), groups.label.shape[1:]
    shown = sorted({round(i * (count - 1) / max(1, min(SHOWN, count) - 1)) for i in range(min(SHOWN, count))})
    columns = min(COLUMNS, len(shown))
    scale = max(2, round(PANEL_WIDTH / max(width, height)))
    panel = (width * scale, height * scale)
    title_font, text_font, small_font = (ImageFont.load_default(points) for points in (34, 20, 17))
    wide = max(columns * (panel[0] + GAP) - GAP, round(title_font.getlength(title)))
    wide = max(wide, *(round(text_font.getlength(line)) for line in [*lines, LEGEND])) + 2 * MARGIN
    head = MARGIN + 50 + 28 * len(lines) + 12
    band = 26 + 2 * panel[1] + 4 + GAP + 8
    bands = -(-len(shown) // columns)
    image = Image.new("RGB", (wide, head + bands * band + 34 + MARGIN), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, MARGIN - 6), title, fill=INK, font=title_font)
    for row, line in enumerate(lines):
        canvas.text((MARGIN, MARGIN + 44 + 28 * row), line, fill=FAINT, font=text_font)

    borders = border_colours(groups)
    for place, frame in enumerate(shown):
        left = MARGIN + place % columns * (panel[0] + GAP)
        top = head + place // columns * band
        canvas.text((left, top), captions[frame], fill=FAINT, font=small_font)
        image.paste(_original(frames[frame], panel), (left, top + 26))
        image.paste(overlay(groups, borders, frame, scale), (left, top + 26 + panel[1] + 4))
    canvas.text((MARGIN, head + bands * band + 4), LEGEND, fill=FAINT, font=text_font)
    return image


LEGEND = (
    "Beneath each frame: its groups in their mean colour, one border colour a group through time. "
    "Bright, thick: groups that move, with the path of their centre so far. Thin: groups that stay."
)


def animate(frames: Tensor, groups: Groups) -> list[Any]:
    """The frames of an animation: the clip above, its groups beneath."""
    extra("PIL", "Pillow")
    from PIL import Image

    height, width = groups.label.shape[1:]
    scale = max(2, round(PANEL_WIDTH / max(width, height)))
    panel = (width * scale, height * scale)
    borders = border_colours(groups)
    images = []
    for frame in progress(range(len(frames)), len(frames), "drawing"):
        image = Image.new("RGB", (panel[0], 2 * panel[1] + 4), PAPER)
        image.paste(_original(frames[frame], panel), (0, 0))
        image.paste(overlay(groups, borders, frame, scale), (0, panel[1] + 4))
        images.append(image)
    return images
