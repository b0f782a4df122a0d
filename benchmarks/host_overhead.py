"""What a verb costs on the host, without a GPU: `python -m benchmarks.host_overhead`.

On small CPU tensors, without gradients, in microseconds. "p50", "p80": from the public function to where a kernel would
be handed to Triton. "with triton": also Triton's own handling of the arguments, with the compiler and the driver as
stubs. The driver's launch itself is in no figure. "functions": how many are called up to where Triton takes over.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sttm_kernels import dispatch
from sttm_kernels import functional as sttm
from sttm_kernels.bench.timing import Sample, time_in_turns
from sttm_kernels.impl.triton.launch import launching_instead

LIMIT_US = 30.0
FUNCTIONS = {
    "assign": 70, "match": 78, "merge": 87, "merge of a sorted plan": 88,
    "assign_merge": 88, "unmerge": 55, "compose": 48, "soft_merge": 97,
}  # fmt: skip
"""How many functions, of Python and of C, one call of a verb may call: its cost, whatever else the machine does."""


@contextlib.contextmanager
def stubbed_driver(arch: int = 90) -> Iterator[SimpleNamespace]:
    """Within it `impl="triton"` takes CPU tensors, compiles nothing and launches nothing.

    Yields:
        compiled: names of the kernels that would have been compiled, one for every miss of Triton's cache.
        launched: how many kernels would have been launched.
    """
    seen = SimpleNamespace(compiled=[], launched=0)
    used: list[JITFunction] = []

    def run(*args: Any) -> None:
        seen.launched += 1

    code = SimpleNamespace(run=run, function=0, packed_metadata=None, launch_metadata=lambda *args: None)

    def compile_nothing(self: JITFunction, key: Any, *rest: Any, **options: Any) -> Any:
        seen.compiled.append(self.__name__)
        used.append(self)
        self.device_caches[0][0][key] = code
        return code

    stub = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    with (
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(JITFunction, "_do_compile", compile_nothing),
        mock.patch.object(dispatch, "why_not", return_value=None),
    ):
        dispatch.kernel.cache_clear()
        try:
            yield seen
        finally:
            dispatch.kernel.cache_clear()
            for kernel in used:
                kernel.device_caches.pop(0, None)


def calls(
    N: int, C: int = 64, K: int = 40, B: int = 2, impl: str = "triton", device: str = "cpu"
) -> dict[str, Callable[[], Any]]:
    """One call of every verb, by name, on N tokens."""
    x, q, meta = (torch.randn(shape, device=device) for shape in ((B, N, C), (B, 4, N, 32), (B, K, 32)))
    size, positions = torch.ones(B, N, device=device), torch.zeros(N, 3, device=device)
    plan = sttm.MergePlan(torch.randint(K, (B, N), dtype=torch.int32, device=device), K)
    onward = sttm.MergePlan(torch.zeros(B, K, dtype=torch.int32, device=device), 1)
    few, few_meta = x[:, :256].bfloat16(), torch.randn(B, K, C, device=device).bfloat16()
    groups = (N + 1) // 2
    token = torch.arange(N, dtype=torch.int32, device=device).repeat(B, 1)
    starts = (2 * torch.arange(groups + 1, dtype=torch.int32, device=device)).clamp_max(N).repeat(B, 1)
    pairs = sttm.MergePlan(token // 2, groups, order=token, offsets=starts)
    half = torch.randn(B, groups, C, device=device)
    return {
        "assign": lambda: sttm.assign(q, meta, impl=impl),
        "match": lambda: sttm.match(q, N // 2, impl=impl),
        "merge": lambda: sttm.merge(x, plan, size, positions, impl=impl),
        "merge of a sorted plan": lambda: sttm.merge(x, pairs, size, positions, impl=impl),
        "assign_merge": lambda: sttm.assign_merge(few, None, few_meta, impl=impl),
        "unmerge": lambda: sttm.unmerge(half, pairs, impl=impl),
        "compose": lambda: sttm.compose(plan, onward, impl=impl),
        "soft_merge": lambda: sttm.soft_merge(x, q, meta, impl=impl),
    }


def functions_called(call: Callable[[], Any]) -> int:
    """By one call of `call`, which has been called before."""
    called = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal called
        called += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return called


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repetitions", type=int, default=300)
    repetitions = parser.parse_args(argv).repetitions
    torch.set_num_threads(1)

    def microseconds(call: Callable[[], Any]) -> Sample:
        return time_in_turns({"": [call]}, torch.device("cpu"), seconds=0, least=repetitions)[""]

    print(f"torch {torch.__version__}, triton {triton.__version__}; limit {LIMIT_US:.0f} us")
    print(f"{'verb':22} {'p50':>7} {'p80':>7} {'with triton':>12} {'launches':>9} {'functions':>10}")
    slow = 0
    with stubbed_driver() as seen, torch.no_grad():
        for name, call in calls(N=128).items():
            before = seen.launched
            call()
            launches = seen.launched - before
            through = microseconds(call)
            with launching_instead(lambda *args: None):
                ours = microseconds(call)
                functions = functions_called(call)
            over = ours.p50 > LIMIT_US
            slow += over
            note = "  <- over the limit" * over
            print(f"{name:22} {ours.p50:7.1f} {ours.p80:7.1f} {through.p50:12.1f} {launches:9} {functions:10}{note}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
