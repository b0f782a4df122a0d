"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, their threads under ThreadSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_host
import pytest
from test_cuda_build import plan

from sttm_kernels import dispatch

if dispatch.on_host() or dispatch.interpreting():
    pytest.skip("starts processes of its own", allow_module_level=True)

__all__ = ["plan"]

HERE = Path(__file__).parent
SUITES = sorted(str(p) for p in HERE.glob("kernels/test_*.py") if not p.name.endswith("_only.py"))


@pytest.mark.long
def test_the_suites_of_the_verbs(plan, monkeypatch):
    """On the module of the baseline alone."""
    compiler, reason = plan.cpu_decision()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(plan, "INSTRUCTION_SETS", {})
    for name in ("CPU_OPTIMIZATION", "ONCE_OPTIMIZATION"):
        monkeypatch.setattr(plan, name, "-O0")  # with the sanitizers' code more takes minutes to compile
    folder = HERE.parent / "build" / "cpu_sanitized"
    module = folder / "_cpu.so"
    plan.compile_cpu([*compiler, *cuda_host.SANITIZERS, "-DSTTM_BASELINE_ONLY"], folder, module)
    environment = cuda_host.environment(module) | {"STTM_CPU_MODULE": str(module)}
    del environment["STTM_CUDA_HOST"]
    done = subprocess.run(
        [*cuda_host.PYTEST, "-k", "cpu-cpu", *SUITES],
        env=environment, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


def test_threads(plan, tmp_path):
    """Those of the package's own: of PyTorch's, the sanitizer knows nothing."""
    compiler, reason = plan.cpu_decision()
    if reason is not None:
        pytest.skip(reason)
    csrc, program = HERE.parent / "csrc", tmp_path / "threads"
    sources = [
        HERE / "cpu_threads.cpp",
        *(csrc / "cpu" / f"{name}.cpp" for name in ("assign", "match", "merge", "pool")),
    ]
    flags = [*plan.CPU_FLAGS, "-O1", "-g1", "-fsanitize=thread", "-DSTTM_ISA=baseline", f"-I{csrc / 'include'}"]
    subprocess.run([*compiler, *flags, *map(str, sources), "-ldl", "-o", str(program)], check=True)
    done = subprocess.run([program], env={"TSAN_OPTIONS": "halt_on_error=1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout == "passed\n"
