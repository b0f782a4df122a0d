"""A video file as a player shows it: its frames at their times and upright, and what could not be read of it."""

from __future__ import annotations

import math
import os
import statistics
import struct
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.console import InputError, extra

LOOK_AHEAD = 64
TRIES = 16
USUAL_RATE = 25.0


class Film:
    """The frames of a video file, each with the time at which it is shown; a context manager that closes the file.

    Iterating gives `(seconds, frame)` in the order of time, from the first frame that the file begins with at about 0,
    and at the end `(seconds, None)`. Packets that cannot be decoded are passed over.

    Args:
        path: any file with a video stream that FFmpeg reads.

    Attributes:
        interval: seconds between frames, where they are even; else the median.
        size: (width, height) as it is shown, once a frame has been read.
        stored_size: the same as it lies in the file, in square pixels.
        count: frames read so far.
        end: seconds from 0 to the end of the last frame read.
        error: what FFmpeg said of the last packet that cannot be decoded, or nothing.

    Raises:
        InputError: there is no such file, or it is no video.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.container = _open(path)
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "SLICE"  # threads over frames lose those that come after a damaged one at the end
        self.size = self.stored_size = (0, 0)
        self.count = 0
        self.error = ""
        self._undecoded = self._damaged = self._late = self._missing = 0
        self.end, self._now, self._whole = 0.0, -math.inf, False
        self._lying, self._mirrored = False, list[int]()
        self._packets = self._demux()
        self._first = list(islice(self._packets, LOOK_AHEAD))
        self.interval, self._even = self._usual_interval()

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        for packet in chain(self._first, self._packets):
            for frame in self._decode(packet):
                time = self._time(frame)
                if self.count == 0:
                    self._look_at(frame)
                self.count += 1
                self._damaged += bool(frame.is_corrupt)
                if time <= self._now:
                    self._late += 1
                    continue
                if self._now >= 0 and self._undecoded + self._damaged + self._late:
                    self._missing += max(0, round((time - self._now) / self.interval) - 1)
                self._now = time
                self.end = time + (float(frame.duration * frame.time_base) if frame.duration else self.interval)
                yield time, frame
        self._whole = True
        yield self.end, None

    def upright(self, pixels: Tensor) -> Tensor:
        """Pixels `(H, W, C)` as they lie in the file, turned and mirrored as it asks for."""
        return (pixels.transpose(0, 1) if self._lying else pixels).flip(self._mirrored)

    def notes(self) -> list[str]:
        """What a person should know of how far it could be read."""
        said = [
            f"{_many(number, noun)} {what}"
            for number, noun, what in (
                (self._undecoded, "packet", "could not be decoded"),
                (self._damaged, "frame", "damaged"),
                (self._late, "frame", "left out, for frames of later times came before"),
                (self._missing if self._even else 0, "frame", "missing after that"),
            )
            if number
        ]
        declared = self._declared()
        if self._whole and declared - self.end > 1.5 * self.interval:
            said.append(
                f"{self.count} frames in the {self.end:.2f} s that could be read of the {declared:.2f} s that the file "
                "declares: it is cut off or damaged"
            )
        return said

    def _demux(self) -> Iterator[Any]:
        """The packets of the stream; where the container itself is damaged, those after it."""
        av, failures = extra("av", "PyAV"), 0
        while failures < TRIES:
            try:
                for packet in self.container.demux(self.stream):
                    failures = 0
                    yield packet
                return
            except (av.FFmpegError, OSError, ValueError) as error:
                self._failed(error)
                failures += 1

    def _decode(self, packet: Any) -> list[Any]:
        av = extra("av", "PyAV")
        try:
            return packet.decode()
        except (av.FFmpegError, OSError, ValueError) as error:
            self._failed(error)
            return []

    def _failed(self, error: Exception) -> None:
        self._undecoded += 1
        self.error = str(getattr(error, "strerror", None) or error)

    def _time(self, frame: Any) -> float:
        if frame.pts is None:
            return 0.0 if self._now < 0 else self._now + self.interval
        return float(frame.pts * frame.time_base) - (self.container.start_time or 0) / 1e6

    def _usual_interval(self) -> tuple[float, bool]:
        """Seconds from a frame to the next, and whether that is the same for all."""
        times = sorted({packet.pts for packet in self._first if packet.pts is not None})
        rate = float(self.stream.average_rate or 0)
        if len(times) < 2:
            return 1 / (rate or USUAL_RATE), True
        median = float(statistics.median(b - a for a, b in pairwise(times)) * self.stream.time_base)
        even = rate > 0 and abs(1 - rate * median) < 0.1
        return 1 / rate if even else median, even

    def _look_at(self, frame: Any) -> None:
        aspect = float(self.stream.codec_context.sample_aspect_ratio or 1) or 1.0
        self.stored_size = self.size = (max(1, round(frame.width * aspect)), frame.height)
        matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
        if matrix is not None:
            # On the screen x is a x + c y and y is b x + d y: the nearest of the eight ways in which a frame can lie.
            a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
            self._lying = abs(b) + abs(c) > abs(a) + abs(d)
            across, down = (c, b) if self._lying else (a, d)
            self._mirrored = [axis for axis, way in ((0, down), (1, across)) if way < 0]
            self.size = self.stored_size[::-1] if self._lying else self.stored_size

    def _declared(self) -> float:
        """Seconds from 0 to the end, by what the file says of itself; 0 if it says nothing."""
        seconds = [0.0]
        if self.stream.duration:
            start = self.stream.start_time or 0
            origin = (self.container.start_time or 0) / 1e6
            seconds.append(float((start + self.stream.duration) * self.stream.time_base) - origin)
        elif len([each for each in self.container.streams if each.type in ("audio", "video")]) == 1:
            seconds.append((self.container.duration or 0) / 1e6)
        if "mov" not in self.container.format.name:  # there, frames that an edit list cuts out are counted, too
            seconds.append(self.stream.frames * self.interval)
        return max(seconds)


def pixels(frame: Any, width: int, height: int) -> Tensor:
    """uint8 `(height, width, 3)`, RGB, of a frame as it lies in the file."""
    return torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"))


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _open(path: str) -> Any:
    av = extra("av", "PyAV")
    if not os.path.exists(path):
        raise InputError(f"no such file: {path}")
    if Path(path).is_dir():
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
