"""`sttm-kernels verify`: every verb of every implementation that can run here, held against the float64 specification.

A row of the table shows its worst error, the budget that error had, and the shape.

To see that the command finds faults, `STTM_VERIFY_PLANT=merge` (or another verb) spoils one element of what that verb
returns.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

import sttm_kernels
from sttm_kernels import dispatch
from sttm_kernels.console import InputError, device_of
from sttm_kernels.testing import DTYPES, RAGGED_SHAPES, Shape
from sttm_kernels.verify import Row, checked, planted, rows_of

HELP = "Check every verb and its gradients on this device against the float64 specification."
PLANT = "STTM_VERIFY_PLANT"
LARGE_SHAPES = (Shape(2, 1568, 784, 64, 768), Shape(1, 4097, 392, 80, 640))
QUICK_SHAPES = (RAGGED_SHAPES[0], RAGGED_SHAPES[3], RAGGED_SHAPES[6], Shape(2, 392, 98, 64, 384))
QUICK_DTYPES = (torch.float32, torch.bfloat16)
IMPLS = tuple(impl for impl in dispatch.IMPLEMENTATIONS if impl != "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--verb", nargs="+", choices=dispatch.VERBS, default=dispatch.VERBS, metavar="VERB")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=IMPLS, metavar="IMPL")
    parser.add_argument("--shapes", nargs="+", metavar="BxNxKxDxC", help="items, tokens, groups, features, channels")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and dtypes: under two minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    device = device_of(arguments.device)
    shapes = _shapes(arguments)
    dtypes = QUICK_DTYPES if arguments.quick else DTYPES
    plant = os.environ.get(PLANT, "")
    if plant and plant not in dispatch.VERBS:
        raise InputError(f"{PLANT} must be one of {', '.join(dispatch.VERBS)}, got {plant!r}")
    lines = [(v, i) for v in arguments.verb for i in arguments.impl]
    work = [line for verb, impl in lines for line in rows_of(verb, impl, device, shapes, dtypes, arguments.seed)]
    start = time.perf_counter()
    with planted(plant):
        rows = [checked(row, cases) for row, cases in _progress(work)]
    failed = [row for row in rows if row.verdict == "FAIL"]
    if arguments.json:
        about = {"device": _name(device), "torch": torch.__version__, "sttm_kernels": sttm_kernels.__version__}
        print(json.dumps({**about, "passed": not failed, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"sttm_kernels {sttm_kernels.__version__}, torch {torch.__version__}, {_name(device)}")
        print(_table(rows))
        count = sum(row.cases for row in rows)
        print(f"{len(failed)} of {len(rows)} rows failed; {count} cases in {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _shapes(arguments: argparse.Namespace) -> tuple[Shape, ...]:
    if arguments.shapes is None:
        return QUICK_SHAPES if arguments.quick else RAGGED_SHAPES + LARGE_SHAPES
    shapes = []
    for text in arguments.shapes:
        extents = text.split("x")
        if len(extents) != 5 or not all(e.isdigit() and int(e) > 0 for e in extents):
            raise InputError(f"--shapes must be BxNxKxDxC, five positive integers, got {text!r}")
        shapes.append(Shape(*map(int, extents)))
    return tuple(shapes)


def _progress(work: list[Any]) -> Iterable[Any]:
    if importlib.util.find_spec("tqdm") is None:
        return work
    tqdm = importlib.import_module("tqdm").tqdm
    return tqdm(work, desc="verify", unit="row", delay=1, leave=False, disable=None)


def _table(rows: list[Row]) -> str:
    lines = [
        f"{'verb':<13}{'impl':<8}{'check':<12}{'cases':>5}{'error':>10}{'budget':>10}{'ratio':>7}  {'verdict':<9}worst"
    ]
    for row in rows:
        numbers = " " * 27
        if row.error is not None:
            numbers = f"{row.error:10.2e}{row.budget:10.2e}{row.ratio:7.2f}"
        lines.append(
            f"{row.verb:<13}{row.impl:<8}{row.check:<12}{row.cases:>5}{numbers}  {row.verdict:<9}{row.worst}".rstrip()
        )
        if row.message:
            lines.append(f"    {row.message}")
    return "\n".join(lines)
