"""What rows say, in lines: every contender's accuracy, and its paired difference to another on the same clips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sttm_kernels.console import extra
from sttm_kernels.evidence import jobs, rows
from sttm_kernels.evidence.contenders import ALL
from sttm_kernels.evidence.rows import Key

Rows = Mapping[Key, Mapping[str, str]]
LEVEL = 0.95
"""Of intervals."""
COMPARISONS = (
    ("sttm-motion", "unmerged", -1.0, "within 1 point of the unmerged network"),
    ("sttm-motion", "tome", 1.7, "at least 1.7 points above ToMe"),
    ("sttm-motion", "tome-once", 1.7, "at least 1.7 points above one matching, after block 1"),
    ("sttm-motion", "random-drop", 0.0, "above dropping tokens at random"),
    ("sttm-motion", "even-frames", 0.0, "above dropping frames evenly"),
    ("sttm-motion", "sttm", 1.0, "motion features worth at least 1 point"),
)
"""The goals: which contender, compared with which, by how many points of joint accuracy at least, in words."""


EXPECTED: dict[str, tuple[float, float, float]] = {
    "unmerged": (44.6, 68.0, 64.7),
    "sttm-motion": (44.6, 67.2, 66.6),
    "tome": (43.7, 64.5, 68.1),
}
"""What `--quick` gave on an AMD EPYC with one thread and torch 2.13.0: joint, digit and motion."""


@dataclass(frozen=True)
class Difference:
    """Mean difference in points of joint accuracy over the seeds that both have, and half widths of its intervals: over
    clips, those seeds given; and over seeds, None where there is one."""

    points: float
    over_clips: float
    over_seeds: float | None
    seeds: int


def difference(ours: Sequence[Mapping[str, str]], theirs: Sequence[Mapping[str, str]]) -> Difference | None:
    """Paired by seed and clip; None where no seed is in both."""
    stats = extra("scipy.stats", "scipy", "evidence", "evidence")
    by_seed = [{row["seed"]: rows.right(row) for row in of} for of in (ours, theirs)]
    paired = []
    for seed in sorted(by_seed[0].keys() & by_seed[1].keys()):
        clips = min(len(of[seed]) for of in by_seed)
        paired.append(100.0 * (by_seed[0][seed][:clips].astype(float) - by_seed[1][seed][:clips]))
    if not paired:
        return None
    clips = min(map(len, paired))
    each = np.stack([of[:clips] for of in paired])
    by_clip, of_seed = each.mean(0), each.mean(1)
    over_clips = stats.norm.ppf((1 + LEVEL) / 2) * by_clip.std(ddof=1) / clips**0.5
    n = len(of_seed)
    over_seeds = stats.t.ppf((1 + LEVEL) / 2, n - 1) * of_seed.std(ddof=1) / n**0.5 if n > 1 else None
    return Difference(float(by_clip.mean()), float(over_clips), None if over_seeds is None else float(over_seeds), n)


def of(found: Rows, setting: str, contender: str, percent: int, steps: int) -> list[Mapping[str, str]]:
    """The rows of a contender, one a seed. The unmerged network is its own at every percent."""
    percent = 0 if contender == "unmerged" else percent
    setting = jobs.TRAINED if contender == "unmerged" else setting
    wanted = (setting, contender, percent, steps)
    return [row for key, row in found.items() if (key.setting, key.contender, key.percent, key.steps) == wanted]


def lines(found: Rows) -> Iterator[str]:
    """A table for every setting and number of steps."""
    cells = defaultdict(list)
    for key in found:
        cells[key.setting, key.steps].append(key)
    for setting, steps in sorted(cells, key=lambda cell: (jobs.SETTINGS.index(cell[0]), cell[1])):
        yield f"{setting}, {steps} steps{' of the unmerged network' * (setting != jobs.TRAINED)}"
        yield f"  {'contender':<17}{'FLOPs':>7}{'joint':>8}{'digit':>7}{'motion':>8}{'to unmerged':>20}{'to ToMe':>20}"
        listed = {(key.contender, key.percent) for key in cells[setting, steps]}
        order = list(ALL)
        for contender, percent in sorted(listed, key=lambda one: (one[1], order.index(one[0]))):
            mine = of(found, setting, contender, percent, steps)
            means = [np.mean([float(row[name]) for row in mine]) for name in ("share", "joint", "digit", "motion")]
            line = f"  {contender:<17}{100 * (means[0] - 1):>+6.0f}%{means[1]:>8.1f}{means[2]:>7.1f}{means[3]:>8.1f}"
            for rival in ("unmerged", "tome"):
                theirs = [] if contender == rival else of(found, setting, rival, percent, steps)
                line += f"{shown(difference(mine, theirs)):>20}"
            yield f"{line}  {len(mine)} seed{'s' * (len(mine) > 1)}"
        yield ""


def beside_expected(found: Rows) -> Iterator[str]:
    """The rows of `--quick` beside what they were elsewhere; the same versions on the same device give the same."""
    yield f"  {'contender':<17}{'joint, digit, motion':>24}{'expected':>24}"
    for key in jobs.quick(jobs.QUICK_STEPS):
        if key in found:
            measured = tuple(float(found[key][name]) for name in ("joint", "digit", "motion"))
            yield f"  {key.contender:<17}{_three(measured):>24}{_three(EXPECTED[key.contender]):>24}"


def _three(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:.1f}" for number in numbers)


def shown(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.points:+.1f} ± {difference.over_seeds or difference.over_clips:.1f}"


def verdicts(found: Rows, steps: int) -> Iterator[str]:
    """The goals: met or missed where the whole interval is on one side, else undecided, or not yet measured."""
    for name, rival, least, words in COMPARISONS:
        ours, theirs = (of(found, jobs.TRAINED, one, jobs.GOAL, steps) for one in (name, rival))
        measured = difference(ours, theirs)
        if measured is None:
            yield f"  {words}: not measured yet"
            continue
        half = measured.over_seeds or measured.over_clips
        low, high = measured.points - half, measured.points + half
        met = "met" if low >= least else "missed" if high < least else "undecided"
        seeds = "" if measured.over_seeds is None else f", ± {measured.over_seeds:.1f} over seeds"
        yield (
            f"  {words}: {met}, {measured.points:+.1f} points"
            f" (± {measured.over_clips:.1f} over clips{seeds}; {measured.seeds} seed{'s' * (measured.seeds > 1)})"
        )
