"""`sttm-kernels demo`: merges the tokens of a clip, says what happened and draws it."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch

from sttm_kernels import dispatch
from sttm_kernels.console import InputError, extra, threads
from sttm_kernels.demo import result, shapes, video

HELP = "Merge the tokens of a video with STTM and draw the groups."
VERBS = ("assign", "merge", "compose")
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
    parser.add_argument("video", nargs="?", metavar="VIDEO", help="default: a clip of moving shapes, made on the spot")
    parser.add_argument("--out", default="sttm-demo.png", metavar="PATH", help="the picture (default: %(default)s)")
    parser.add_argument("--gif", metavar="PATH", help="also write an animation")
    parser.add_argument("--start", type=_from_zero, default=0, metavar="N", help="first frame, from 0")
    parser.add_argument(
        "--frames", type=_from_one, metavar="N", help="how many, across scene cuts (default: 16 of one scene)"
    )
    parser.add_argument(
        "--stride", type=_from_one, metavar="N", help="take every Nth frame (default: 1 with --frames, else up to 4)"
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
    _writable("--out", arguments.out, PICTURES)
    if arguments.gif is not None:
        _writable("--gif", arguments.gif, ANIMATIONS)
    device, implementation = _implementation(arguments.impl, arguments.device)
    extra("PIL", "Pillow")

    began = time.perf_counter()
    with threads(1):
        where = arguments.patch, arguments.start, arguments.frames, arguments.stride
        clip = shapes.clip(*where, arguments.seed) if arguments.video is None else video.read(arguments.video, *where)
    read_in = time.perf_counter() - began
    try:
        merged = result.merge_tokens(
            clip, arguments.patch, arguments.spatial_keep, arguments.temporal_keep, arguments.impl, device
        )
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error):
            raise InputError("not enough memory for so many tokens: fewer --frames or a larger --patch") from None
        raise

    print("\n".join(result.report(merged, implementation)))
    drawing = time.perf_counter()
    with threads(1):
        result.draw(merged, implementation, arguments.out, arguments.gif)
    done = time.perf_counter()
    print(f"\n{'time':<10}{done - began:.1f} s in all: {read_in:.1f} reading, {done - drawing:.1f} drawing")
    for path in filter(None, (arguments.out, arguments.gif)):
        print(f"{'wrote':<10}{path}")
    return 0


def _writable(option: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Says so before the work, not after it, if the result cannot be written."""
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
