"""The CUDA kernels compiled by nvcc, no GPU needed: nothing spills. `benchmarks.codegen.cuda` prints the table."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.codegen import cuda as codegen_cuda
from sttm_kernels import dispatch

if dispatch.on_host() or dispatch.interpreting():
    pytest.skip("needs neither", allow_module_level=True)
if codegen_cuda.nvcc() is None:
    pytest.skip("there is no nvcc", allow_module_level=True)

EXAMPLE = codegen_cuda.CSRC / "examples" / "merge_tokens.cu"


@pytest.mark.table
@pytest.mark.parametrize("verb", codegen_cuda.VERBS)
def test_nothing_spills(verb):
    """On one architecture, to save minutes; `python -m benchmarks.codegen --impl cuda` has more."""
    reports = codegen_cuda.build(verb, codegen_cuda.ARCHITECTURES[-1])
    assert reports
    assert not [(report.name, wrong) for report in reports for wrong in codegen_cuda.faults(report)]


def test_reads_and_writes_of_16_bytes():
    reports = {report.name: report for report in codegen_cuda.build("unmerge", "80")}
    if shutil.which("cuobjdump") is None and not any(report.instructions for report in reports.values()):
        pytest.skip("there is no cuobjdump")
    for name, report in reports.items():
        if name.startswith("unmerge_kernel"):
            assert bool(report.instructions["128-bit"]) == ("true" in name), name


def test_faults_are_seen():
    log = "Compiling entry function 'f' for 'sm_80'\n 8 bytes spill stores, 4 bytes spill loads\n"
    log += "Used 9 registers, 16 bytes smem"
    (report,) = codegen_cuda._resources(log, "80")
    assert (report.registers, report.shared, report.spills) == (9, 16, 12)
    assert codegen_cuda.faults(report) == ["12 bytes spilled"]


def test_the_example_links_with_the_headers_and_the_runtime_alone(tmp_path: Path):
    program = tmp_path / "merge_tokens"
    command = [codegen_cuda.nvcc(), "-std=c++17", "-arch=sm_80", f"-I{codegen_cuda.CSRC / 'include'}", EXAMPLE]
    subprocess.run([*map(str, command), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    if run.returncode != 0:
        assert "CUDA error: " in run.stderr  # there is no GPU
    else:
        assert "16 tokens" in run.stdout
