"""Measures over a small set of shapes which implementation of each verb is fastest on a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from sttm_kernels import crossover, dispatch
from sttm_kernels.bench import timing
from sttm_kernels.bench.operations import draw, operations
from sttm_kernels.bench.workloads import Workload

TOKENS = {"cuda": 1 << 15, "cpu": 1 << 12}
"""Of a batch, so that a device has enough to do."""
LONGEST = {"cuda": 6272, "cpu": 1568}
MATCHING, ASSIGNING = ("match", "merge", "unmerge"), ("assign", "assign_merge", "soft_merge")
HOPELESS = 5.0
"""Times the best time of two calls: what took longer is not called again."""


def workloads(device: torch.device) -> list[Workload]:
    """From a frame to a long clip, from the features of a head to those of a wide layer."""
    found = []
    for N in (196, 1568, 6272):
        if N > LONGEST[device.type]:
            continue
        B = max(1, TOKENS[device.type] // N)
        for C in (64, 256, 1024):
            found.append(Workload("match", B, N, C, r=N // 2, unmerge=True, only=MATCHING))
            found += [Workload("assign", B, N, C, K=K, only=ASSIGNING) for K in (16, 64, 392) if K < N <= 1568]
    return found


def measure(
    works: Sequence[Workload], device: torch.device, dtype: torch.dtype, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row of the table for each verb at each shape, as it is measured, with `us`, the time of each implementation.

    Forward; the 20th percentile, which other work on the machine disturbs less than the median. Whether results are
    right is for `sttm-kernels verify` to say; an implementation that fails is left out.
    """
    impls = [impl for impl in dispatch.IMPLEMENTATIONS if impl != "reference" and _runs(impl, device, dtype)]
    for work in works:
        sets = [draw(work, device, dtype, seed) for seed in range(2)]
        found = operations(work, impls, device, dtype, compiled=False)
        for verb, group in groupby(found, key=lambda operation: operation.name):
            calls = {op.impl: [partial(op.run, inputs) for inputs in sets] for op in group if op.impl in impls}
            times = _times(calls, device, seconds)
            if not times:
                continue
            shape = crossover.Shape(work.N, work.groups, work.D if verb in ("match", "assign") else work.C)
            yield {
                "verb": verb, "dtype": str(dtype).removeprefix("torch."), **shape._asdict(),
                "impl": _best(times, dispatch.choose(verb, device, dtype)), "us": times,
            }  # fmt: skip


def _runs(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    return all(dispatch.why_not(verb, impl, device, dtype) is None for verb in dispatch.VERBS)


@torch.no_grad()
def _times(calls: Mapping[str, Sequence[timing.Call]], device: torch.device, seconds: float) -> dict[str, float]:
    first: dict[str, float] = {}
    for impl, mine in calls.items():
        try:
            mine[0]()  # compiles
            first[impl] = min(timing.seconds_of(call, device) for call in mine)
        except Exception:  # compilers raise classes of their own
            continue
    if not first:
        return {}
    bound = HOPELESS * min(first.values())
    ready = {impl: calls[impl] for impl, took in first.items() if took <= bound}
    samples = timing.time_in_turns(ready, device, seconds)
    slow = {impl: 1e6 * took for impl, took in first.items() if impl not in ready}
    return {impl: round(us, 1) for impl, us in ({k: v.p20 for k, v in samples.items()} | slow).items()}


def _best(times: Mapping[str, float], default: str) -> str:
    best = min(times, key=times.__getitem__)
    worth = default not in times or times[best] < crossover.MARGIN * times[default]
    return best if worth else default
