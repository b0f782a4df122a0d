"""`sttm-kernels bench`: the times of the package and of its rivals on this device, appended to a CSV."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sttm_kernels import dispatch
from sttm_kernels.bench import models, results, runner, scaling, timing
from sttm_kernels.bench.workloads import SUITES
from sttm_kernels.console import InputError, device_of
from sttm_kernels.crossover import device_name, slug

HELP = "Time every operation against its rivals on this device, after a check of its results; rows go to a CSV."
DTYPES = ("bfloat16", "float16", "float32")
RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=(*SUITES, "models"), default="quick", help="(%(default)s)")
    parser.add_argument("--impl", nargs="+", choices=dispatch.IMPLEMENTATIONS, metavar="IMPL",
                        help="of: %(choices)s; default: all that can run here but the reference")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="CSV", help=f"rows are appended to it; {RESULTS}/<device>.csv")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--workload", default="", metavar="TEXT", help="only those with this in their name")
    parser.add_argument("--seconds", type=_positive, default=0.5, help="of timing for each operation (%(default)s)")
    parser.add_argument("--limit", type=_positive, default=30.0,
                        help="seconds one call may take; what would take longer is left out (%(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    parser.add_argument("--batch", type=int, help='of the suite "models"; default: 8 on a GPU, 1 on a CPU')
    parser.add_argument("--no-compile", action="store_true", help="leave out rivals under torch.compile")


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments.device)
    for name in ("threads", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    torch.set_num_threads(arguments.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    settings = runner.Settings(
        arguments.suite, device, dtype, _impls(arguments.impl, device, dtype), arguments.seconds, arguments.limit,
        not arguments.no_compile,
    )  # fmt: skip
    names = models.FAMILIES if arguments.suite == "models" else {work.name for work in SUITES[arguments.suite]}
    if not any(arguments.workload in name for name in names):
        raise InputError(f"--workload must be part of a name in {arguments.suite}, got {arguments.workload!r}")
    out = arguments.out or RESULTS / f"{slug(device_name(device))}.csv"
    _writable(out)

    limits = timing.ceilings(device, dtype, arguments.seconds)
    everywhere = runner.surroundings(settings, limits, _command(arguments))
    print(f"{everywhere['device']}, {arguments.suite}, {everywhere['dtype']}: "
          f"copies {limits.bandwidth / 1e9:.0f} GB/s, multiplies {limits.flop_rate / 1e12:.2f} TFLOP/s")  # fmt: skip
    if arguments.suite == "models":
        measured = models.measure(arguments.workload, settings, limits, arguments.batch)
    else:
        measured = runner.measure(
            [w for w in SUITES[arguments.suite] if arguments.workload in w.name], settings, limits
        )
    rows: list[dict[str, Any]] = []
    try:
        _collect(measured, everywhere, out, rows)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(rows)} rows are in {out}")
        raise
    if arguments.suite == "scaling":
        print(scaling.summary(rows))
    failed = [row for row in rows if row["check"].startswith("failed")]
    print(f"{len(rows)} rows are in {out}" + (f"; {len(failed)} failed their check" if failed else ""))
    return 1 if failed else 0


def _collect(
    measured: Iterable[list[dict[str, Any]]], everywhere: dict[str, Any], out: Path, rows: list[dict[str, Any]]
) -> None:
    """Appends and prints rows as they come."""
    heading = None
    for group in measured:
        group = [everywhere | row for row in group]
        results.append(out, group)
        rows += group
        this = {name: group[0][name] for name in ("workload", "B", "N", "C", "K") if name in group[0]}
        if this != heading:
            print("\n" + "  ".join(str(v) if n == "workload" else f"{n}={v}" for n, v in this.items()))
            heading = this
        for line in _lines(group):
            print(line, flush=True)


def _lines(group: Sequence[dict[str, Any]]) -> Iterable[str]:
    """One line per row. The ratio: of an operation, its time over that of the package's fastest; of a model, the
    speed-up over the model without merging."""
    own = [row["p50_us"] for row in group if row["impl"] in dispatch.IMPLEMENTATIONS and "p50_us" in row]
    for row in group:
        name = f"{row['impl']} r={row['r']}" if row.get("r") and "tokens" in row else row["impl"]
        line = f"  {row['operation']:34} {name:22}"
        if "p50_us" not in row:
            yield f"{line} {row['check']}"
            continue
        line += f" {_time(row['p50_us'])} {row['fraction_of_floor']:7.1%} of floor {row['peak_bytes'] / 1e6:9.1f} MB"
        if "tokens" in row:
            compiled = row["impl"].endswith("compiled")
            plain = next(r for r in group if r["r"] == 0 and r["impl"].endswith("compiled") == compiled)
            speedup = plain["p50_us"] / row["p50_us"]
            line += f" {speedup:7.2f} x, realised {speedup * row['flops'] / plain['flops']:.2f}, {row['K']} tokens left"
        elif own:
            line += f" {row['p50_us'] / min(own):7.2f} x"
        yield line


def _time(microseconds: float) -> str:
    return f"{microseconds:9.1f} us" if microseconds < 1e4 else f"{microseconds / 1e3:9.1f} ms"


def _impls(asked: Sequence[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those asked for, all of which must be able to run, or those that can."""
    reasons = {
        impl: next(filter(None, (dispatch.why_not(verb, impl, device, dtype) for verb in dispatch.VERBS)), None)
        for impl in asked or dispatch.IMPLEMENTATIONS
    }
    for impl, reason in reasons.items():
        if asked and reason is not None:
            raise InputError(f"--impl {impl} cannot run on {device}: {reason}")
    return [impl for impl, reason in reasons.items() if reason is None and (asked or impl != "reference")]


def _writable(out: Path) -> None:
    """Fails now and not after minutes of measuring."""
    try:
        results.append(out, [])
    except (OSError, ValueError) as error:
        raise InputError(f"--out cannot be written: {error}") from None


def _command(arguments: argparse.Namespace) -> str:
    """What gives these rows again."""
    parts = ["sttm-kernels", "bench", "--suite", arguments.suite]
    parts += ["--seconds", f"{arguments.seconds:g}", "--limit", f"{arguments.limit:g}"]
    for name in ("impl", "dtype", "workload", "batch"):
        value = getattr(arguments, name)
        if value:
            parts += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return shlex.join([*parts, *["--no-compile"] * arguments.no_compile])
