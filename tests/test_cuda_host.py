"""The CUDA kernels on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer; and what that setup must find."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cuda_host
import pytest

from sttm_kernels import dispatch

if dispatch.on_host() or dispatch.interpreting():
    pytest.skip("starts processes of its own", allow_module_level=True)
if shutil.which(cuda_host.compiler()) is None:
    pytest.skip(f"needs a C++ compiler, {cuda_host.compiler()} is not there", allow_module_level=True)

HERE = Path(__file__).parent
OTHERS = ("test_cpu_only.py", "test_torch_only.py", "test_triton_only.py")
KERNELS = sorted(p for p in HERE.glob("kernels/test_*.py") if p.name not in OTHERS)
SUITES = [*KERNELS, HERE / "test_cuda_arrays.py"]
ORDERS = ("forward", "reverse", "shuffle:1", "shuffle:2")


@pytest.mark.long
@pytest.mark.parametrize("half", [0, 1])
def test_suites(half):
    """Builds the module once, then runs half of the files of tests in a process that loads the sanitizers first."""
    module = cuda_host.build(HERE.parent / "build" / "cuda_host", jobs=int(os.environ.get("MAX_JOBS", "2")))
    run = subprocess.run(
        [*cuda_host.PYTEST, *map(str, SUITES[half::2])],
        env=cuda_host.environment(module), capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-8000:]
    assert " passed" in run.stdout


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = tmp_path_factory.mktemp("faults") / "faults"
    cuda_host.build_program(HERE / "cuda_faults" / "faults.cpp", program)
    return program


def run_in_order(command, order):
    environment = {**os.environ, "STTM_HOST_ORDER": order}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("fault", "found_in", "message"),
    [
        ("missing_barrier", ("reverse", "shuffle:1", "shuffle:2"), "is 2147483647"),
        ("unwritten_shared", ORDERS, "out[6] is 2147483647"),
        ("off_by_one", ORDERS, "AddressSanitizer: heap-buffer-overflow"),
        ("shared_overrun", ORDERS, "out of bounds for type 'int [64]'"),
        ("dynamic_overrun", ORDERS, "AddressSanitizer: heap-buffer-overflow"),
        ("early_return", ORDERS, "63 are at a barrier and 1 have returned"),
        ("divergent_barrier", ORDERS, "threads wait at different barriers"),
        ("divergent_shuffle", ORDERS, "waits for ever at shuffle_up"),
        ("misaligned", ORDERS, "requires 16 byte alignment"),
        ("unasked_shared", ORDERS, "53248 bytes of shared memory, 10240 of them static, are more than was asked for"),
    ],
)
def test_planted_fault_is_found(fault, found_in, message, faults):
    for order in ORDERS:
        right, wrong = (run_in_order([faults, fault, kind], order) for kind in ("right", "wrong"))
        assert right.returncode == 0, (order, right.stderr)
        if order in found_in:
            assert wrong.returncode != 0, order
            assert message in wrong.stderr, (order, wrong.stderr)
        else:
            assert wrong.returncode == 0, (order, wrong.stderr)


@pytest.mark.table
@pytest.mark.parametrize(
    ("header", "planted", "message"),
    [
        (None, None, None),
        ("csr.cuh", ("table[at] = 0;\n        __syncthreads();", "table[at] = 0;"), None),
        ("slices.cuh", ("piece * kStep < left", "piece * kStep <= left"), "AddressSanitizer: heap-buffer-overflow"),
    ],
    ids=["none", "missing barrier", "off by one"],
)
def test_the_example_and_faults_planted_in_its_kernel(header, planted, message, tmp_path):
    """csrc/examples/merge_tokens.cu checks what it computes."""
    csrc = tmp_path / "csrc"
    shutil.copytree(cuda_host.CSRC, csrc)
    if planted is not None:
        path = csrc / "include" / "sttm" / header
        text = path.read_text()
        assert planted[0] in text
        path.write_text(text.replace(*planted, 1))
    cuda_host.build_program(csrc / "examples" / "merge_tokens.cu", tmp_path / "example", csrc)
    runs = [run_in_order([tmp_path / "example"], order) for order in ORDERS]
    if planted is None:
        for run in runs:
            assert run.returncode == 0, run.stdout + run.stderr
            assert "group 4: 16 tokens around row 5.5, column 5.5" in run.stdout
    else:
        assert any(run.returncode != 0 for run in runs)
        assert message is None or all(message in run.stderr for run in runs)


def test_an_order_that_does_not_exist(faults):
    run = run_in_order([faults, "off_by_one", "right"], "backwards")
    assert run.returncode != 0
    assert "STTM_HOST_ORDER must be forward, reverse or shuffle:<seed>, got backwards" in run.stderr
