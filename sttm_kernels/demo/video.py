"""From a video file to the frames of one piece of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.console import InputError, extra, progress

DEFAULT_FRAMES = 16
DEFAULT_STRIDES = range(1, 5)
SHORT_SIDE = 224
LONGEST_SIDE = 1024
CUT_LEAST, CUT_TIMES, CUT_HISTORY = 24.0, 2.5, 8


@dataclass(frozen=True)
class Clip:
    """A piece of a video.

    Attributes:
        name: for titles.
        frames: uint8 `(T, H, W, 3)`, RGB; H and W are multiples of the patch.
        indices: which frames of the video they are.
        fps: frames per second of the video.
        source_size: (width, height) of the video as it is shown.
        notes: what a person should know of how it was read.
    """

    name: str
    frames: Tensor
    indices: range
    fps: float
    source_size: tuple[int, int]
    notes: list[str] = field(default_factory=list)


def read(path: str, patch: int, start: int = 0, frames: int | None = None, stride: int | None = None) -> Clip:
    """Decodes a piece of a video, scaled to a short side of 224 (less for a strip) and cropped to whole patches.

    Args:
        path: any file with a video stream that FFmpeg reads.
        patch: the side of a patch in pixels.
        start: the first frame, counted from 0.
        frames: how many, across scene cuts; fewer where the video ends. None: 16, or fewer where the scene ends.
        stride: every how many frames of the video. None: with `frames` 1, else the largest of 1 to 4 with which the
            scene has 16 frames.

    Raises:
        InputError: there is no such file, it holds no video frame, `start` is past its end, or a frame holds no patch.
    """
    container = _open(path)
    with container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        decoded = _Decoded(container, stream)
        if frames is not None:
            stride = stride or 1
        step = stride or 1
        span = step * frames if frames is not None else DEFAULT_FRAMES * (stride or DEFAULT_STRIDES[-1])
        scene = _Scene()
        kept = []
        for number, frame in enumerate(progress(decoded, start + span, f"reading {Path(path).name}")):
            if number < start:
                continue
            if frames is None and scene.ends_before(frame):
                break
            if (number - start) % step == 0:
                size = _working_size(*decoded.stored_size)
                kept.append(crop(_upright(_pixels(frame, *size), frame), patch))
            if number - start + 1 >= span:
                break
        fps = float(stream.average_rate or stream.base_rate or 25)
    if decoded.count == 0:
        raise InputError(f"{path} holds no video frame" + (f": {decoded.error}" if decoded.error else ""))
    if not kept:
        raise InputError(f"--start {start} is past the end of {path}, which has {decoded.count} frames")
    if stride is None:
        stride = max(s for s in DEFAULT_STRIDES if s == 1 or len(kept) >= s * DEFAULT_FRAMES)
        kept = kept[::stride][:DEFAULT_FRAMES]
    indices = range(start, start + stride * len(kept), stride)
    notes = [f"decoding stopped early: {decoded.error}"] if decoded.error else []
    return Clip(Path(path).name, torch.stack(kept), indices, fps, decoded.shown_size, notes)


class _Scene:
    """Tells a cut: a frame that differs much more from the one before than frames did of late."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.changes = [CUT_LEAST / CUT_TIMES]

    def ends_before(self, frame: Any) -> bool:
        thumbnail = _pixels(frame, 64, 36).float()
        change = 0.0 if self.previous is None else float((thumbnail - self.previous).abs().mean())
        usual = sorted(self.changes)[len(self.changes) // 2]
        self.previous = thumbnail
        self.changes = [*self.changes[1 - CUT_HISTORY :], change]
        return change > max(CUT_LEAST, CUT_TIMES * usual)


def _open(path: str) -> Any:
    av = extra("av", "PyAV")
    if not os.path.exists(path):
        raise InputError(f"no such file: {path}")
    if os.path.isdir(path):
        raise InputError(f"{path} is a directory, not a video")
    try:
        container = av.open(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} is not a video that FFmpeg can read: {reason}") from None
    if "tty" in container.format.name:
        container.close()
        raise InputError(f"{path} is a text file, not a video")
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        container.close()
        raise InputError(f"{path} has no video stream, only {kinds}")
    return container


class _Decoded:
    """The frames of a stream, as far as they can be decoded.

    Attributes:
        count: frames so far.
        error: what ended decoding before the video did, or nothing.
        stored_size: (width, height) of the first frame as it lies in the file, in square pixels.
        shown_size: the same, turned upright.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.count = 0
        self.error = ""
        self.stored_size = self.shown_size = (0, 0)

    def __iter__(self) -> Iterator[Any]:
        av = extra("av", "PyAV")
        try:
            for frame in self.container.decode(self.stream):
                if self.count == 0:
                    aspect = float(self.stream.codec_context.sample_aspect_ratio or 1) or 1.0
                    self.stored_size = (max(1, round(frame.width * aspect)), frame.height)
                    turned = _quarter_turns(frame) % 2
                    self.shown_size = self.stored_size[::-1] if turned else self.stored_size
                self.count += 1
                yield frame
        except (av.FFmpegError, OSError, ValueError) as error:
            self.error = str(getattr(error, "strerror", None) or error)


def _working_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) to decode to, the aspect ratio kept."""
    scale = min(SHORT_SIDE / min(width, height), LONGEST_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _pixels(frame: Any, width: int, height: int) -> Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"))


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, that the file asks for: telephones store portrait clips lying down."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _upright(pixels: Tensor, frame: Any) -> Tensor:
    return pixels.rot90(_quarter_turns(frame), (0, 1))


def crop(pixels: Tensor, patch: int) -> Tensor:
    """The middle of frames `(..., H, W, 3)`, in whole patches."""
    high, wide = pixels.shape[-3:-1]
    height, width = high // patch * patch, wide // patch * patch
    if height == 0 or width == 0:
        raise InputError(f"at {wide} x {high} pixels a frame holds no patch of {patch} pixels; --patch must be smaller")
    top, left = (high - height) // 2, (wide - width) // 2
    return pixels[..., top : top + height, left : left + width, :]
