"""Triton kernels compiled ahead of time, no GPU needed: shared memory fits, nothing spills, tensor cores are used.

Compiled is a covering part: each kernel on each architecture, in each dtype, in each block configuration, with each
value of every other compile-time setting, but not every combination of them. All combinations take
`python -m benchmarks.codegen`, which prints the table and fails on the same faults.
"""

import dataclasses
import importlib.util
import inspect
import re
from collections import Counter

import pytest
import torch

from sttm_kernels import dispatch

if dispatch.interpreting():
    pytest.skip("compiles, which TRITON_INTERPRET=1 replaces", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.codegen import table as codegen
from benchmarks.codegen.recording import recorded
from sttm_kernels.impl.triton import config, csr, match
from sttm_kernels.impl.triton.match import _select, select_kernel

WORK = codegen.specializations(config.ARCHITECTURES)
COVERING = codegen.covering(WORK)


@pytest.mark.unpoisoned
@pytest.mark.table
@pytest.mark.parametrize("at", range(len(COVERING)), ids=lambda at: codegen.describe(*COVERING[at]).replace(" ", "-"))
def test_code(at):
    arch, one = COVERING[at]
    assert not codegen.faults(arch, one, codegen.build(arch, one))


def test_the_covering_part_meets_every_kernel_on_every_architecture():
    def met(work):
        return {(one.kernel.__name__, arch) for arch, one in work}

    assert met(COVERING) == met(WORK)
    assert {arch for arch, _ in COVERING} == set(config.ARCHITECTURES)


def test_faults_are_seen():
    arch, one = COVERING[0]
    one = dataclasses.replace(one, expect_dot=True)
    spilling = codegen.Report(255, 1 << 20, Counter(STL=3, LDL=2), 0)
    assert len(codegen.faults(arch, one, spilling)) == 3


# Order: threads that hold the same element of a small block


def of_line(kernel, text):
    """Number of the only line of a kernel that holds `text`."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (at,) = (at for at, line in enumerate(lines) if text in line)
    return first + at


def memory_and_barriers(ptx):
    """(source line, what) of every global load, global store and barrier, in the order of the code."""
    line = 0
    for one in ptx.splitlines():
        place = re.match(r"\s*\.loc\s+\d+\s+(\d+)", one)
        line = int(place[1]) if place else line
        what = re.search(r"\b(ld\.global|st\.global|bar\.sync|barrier\.sync)\b", one)
        if what:
            yield line, what[1][:2]


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("kernel", "part", "before", "after"),
    [
        (csr.start_kernel, csr.start_kernel, "here = tl.load(at", "tl.store(at, members"),
        (select_kernel, _select, "group = tl.load(index + other", "tl.store(index + n, group, mask=merged)"),
    ],
    ids=["start", "select"],
)
def test_all_threads_have_read_before_one_writes(kernel, part, before, after):
    """Where a block has fewer elements than the program has threads, several threads hold one element."""
    index = torch.empty(2, 100, dtype=torch.int32, device="meta")
    order, offsets = torch.empty_like(index), index.new_empty(2, 6)

    def run():
        with config.forced("place", BLOCK=16), config.forced("select", BLOCK=64, BLOCK_PAIRS=16):
            csr.sort_chunks(index, order, offsets)
            match(torch.empty(2, 100, 16, device="meta"), 8, 0, None, None)

    (one,) = (one for one in recorded("small", run, 80) if one.kernel is kernel)
    ptx = triton.compile(codegen.source(one), target=GPUTarget("cuda", 80, 32), options=dict(one.options)).asm["ptx"]
    found = list(memory_and_barriers(ptx))
    read = max(at for at, item in enumerate(found) if item == (of_line(part, before), "ld"))
    written = min(at for at, item in enumerate(found) if item == (of_line(part, after), "st"))
    assert read < written
    assert "ba" in {what for _, what in found[read:written]}


# Rounding


TF32 = {
    one.kernel.__name__: one
    for arch, one in WORK
    if arch == 80 and one.expect_dot and "*fp32" in list(one.signature.values())[:1]
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("kernel", TF32)
def test_both_factors_of_a_tf32_product_are_rounded(kernel):
    """Tensor cores would cut them off: cosines of like rows came out up to 9e-4 too small."""
    one = TF32[kernel]
    code = triton.compile(codegen.source(one), target=GPUTarget("cuda", 80, 32), options=dict(one.options)).asm["ttir"]
    made_by = dict(re.findall(r"(%\w+)(?::\d+)? = (.*)", code))
    products = re.findall(r"tt\.dot (%\w+), (%\w+), .*inputPrecision = tf32", code)
    assert products
    for factor in {factor for both in products for factor in both}:
        assert "cvt.rna.tf32" in made_by[factor], f"{factor} = {made_by[factor]}"
