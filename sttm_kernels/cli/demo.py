"""`sttm-kernels demo`: merges the tokens of a clip, says what happened and draws it."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sttm_kernels import dispatch
from sttm_kernels.cli import merging, picture, shapes, video
from sttm_kernels.cli.common import InputError, extra, one_thread
from sttm_kernels.cli.tokens import mean_colours, patch_tokens
from sttm_kernels.functional import merge
from sttm_kernels.nn.sttm import Keep

HELP = "Merge the tokens of a video with STTM and draw the groups."
GROUPS = 16
VERBS = ("assign", "merge", "compose")
VIT_B_DEPTH = 12
PICTURES, ANIMATIONS = (".png", ".jpg", ".jpeg", ".webp"), (".gif",)
BAR = 40


def _count(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def _from_zero(text: str) -> int:
    return _count(text, 0)


def _from_one(text: str) -> int:
    return _count(text, 1)


def _keep(text: str) -> float | int:
    try:
        return _count(text, 1) if text.strip().lstrip("+-").isdigit() else _fraction(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a fraction like 0.25 or a count like 16, got {text!r}") from None


def _fraction(value: float) -> float:
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
        help=f"tokens left of the clip: a fraction of those, or a count (default: {GROUPS})",
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
    with one_thread():
        clip = _clip(arguments)
    read_in = time.perf_counter() - began
    try:
        result = _merge(clip, arguments, device)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(error):
            raise InputError("not enough memory for so many tokens: fewer --frames or a larger --patch") from None
        raise

    print("\n".join(_report(clip, result, implementation)))
    drawing = time.perf_counter()
    with one_thread():
        _draw(clip, result, implementation, arguments)
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


def _clip(arguments: argparse.Namespace) -> video.Clip:
    if arguments.video is not None:
        return video.read(arguments.video, arguments.patch, arguments.start, arguments.frames, arguments.stride)
    rendered = shapes.render(shapes.FRAMES, arguments.seed)
    stride = arguments.stride or (1 if arguments.frames else shapes.FRAMES // video.DEFAULT_FRAMES)
    indices = range(shapes.FRAMES)[arguments.start :: stride][: arguments.frames or video.DEFAULT_FRAMES]
    if not indices:
        raise InputError(f"--start {arguments.start} is past the end of the moving shapes: {shapes.FRAMES} frames")
    frames = video.crop(rendered.frames[indices.start : indices.stop : indices.step], arguments.patch)
    return video.Clip("moving shapes", frames, indices, 25.0, (shapes.WIDTH, shapes.HEIGHT))


@dataclass(frozen=True)
class _Result:
    grid: tuple[int, int, int]
    spatial: merging.Stage
    temporal: merging.Stage
    groups: picture.Groups
    seconds: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens before, between and after the stages."""
        return self.spatial.plan.index.shape[1], self.spatial.plan.num_groups, self.temporal.plan.num_groups


def _merge(clip: video.Clip, arguments: argparse.Namespace, device: torch.device) -> _Result:
    began = time.perf_counter()
    with one_thread():
        x, grid = patch_tokens(clip.frames, arguments.patch)
    seconds = time.perf_counter() - began
    impl = arguments.impl
    spatial_keep, temporal_keep = _keeps(grid, arguments.spatial_keep, arguments.temporal_keep)
    with torch.no_grad():
        spatial, temporal = merging.merge_clip(x.to(device), grid, spatial_keep, temporal_keep, impl)
        plan = merging.whole_plan(spatial, temporal, impl)
        positions = spatial.tokens.positions
        assert positions is not None
        paths = merging.centres(positions, temporal.plan, grid[0], spatial.tokens.size, impl=impl)
        colours = merge(mean_colours(clip.frames, arguments.patch).to(device), plan, impl=impl).x[0]
    groups = picture.Groups(
        plan.index[0].view(grid).long().cpu(), colours.round().to(torch.uint8).cpu(), paths.float().cpu()
    )
    return _Result(grid, spatial, temporal, groups, seconds)


def _keeps(grid: tuple[int, int, int], spatial: float | int, temporal: float | int | None) -> tuple[Keep, Keep]:
    in_frame = grid[1] * grid[2]
    if isinstance(spatial, int) and spatial > in_frame:
        raise InputError(f"--spatial-keep {spatial} is more than the {in_frame} tokens of a frame")
    left = grid[0] * (spatial if isinstance(spatial, int) else max(1, int(spatial * in_frame + 0.5)))
    if isinstance(temporal, int) and temporal > left:
        raise InputError(f"--temporal-keep {temporal} is more than the {left} tokens that the spatial stage leaves")
    return spatial, min(GROUPS, left) if temporal is None else temporal


def vit_flops(tokens: int, dim: int = 768, depth: int = VIT_B_DEPTH) -> int:
    """Of the blocks of a ViT-B on one clip of so many tokens, 2 per multiply-add: linear layers and attention."""
    return depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)


def _amount(number: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}FLOP"
    return f"{number / 1e6:.3g} MFLOP"


def _pieces(clip: video.Clip) -> str:
    first, last, step = clip.indices[0], clip.indices[-1], clip.indices.step
    if first == last:
        return f"frame {first}"
    return f"frames {first} to {last}" + (f", every {step}" + _ordinal(step) if step > 1 else "")


def _ordinal(number: int) -> str:
    return "th" if number % 100 // 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _saved(result: _Result) -> tuple[int, int, float]:
    before, after = vit_flops(result.counts[0]), vit_flops(result.counts[2])
    return before, after, 100 * (1 - after / before)


def _report(clip: video.Clip, result: _Result, implementation: str) -> list[str]:
    (frames, rows, columns), (before, between, after) = result.grid, result.counts
    height, width = clip.frames.shape[1:3]
    full, left, saved = _saved(result)
    lines = [
        f"{'clip':<10}{clip.name}, {_pieces(clip)}, {' x '.join(map(str, clip.source_size))} as {width} x {height}",
        *(f"{'note':<10}{note}" for note in clip.notes),
        f"{'tokens':<10}{before} patches of {height // rows} x {width // columns} pixels, "
        f"{frames} x {rows} x {columns}, cut in {result.seconds:.2f} s",
    ]
    for name, stage, start, end in (
        ("spatial", result.spatial, before, between),
        ("temporal", result.temporal, between, after),
    ):
        empty = f", {stage.empty} of them empty" if stage.empty else ""
        lines.append(f"{name:<10}{start} to {end} tokens{empty}, {1000 * stage.seconds:.1f} ms")
    lines += [
        f"{'ran on':<10}{implementation}",
        f"{'ViT-B':<10}{VIT_B_DEPTH} blocks behind the merge: {_amount(full)} to {_amount(left)} a clip, "
        f"{saved:.2f} % saved",
        "",
        "tokens in a group, and how many groups",
        *_histogram(result.temporal.tokens.size[0].cpu()),
    ]
    return lines


def _histogram(sizes: Tensor) -> list[str]:
    """Groups by size, in bins that double, as bars."""
    bins = sizes[sizes > 0].log2().floor().long().bincount()
    rows = []
    for power, number in enumerate(bins.tolist()):
        if any(bins[: power + 1]):
            low, high = 2**power, 2 ** (power + 1) - 1
            label = str(low) if low == high else f"{low} to {high}"
            bar = "#" * -(-number * BAR // int(bins.max()))
            rows.append(f"{label:>16}  {number:>5}  {bar}".rstrip())
    empty = int((sizes == 0).sum())
    return [*([f"{'empty':>16}  {empty:>5}"] if empty else []), *rows]


def _draw(clip: video.Clip, result: _Result, implementation: str, arguments: argparse.Namespace) -> None:
    before, between, after = result.counts
    full, left, saved = _saved(result)
    title = f"{clip.name}: {before} tokens merged to {between}, then to {after}"
    lines = [
        f"{_pieces(clip).capitalize()}. Spatial stage {1000 * result.spatial.seconds:.0f} ms, temporal stage "
        f"{1000 * result.temporal.seconds:.0f} ms, {implementation}.",
        f"A ViT-B behind the merge takes {_amount(left)} a clip in place of {_amount(full)}: {saved:.2f} % saved.",
    ]
    captions = [f"frame {index}, {index / clip.fps:.2f} s" for index in clip.indices]
    try:
        picture.sheet(clip.frames, result.groups, captions, title, lines).save(arguments.out)
        if arguments.gif is not None:
            images = picture.animate(clip.frames, result.groups)
            duration = max(20, round(1000 * clip.indices.step / clip.fps))
            images[0].save(arguments.gif, save_all=True, append_images=images[1:], duration=duration, loop=0)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or 'the picture'}: {error.strerror or error}") from None
