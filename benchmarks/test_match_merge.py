"""The same contenders under pytest-benchmark: `pytest benchmarks --benchmark-only`. Reports, asserts no time."""

from __future__ import annotations

import pytest
import torch

from benchmarks.match_merge_cpu import SHAPE, check, inputs, match_merge
from benchmarks.rivals import tome_match_merge

CONTENDERS = {
    "sttm_kernels": match_merge,
    "tome_eager": tome_match_merge,
    "tome_compiled": torch.compile(tome_match_merge),
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_match_merge(benchmark, contender):
    metric, x = inputs(**SHAPE)
    check(metric, x, SHAPE["r"])
    benchmark(CONTENDERS[contender], metric, x, SHAPE["r"])
