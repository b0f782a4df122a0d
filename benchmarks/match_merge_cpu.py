"""match + merge on a CPU against Token Merging's formulation, eager and compiled.

Run `python -m benchmarks.match_merge_cpu`.

All contenders run interleaved in one process, so that their ratio stands when the machine's speed does not. Also prints
the peak memory that one match + merge takes on top of its inputs at N = 18432, C = 1408.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import sttm_kernels as sttm
from benchmarks.rivals import tome_match_merge
from sttm_kernels.testing import assert_within_budget

SHAPE = {"B": 8, "N": 1568, "C": 768, "D": 64, "r": 784}
LARGE = {"B": 1, "N": 18432, "C": 1408, "D": 64, "r": 9216}


def inputs(B: int, N: int, C: int, D: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, N, D, generator=generator), torch.randn(B, N, C, generator=generator)


def match_merge(metric: torch.Tensor, x: torch.Tensor, r: int) -> sttm.MergedTokens:
    return sttm.merge(x, sttm.match(metric, r, impl="torch"), impl="torch")


def check(metric: torch.Tensor, x: torch.Tensor, r: int) -> None:
    """The same r tokens merged into the same groups give the same means: compared sorted, for the orders differ."""
    ours = match_merge(metric, x, r).x
    exact = tome_match_merge(metric.double(), x.double(), r)[0]
    plain = tome_match_merge(metric, x, r)[0]

    def ordered(y: torch.Tensor) -> torch.Tensor:
        return y.gather(1, y[..., :1].argsort(dim=1).expand_as(y))

    assert_within_budget("match + merge", ordered(ours), ordered(exact), ordered(plain), terms=2)


def interleaved(contenders: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each, the contenders taking turns."""
    for _ in range(3):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(samples) for name, samples in times.items()}


def peak_extra_memory() -> float:
    """Peak resident memory of one large match + merge above its inputs, over the size of x. Needs a fresh process."""
    metric, x = inputs(**LARGE)
    match_merge(*inputs(1, 64, 64, 16, 16), 16)
    before = _status_bytes("VmRSS")
    match_merge(metric, x, LARGE["r"])
    return (_status_bytes("VmHWM") - before) / (x.numel() * x.element_size())


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_only:
        print(peak_extra_memory())
        return

    metric, x = inputs(**SHAPE)
    r = SHAPE["r"]
    check(metric, x, r)
    compiled = torch.compile(tome_match_merge)
    plan = sttm.match(metric, r, impl="torch")
    medians = interleaved(
        {
            "sttm_kernels": lambda: match_merge(metric, x, r),
            "  match": lambda: sttm.match(metric, r, impl="torch"),
            "  merge": lambda: sttm.merge(x, plan, impl="torch"),
            "ToMe's formulation, eager": lambda: tome_match_merge(metric, x, r),
            "ToMe's formulation, torch.compile": lambda: compiled(metric, x, r),
        },
        args.repetitions,
    )
    print(f"{_processor()}, {args.threads} threads, torch {torch.__version__}, float32, {json.dumps(SHAPE)}")
    ours = medians["sttm_kernels"]
    for name, median in medians.items():
        print(f"{name:36s} {median:8.2f} ms {median / ours:6.2f} x")
    command = [sys.executable, "-m", "benchmarks.match_merge_cpu", "--memory-only", f"--threads={args.threads}"]
    extra = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"peak extra memory at {json.dumps(LARGE)}: {extra:.2f} x the size of x")


if __name__ == "__main__":
    main()
