"""Ratios to rivals on a CPU that must not fall: `pytest benchmarks`, reported by pytest-benchmark.

Times of a shared machine prove nothing; contenders that take turns on one thread keep their ratio. The least allowed is
about half of what was measured.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sttm_kernels import dispatch
from sttm_kernels.bench.operations import draw, operations
from sttm_kernels.bench.timing import time_in_turns
from sttm_kernels.bench.workloads import SUITES
from sttm_kernels.console import threads

CPU = torch.device("cpu")
OURS = dispatch.choose("merge", CPU, torch.float32)
WORKLOAD = next(work for work in SUITES["quick"] if work.name == "VideoMAE-B 16x224")
LEAST = {
    ("match + merge", "ToMe eager"): 2.0,
    ("match + merge", "ToMe compiled"): 0.75,
    ("match + merge forward + backward", "ToMe eager"): 3.0,
    ("merge", "index_add"): 1.1,
    ("merge", "scatter_reduce"): 10.0,
    ("merge", "one-hot bmm"): 20.0,
}
"""Times ours, by operation and rival."""


@pytest.mark.parametrize(("operation", "rival"), LEAST, ids=lambda name: name.replace(" ", "_"))
def test_ratio(benchmark, operation, rival):
    inputs = [draw(WORKLOAD, CPU, torch.float32, seed) for seed in range(2)]
    calls = {
        each.impl: [partial(each.run, one) for one in inputs]
        for each in operations(WORKLOAD, [OURS], CPU, torch.float32, compiled=True)
        if each.name == operation and each.impl in (OURS, rival)
    }
    with threads(1):
        samples = time_in_turns(calls, CPU, seconds=1.0)
        ratio = samples[rival].p20 / samples[OURS].p20
        benchmark.extra_info[f"{rival} / ours"] = round(ratio, 2)
        benchmark.pedantic(calls[OURS][0], rounds=5)
    assert ratio >= LEAST[operation, rival]
