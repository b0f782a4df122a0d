"""Which rows may stand beside each other, and what they say then.

Rows are compared within one run, device and dtype, on one workload of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sttm_kernels import dispatch

OURS = dispatch.IMPLEMENTATIONS
MODELS, SCALING, SMOKE = "models", "scaling", "smoke"
SHAPE = ("B", "N", "C", "heads", "D", "r", "K")

Row = dict[str, str]
Key = TypeVar("Key")
Item = TypeVar("Item")


def number(row: Row, column: str) -> float | None:
    return float(row[column]) if row[column] else None


def on_gpu(row: Row) -> bool:
    """Threads are counted on CPUs only."""
    return not row["threads"]


def timed(row: Row) -> bool:
    return bool(row["p50_us"])


def is_rival(row: Row) -> bool:
    """Of the package's verbs: something other than a yardstick, by someone else."""
    return row["impl"] not in ("", *OURS) and row["check"] != "none" and row["suite"] != MODELS


def shape(row: Row) -> tuple[str, ...]:
    """What tells workloads of one name from each other; in "models" and "scaling" all sizes of one belong together."""
    if row["suite"] == MODELS:
        return (row["B"],)
    return () if row["suite"] == SCALING else tuple(row[name] for name in SHAPE)


def title(row: Row) -> str:
    """A workload and its shape, as short as tells it from others."""
    if row["suite"] == SCALING:
        return f"{row['workload']}, {row['axis']}={row[row['axis']]}"
    merges = f", r={row['r']}" if row["r"] not in ("", "0") else f", K={row['K']}"
    return f"{row['workload']}, B={row['B']}" + merges * (row["suite"] != MODELS)


def subject(row: Row) -> tuple[str, ...]:
    """What was measured, apart from how and when."""
    return (*(row[name] for name in ("device", "dtype", "suite", "axis", "workload", "operation")), *shape(row))


def point(row: Row) -> tuple[str, ...]:
    """A subject at one size: what implementations and rivals may be compared at."""
    return (*subject(row), *(row[name] for name in SHAPE))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every subject the rows of the last run that measured it, of every implementation the last row.

    The suite "smoke" says nothing of speed and is left out.
    """
    ordered = sorted((row for row in rows if row["suite"] != SMOKE), key=lambda row: row["time"])
    last = {subject(row): row["run"] for row in ordered}
    kept: dict[tuple[str, ...], Row] = {}
    for row in ordered:
        if row["run"] == last[subject(row)]:
            kept[(*point(row), row["impl"])] = row
    return list(kept.values())


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """In the order in which each first appears."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def best_of_ours(rows: Iterable[Row]) -> Row | None:
    ours = [row for row in rows if row["impl"] in OURS and timed(row)]
    return min(ours, key=lambda row: float(row["p50_us"]), default=None)


def speed_up(rows: Iterable[Row], other: Row) -> float | None:
    """How many times faster the best of ours is than `other`, of the rows of one point; None if one has no time."""
    ours = best_of_ours(rows)
    return float(other["p50_us"]) / float(ours["p50_us"]) if ours is not None and timed(other) else None


@dataclass(frozen=True)
class Merged:
    """A model with merging beside the same one without, of one run."""

    before: Row
    after: Row

    def ratio(self, column: str) -> float | None:
        one, other = number(self.before, column), number(self.after, column)
        return one / other if one and other else None

    @property
    def speed_up(self) -> float | None:
        return self.ratio("p50_us") if timed(self.before) and timed(self.after) else None

    @property
    def realised(self) -> float | None:
        """The speed-up over the reduction in operations: 1 says that all of it was realised."""
        faster, fewer = self.speed_up, self.ratio("flops")
        return faster / fewer if faster and fewer else None

    @property
    def keep(self) -> float | None:
        """Tokens that leave the last layer over those that enter the first."""
        counts = tokens(self.after)
        return counts[-1] / counts[0] if counts else None


def tokens(row: Row) -> Sequence[int]:
    return [int(count) for count in row["tokens"].split()]


def merged_models(rows: Iterable[Row]) -> list[Merged]:
    """Every merging model beside its like; one without its like stands beside a row that says so."""
    pairs = []
    for of in grouped((row for row in rows if row["suite"] == MODELS), subject).values():
        for kind in grouped(of, lambda row: row["impl"].removeprefix("un")):
            before = [row for row in of if row["impl"] == f"un{kind}"] or [_absent(of[0], f"un{kind}")]
            after = [row for row in of if row["impl"] == kind] or [_absent(of[0], kind)]
            pairs += [Merged(before[0], row) for row in after]
    return pairs


def _absent(row: Row, impl: str) -> Row:
    empty = dict.fromkeys(("r", "p20_us", "p50_us", "p80_us", "peak_bytes", "flops", "tokens"), "")
    return {**row, **empty, "impl": impl, "check": "not measured"}
