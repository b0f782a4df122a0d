"""Combinations of present and absent optional arguments of every operator compile, on the installed Triton.

The combinations are those of the operators' schemas (`benchmarks.codegen.combinations`). The operators are called on
small CPU tensors as if a GPU were there, and `launch` hands over what it would have compiled. Of the forms that come of
it a part in which every two parameters meet in every way goes through the front end, where an absent argument that is
read shows (`python -m benchmarks.codegen.forms --compile` takes them all); of a part that covers each parameter's
presence and absence and every setting, machine code is made.
"""

import importlib.util

import pytest
import torch

from sttm_kernels import dispatch

if dispatch.interpreting():
    pytest.skip("compiles, which TRITON_INTERPRET=1 replaces", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks.codegen import forms, launched, table
from benchmarks.codegen.combinations import operators
from sttm_kernels.impl import triton as implementation

OPERATORS = operators(implementation)


@pytest.mark.table
@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", OPERATORS)
def test_every_combination_passes_the_front_end(op):
    met = table.covering(forms.of_triton(op), table.pairs)
    for item in met:
        table.front_end(*item)
    print(f"{op}: {len(met)} forms through the front end")


@pytest.mark.unpoisoned
@pytest.mark.table
@pytest.mark.parametrize("op", OPERATORS)
def test_combinations_become_machine_code(op):
    whole = table.covering([item for item in forms.of_triton(op) if item[0] == forms.FULL[1]])
    faults = {table.describe(*item): table.faults(*item, table.build(*item)) for item in whole}
    assert not {name: found for name, found in faults.items() if found}
    print(f"{op}: {len(whole)} forms to machine code")


def test_the_operators_are_those_of_the_package():
    assert {"assign", "assign_merge", "match", "merge", "merge_backward", "soft_merge", "unmerge"} <= set(OPERATORS)


@triton.jit
def forgetful_kernel(x, size, out, N, BLOCK: tl.constexpr):
    """Reads a size that is absent, for as many tokens as there are."""
    n = tl.arange(0, BLOCK)
    total = tl.load(x + n, mask=n < N, other=0.0)
    for _ in range(N // BLOCK):
        total *= tl.load(size + n, mask=n < N, other=1.0)
    tl.store(out + n, total, mask=n < N)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("size", [torch.float32, None], ids=["present", "absent"])
def test_a_launch_that_reads_an_absent_argument_is_refused(size):
    """The interpreter does not get there with fewer tokens than a block; what it launched is compiled afterwards."""
    args = (torch.float32, size, torch.float32, 16)
    launch = launched.Launch(__name__, "forgetful_kernel", args, (("BLOCK", 16),), (4, 1))
    problem = launched.problem(launch)
    assert problem is None if size is not None else "size + n" in problem


@pytest.mark.unpoisoned
def test_launches_are_compiled_by_a_process_that_does_not_interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = (torch.int32,) * 3 + (16,) * 3
    known = launched.Launch("sttm_kernels.impl.triton.unmerge", "compose_kernel", args, (("BLOCK", 16),), (4, 1))
    found = launched.problems([known, known._replace(kernel="lost_kernel")])
    assert found[0] is None
    assert "lost_kernel" in found[1]
