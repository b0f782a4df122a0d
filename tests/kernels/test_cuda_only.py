"""What only the CUDA kernels have: which calls reach them, threads in any order, plans of any content, digits of their
sort, shared memory."""

import importlib
from functools import partial

import pytest
import torch
from cases import NORMALIZATIONS, draw, each, each_reduction, only, run, unwritten
from test_every_verb import VERBS, calling
from torch.utils._pytree import tree_leaves

import sttm_kernels as sttm
from benchmarks.codegen import combinations, forms
from sttm_kernels import dispatch
from sttm_kernels.checks import check_match, check_soft_merge, fields, make_mask
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import assert_equal, assert_order, guarded, make_index, make_tokens

cuda = importlib.import_module("sttm_kernels.impl.cuda")
DEVICE = "cpu" if dispatch.on_host() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs STTM_CUDA_HOST or an NVIDIA GPU", allow_module_level=True)
if dispatch.why_not("merge", "cuda", DEVICE) is not None:
    pytest.skip(str(dispatch.why_not("merge", "cuda", DEVICE)), allow_module_level=True)

ORDERS = ("forward", "reverse", "shuffle:1")
ONE_LAUNCH = 1024  # kOneLaunch of csrc/include/sttm/match_tokens.cuh
ONE_BLOCK = 8192  # kOneBlock of csrc/include/sttm/csr.cuh
TINY = combinations.Extents(B=1, N=5, C=8, D=8, P=2, H=2)


@each("op", combinations.operators(cuda))
def test_every_combination_of_optional_arguments_runs(op, monkeypatch):
    """Those that `forms` counts, in every dtype: each has kernels, which write all that they should."""
    seen = forms.Seen(cuda._extension())
    monkeypatch.setattr(cuda, "_extension", lambda: seen)
    for dtype, rounding in combinations.KINDS:
        with combinations.products(rounding):
            for chosen in combinations.combinations(op):
                expected = combinations.call(op, "cuda", dtype, chosen, TINY, "meta")
                found = combinations.call(op, "cuda", dtype, chosen, TINY, DEVICE)
                for like, value in zip(tree_leaves(expected), tree_leaves(found), strict=True):
                    assert (value.shape, value.dtype) == (like.shape, like.dtype), (dtype, chosen)
                    assert not bool(value.isnan().any()), (dtype, chosen, "not written")
    assert seen.forms == forms.of_cuda(op)


@pytest.mark.skipif(not dispatch.on_host(), reason="a GPU has an order of its own")
@each("verb", VERBS)
@each(("N", "K", "C", "dtype"), [(20, 5, 24, torch.float32), (70, 66, 140, torch.bfloat16)])
def test_the_order_of_threads_and_blocks_changes_no_bit(verb, N, K, C, dtype, monkeypatch):
    inputs, results = draw((2, N, K, 72, C), dtype), []
    for order in ORDERS:
        monkeypatch.setenv("STTM_HOST_ORDER", order)
        results.append(run(calling(verb, "cuda"), inputs))
    for other in results[1:]:
        for name, value in results[0].items():
            assert_equal(name, other[name], value)


@each_reduction
@each("dtype", (torch.float32, torch.bfloat16))
def test_merge_of_a_group_has_the_same_bits_whatever_groups_are_beside_it(dtype, reduce):
    """Beside many of one token, warps own groups; without these, blocks do."""
    lengths, single = torch.tensor([40, 1, 2, 170, 33, 0, 32, 140, 130, 150]), 100
    K, N = len(lengths), int(lengths.sum())
    inputs = draw((1, N + single, K + single, 8, 24), dtype, DEVICE)
    inputs = only(inputs, "x", "weight", "size", "positions", "fill")
    index = torch.arange(K, dtype=torch.int32).repeat_interleave(lengths)[torch.randperm(N)]
    index = torch.cat([index, torch.arange(K, K + single, dtype=torch.int32)])[None].to(DEVICE)

    def merge(index, K, x, weight, size, positions, fill):
        return fields(sttm.merge(x, sttm.MergePlan(index, K, weight=weight), size, positions, reduce, fill, "cuda"))

    beside = merge(index, K + single, **inputs)
    own = {name: value[:, : K if name == "fill" else N] for name, value in inputs.items()}
    for name, value in merge(index[:, :N], K, **own).items():
        assert_equal(name, beside[name][:, :K], value)


@each("dtype", (torch.float32, torch.bfloat16))
@each(("B", "N", "K", "C"), [(2, 300, 70, 20), (1, 270, 1030, 8)])
def test_soft_merge_of_more_tokens_than_a_block_takes(B, N, K, C, dtype):
    """In several spans, whose sums are added, or in several panels of one; which of them does not depend on B."""
    inputs = draw((B, N, K, 8, C), dtype, DEVICE)
    for normalize in NORMALIZATIONS:
        given = only(inputs, "x", "q", "meta", "size", "positions")
        check_soft_merge("cuda", **given, similarity="cosine", temperature=0.2, normalize=normalize)
    if B > 1:
        call = calling("soft_merge over meta", "cuda")
        both, alone = (run(call, of) for of in (inputs, {name: t[:1] for name, t in inputs.items()}))
        for name, value in alone.items():
            assert_equal(name, both[name][:1], value)


@each_reduction
@each("N", [20, 180])
def test_an_order_that_is_not_one_stays_in_bounds(reduce, N, outputs_amid_poison):
    """Callers may pass any plan: what it gives is meaningless, but every access is inside (the sanitizer looks)."""
    order = torch.tensor([-1, N, 2**31 - 1, -(2**31), 3]).repeat(2, N // 5).to(DEVICE, torch.int32)
    offsets = torch.tensor([[0, 2**31 - 1, 4, -(2**31), N, N + 1], [-9, 0, N, 3, 2, 1]]).to(DEVICE, torch.int32)
    index = make_index(2, N, 5, DEVICE)

    def call(x, weight, size, positions):
        plan = sttm.MergePlan(index, 5, weight=weight, order=order, offsets=offsets)
        return fields(sttm.merge(x, plan, size, positions, reduce, impl="cuda"))

    with unwritten(only(draw((2, N, 5, 1, 20), device=DEVICE), "x", "weight", "size", "positions")) as inputs:
        run(call, inputs)


@each(
    ("N", "K", "C", "dtype"),
    [
        (1, 1, 8, torch.float32),
        (33, 7, 20, torch.float32),
        (49, 25, 200, torch.bfloat16),
        (130, 70, 136, torch.float16),
        (256, 128, 16, torch.float16),
        (150, 5, 768, torch.float16),  # too much for shared memory
    ],
)
@each("similarity", ["cosine", "dot"])
def test_features_that_stay_in_shared_memory_give_the_same_bits(N, K, C, dtype, similarity):
    """x as its own metric is read once, x and a copy of it twice."""
    inputs = draw((2, N, K, C, C), dtype, DEVICE)
    mask = make_mask(2, N, DEVICE)
    mask[:, 0] = True
    x = inputs["x"].masked_fill(~mask[..., None], torch.nan)
    more = (inputs["meta"], similarity, 1.0, "softmax", mask, *only(inputs, "size", "positions", "fill").values())
    (one, plan), (other, expected) = (assign_merge(x, q, *more, "cuda") for q in (None, x.clone()))
    for name, value in (fields(other) | fields(expected) | {"index": expected.index}).items():
        assert_equal(name, getattr(one if name in fields(one) else plan, name), value)


# Long sequences, and sorting tokens by group


def test_match_of_more_tokens_than_one_launch_takes():
    check_match("cuda", make_tokens(2, ONE_LAUNCH + 151, 8, torch.float16, DEVICE), 700, 1)


@each("r", [0, 31, 149, 150, [0, 31]], ids=str)
@each(("masked", "threshold"), [(False, None), (True, None), (False, 0.9)])
def test_selection_by_several_blocks_is_that_by_one(r, masked, threshold):
    """The same tokens behind a prefix that is longer than one block takes, and without it."""
    rest, equal = 300, torch.arange(300) % 7 < 3
    metric = make_tokens(2, ONE_BLOCK + rest, 4, device=DEVICE)
    metric[:, ONE_BLOCK:][:, equal] = metric[:, -1:]  # scores of 1
    mask = make_mask(2, ONE_BLOCK + rest, DEVICE) if masked else None
    call = partial(sttm.match, threshold=threshold, impl="cuda")
    given = torch.tensor(r) if isinstance(r, list) else r
    plan = call(metric, given, ONE_BLOCK, mask=mask)
    alone = call(metric[:, ONE_BLOCK:], given, mask=mask[:, ONE_BLOCK:] if mask is not None else None)
    assert_equal("score", plan.score[:, ONE_BLOCK:], alone.score)
    assert_equal("index", plan.index[:, ONE_BLOCK:], (alone.index + ONE_BLOCK * (alone.index >= 0)).int())
    if mask is None:
        assert_order(plan.index, plan.num_groups, plan.order, plan.offsets)


@each("dtype", [torch.bfloat16, torch.float16])
@each("D", [8, 40, 64, 72, 88, 90, 112, 128, 136])
def test_match_of_every_depth_by_parts_of_the_dst(D, dtype):
    """Dst are shared out among blocks where there are few: packed, they are not, with the same bits."""
    metric = make_tokens(1, 300, D, dtype, DEVICE)
    check_match("cuda", metric, 70, 1)
    plan, whole = sttm.match(metric, 70, 1, impl="cuda"), sttm.match(metric, 70, 1, lengths=[300], impl="cuda")
    for name, value in fields(whole).items():
        assert_equal(name, getattr(plan, name), value)


def test_the_lowest_of_equal_dst_in_several_parts():
    """And of rising negative scores the highest, which as integers are in the other order."""
    metric = torch.zeros(1, 512, 8, dtype=torch.float16, device=DEVICE)
    metric[0, ::2, 0], metric[0, 1::2, 0] = 1, -1
    metric[0, 1::2, 1] = torch.arange(256, device=DEVICE) // 2 / 256
    index = sttm.match(metric, 255, impl="cuda").index[0]
    assert bool((index[:510:2] == index[509]).all())


@each("name", ["src", "dst"])
def test_lists_that_point_outside_are_not_followed(name, monkeypatch):
    """The kernels trust nobody: such entries of the lists of src and dst count as padding."""
    splits = importlib.import_module("sttm_kernels.partition")
    lists = splits.lists

    def wild(*args):
        made = dict(zip(("src", "dst"), lists(*args), strict=True))
        made[name] = made[name].clone()
        made[name][..., -2:] = torch.tensor([-7, 20])
        return tuple(made.values())

    monkeypatch.setattr(splits, "lists", wild)
    draws = torch.zeros(2, 20, dtype=torch.bool)
    draws[:, 1::2] = True  # a mask, whose lists no cache knows
    index = sttm.match(make_tokens(2, 20, 8, device=DEVICE), 4, 0, draws, impl="cuda").index
    assert bool(((index >= -1) & (index < 16)).all())


@each("kind", ["random", "even", "one", "none"])
@each(
    ("N", "K"),
    [
        (1, 1),
        (16, 40),
        (77, 5),
        (257, 255),
        (300, 256),
        (300, 1023),
        (300, 1024),
        (ONE_LAUNCH + 5, 3000),
        (ONE_BLOCK + 5, 5000),
    ],
)
def test_tokens_are_sorted_by_group(N, K, kind):
    """By one digit or two, by small blocks, large ones or several; tokens without a group come last."""
    index = make_index(2, N, K, DEVICE, kind=kind)
    index[0, 0] = 2**31 - 1
    index[1, -1] = -(2**31)
    shapes = (2, N), (2 * cuda.SORT_ROOM, N), (2, K + 1)
    made = [guarded(index), *(guarded(index.new_empty(shape)) for shape in shapes)]
    held, order, other, offsets = (one.tensor for one in made)
    cuda._extension().csr(held, K, order, offsets, other, cuda._stream(index))
    assert_order(torch.where((index < 0) | (index >= K), K, index), K, order, offsets)
    for one in made:
        one.check()
