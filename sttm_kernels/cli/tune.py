"""`sttm-kernels tune`: which implementation is fastest on this device, for `impl="auto"`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from sttm_kernels import crossover, dispatch
from sttm_kernels.bench import tune
from sttm_kernels.bench.runner import now
from sttm_kernels.console import InputError, device_of

HELP = "Measure, on a quiet device, which implementation is fastest at which shape; impl='auto' then takes it."
DTYPES = ("bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="float16 goes by bfloat16 (both)")
    parser.add_argument("--seconds", type=float, default=0.03, help="of timing for each verb and shape (%(default)s)")
    parser.add_argument("--reset", action="store_true", help="remove the table of this device, and measure nothing")


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments.device)
    if dispatch.interpreting() or dispatch.on_host():
        raise InputError("what TRITON_INTERPRET and STTM_CUDA_HOST run is not what this device runs: unset them")
    if not arguments.seconds > 0:
        raise InputError(f"--seconds must be positive, got {arguments.seconds}")
    file: Path | str = "the folder of tables"
    try:
        file = crossover.path(device)
        if arguments.reset:
            print(f"removed   {file}" if crossover.remove(device) else f"there is no {file}")
            return 0
        crossover.writable(device)  # before minutes of measuring
        rows = _measured(device, arguments)
        about = {
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "time": now(),
        }
        crossover.write(device, rows, about)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    others = sum(row["impl"] != _usual(row, device) for row in rows)
    print(f"wrote     {file}: {len(rows)} shapes, at {others} of them not what auto takes without it")
    return 0


def _usual(row: dict[str, Any], device: torch.device) -> str:
    return dispatch.choose(row["verb"], device, getattr(torch, row["dtype"]))


def _measured(device: torch.device, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints rows as they come."""
    start, rows = time.monotonic(), []
    print(f"{crossover.device_name(device)}: microseconds, * where auto will take another implementation than before")
    for dtype in arguments.dtype:
        for row in tune.measure(tune.workloads(device), device, getattr(torch, dtype), arguments.seconds):
            rows.append(row)
            times = "  ".join(f"{impl} {us:.0f}" for impl, us in row["us"].items())
            mark = "*" if row["impl"] != _usual(row, device) else " "
            shape = f"N={row['tokens']:<6}K={row['groups']:<6}{row['features']:>5} features"
            print(f"{mark} {row['verb']:13}{dtype:9}  {shape}  {row['impl']:7}of  {times}", flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    return rows
