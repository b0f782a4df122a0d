"""How long calls take on a device, what memory they take, and how fast that device can be."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from sttm_kernels.crossover import device_name as device_name

CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
"""Input sets rotate over at least this much memory, so that none is found in a cache."""
MOST_ROUNDS = 1000

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """Microseconds per call at the 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes per second copying, floating-point operations per second in a matrix product."""

    bandwidth: float
    flop_rate: float

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Microseconds that no implementation can beat."""
        return 1e6 * max(bytes_moved / self.bandwidth, flops / self.flop_rate)


def available_bytes() -> float:
    """Of main memory: what the system and the container leave; infinite where neither says."""
    found = []
    with suppress(OSError, ValueError):
        found.append(1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]))  # type: ignore[index]
    with suppress(OSError, ValueError):
        cgroup = Path("/sys/fs/cgroup")
        found.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return min(found, default=float("inf"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turns(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, least: int = 5
) -> dict[str, Sample]:
    """Times single calls, the contenders taking turns, so that their ratios stand when the machine's speed does not.

    Each contender is the same work on different inputs, which take turns as well. On a CPU by the clock; on a GPU by
    events, each call behind a sum over more memory than the caches keep, during which the host enqueues it: the time is
    that of the GPU, its caches cold and with nothing in them to be written back, unless the host takes longer. About
    `seconds` are spent on each contender on average, and at least `least` rounds on each.
    """
    before = torch.zeros(CACHE_BYTES["cuda"] // 2, device=device) if device.type == "cuda" else None
    for calls in contenders.values():
        calls[0]()
    round_seconds = sum(seconds_of(calls[0], device) for calls in contenders.values())
    rounds = min(MOST_ROUNDS, max(least, int(seconds * len(contenders) / max(round_seconds, 1e-6))))
    marks: dict[str, list[Any]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, calls in contenders.items():
            call = calls[turn % len(calls)]
            if before is not None:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.sum()
                begin.record()
                call()
                end.record()
                marks[name].append((begin, end))
            else:
                start = time.perf_counter()
                call()
                marks[name].append(1e6 * (time.perf_counter() - start))
    synchronize(device)
    if before is not None:
        marks = {name: [1e3 * begin.elapsed_time(end) for begin, end in pairs] for name, pairs in marks.items()}
    return {name: _sample(times) for name, times in marks.items()}


def _sample(times: Sequence[float]) -> Sample:
    return Sample(*torch.tensor(times).double().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist())


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory allocated during a call above what was there before; what it returns is included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    events = _profiled(call, device, memory=True)
    allocated = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def launches(call: Call, device: torch.device) -> int:
    """How many kernels one call starts on a GPU, copies and fills included."""
    return sum(event.device_type() == DeviceType.CUDA for event in _profiled(call, device, memory=False))


def _profiled(call: Call, device: torch.device, memory: bool) -> list[Any]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes a line to stderr when it starts and when it stops
    with profile(use_device="cuda" if device.type == "cuda" else None, profile_memory=memory) as profiler:
        result = call()
        synchronize(device)
    del result
    return list(profiler.kineto_results.events())


def graph_microseconds(calls: Sequence[Call], device: torch.device, seconds: float) -> float:
    """Per call, when a CUDA graph of all `calls` is replayed: what is left of a call without the host's part."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_in_turns({"graph": [graph.replay]}, device, seconds)["graph"].p50 / len(calls)


def host_microseconds(call: Call, device: torch.device, repetitions: int = 50) -> float:
    """Median time on the host to enqueue one call, the GPU not waited for."""
    synchronize(device)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    synchronize(device)
    return _sample(times).p50


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Measures them, as what is reached in the better runs: a copy far larger than the cache, a square product."""
    cuda = device.type == "cuda"
    source = torch.empty(CACHE_BYTES[device.type] * (4 if cuda else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    extent = 8192 if cuda else 2048
    a = torch.randn(extent, extent, device=device).to(dtype)
    copy = time_in_turns({"copy": [lambda: target.copy_(source)]}, device, seconds)["copy"]
    product = time_in_turns({"product": [lambda: a @ a]}, device, seconds)["product"]
    return Ceilings(2e6 * source.numel() / copy.p20, 2e6 * extent**3 / product.p20)
