"""Rows of measurements in CSV files that any version may append to.

One row is one operation of one implementation on one workload. Rows are compared within a `run` only: the clock of one
machine on one day says nothing about another.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Goes up when a column changes its meaning; a new column alone leaves it as it is."""

COLUMNS = (
    "schema", "run", "suite", "workload", "operation", "impl", "dtype", "B", "N", "C", "heads", "D", "r", "K", "axis",
    "p20_us", "p50_us", "p80_us", "graph_us", "host_us", "launches", "peak_bytes", "bytes", "flops", "floor_us",
    "fraction_of_floor", "tokens", "check", "device", "threads", "bandwidth", "flop_rate", "torch", "triton", "cuda",
    "version", "commit", "command", "time",
)  # fmt: skip
"""What each means:

    schema, run, command, time: SCHEMA; one name for all rows of one run; what was typed; when it was measured (UTC).
    suite, workload, operation, impl: what was measured; impl is an implementation of the package or the name of a
        rival.
    B, N, C, heads, D, r, K: items, tokens, channels, heads, features of the metric, tokens merged away (in a model: per
        layer), groups (in a model: tokens that are left).
    axis: in the suite "scaling", what grows: N, B, K, D or r.
    p20_us, p50_us, p80_us: microseconds per call, inputs not in the cache, on a GPU without what the host takes to
        enqueue it (as far as `time_in_turns` says); empty if it was not timed.
    graph_us: per call, replayed in a CUDA graph. host_us: on the host, to enqueue one call. launches: kernels per call.
    peak_bytes: the most memory allocated above what was there before the call, its results included.
    bytes, flops: what the operation must read and write once, and compute; floor_us: the time that takes at `bandwidth`
        (bytes per second) and `flop_rate` (operations per second), both measured in the same run;
        fraction_of_floor: floor_us / p50_us.
    tokens: in a model, how many enter each layer, and leave the last, with spaces between.
    check: "passed", "none" (a yardstick, not an implementation), or "failed: ...", "out of memory: ...",
        "left out: ...", and then there is no time.
    device, threads, torch, triton, cuda, version, commit: where, and of what; threads of a CPU, empty on a GPU.
"""


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a file, which is created if need be.

    A file of another version keeps all that is in it: columns that it lacks are added to its header, columns that only
    it has stay, empty in the new rows. It is then replaced in one step, so that an interruption leaves it whole.

    Raises:
        ValueError: there is a file, and it is not one of results.
    """
    if path.exists() and path.stat().st_size:
        columns = header(path)
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            columns = [*columns, *missing]
            _rewrite(path, columns)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(COLUMNS)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, columns).writeheader()
    with path.open("r+", newline="") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(end - 1)
        if file.read(1) != "\n":  # a row that was cut off must not swallow the next one
            file.write("\r\n")
        writer = csv.DictWriter(file, columns, restval="")
        for row in rows:
            writer.writerow({"schema": SCHEMA, **row})


def read(path: Path) -> list[dict[str, str]]:
    """All whole rows of a file, oldest first; absent columns are empty.

    Raises:
        ValueError: it is not a file of results, or of a schema that this version does not know.
    """
    header(path)
    with path.open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file, restval="") if row["time"].endswith("+00:00")
        ]  # others were cut off
    for row in rows:
        if int(row["schema"]) > SCHEMA:
            raise ValueError(f"{path} has rows of schema {row['schema']}; this version reads up to {SCHEMA}")
    return [{name: row.get(name) or "" for name in COLUMNS} for row in rows]


def header(path: Path) -> list[str]:
    """The columns of a file of results."""
    with path.open(newline="") as file:
        columns = next(csv.reader(file), [])
    if columns[:1] != ["schema"] or not {"run", "time"} <= set(columns):
        raise ValueError(
            f"{path} is not a file of results: its columns must be schema, run, time and more, got {columns}"
        )
    return columns


def _rewrite(path: Path, columns: list[str]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)
