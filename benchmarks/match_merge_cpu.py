"""match + merge on a CPU against Token Merging's formulation, eager and compiled.

Run `python -m benchmarks.match_merge_cpu`.

All contenders run interleaved in one process, so that their ratio stands when the machine's speed does not. Also prints
the peak memory that one match + merge takes on top of its inputs at N = 18432, C = 1408.
"""

from __future__ import annotations

import argparse
import json

import torch

import sttm_kernels as sttm
from sttm_kernels.bench.rivals import tome_match_merge
from sttm_kernels.bench.timing import device_name, peak_bytes, time_in_turns
from sttm_kernels.testing import assert_within_budget

CPU = torch.device("cpu")
SHAPE = {"B": 8, "N": 1568, "C": 768, "D": 64, "r": 784}
LARGE = {"B": 1, "N": 18432, "C": 1408, "D": 64, "r": 9216}


def inputs(B: int, N: int, C: int, D: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, N, D, generator=generator), torch.randn(B, N, C, generator=generator)


def match_merge(metric: torch.Tensor, x: torch.Tensor, r: int) -> sttm.MergedTokens:
    return sttm.merge(x, sttm.match(metric, r))


def check(metric: torch.Tensor, x: torch.Tensor, r: int) -> None:
    """The same r tokens merged into the same groups give the same means: compared sorted, for the orders differ."""
    ours = match_merge(metric, x, r).x
    exact = tome_match_merge(metric.double(), x.double(), r)[0]
    plain = tome_match_merge(metric, x, r)[0]

    def ordered(y: torch.Tensor) -> torch.Tensor:
        return y.gather(1, y[..., :1].argsort(dim=1).expand_as(y))

    assert_within_budget("match + merge", ordered(ours), ordered(exact), ordered(plain), terms=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="spent on each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    metric, x = inputs(**SHAPE)
    r = SHAPE["r"]
    check(metric, x, r)
    compiled = torch.compile(tome_match_merge)
    plan = sttm.match(metric, r)
    contenders = {
        "sttm_kernels": lambda: match_merge(metric, x, r),
        "  match": lambda: sttm.match(metric, r),
        "  merge": lambda: sttm.merge(x, plan),
        "ToMe's formulation, eager": lambda: tome_match_merge(metric, x, r),
        "ToMe's formulation, torch.compile": lambda: compiled(metric, x, r),
    }
    samples = time_in_turns({name: [run] for name, run in contenders.items()}, CPU, args.seconds)
    print(f"{device_name(CPU)}, {args.threads} threads, torch {torch.__version__}, float32, {json.dumps(SHAPE)}")
    for name, sample in samples.items():
        print(f"{name:36s} {sample.p50 / 1e3:8.2f} ms {sample.p50 / samples['sttm_kernels'].p50:6.2f} x")
    metric, x = inputs(**LARGE)
    extra = peak_bytes(lambda: match_merge(metric, x, LARGE["r"]), CPU) / (x.numel() * x.element_size())
    print(f"peak extra memory at {json.dumps(LARGE)}: {extra:.2f} x the size of x")


if __name__ == "__main__":
    main()
