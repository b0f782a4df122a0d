"""How time grows with what grows: exponents fitted to measured rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

from sttm_kernels.bench.compare import SCALING, grouped

CONSTANT_PART = 3.0
"""Times below this multiple of the smallest one are mostly the constant cost of a call."""


def fitted_exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
    """b of the least-squares line log(time) = a + b log(size), over the points that stand out from the constant part.

    None with fewer than three such points.
    """
    smallest = min(times, default=0.0)
    points = [(math.log(s), math.log(t)) for s, t in zip(sizes, times, strict=True) if t >= CONSTANT_PART * smallest]
    if len({x for x, _ in points}) < 3:
        return None
    return linear_regression(*zip(*points, strict=True)).slope


@dataclass(frozen=True)
class Curve:
    """Time against the size of an axis, of one implementation in one run.

    Attributes:
        rows: all of it, those without a time too.
    """

    workload: str
    axis: str
    operation: str
    impl: str
    rows: list[Any]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Size and microseconds, by size."""
        return sorted((float(row[self.axis]), float(row["p50_us"])) for row in self.rows if row.get("p50_us"))

    @property
    def exponent(self) -> float | None:
        return fitted_exponent([size for size, _ in self.points], [time for _, time in self.points])


def curves(rows: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Of the suite "scaling"."""
    found = grouped(
        (row for row in rows if row["suite"] == SCALING and row["axis"]),
        lambda row: (row["workload"], row["axis"], row["operation"], row["impl"]),
    )
    return [Curve(*key, of) for key, of in found.items()]


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line per curve: time is proportional to this power of the axis."""
    lines = ["", f"{'workload':12} {'operation':16} {'impl':22} {'axis':>4} {'from':>8} {'to':>8}  exponent"]
    for curve in curves(rows):
        if curve.points:
            (least, _), (most, _) = curve.points[0], curve.points[-1]
            shown = "too few above the constant cost" if curve.exponent is None else f"{curve.exponent:8.2f}"
            lines.append(
                f"{curve.workload:12} {curve.operation:16} {curve.impl:22} {curve.axis:>4} {least:8.0f} {most:8.0f}  "
                f"{shown}"
            )
    return "\n".join(lines)
