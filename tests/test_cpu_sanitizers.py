"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest
from test_cuda_build import plan

from sttm_kernels import dispatch

if dispatch.on_host() or dispatch.interpreting():
    pytest.skip("starts processes of its own", allow_module_level=True)

__all__ = ["plan"]

HERE = Path(__file__).parent
SUITES = sorted(p.name for p in HERE.glob("kernels/test_*.py") if not p.name.endswith("_only.py"))


@pytest.fixture
def sanitized(plan, monkeypatch):
    """The module, of the baseline alone, built once."""
    compiler, reason = plan.cpu_decision()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(plan, "INSTRUCTION_SETS", {})
    folder = HERE.parent / "build" / "cpu_sanitized"
    plan.compile_cpu([*compiler, *cuda_host.SANITIZERS, "-DSTTM_BASELINE_ONLY"], folder, folder / "_cpu.so")
    return folder / "_cpu.so"


@pytest.mark.parametrize("suite", SUITES)
def test_suite(suite, sanitized):
    environment = cuda_host.environment(sanitized) | {"STTM_CPU_MODULE": str(sanitized)}
    del environment["STTM_CUDA_HOST"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu-cpu"]
    done = subprocess.run(
        [*command, str(HERE / "kernels" / suite)],
        env=environment, capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
