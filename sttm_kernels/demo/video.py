"""From a video file to the frames of one piece of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.console import InputError, progress
from sttm_kernels.demo.film import Film, pixels

DEFAULT_FRAMES = 16
DEFAULT_INTERVALS = range(1, 5)
SHORT_SIDE = 224
LONGEST_SIDE = 1024
CUT_LEAST, CUT_TIMES, CUT_HISTORY = 24.0, 2.5, 8


@dataclass(frozen=True)
class Clip:
    """A piece of a video.

    Attributes:
        name: for titles.
        frames: uint8 `(T, H, W, 3)`, RGB; H and W are multiples of the patch.
        start: seconds from the beginning of the video to the first frame.
        step: seconds from a frame to the next.
        source_size: (width, height) of the video as it is shown.
        notes: what a person should know of how it was read.
    """

    name: str
    frames: Tensor
    start: float
    step: float
    source_size: tuple[int, int]
    notes: list[str] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """Seconds from the beginning of the video to every frame."""
        return [self.start + number * self.step for number in range(len(self.frames))]


def read(path: str, patch: int, start: float = 0.0, frames: int | None = None, step: float | None = None) -> Clip:
    """Decodes a piece of a video, scaled to a short side of 224 (less for a strip) and cropped to whole patches.

    Frames are those that are on the screen at times in equal steps, whatever the times at which frames change.

    Args:
        path: any file with a video stream that FFmpeg reads.
        patch: the side of a patch in pixels.
        start: seconds from the beginning to the first frame.
        frames: how many, across scene cuts; fewer where the video ends. None: 16, or fewer where the scene ends.
        step: seconds from a frame to the next. None: the video's usual time between frames; without `frames`, the
            largest of 1 to 4 times that with which the scene has 16 frames.

    Raises:
        InputError: there is no such file, it holds no video frame, `start` is past its end, or a frame holds no patch.
    """
    with Film(path) as film:
        fine = step or film.interval
        most = frames or DEFAULT_FRAMES * (1 if step else DEFAULT_INTERVALS[-1])
        slack = film.interval / 4
        shown = progress(film, round((start + most * fine) / film.interval), f"reading {Path(path).name}")
        if frames is None:
            shown = _scene(shown, start + slack)
        times, kept, before = list[float](), list[Tensor](), None
        for time, frame in _sample(shown, start, fine, most, slack):
            if frame is not before:
                image = crop(film.upright(pixels(frame, *_working_size(*film.stored_size))), patch)
            times.append(time)
            kept.append(image)
            before = frame
        if film.count == 0:
            raise InputError(f"{path} holds no video frame" + (f": {film.error}" if film.error else ""))
        if not kept:
            raise InputError(f"--start {start:g} is past the end of {path}, {film.end:.2f} s long")
        notes, size = film.notes(), film.size
    if frames is None and step is None:
        intervals = max(n for n in DEFAULT_INTERVALS if n == 1 or len(kept) >= n * DEFAULT_FRAMES)
        kept, fine = kept[::intervals][:DEFAULT_FRAMES], fine * intervals
    return Clip(Path(path).name, torch.stack(kept), times[0], fine, size, notes)


def _sample(shown: Iterator[tuple[float, Any]], start: float, step: float, most: int, slack: float) -> Iterator[Any]:
    """`(time, frame)` at no more than `most` times in equal steps: the frame that is on the screen then.

    A frame that comes less than `slack` after such a time counts as there, for containers round.
    """
    number, before = 0, None
    for time, frame in shown:
        if before is None:
            start = max(start, time)
        while before is not None and start + number * step < time - slack:
            yield start + number * step, before
            number += 1
            if number == most:
                return
        before = frame


def _scene(shown: Iterator[tuple[float, Any]], after: float) -> Iterator[tuple[float, Any]]:
    """The frames up to the first cut after this time, which closes them as the end of the film does."""
    cuts, before = _Cuts(), None
    for time, frame in shown:
        if frame is not None and before is not None and time > after:
            if cuts.previous is None:
                cuts.between_last_and(before)
            if cuts.between_last_and(frame):
                yield time, None
                return
        before = frame
        yield time, frame


class _Cuts:
    """Tells a cut: a frame that differs much more from the one before than frames did of late."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.changes = [CUT_LEAST / CUT_TIMES]

    def between_last_and(self, frame: Any) -> bool:
        thumbnail = pixels(frame, 64, 36).float()
        change = 0.0 if self.previous is None else float((thumbnail - self.previous).abs().mean())
        usual = sorted(self.changes)[len(self.changes) // 2]
        self.previous = thumbnail
        self.changes = [*self.changes[1 - CUT_HISTORY :], change]
        return change > max(CUT_LEAST, CUT_TIMES * usual)


def _working_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) to decode to, the aspect ratio kept."""
    scale = min(SHORT_SIDE / min(width, height), LONGEST_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def crop(pixels: Tensor, patch: int) -> Tensor:
    """The middle of frames `(..., H, W, 3)`, in whole patches."""
    high, wide = pixels.shape[-3:-1]
    height, width = high // patch * patch, wide // patch * patch
    if height == 0 or width == 0:
        raise InputError(f"at {wide} x {high} pixels a frame holds no patch of {patch} pixels; --patch must be smaller")
    top, left = (high - height) // 2, (wide - width) // 2
    return pixels[..., top : top + height, left : left + width, :]
