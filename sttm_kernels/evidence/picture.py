"""One picture of the rows: accuracy against operations, one line a method, a panel a setting; needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sttm_kernels.bench.plots import BESIDE, DPI, INK, MARKERS, PALETTE, STYLE, WIDTH
from sttm_kernels.evidence import jobs, table
from sttm_kernels.evidence.contenders import CONTENDERS
from sttm_kernels.evidence.rows import Key

TITLES = {
    jobs.APPLIED: "applied to a trained network as it is",
    jobs.TUNED: "after a short fine-tune",
    jobs.TRAINED: "trained from scratch",
}


def draw(found: table.Rows, path: Path, steps: int) -> None:
    """Where the unmerged network has rows, a point is its accuracy and the paired difference to it, with its interval
    over clips: contenders may have been measured on fewer clips."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _draw({key: row for key, row in found.items() if key.steps == steps}, path, steps)


def _draw(found: table.Rows, path: Path, steps: int) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    unmerged = table.of(found, jobs.TRAINED, "unmerged", 0, steps)
    drawn = {key.contender for key in found} - {"unmerged", *jobs.CONTROLS}
    order = [name for name in CONTENDERS if name in drawn]
    looks = {
        name: {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "label": name}
        for i, name in enumerate(order)
    }
    settings = [setting for setting in jobs.SETTINGS if any(key.setting == setting for key in found)]
    figure = Figure((WIDTH, 4.6 * len(settings) + 0.5), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    device = next(iter(found.values()))["device"]
    figure.suptitle(f"Both answers right, against operations\n{steps} steps, {device}", x=0.01, ha="left", size=11)
    for axes, setting in zip(figure.subplots(len(settings), 1, squeeze=False)[:, 0], settings, strict=True):
        axes.set_title(TITLES[setting])
        if unmerged:
            at = float(np.mean([float(row["joint"]) for row in unmerged]))
            axes.axhline(at, color=INK, linewidth=1, label="unmerged")
        for name in order:
            points = sorted(_points(found, setting, name, steps, unmerged))
            if points:
                share, joint, half = zip(*points, strict=True)
                axes.errorbar(share, joint, half, capsize=2, elinewidth=0.8, linewidth=1.1, **looks[name])
        axes.set_xlim(103, 30)
        axes.set_xlabel("operations of a clip, percent of the unmerged network's")
        axes.set_ylabel("percent of clips")
        axes.legend(**BESIDE)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _points(found: table.Rows, setting: str, name: str, steps: int, unmerged: list[Any]) -> list[tuple[float, ...]]:
    """Share of operations, accuracy, half an interval, of every rate."""
    by_rate: dict[int, list[Key]] = defaultdict(list)
    for key in found:
        if (key.setting, key.contender) == (setting, name):
            by_rate[key.percent].append(key)
    points: list[tuple[float, ...]] = []
    for keys in by_rate.values():
        mine = [found[key] for key in keys]
        share, joint = (float(np.mean([float(row[of]) for row in mine])) for of in ("share", "joint"))
        against = table.difference(mine, unmerged)
        if against is None:
            points.append((100 * share, joint, 0.0))
        else:
            of_unmerged = float(np.mean([float(row["joint"]) for row in unmerged]))
            points.append((100 * share, of_unmerged + against.points, against.over_clips))
    return points
