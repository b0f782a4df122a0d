"""Launch configurations: which architecture a launch is for, what fits its shared memory, which configuration it gets.

No autotuning: every verb keeps a short list of configurations, best first, and takes the first one that fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from sttm_kernels import dispatch

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities times ten that configurations are written for; a GPU takes those of the highest not above it."""

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have, by compute capability times ten."""

OTHER_MAKERS = 81
"""In the place of a compute capability, GPUs of AMD and Intel: they take configurations of 80 that fit 64 KiB."""
SHARED_MEMORY[OTHER_MAKERS] = 64

MAX_INT32 = 2**31 - 1

WARP = 32
REGISTERS = 65536
"""Of 32 bits, per multiprocessor; one thread has at most 255."""

NVIDIA = dispatch.NVIDIA and not (torch.version.cuda is None and torch.xpu.is_available())
"""Whether kernels are compiled for NVIDIA's GPUs, and without any: PyTorch is built for the GPUs of one maker."""

INTERPRET = dispatch.interpreting()
"""Whether kernels run in Triton's interpreter, which needs other code in places: it cannot multiply bfloat16."""


@dataclass(frozen=True, eq=False)
class Config:
    """How a kernel is launched: warps per program, software pipeline stages, and its block sizes by argument name."""

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]

    @cached_property
    def options(self) -> dict[str, int]:
        """What Triton is given beside the blocks.

        A thread may have all the registers there are: left alone, the compiler spills some so that more programs share
        a multiprocessor.
        """
        common = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if not NVIDIA:
            return common
        return {**common, "maxnreg": min(255, REGISTERS // (WARP * self.num_warps))}


_forced: dict[str, Config] = {}
_forced_arch: list[int] = []


@cache
def _capability(device: torch.device) -> int:
    """Compute capability times ten of the GPU; 80 under the interpreter and for tensors without data."""
    if not NVIDIA:
        return OTHER_MAKERS
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configured(
    name: str, bytes_needed: Callable[..., int] | None = None
) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., Any]]:
    """Makes of a list of configurations the one to launch.

    The function below it takes the architecture and a case (what the configurations depend on, hashable) and returns
    them, best first. What comes of it takes the device and the case and returns the first that fits shared memory; if
    none does the last, which may be None. Every case is worked out once.

    Args:
        name: of the kernel without `_kernel`; a test may force its configuration.
        bytes_needed: shared memory of one program, from the configuration and the case: `num_stages` copies of every
            tile that is streamed into a dot, plus what stays resident.
    """

    def decorate(candidates: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        @cache
        def best(found: int, *case: Any) -> Any:
            configs = candidates(max(arch for arch in ARCHITECTURES if arch <= found), *case)
            if bytes_needed is None:
                return configs[0]
            limit = 1024 * SHARED_MEMORY[max(known for known in SHARED_MEMORY if known <= found)]
            return next((one for one in configs if one is not None and bytes_needed(one, *case) <= limit), configs[-1])

        def choose(device: torch.device, *case: Any) -> Any:
            if _forced and name in _forced:
                return _forced[name]
            return best(_forced_arch[-1] if _forced_arch else _capability(device), *case)

        return choose

    return decorate


def fixed(name: str, config: Config) -> Config:
    """The only configuration of a kernel, unless a test forces another."""
    return _forced.get(name, config)


@contextlib.contextmanager
def forced(name: str, num_warps: int = 4, num_stages: int = 1, **blocks: int) -> Iterator[None]:
    """Within it the kernel `name` gets this configuration: small blocks, so that small tests cross many tiles."""
    before = dict(_forced)
    _forced[name] = Config(num_warps, num_stages, blocks)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def forced_architecture(arch: int) -> Iterator[None]:
    """Within it every device counts as one of this compute capability (times ten)."""
    _forced_arch.append(arch)
    try:
        yield
    finally:
        _forced_arch.pop()
