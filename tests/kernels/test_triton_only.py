"""What only the Triton kernels have: how many launches, chunks of their sort, a product for few groups, far offsets."""

import importlib

import pytest
import torch
from cases import draw, each, only, short

import sttm_kernels as sttm
from sttm_kernels import dispatch
from sttm_kernels.checks import check_match, check_merge
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import assert_equal, assert_order, guarded, make_index, make_tokens

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

csr = importlib.import_module("sttm_kernels.impl.triton.csr")
launch = importlib.import_module("sttm_kernels.impl.triton.launch")
match_file = importlib.import_module("sttm_kernels.impl.triton.match")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Blocks of the sizes that users get


@pytest.mark.shipped_blocks
@each("reduce", ["mean", "sum"])
@each("extras", [(), ("size", "weight", "positions", "fill")], ids=["bare", "everything"])
@each("dtype", DTYPES[1:], ids=short)
def test_merge_of_few_groups_by_a_product(reduce, extras, dtype):
    inputs = draw((1, 70, 66, 1, 72), dtype)
    check_merge("triton", inputs["x"], make_index(1, 70, 66), 66, reduce=reduce, **only(inputs, *extras))


@pytest.mark.shipped_blocks
@each(
    ("K", "dtype", "ordered", "launches"),
    [
        (9, torch.float16, False, 1),
        (200, torch.float16, False, 2),
        (9, torch.float32, False, 2),
        (200, torch.float16, True, 1),
    ],
)
def test_how_many_launches_merge_takes(K, dtype, ordered, launches):
    index = make_index(2, 300, K, left_out=0.0)
    order, offsets = index.argsort(dim=1, stable=True).to(torch.int32), torch.zeros(2, K + 1, dtype=torch.int32)
    shortcut = {"order": order, "offsets": offsets} if ordered else {}
    seen = []
    with launch.launching_instead(lambda *args: seen.append(args[0].__name__)):
        sttm.merge(make_tokens(2, 300, 20, dtype), sttm.MergePlan(index, K, **shortcut), impl="triton")
    assert len(seen) == launches, seen


# Sorting tokens by group


@pytest.fixture
def chunks(monkeypatch):
    """Sorts a few tokens as it would many thousands."""
    monkeypatch.setattr(csr, "ONE_PROGRAM", 8)
    monkeypatch.setattr(match_file, "ONE_PROGRAM", 8)
    monkeypatch.setattr(csr, "MAX_CHUNKS", 3)
    monkeypatch.setattr(csr, "LEAST_CHUNK", 16)


def test_long_sequences_are_sorted_in_chunks(chunks):
    check_match("triton", make_tokens(2, 75, 16), 30, 1)


@each("kind", ["random", "even", "one", "none"])
@each(("N", "K"), [(1, 1), (16, 40), (77, 5), (100, 33)])
@each("chunked", [False, True])
def test_tokens_are_sorted_by_group(N, K, kind, chunked, request, outputs_amid_poison):
    """Those without a group come last, also where the index points far outside."""
    if chunked:
        request.getfixturevalue("chunks")
    index = make_index(2, N, K, kind=kind)
    index[0, 0] = 2**31 - 1
    index[1, -1] = -(2**31)
    held = guarded(index)
    order, offsets = csr.parts(csr.csr(held.tensor, K), *held.tensor.shape, K)
    assert_order(torch.where((index < 0) | (index >= K), K, index), K, order, offsets)
    held.check("index")
    assert outputs_amid_poison


# Offsets


def far_apart(values):
    """The same values with batch items 2^30 + 8 elements apart: three of them span more than 2^31 elements.

    Memory that nothing touches is only reserved, not used.
    """
    B, stride = values.shape[0], 2**30 + 8
    memory = torch.empty((B - 1) * stride + values[0].numel(), dtype=values.dtype)
    view = memory.as_strided(values.shape, (stride, *values[0].contiguous().stride()))
    return view.copy_(values)


@pytest.mark.unpoisoned
@pytest.mark.shipped_blocks
@each("verb", ["assign", "match", "merge", "unmerge", "soft_merge", "assign_merge"])
def test_offsets_past_two_to_the_31(verb):
    x = far_apart(make_tokens(3, 20, 16, torch.float16))
    meta = make_tokens(3, 4, 16, torch.float16, seed=1)
    plan = sttm.MergePlan(torch.arange(20, dtype=torch.int32).remainder(4).repeat(3, 1), 4)
    onward = sttm.MergePlan(torch.arange(30, dtype=torch.int32).remainder(20).repeat(3, 1), 20)
    call = {
        "assign": lambda x: sttm.assign(x, meta, impl="triton").score,
        "match": lambda x: sttm.match(x, 6, impl="triton").score,
        "merge": lambda x: sttm.merge(x, plan, impl="triton").x,
        "unmerge": lambda x: sttm.unmerge(x, onward, impl="triton"),
        "soft_merge": lambda x: sttm.soft_merge(x, x, meta, impl="triton").x,
        "assign_merge": lambda x: assign_merge(x, None, meta, impl="triton")[0].x,
    }[verb]
    assert_equal(verb, call(x), call(x.contiguous()))
