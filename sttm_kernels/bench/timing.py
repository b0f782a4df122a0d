"""How long a call takes on a device, and how fast that device can be."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Input sets rotate over at least this much memory, so that none is found in a cache."""


@dataclass(frozen=True)
class Sample:
    """Microseconds per call at the 20th, 50th and 80th percentile; peak bytes above what was there, None on a CPU."""

    p20: float
    p50: float
    p80: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes per second copying, floating-point operations per second in a matrix product."""

    bandwidth: float
    flop_rate: float

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Microseconds that no implementation can beat."""
        return 1e6 * max(bytes_moved / self.bandwidth, flops / self.flop_rate)


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float, least: int = 5) -> Sample:
    """Times single calls, taking `calls` (the same work on different inputs) in turn.

    On a GPU by events that are recorded without waiting in between, on a CPU by the clock.
    """
    for call in (*calls, *calls[:1]):
        call()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    calls[0]()
    if cuda:
        torch.cuda.synchronize(device)
    repetitions = min(1000, max(least, int(seconds / max(time.perf_counter() - start, 1e-6))))
    turns = [call for call, _ in zip(itertools.cycle(calls), range(repetitions), strict=False)]
    peak = None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repetitions)]
        for call, (begin, end) in zip(turns, zip(events[::2], events[1::2], strict=True), strict=True):
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        times = [1e3 * begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2], strict=True)]
    else:
        times = []
        for call in turns:
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Sample(p20, p50, p80, peak)


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Measures them: a copy far larger than the cache, and a square matrix product."""
    cuda = device.type == "cuda"
    source = torch.empty(CACHE_BYTES[device.type] * (4 if cuda else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, seconds)
    extent = 8192 if cuda else 512
    a = torch.randn(extent, extent, device=device).to(dtype)
    product = time_calls([lambda: a @ a], device, seconds)
    return Ceilings(2e6 * source.numel() / copy.p50, 2e6 * extent**3 / product.p50)
