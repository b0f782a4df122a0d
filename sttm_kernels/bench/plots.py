"""Pictures of rows of one device and dtype, each a PNG; needs matplotlib.

A drawing function takes rows that `compare.latest` left and a path; it returns whether there was something to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sttm_kernels.bench import compare
from sttm_kernels.bench.compare import MODELS, OURS, SCALING, Row
from sttm_kernels.bench.scaling import curves
from sttm_kernels.bench.workloads import BACKWARD
from sttm_kernels.crossover import slug

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import Formatter

WIDTH, DPI = 10.0, 120
INK, FAINT, GRID = "#222222", "#767676", "#dddddd"
FASTER, SLOWER = "#0072b2", "#d55e00"
PALETTE = (FASTER, SLOWER, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#882255", "#999933")
"""Okabe and Ito's, which colour-blind people tell apart, with wine red and olive for its yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
LINES = ("-", "--", "-.", ":")
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
"""Where a legend stands."""
OVER = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
"""Behind text that lines run through."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "lines.markeredgecolor": "white",
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """All pictures of all devices and dtypes; returns those that there was something to see on."""
    import matplotlib

    drawn = []
    for (device, dtype), of in compare.grouped(rows, lambda row: (row["device"], row["dtype"])).items():
        for name, picture in PICTURES.items():
            path = folder / file_name(device, dtype, name)
            with matplotlib.rc_context(STYLE):
                if picture(of, path):
                    drawn.append(path)
    return drawn


def file_name(device: str, dtype: str, picture: str) -> str:
    return f"{slug(device)}-{dtype}-{picture}.png"


def speed_up(rows: Sequence[Row], path: Path, backward: bool = False) -> bool:
    """How many times faster the best implementation of the package is than each rival, on each workload."""
    compared = [
        (row, compare.speed_up(of, row))
        for of in compare.grouped(rows, compare.point).values()
        for row in of
        if compare.is_rival(row) and row["suite"] != SCALING and row["operation"].endswith(BACKWARD) == backward
    ]
    blocks = compare.grouped(compared, lambda one: compare.title(one[0])).items()
    if not blocks:
        return False
    figure = _figure(
        rows,
        f"Speed-up over rivals,{BACKWARD if backward else ' forward'}",
        0.21 * sum(1.3 + len(bars) for _, bars in blocks) + 1.1,
    )
    axes = figure.subplots()
    axes.set_xscale("log")
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for title, bars in blocks:
        axes.text(0.005, y, title, transform=axes.get_yaxis_transform(), va="center", weight="bold", size=8, bbox=OVER)
        for row, ratio in bars:
            y += 1
            ticks.append((y, f"{row['operation'].removesuffix(BACKWARD)} / {row['impl']}"))
            if ratio is None:
                reason = "ours has no time" if compare.timed(row) else row["check"]
                axes.text(1, y, f"  {_short(reason)}", va="center", size=8, color=FAINT)
                continue
            slower = ratio < 1
            axes.barh(y, ratio - 1, left=1, height=0.74, color=SLOWER if slower else FASTER)
            axes.annotate(
                f"{ratio:.2f} x, slower" if slower else f"{ratio:.2f} x",
                (ratio, y),
                (-4 if slower else 4, -0.5),
                textcoords="offset points",
                ha="right" if slower else "left",
                va="center",
                size=8,
            )
        y += 1.3
    ratios = [ratio for _, bars in blocks for _, ratio in bars if ratio is not None]
    least, most = min([0.95, *ratios]), max([2.0, *ratios])
    room = (most / least) ** 0.2
    axes.set_xlim(least / (room if least < 0.95 else 1), most * room)
    axes.set_ylim(y - 0.6, -0.9)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    _plain(axes.xaxis, "{x:g} x")
    axes.set_xlabel("operation / rival: its time over that of the package's best implementation, in the same run")
    return _save(figure, path)


def roofline(rows: Sequence[Row], path: Path) -> bool:
    """Bytes per second against operations per byte.

    The roof is the bandwidth, up to where arithmetic takes longer; the distance to it is the distance to the floor. In
    bytes, operations that compute nothing have a place too.
    """
    from matplotlib.ticker import EngFormatter

    points = [
        row
        for row in rows
        if row["suite"] not in (MODELS, SCALING) and row["impl"] in OURS and compare.timed(row) and row["bandwidth"]
    ]
    if not points:
        return False
    at = [_of(row, "flops") / _of(row, "bytes") for row in points]
    rates = [1e6 * _of(row, "bytes") / _of(row, "p50_us") for row in points]
    roofs = sorted({(_of(row, "bandwidth"), _of(row, "flop_rate")) for row in points})
    marks = [1.0, *(x for x in at if x > 0), *(flop_rate / bandwidth for bandwidth, flop_rate in roofs)]
    low, high = min(marks) / 2, max(marks) * 8
    nothing = low / 2 if 0 in at else low
    left = nothing / 2.5

    figure = _figure(rows, "Roofline: how near the kernels come to what the device can move and multiply", 5.8)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(left, high))
    axes.set_ylim(min(rates) / 2, max(rates + [bandwidth for bandwidth, _ in roofs]) * 2.5)
    for bandwidth, flop_rate in roofs:
        for share in (1, 0.5, 0.1):
            ys = [share * bandwidth, share * bandwidth, share * flop_rate / high]
            ink, line = (INK, "-") if share == 1 else (FAINT, ":")
            axes.plot([left, flop_rate / bandwidth, high], ys, line, color=ink, linewidth=1.6 if share == 1 else 0.9)
    bandwidth, flop_rate = roofs[-1]
    bytes_per_second = EngFormatter("B/s")
    for share, text in ((1, f"copies: {bytes_per_second(bandwidth)}"), (0.5, "50 %"), (0.1, "10 %")):
        colour = INK if share == 1 else FAINT
        axes.annotate(text, (left, share * bandwidth), (5, 3), textcoords="offset points", size=8, color=colour)
    between = (flop_rate / bandwidth * high) ** 0.5
    products = f"products: {EngFormatter('FLOP/s')(flop_rate)}"
    axes.annotate(products, (between, flop_rate / between), (4, 4), textcoords="offset points", size=8)
    colours, markers = _colours(rows), _markers(rows)
    for row, x, rate in zip(points, at, rates, strict=True):
        colour, hollow = colours[row["operation"]], row["operation"].endswith(BACKWARD)
        marker: dict[str, Any] = {
            "markerfacecolor": "white" if hollow else colour,
            "markeredgecolor": colour if hollow else "white",
        }
        axes.plot(max(x, nothing), rate, markers[row["impl"]], alpha=0.85, **marker)
    if 0 in at:
        axes.axvline(low / 2**0.5, color=FAINT, linewidth=0.7)
    decades = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    ticks = [*[nothing] * (0 in at), *decades]
    axes.set_xticks(ticks, [f"{x:g}" if x in decades else "0" for x in ticks])
    axes.yaxis.set_major_formatter(bytes_per_second)
    axes.set_xlabel("floating-point operations per byte that must be moved (dotted: half and a tenth of the roof)")
    axes.legend(handles=_handles(colours, markers, points), **BESIDE)
    return _save(figure, path)


def scaling(rows: Sequence[Row], path: Path) -> bool:
    """Time against N, and smaller against whatever else was varied."""
    from matplotlib.ticker import EngFormatter

    drawn = [curve for curve in curves(rows) if curve.points]
    if not drawn:
        return False
    found = compare.grouped(drawn, lambda curve: (curve.axis, curve.workload))
    large = {name: of for name, of in found.items() if name[0] == "N"}
    bands = [band for band in (large, {name: of for name, of in found.items() if name not in large}) if band]
    heights = [5.8 if band is large else 3.4 for band in bands]
    figure = _figure(rows, "Time of one call against size", sum(heights) + 0.5)
    figures = figure.subfigures(len(bands), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours, markers, seconds = _colours(rows), _markers(rows), EngFormatter("s")
    lines = dict(zip(markers, LINES * len(markers), strict=False))
    for part, band in zip(figures, bands, strict=True):
        for panel, ((axis, workload), of) in zip(
            part.subplots(1, len(band), squeeze=False, sharey=True)[0], band.items(), strict=True
        ):
            for curve in of:
                exponent = "" if curve.exponent is None else f": {axis}$^{{{curve.exponent:.2f}}}$"
                panel.plot(
                    *zip(*curve.points, strict=True),
                    marker=markers[curve.impl],
                    linestyle=lines[curve.impl],
                    color=colours[curve.operation],
                    label=f"{curve.operation}, {curve.impl}{exponent}",
                )
            panel.set(xscale="log", yscale="log", xlabel=axis, title=workload)
            sizes = sorted({size for curve in of for size, _ in curve.points})
            shown = sizes[:1]
            for size in sizes[1:]:
                if size / shown[-1] > 0.99 * (sizes[-1] / sizes[0]) ** (len(band) / 14):
                    shown.append(size)
            panel.set_xticks(shown, [f"{size:g}" if size < 1e6 else f"{size / 1e6:.2g}M" for size in shown])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter(lambda microseconds, _: seconds(microseconds / 1e6))
            if axis == "N":
                columns = max(1, 4 // len(band))
                panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, handlelength=3.2)
        if band is not large:
            handles = _handles(colours, markers, [curve.rows[0] for of in band.values() for curve in of])
            part.legend(handles=handles, loc="outside lower center", ncols=6)
    return _save(figure, path)


def throughput(rows: Sequence[Row], path: Path) -> bool:
    """Items per second of models with merging over those without, against the share of tokens that is left."""
    pairs = [pair for pair in compare.merged_models(rows) if pair.speed_up and pair.keep]
    families = compare.grouped(pairs, lambda pair: tuple(pair.after[name] for name in ("workload", "B", "impl")))
    if not families:
        return False
    across = min(4, len(families))
    down = math.ceil(len(families) / across)
    figure = _figure(rows, "Models: items per second with merging, over those without", 2.5 * down + 1.1)
    panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for panel, ((workload, items, impl), of) in zip(panels, families.items(), strict=False):
        of = sorted(of, key=lambda pair: -(pair.keep or 0))
        promised = [(1.0, 1.0), *((pair.keep, fewer) for pair in of if (fewer := pair.ratio("flops")))]
        panel.plot(*zip(*promised, strict=True), "--", color=FAINT, label="what the operations saved promise")
        measured = [(1.0, 1.0), *((pair.keep, pair.speed_up) for pair in of)]
        panel.plot(*zip(*measured, strict=True), "-", color=FASTER, label="measured")
        for pair in of:
            ratio = pair.speed_up or 0.0
            panel.plot(pair.keep, ratio, "o", color=SLOWER if ratio < 1 else FASTER)
            side = {"xytext": (0, -7), "ha": "center"} if ratio < 1 else {"xytext": (5, -3), "ha": "left"}
            panel.annotate(
                f"{ratio:.2f} x", (pair.keep, ratio), textcoords="offset points", va="top", size=7, bbox=OVER, **side
            )
        panel.axhline(1, color=INK, linewidth=0.8)
        panel.set(title=f"{workload}, B={items}{', compiled' * impl.endswith('compiled')}", xlim=(1.05, -0.3))
        panel.set_xticks([1, 0.5, 0], ["100 %", "50 %", "0 %"])
    for panel in panels[len(families) :]:
        panel.set_visible(False)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low - 0.2 * (high - low), high)
    _plain(panels[0].yaxis, "{x:g} x")
    figure.supxlabel("tokens that are left after the last layer", size=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return _save(figure, path)


def memory(rows: Sequence[Row], path: Path) -> bool:
    """The most memory that one call allocates, its result included."""
    from matplotlib.ticker import EngFormatter

    kinds = {"match + merge": "match + merge", "forward": "a model's forward"}
    shown = [row for row in rows if row["operation"] in kinds and row["suite"] != SCALING and row["peak_bytes"]]
    if not shown:
        return False
    lines = {
        kind: compare.grouped(of, compare.title)
        for kind, of in compare.grouped(shown, lambda row: row["operation"]).items()
    }
    heights = [len(of) + 1.5 for of in lines.values()]
    figure = _figure(rows, "Peak memory of one call, its result included", 0.36 * sum(heights) + 1.1)
    panels = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (kind, of) in zip(panels, lines.items(), strict=True):
        here = [row for line in of.values() for row in line]
        markers = _markers(here)
        impls = list(markers)
        colours = dict(zip(impls, PALETTE * len(impls), strict=False))
        for y, line in enumerate(of.values()):
            for row in line:
                apart = 0.8 * ((impls.index(row["impl"]) + 0.5) / len(impls) - 0.5)
                panel.plot(_of(row, "peak_bytes"), y + apart, markers[row["impl"]], color=colours[row["impl"]])
        least, most = (pick(_of(row, "peak_bytes") for row in here) for pick in (min, max))
        low, high = math.floor(math.log10(0.9 * least)), math.ceil(math.log10(1.1 * most))
        panel.set(xscale="log", xlim=(10.0**low, 10.0**high), ylim=(len(of) - 0.4, -0.6), title=kinds[kind])
        panel.set_yticks(range(len(of)), list(of))
        panel.tick_params(axis="y", length=0)
        _plain(panel.xaxis, EngFormatter("B"), (1, 2, 5) if high - low < 3 else (1,))
        panel.legend(handles=[_handle(impl, markers[impl], colours[impl]) for impl in impls], **BESIDE)
    return _save(figure, path)


PICTURES: dict[str, Callable[..., bool]] = {
    "speed-up": speed_up,
    "speed-up-backward": partial(speed_up, backward=True),
    "roofline": roofline,
    "scaling": scaling,
    "throughput": throughput,
    "memory": memory,
}


def _figure(rows: Sequence[Row], title: str, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((WIDTH, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    where = f"{rows[0]['device']}, {rows[0]['dtype']}"
    figure.suptitle(f"{title}\n{where}", x=0.01, ha="left", size=11)
    return figure


def _save(figure: Figure, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _handles(colours: dict[str, str], markers: dict[str, str], rows: Sequence[Row]) -> list[Line2D]:
    """Of a legend: what these rows have of operations, by colour, and of implementations, by marker."""
    operations, impls = ({row[name] for row in rows} for name in ("operation", "impl"))
    named = {name.removesuffix(BACKWARD): colours[name] for name in sorted(operations)}
    return [
        *(_handle(name, "o", colour) for name, colour in named.items()),
        *[_handle(f"hollow:{BACKWARD}", "o", "white")] * any(name.endswith(BACKWARD) for name in operations),
        *(_handle(name, marker, FAINT) for name, marker in markers.items() if name in impls),
    ]


def _handle(name: str, marker: str, colour: str) -> Line2D:
    from matplotlib.lines import Line2D

    edge = INK if colour == "white" else "white"
    return Line2D([], [], linestyle="", marker=marker, markerfacecolor=colour, markeredgecolor=edge, label=name)


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """A colour for every operation, with its backward or without, the same on every picture of these rows."""
    names = sorted({row["operation"] for row in rows if row["suite"] != MODELS})
    bare = dict.fromkeys(name.removesuffix(BACKWARD) for name in names)
    colours = dict(zip(bare, PALETTE * len(bare), strict=False))
    return {name: colours[name.removesuffix(BACKWARD)] for name in names}


def _markers(rows: Iterable[Row]) -> dict[str, str]:
    """A marker for every implementation, ours first."""
    names = {row["impl"] for row in rows}
    ordered = [*(name for name in OURS if name in names), *sorted(names - set(OURS))]
    return dict(zip(ordered, MARKERS * len(ordered), strict=False))


def _of(row: Row, column: str) -> float:
    return compare.number(row, column) or 0.0


def _short(text: str) -> str:
    return text if len(text) <= 70 else f"{text[:69]}…"


def _plain(axis: Axis, formatter: str | Formatter, digits: Sequence[int] = (1, 2, 5)) -> None:
    """Numbers like 0.5 and 20 where a logarithmic axis has powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_formatter(formatter)
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=digits, numticks=12))
        axis.set_minor_formatter(NullFormatter())
