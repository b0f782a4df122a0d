"""Which implementation of a verb can run on a device, which one `auto` takes, and why another cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sttm_kernels import crossover
from sttm_kernels.torch_private import tf32 as tf32

VERBS = ("assign", "match", "merge", "assign_merge", "unmerge", "compose", "soft_merge")
IMPLEMENTATIONS = ("cuda", "triton", "cpu", "torch", "reference")
MIN_CAPABILITY = (8, 0)
NVIDIA = torch.version.hip is None
"""Whether tensors on "cuda" are on NVIDIA's GPUs: where PyTorch is built for ROCm, they are on AMD's."""

_MODULES = {  # relative: a process may hold other copies of the package under other names
    "cuda": ".impl.cuda",
    "triton": ".impl.triton",
    "cpu": ".impl.cpu",
    "torch": ".impl.eager",
    "reference": ".reference",
}


def interpreting() -> bool:
    """True when Triton runs its kernels on the CPU, one program after another (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_host() -> bool:
    """True when the CUDA kernels run on the CPU, compiled for it (`STTM_CUDA_HOST=<path of that module>`)."""
    return bool(os.environ.get("STTM_CUDA_HOST"))


@cache
def why_not(verb: str, impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why `impl` cannot run `verb` on this device in this dtype; None if it can.

    "cuda" without an index is the device that is current when it is first asked for.

    Raises:
        ValueError: `verb` or `impl` is not a name this package knows.
    """
    if verb not in VERBS:
        raise ValueError(f"verb must be one of {VERBS}, got {verb!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {('auto', *IMPLEMENTATIONS)}, got {impl!r}")
    if impl in ("torch", "reference"):
        return None
    device_type = torch.device(device).type
    if impl == "cuda" and on_host():
        if device_type != "cpu" or dtype == torch.float64:
            return f"STTM_CUDA_HOST runs CPU tensors other than float64, got {dtype} on {device_type}"
        return importlib.import_module(_MODULES[impl], __package__).why_not(verb, device)
    if importlib.util.find_spec(_MODULES[impl], __package__) is None:
        return f"this build of sttm_kernels has no {impl} kernels"
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return f"the {impl} kernels take float32, bfloat16 and float16, not float64"
    if impl == "triton" and interpreting():
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if impl == "cpu":
        needs_cpu = f"the cpu kernels need CPU tensors, got {device_type}"
        return (
            importlib.import_module(_MODULES[impl], __package__).why_not(verb, device)
            if device_type == "cpu"
            else needs_cpu
        )
    if device_type != "cuda" and not (impl == "triton" and device_type == "xpu"):
        return f"the {impl} kernels need {'CUDA' if impl == 'cuda' else 'GPU'} tensors, got {device_type}"
    if impl == "cuda" and not NVIDIA:
        return "the cuda kernels need an NVIDIA GPU, this PyTorch is built for AMD's"
    on_nvidia = device_type == "cuda" and NVIDIA
    if on_nvidia and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return f"the {impl} kernels need compute capability 8.0, this GPU has {capability}"
    return importlib.import_module(_MODULES[impl], __package__).why_not(verb, device)


def choose(verb: str, device: torch.device | str, dtype: torch.dtype, shape: crossover.Shape | None = None) -> str:
    """The implementation that `auto` takes: what was fastest at this shape, where `sttm-kernels tune` has measured it;
    else on GPUs the first of cuda, triton and torch that can run, on CPUs cpu or torch. Never the interpreter."""
    device = torch.device(device)
    tuned = None if shape is None else crossover.fastest(verb, device, dtype, shape)
    first = () if tuned not in IMPLEMENTATIONS else (tuned,)
    for impl in (*first, *{"cuda": ("cuda", "triton"), "xpu": ("triton",), "cpu": ("cpu",)}.get(device.type, ())):
        if why_not(verb, impl, device, dtype) is None:
            return impl
    return "torch"


@cache
def takes_sequences(verb: str, impl: str, device: torch.device | str, dtype: torch.dtype, lists: bool = False) -> bool:
    """Whether an implementation takes all sequences of a packed batch in one launch; else, one after another. With
    `lists`, whether `match` does where src and dst are listed."""
    if impl == "auto":
        impl = choose(verb, device, dtype)
    if impl in ("torch", "reference") or why_not(verb, impl, device, dtype) is not None:
        return False
    module = importlib.import_module(_MODULES[impl], __package__)
    return verb in module.SEQUENCES and (not lists or getattr(module, "LISTS", False))


def verb_of(name: str) -> str:
    """The verb that an operator is a form of."""
    return re.sub("_(backward|packed|earlier)$", "", name)


@cache
def kernel(name: str, impl: str, device: torch.device | str, dtype: torch.dtype) -> Callable[..., Any]:
    """The function behind the operator `name`, a verb or a form of one.

    Raises:
        ValueError: `impl` is unknown.
        RuntimeError: `impl` was asked for by name and cannot run; the message says why.
    """
    verb = verb_of(name)
    if impl == "auto":
        impl = choose(verb, device, dtype)
    reason = why_not(verb, impl, device, dtype)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run {verb}: {reason}")
    return getattr(importlib.import_module(_MODULES[impl], __package__), name)
