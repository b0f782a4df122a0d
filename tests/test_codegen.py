"""What counts as a fault of a compiled CUDA kernel, and the table. `test_cuda_compile` holds the kernels against it."""

import importlib.util
import re
from collections import Counter

import pytest

from benchmarks.codegen import cuda as codegen_cuda

HEADERS = "".join(path.read_text() for path in sorted((codegen_cuda.CSRC / "include" / "sttm").glob("*.cuh")))


def report(name, spills=0, **instructions):
    return codegen_cuda.Report(name, "80", 40, 0, spills, Counter(instructions))


@pytest.mark.parametrize("kernel", codegen_cuda.PRODUCTS)
def test_kernels_that_multiply_are_expected_to_use_tensor_cores(kernel):
    assert re.search(rf"\b{kernel}\(", HEADERS), "there is no such kernel any more"
    for arguments in ("<__half, false>", "<__nv_bfloat16, false, 4>", "<float, false>"):
        assert codegen_cuda.faults(report(kernel + arguments, FFMA=9)) == ["no tensor-core instruction"]
        assert codegen_cuda.faults(report(kernel + arguments, HMMA=9)) == []
    assert codegen_cuda.faults(report(kernel + "<float, true>", FFMA=9)) == []
    assert codegen_cuda.faults(report(kernel + "<__half, false>")) == [], "the code was not read: no cuobjdump"


def test_other_kernels_are_not():
    assert codegen_cuda.faults(report("unmerge_kernel<__half, true>", LDG=1)) == []


def test_memory_of_threads_is_a_fault():
    assert codegen_cuda.faults(report("csr_kernel<256>", 12, STL=3)) == ["12 bytes spilled"]
    assert codegen_cuda.faults(report("csr_kernel<256>", LDL=1)) == ["an array of a thread in memory"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_table(monkeypatch, capsys):
    """CUDA kernels are rows of the table of the Triton kernels; a fault is marked, and makes the command fail."""
    from benchmarks.codegen import table as codegen

    made = [report("nearest_kernel<__half, false>", HMMA=8, LDG=2), report("csr_kernel<256>", LDG=7)]
    monkeypatch.setattr(codegen_cuda, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(codegen_cuda, "build", lambda verb, arch: made)
    assert codegen.main(["--impl", "cuda", "--arch", "80", "--verb", "match"]) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["kernel", *codegen.COLUMNS]
    assert rows[0].split()[-10:] == ["40", "0", "0", "8", "0", "0", "0", "0", "2", "0"]
    assert last == "2 without faults"
    made.append(report("spatial_kernel<__half, false, 4>", 8))
    assert codegen.main(["--impl", "cuda", "--arch", "80", "--verb", "match"]) == 1
    assert "<- 8 bytes spilled\n1 of 3 at fault" in capsys.readouterr().out


def test_the_table_needs_a_compiler(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.codegen import table as codegen

    monkeypatch.setattr(codegen_cuda, "nvcc", lambda: None)
    with pytest.raises(SystemExit, match="there is no nvcc"):
        codegen.main(["--impl", "cuda"])
