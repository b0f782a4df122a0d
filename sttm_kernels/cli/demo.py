"""`sttm-kernels demo`: merges the tokens of a clip, says what happened and draws it."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sttm_kernels import dispatch
from sttm_kernels.console import InputError, extra, progress, threads
from sttm_kernels.demo import result, shapes, video

HELP = "Merge the tokens of a video with STTM and draw the groups."
VERBS = ("assign", "merge", "compose")
PICTURE, FOLDER = "sttm-demo.png", "sttm-demo"
PICTURES, ANIMATIONS = (".png", ".jpg", ".jpeg", ".webp"), (".gif",)


def _count(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


_from_zero, _from_one = partial(_count, least=0), partial(_count, least=1)


def _seconds(text: str, positive: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}") from None
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise argparse.ArgumentTypeError(f"must be {'above 0' if positive else 'at least 0'} seconds, got {value:g}")
    return value


def _keep(text: str) -> float | int:
    if text.strip().lstrip("+-").isdigit():
        return _count(text, 1)
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a fraction like 0.25 or a count like 16, got {text!r}") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"as a fraction must be above 0 and at most 1.0, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "video",
        nargs="?",
        metavar="VIDEO",
        help="a file, or a folder for all the videos in it; default: a clip of moving shapes, made on the spot",
    )
    parser.add_argument(
        "--out", metavar="PATH", help=f"the picture (default: {PICTURE}); for a folder a folder (default: {FOLDER})"
    )
    parser.add_argument("--gif", metavar="PATH", help="also write an animation; for a folder a folder")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a clip in place of the text")
    parser.add_argument(
        "--start", type=partial(_seconds, positive=False), default=0.0, metavar="SECONDS", help="of the first frame"
    )
    parser.add_argument(
        "--frames", type=_from_one, metavar="N", help="how many, across scene cuts (default: 16 of one scene)"
    )
    parser.add_argument(
        "--step",
        type=partial(_seconds, positive=True),
        metavar="SECONDS",
        help="from a frame to the next (default: that of the video with --frames, else up to 4 times that)",
    )
    parser.add_argument("--patch", type=_from_one, default=8, metavar="N", help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--spatial-keep",
        type=_keep,
        default=0.25,
        metavar="KEEP",
        help="tokens left of each frame: a fraction like 0.25 or a count like 64 (default: %(default)s)",
    )
    parser.add_argument(
        "--temporal-keep",
        type=_keep,
        metavar="KEEP",
        help=f"tokens left of the clip: a fraction of those, or a count (default: {result.GROUPS})",
    )
    parser.add_argument("--impl", choices=("auto", *dispatch.IMPLEMENTATIONS), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seed", type=_from_zero, default=0, metavar="N", help="of the clip of moving shapes")


def run(arguments: argparse.Namespace) -> int:
    jobs = _jobs(arguments)
    device, implementation = _implementation(arguments.impl, arguments.device)
    extra("PIL", "Pillow")
    passed_over = 0
    for number, job in enumerate(progress(jobs, len(jobs), "clips", "clip") if len(jobs) > 1 else jobs):
        if number and not arguments.json:
            print()
        try:
            _one(arguments, job, device, implementation)
        except InputError as error:
            if len(jobs) == 1:
                raise
            print(f"sttm-kernels: passed over: {error}", file=sys.stderr)
            passed_over += 1
    if passed_over == len(jobs):
        raise InputError(f"{arguments.video} has no file that could be drawn")
    return 0


def _one(arguments: argparse.Namespace, job: Job, device: torch.device, implementation: str) -> None:
    began = time.perf_counter()
    with threads(1):
        where = arguments.patch, arguments.start, arguments.frames, arguments.step
        clip = shapes.clip(*where, arguments.seed) if job.video is None else video.read(job.video, *where)
    read_in = time.perf_counter() - began
    try:
        merged = result.merge_tokens(
            clip, arguments.patch, arguments.spatial_keep, arguments.temporal_keep, arguments.impl, device
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error):
            raise InputError("not enough memory for so many tokens: fewer --frames or a larger --patch") from None
        raise

    if not arguments.json:
        print("\n".join(result.report(merged, implementation)))
    drawing = time.perf_counter()
    with threads(1):
        result.draw(merged, implementation, job.out, job.gif)
    done = time.perf_counter()
    written = [path for path in (job.out, job.gif) if path is not None]
    if arguments.json:
        print(json.dumps({**result.record(merged, implementation), "wrote": written}), flush=True)
        return
    print(f"\n{'time':<10}{done - began:.1f} s in all: {read_in:.1f} reading, {done - drawing:.1f} drawing")
    for path in written:
        print(f"{'wrote':<10}{path}")


@dataclass(frozen=True)
class Job:
    """A video, or None for the moving shapes, and where its picture and its animation go."""

    video: str | None
    out: str
    gif: str | None


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    """Says before the work, not after it, if a result cannot be written."""
    folder = None if arguments.video is None else Path(arguments.video)
    if folder is None or not folder.is_dir():
        job = Job(arguments.video, arguments.out or PICTURE, arguments.gif)
        _writable("--out", job.out, PICTURES)
        if job.gif is not None:
            _writable("--gif", job.gif, ANIMATIONS)
        return [job]
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise InputError(f"{folder} has no files")
    out = _folder("--out", arguments.out or FOLDER)
    gif = None if arguments.gif is None else _folder("--gif", arguments.gif)
    return [
        Job(str(path), str(out / f"{path.name}.png"), None if gif is None else str(gif / f"{path.name}.gif"))
        for path in files
    ]


def _folder(option: str, name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() in PICTURES + ANIMATIONS:
        raise InputError(f"{option} must be a folder where the videos are those of a folder, got {name}")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: cannot make the folder {name}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{option}: cannot write to {name}")
    return path


def _writable(option: str, path: str, suffixes: tuple[str, ...]) -> None:
    target = Path(path)
    folder = target.parent
    if target.suffix.lower() not in suffixes:
        raise InputError(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    if not folder.is_dir():
        raise InputError(f"{option}: no such directory: {folder}")
    if target.is_dir() or not os.access(target if target.exists() else folder, os.W_OK):
        raise InputError(f"{option}: cannot write {path}")


def _implementation(impl: str, device: str | None) -> tuple[torch.device, str]:
    """The device, and the implementation in words."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device")
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not dispatch.interpreting() else "cpu"
    if impl == "auto":
        chosen = [dispatch.choose(verb, device, torch.float32) for verb in VERBS]
        names = ", ".join(f"{verb} {name}" for verb, name in zip(VERBS, chosen, strict=True))
        return torch.device(device), f"{chosen[0] if len(set(chosen)) == 1 else names} on {device}"
    for verb in VERBS:
        reason = dispatch.why_not(verb, impl, device)
        if reason is not None:
            raise InputError(f"--impl {impl} cannot run {verb} on {device}: {reason}")
    return torch.device(device), f"{impl} on {device}"
