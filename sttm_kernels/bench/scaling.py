"""How time grows with what grows: exponents fitted to measured rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def series(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], list[tuple[float, float]]]:
    """(size, microseconds) by workload, axis, operation and implementation, of the rows that have a time."""
    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("axis") and row.get("p50_us"):
            key = (row["workload"], row["axis"], row["operation"], row["impl"])
            found.setdefault(key, []).append((float(row[row["axis"]]), float(row["p50_us"])))
    return {key: sorted(points) for key, points in found.items()}


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line per series: time is proportional to this power of the axis."""
    lines = ["", f"{'workload':12} {'operation':16} {'impl':22} {'axis':>4} {'from':>8} {'to':>8}  exponent"]
    for (workload, axis, operation, impl), points in series(rows).items():
        sizes, times = zip(*points, strict=True)
        exponent = fitted_exponent(sizes, times)
        shown = "too few above the constant cost" if exponent is None else f"{exponent:8.2f}"
        lines.append(f"{workload:12} {operation:16} {impl:22} {axis:>4} {sizes[0]:8.0f} {sizes[-1]:8.0f}  {shown}")
    return "\n".join(lines)
