"""Triton kernels compiled ahead of time, no GPU needed: shared memory fits, nothing spills, tensor cores are used.

A default run compiles a covering part: every kernel on every architecture in every dtype, every block configuration,
every value of every other compile-time setting, but not every combination of them. All combinations take
`python -m benchmarks.codegen`, which prints the table and fails on the same faults.
"""

import dataclasses
import importlib.util
from collections import Counter

import pytest

from sttm_kernels import dispatch

if dispatch.interpreting():
    pytest.skip("compiles, which TRITON_INTERPRET=1 replaces", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks.codegen import table as codegen
from sttm_kernels.impl.triton import config

WORK = codegen.specializations(config.ARCHITECTURES)
COVERING = codegen.covering(WORK)


@pytest.mark.unpoisoned
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
