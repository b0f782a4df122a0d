"""Measures the operations of workloads, a row each, and says in the row why if there is no time."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sttm_kernels import __version__, dispatch
from sttm_kernels.bench import timing
from sttm_kernels.bench.operations import Inputs, Operation, draw, exact, input_bytes, operations, unchecked
from sttm_kernels.bench.timing import CACHE_BYTES, Ceilings, Sample
from sttm_kernels.bench.workloads import Workload

MOST_SETS = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run.

    Attributes:
        suite: its name, for the rows.
        impls: implementations of the package to measure.
        seconds: to spend on timing each operation, or a little more.
        limit: seconds that one call may take; what would take longer is left out.
        compiled: whether rivals run under `torch.compile` too.
    """

    suite: str
    device: torch.device
    dtype: torch.dtype
    impls: Sequence[str]
    seconds: float
    limit: float
    compiled: bool


def surroundings(settings: Settings, limits: Ceilings, command: str) -> Row:
    """What every row of a run says about where it came from."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "run": f"{now:%Y%m%dT%H%M%S.%f}-{os.getpid()}",
        "suite": settings.suite,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": timing.device_name(settings.device)
        + " (Triton's interpreter)" * dispatch.interpreting()
        + " (CUDA kernels compiled for the CPU)" * dispatch.on_host(),
        "threads": torch.get_num_threads() if settings.device.type == "cpu" else "",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "version": __version__,
        "commit": commit(),
        "command": command,
        "bandwidth": f"{limits.bandwidth:.4g}",
        "flop_rate": f"{limits.flop_rate:.4g}",
    }


def commit() -> str:
    """Of the checkout that this file is part of, "-dirty" if changed; empty if it is installed elsewhere."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        described = [*git, "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    return ""


def measure(workloads: Sequence[Workload], settings: Settings, limits: Ceilings) -> Iterator[list[Row]]:
    """The rows of one operation of one workload at a time, all implementations and rivals of it."""
    earlier: dict[tuple[str, str, str], float] = {}  # seconds per unit of cost
    for work in workloads:
        shape = {name: getattr(work, name) for name in ("B", "N", "C", "heads", "D", "r", "axis")} | {"K": work.groups}
        everywhere = {"workload": work.name, **shape}
        try:
            sets = _draw(work, settings)
        except (RuntimeError, MemoryError) as error:
            yield [everywhere | {"operation": "inputs", "impl": "", "time": now(), "check": why(error)}]
            continue
        found = operations(work, settings.impls, settings.device, settings.dtype, settings.compiled)
        for name, group in groupby(found, key=lambda operation: operation.name):
            rows = []
            ready: list[tuple[Row, Operation]] = []
            for operation in group:
                row = everywhere | _described(operation, limits)
                before = earlier.get((work.name, name, operation.impl))
                expected = 0.0 if before is None else before * _cost(operation)
                row["check"] = _refused(operation, expected, settings) or checked(operation, sets[0])
                rows.append(row)
                if row["check"] in ("passed", "none"):
                    ready.append((row, operation))
            _time(ready, sets, settings)
            for row, operation in ready:
                if "p50_us" in row:
                    earlier[work.name, name, operation.impl] = row["p50_us"] / 1e6 / _cost(operation)
            for row in rows:
                row["time"] = now()
            yield rows


def _cost(operation: Operation) -> int:
    """What the time of an operation grows with."""
    return max(operation.flops, operation.bytes_moved)


def _draw(work: Workload, settings: Settings) -> list[Inputs]:
    each = input_bytes(work, settings.dtype)
    sets = max(2, min(MOST_SETS, math.ceil(CACHE_BYTES[settings.device.type] / each)))
    if settings.device.type == "cpu" and 2 * sets * each > timing.available_bytes():
        raise MemoryError(f"{sets} sets of inputs take {2 * sets * each / 1e9:.1f} GB")
    return [draw(work, settings.device, settings.dtype, seed) for seed in range(sets)]


def _described(operation: Operation, limits: Ceilings) -> Row:
    return {
        "operation": operation.name,
        "impl": operation.impl,
        "bytes": operation.bytes_moved,
        "flops": operation.flops,
        "floor_us": round(limits.floor(operation.bytes_moved, operation.flops), 2),
    }


def _refused(operation: Operation, expected: float, settings: Settings) -> str | None:
    """Why it is not even tried: too slow, or more memory than a CPU can refuse without being killed."""
    if expected > settings.limit:
        return f"left out: one call would take some {expected:.0f} s, over the limit of {settings.limit:g} s"
    if settings.device.type == "cpu" and operation.scratch > timing.available_bytes():
        return f"out of memory: it writes {operation.scratch / 1e9:.1f} GB in between"
    return None


@torch.no_grad()
def checked(operation: Operation, inputs: Inputs) -> str:
    """The column `check`."""
    try:
        result = operation.run(inputs)
        if operation.exact:
            inputs = exact(inputs)
            result = operation.run(inputs)
        operation.check(inputs, result)
    except Exception as error:  # compilers raise classes of their own
        return why(error)
    return "none" if operation.check is unchecked else "passed"


def why(error: BaseException) -> str:
    """The column `check` for what went wrong."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    short_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
        "can't allocate memory|out of memory", str(error), re.IGNORECASE
    )
    return f"{'out of memory' if short_of_memory else 'failed'}: {text}"


@torch.no_grad()
def _time(ready: Sequence[tuple[Row, Operation]], sets: Sequence[Inputs], settings: Settings) -> None:
    """Fills in what is measured: in turns, or each alone if one of them fails in company."""
    device, seconds = settings.device, settings.seconds
    if not ready:
        return
    calls = {op.impl: [partial(op.run, inputs) for inputs in sets] for _, op in ready}
    samples: dict[str, Sample] = {}
    try:
        samples = timing.time_in_turns(calls, device, seconds)
    except Exception:
        for row, operation in ready:
            try:
                samples |= timing.time_in_turns({operation.impl: calls[operation.impl]}, device, seconds)
            except Exception as error:
                row["check"] = why(error)
    for row, operation in ready:
        if operation.impl not in samples:
            continue
        sample, mine = samples[operation.impl], calls[operation.impl]
        row |= {f"{name}_us": round(getattr(sample, name), 2) for name in ("p20", "p50", "p80")}
        row["fraction_of_floor"] = float(f"{row['floor_us'] / sample.p50:.4g}")
        row["peak_bytes"] = timing.peak_bytes(mine[0], device)
        if device.type == "cuda":
            row["host_us"] = round(timing.host_microseconds(mine[0], device), 2)
            row["launches"] = timing.launches(mine[0], device) or ""  # no rights to profile: not known
            with suppress(RuntimeError):  # not everything can be captured
                row["graph_us"] = round(timing.graph_microseconds(mine, device, seconds), 2)


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
