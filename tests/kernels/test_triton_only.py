"""What only the Triton kernels have: how many launches, chunks of their sort, far offsets."""

import importlib
from functools import partial

import pytest
import torch
from cases import draw, each, each_dtype_and_reduction, only, run, short

import sttm_kernels as sttm
from sttm_kernels import dispatch
from sttm_kernels.checks import check_match, fields
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import assert_equal, assert_order, guarded, make_index, make_tokens

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

csr = importlib.import_module("sttm_kernels.impl.triton.csr")
launch = importlib.import_module("sttm_kernels.impl.triton.launch")
match_file = importlib.import_module("sttm_kernels.impl.triton.match")

# Blocks of the sizes that users get


@pytest.mark.shipped_blocks
@each(("K", "ordered", "launches"), [(9, False, 2), (200, False, 2), (9, True, 1)])
def test_how_many_launches_merge_takes(K, ordered, launches):
    index = make_index(2, 300, K, left_out=0.0)
    order, offsets = index.argsort(dim=1, stable=True).to(torch.int32), torch.zeros(2, K + 1, dtype=torch.int32)
    shortcut = {"order": order, "offsets": offsets} if ordered else {}
    seen = []
    with launch.launching_instead(lambda *args: seen.append(args[0].__name__)):
        sttm.merge(make_tokens(2, 300, 20), sttm.MergePlan(index, K, **shortcut), impl="triton")
    assert len(seen) == launches, seen


@pytest.mark.shipped_blocks
@each("how", [{}, {"partition": "frames"}, {"window": (2, 2, 2)}, {"protect": [3]}], ids=lambda how: "-".join(how))
def test_packed_sequences_take_as_many_launches_however_many(how):
    seen = {}
    for S in (2, 7):
        seen[S] = []
        with launch.launching_instead(lambda *args, names=seen[S]: names.append(args[0].__name__)):
            grid = {"grid": (3, 2, 2)} if how else {}
            sttm.match(make_tokens(1, 12 * S, 8)[0], 3, lengths=[12] * S, impl="triton", **grid, **how)
    assert seen[2] == seen[7]


@pytest.mark.shipped_blocks
@each("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_group_has_the_bits_that_it_has_alone(dtype):
    """Whether groups are long on average, which decides who owns them, or only this one is."""
    index = torch.arange(41).repeat_interleave(torch.tensor([40, 9, 3, *[1] * 38]))[None].int()
    inputs = only(draw((1, 90, 41, 1, 300), dtype), "x", "weight", "size", "positions")

    def merge(index, K, x, weight, size, positions):
        return fields(sttm.merge(x, sttm.MergePlan(index, K, weight=weight), size, positions, impl="triton"))

    together = run(partial(merge, index, 41), inputs)
    for groups in ([0], [1], [2], [0, 2]):
        mine = torch.isin(index[0], torch.tensor(groups))
        own = torch.searchsorted(torch.tensor(groups), index[:, mine]).int()
        alone = run(partial(merge, own, len(groups)), {name: value[:, mine] for name, value in inputs.items()})
        for name, value in alone.items():
            assert_equal(f"{name} of groups {groups}", together[name][:, mine if "gradient" in name else groups], value)


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


@pytest.mark.shipped_blocks
@each("K", [9, 130])
@each_dtype_and_reduction
def test_a_plan_with_its_order_gives_the_bits_of_one_without(dtype, reduce, K):
    x, size = make_tokens(1, 60, 20, dtype), draw((1, 60, 1, 1, 1))["size"]
    index = make_index(1, 60, K, left_out=0.0)
    order = index.argsort(dim=1, stable=True).int()
    offsets = torch.searchsorted(index.sort(dim=1).values, torch.arange(K + 1).int()[None]).int()
    plain, ordered = sttm.MergePlan(index, K), sttm.MergePlan(index, K, order=order, offsets=offsets)
    found, expected = (sttm.merge(x, plan, size, reduce=reduce, impl="triton") for plan in (ordered, plain))
    assert_equal("x", found.x, expected.x)
    assert_equal("size", found.size, expected.size)


# Offsets


def far_apart(values, dim):
    """The same values with neighbours along `dim` so far apart that they span more than 2^31 elements.

    Memory that nothing touches is only reserved, not used.
    """
    shape = list(values.shape)
    stride = 2**31 // (shape[dim] - 2) + 8
    strides = list(torch.empty_like(values, device="meta").select(dim, 0).contiguous().stride())
    strides.insert(dim, stride)
    memory = torch.empty((shape[dim] - 1) * stride + values.select(dim, 0).numel(), dtype=values.dtype)
    return memory.as_strided(shape, strides).copy_(values)


ONE_TILE = pytest.mark.shipped_blocks


@pytest.mark.unpoisoned
@each(
    "shape",
    [
        pytest.param(("items", 3, 6, 8), marks=ONE_TILE, id="items"),
        pytest.param(("rows", 2, 18, 8), marks=ONE_TILE, id="rows"),
        pytest.param(("rows", 2, 18, 8), id="tiles of rows"),
        pytest.param(("features", 2, 6, 4), marks=ONE_TILE, id="features"),
    ],
)
@each("verb", ["assign", "match", "merge", "unmerge", "soft_merge", "assign_merge"])
def test_offsets_past_two_to_the_31(verb, shape):
    """And the gradients, where the kernels of the way back read features too."""
    along, B, N, C = shape
    x = far_apart(make_tokens(B, N, C, torch.float16), ("items", "rows", "features").index(along))
    meta = make_tokens(B, 2, C, torch.float16, seed=1)
    plan = sttm.MergePlan(torch.arange(N, dtype=torch.int32).remainder(2).repeat(B, 1), 2, weight=torch.rand(B, N))
    onward = sttm.MergePlan(torch.arange(30, dtype=torch.int32).remainder(N).repeat(B, 1), N)
    call = {
        "assign": lambda x: sttm.assign(x, meta, impl="triton").lse,
        "match": lambda x: sttm.match(x, 1, impl="triton").score,
        "merge": lambda x: sttm.merge(x, plan, impl="triton").x,
        "unmerge": lambda x: sttm.unmerge(x, onward, impl="triton"),
        "soft_merge": lambda x: sttm.soft_merge(x, x, meta, impl="triton").x,
        "assign_merge": lambda x: assign_merge(x, None, meta, impl="triton")[0].x,
    }[verb]
    found, expected = (run(lambda x: {verb: call(x)}, {"x": one}) for one in (x, x.contiguous()))
    for name, value in expected.items():
        assert_equal(name, found[name], value)
    assert len(found) == (1 if verb == "match" else 2)
