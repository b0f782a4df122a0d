"""What became of the tokens of a clip, in words and as a picture."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.console import InputError, threads
from sttm_kernels.demo import classifier, merging, picture
from sttm_kernels.demo.classifier import vit_flops
from sttm_kernels.demo.tokens import mean_colours, patch_tokens
from sttm_kernels.demo.video import Clip
from sttm_kernels.functional import compose, merge
from sttm_kernels.nn.sttm import Grid, Keep

GROUPS = 16
BAR = 40


@dataclass(frozen=True)
class Result:
    """A clip, what each stage of STTM made of it, and what is drawn.

    Attributes:
        clip: as it was read.
        grid: (T, H, W), of its patches.
        spatial, temporal: the stages.
        groups: the final ones.
        classifier: a small ViT on the same clip.
        seconds: that cutting the frames into tokens took.
    """

    clip: Clip
    grid: Grid
    spatial: merging.Stage
    temporal: merging.Stage
    groups: picture.Groups
    classifier: classifier.Measured
    seconds: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens before, between and after the stages."""
        return self.spatial.plan.index.shape[1], self.spatial.plan.num_groups, self.temporal.plan.num_groups


def merge_tokens(
    clip: Clip,
    patch: int,
    spatial_keep: float | int,
    temporal_keep: float | int | None,
    impl: str,
    device: torch.device,
) -> Result:
    """Cuts a clip into tokens and merges them.

    Args:
        clip: of whole patches.
        patch: the side of a patch in pixels.
        spatial_keep, temporal_keep: of `STTM`; None leaves 16 groups.
        impl: of every verb.
        device: to merge on.

    Raises:
        InputError: more tokens are to be kept than there are.
    """
    began = time.perf_counter()
    with threads(1):
        x, grid = patch_tokens(clip.frames, patch)
    seconds = time.perf_counter() - began
    keeps = _keeps(grid, spatial_keep, temporal_keep)
    with torch.no_grad():
        spatial, temporal = merging.merge_clip(x.to(device), grid, *keeps, impl)
        plan = compose(spatial.plan, temporal.plan, impl)
        positions = spatial.tokens.positions
        assert positions is not None
        paths = merging.centres(positions, temporal.plan, grid[0], spatial.tokens.size, impl=impl)
        colours = merge(mean_colours(clip.frames, patch).to(device), plan, impl=impl).x[0]
    groups = picture.Groups(
        plan.index[0].view(grid).long().cpu(), colours.round().to(torch.uint8).cpu(), paths.float().cpu()
    )
    measured = classifier.measure(clip.frames, impl, device)
    return Result(clip, grid, spatial, temporal, groups, measured, seconds)


def _keeps(grid: Grid, spatial: float | int, temporal: float | int | None) -> tuple[Keep, Keep]:
    in_frame = grid[1] * grid[2]
    if isinstance(spatial, int) and spatial > in_frame:
        raise InputError(f"--spatial-keep {spatial} is more than the {in_frame} tokens of a frame")
    left = grid[0] * (spatial if isinstance(spatial, int) else max(1, int(spatial * in_frame + 0.5)))
    if isinstance(temporal, int) and temporal > left:
        raise InputError(f"--temporal-keep {temporal} is more than the {left} tokens that the spatial stage leaves")
    return spatial, min(GROUPS, left) if temporal is None else temporal


def _amount(number: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}FLOP"
    return f"{number / 1e6:.3g} MFLOP"


def _piece(clip: Clip) -> str:
    """Which frames, in words."""
    if len(clip.frames) == 1:
        return f"1 frame at {clip.start:.2f} s"
    return f"{len(clip.frames)} frames from {clip.start:.2f} to {clip.times[-1]:.2f} s, one every {clip.step:.3g} s"


def _settings(result: Result) -> dict[str, tuple[int, int]]:
    """Tokens, and the operations of a ViT-B behind them: unmerged, as a classifier would keep them, and as drawn."""
    before, _, after = result.counts
    half = round(before * classifier.KEEP)
    return {name: (n, vit_flops(n)) for name, n in (("unmerged", before), ("half", half), ("drawn", after))}


def record(result: Result, implementation: str) -> dict[str, Any]:
    """What `report` says, for programs; sizes in pixels, times in seconds."""
    clip, counts = result.clip, result.counts
    height, width = clip.frames.shape[1:3]
    return {
        "clip": clip.name,
        "frames": len(clip.frames),
        "start": clip.start,
        "step": clip.step,
        "size": clip.source_size,
        "read_as": (width, height),
        "notes": clip.notes,
        "implementation": implementation,
        "grid": result.grid,
        "tokens": dict(zip(("before", "spatial", "temporal"), counts, strict=True)),
        "seconds": {"spatial": result.spatial.seconds, "temporal": result.temporal.seconds},
        "vit_b_flops": {name: flops for name, (_, flops) in _settings(result).items()},
        "small_vit": asdict(result.classifier),
        "group_sizes": result.temporal.tokens.size[0].long().tolist(),
    }


def report(result: Result, implementation: str) -> list[str]:
    """The lines that are printed; `implementation` is what it ran on, in words."""
    clip = result.clip
    (frames, rows, columns), (before, between, after) = result.grid, result.counts
    height, width = clip.frames.shape[1:3]
    lines = [
        f"{'clip':<10}{clip.name}, {_piece(clip)}, {' x '.join(map(str, clip.source_size))} as {width} x {height}",
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
        *_costs(result),
        "",
        "tokens in a group, and how many groups",
        *_histogram(result.temporal.tokens.size[0].cpu()),
    ]
    return lines


def _costs(result: Result) -> list[str]:
    """What a ViT-B behind the merge would take, and what a small ViT took."""
    settings, measured = _settings(result), result.classifier
    full = settings["unmerged"][1]
    lines: list[str] = []
    for name, what in (("unmerged", "unmerged"), ("half", "a half, as classifiers keep"), ("drawn", "as drawn")):
        tokens, flops = settings[name]
        saved = "" if name == "unmerged" else f", {100 * (1 - flops / full):.2f} % saved"
        lines.append(f"{'ViT-B' if not lines else '':<10}{tokens:>6} tokens, {what}: {_amount(flops)} a clip{saved}")
    if settings["drawn"][0] < settings["half"][0]:
        lines[-1] += "; so few are for the eye, not for a classifier"
    return [*lines, f"{'measured':<10}{_measured(measured)}"]


def _measured(measured: classifier.Measured) -> str:
    half = round(measured.tokens * classifier.KEEP)
    return (
        f"a ViT of {classifier.DEPTH} blocks, {classifier.DIM} wide, on the clip's {measured.tokens} tokens, "
        f"on {measured.where}: "
        f"{1000 * measured.unmerged:.0f} ms; merged to {half} behind the first block: {1000 * measured.merged:.0f} ms"
    )


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


def draw(result: Result, implementation: str, out: str, gif: str | None) -> None:
    """Writes the picture and, if it is given a path, the animation.

    Raises:
        InputError: one of them cannot be written.
    """
    clip = result.clip
    before, between, after = result.counts
    settings = _settings(result)
    full, half = settings["unmerged"][1], settings["half"][1]
    title = f"{clip.name}: {before} tokens merged to {between}, then to {after}"
    lines = [
        f"{_piece(clip)}. Spatial stage {1000 * result.spatial.seconds:.0f} ms, temporal stage "
        f"{1000 * result.temporal.seconds:.0f} ms, {implementation}.",
        f"{after} groups are for the eye. A classifier keeps a half of the tokens: a ViT-B behind them takes "
        f"{_amount(half)} a clip in place of {_amount(full)}, {100 * (1 - half / full):.0f} % saved.",
        f"Measured: {_measured(result.classifier)}.",
    ]
    captions = [f"{time:.2f} s" for time in clip.times]
    try:
        picture.sheet(clip.frames, result.groups, captions, title, lines).save(out)
        if gif is not None:
            images = picture.animate(clip.frames, result.groups)
            duration = max(20, round(1000 * clip.step))
            images[0].save(gif, save_all=True, append_images=images[1:], duration=duration, loop=0)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or 'the picture'}: {error.strerror or error}") from None
