"""`sttm-kernels report`: tables and pictures of what `sttm-kernels bench` measured."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from sttm_kernels.bench import report, results
from sttm_kernels.console import InputError, extra

HELP = "Write tables and pictures of measurements."
MEASURED, OUT = Path("benchmarks", "results"), Path("benchmarks")
EVIDENCE = "evidence*.csv"
"""Rows of accuracies, not of times."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="CSV",
        help=f"of sttm-kernels bench (default: {MEASURED}/*.csv but {EVIDENCE})",
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="for RESULTS.md and plots/ (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    extra("matplotlib", "matplotlib", "report", "bench")
    measured = arguments.results or (path for path in MEASURED.glob("*.csv") if not path.match(EVIDENCE))
    paths = sorted(set(measured), key=lambda path: (path.name, str(path)))
    if not paths:
        raise InputError(f"no results: there is no {MEASURED}/*.csv here, and no CSV was named")
    measurements = [row for path in paths for row in _read(path)]
    if not measurements:
        raise InputError(f"no rows in {', '.join(map(str, paths))}")
    try:
        written = report.write(measurements, arguments.out, [path.name for path in paths])
    except OSError as error:
        raise InputError(f"--out {arguments.out}: {error}") from None
    for path in written:
        print(f"{'wrote':<10}{path}")
    return 0


def _read(path: Path) -> list[dict[str, str]]:
    try:
        return results.read(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, csv.Error) as error:
        message = str(error)
        raise InputError(message if str(path) in message else f"{path} cannot be read: {message}") from None
