"""assign_merge is assign and then merge: their specification, their results, and gradients of both together."""

import pytest
import torch
from cases import (
    DTYPES,
    SIMILARITIES,
    SMALL,
    draw,
    each,
    each_dtype,
    each_layout,
    each_similarity,
    each_weight,
    only,
    temperature_of,
    unwritten,
)

import sttm_kernels as sttm
from sttm_kernels.checks import check_assign_merge, fields, make_mask
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import LAYOUTS, assert_equal, assert_order, make_tokens

EXTRAS = ("size", "positions", "fill")
SHAPES = [
    (1, 1, 1, 64, 64),
    (2, 2, 3, 5, 4),
    (2, 16, 1, 16, 17),
    (3, 17, 5, 3, 20),
    (2, 31, 33, 80, 64),
    (1, 65, 64, 64, 33),
    (1, 127, 65, 17, 24),
    (1, 129, 128, 16, 40),
    (1, 256, 9, 8, 8),
]
if SMALL:
    SHAPES = [*SHAPES[:5], (1, 33, 16, 88, 15), (1, 15, 15, 64, 33)]


@pytest.fixture(autouse=True)
def _tensor_cores(backend):
    """True float32 products take Triton two launches; its fused kernel is for those that tensor cores can do."""
    before = torch.backends.cuda.matmul.fp32_precision
    if SMALL:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def tokens(backend, B, N, K, D, C, dtype=torch.float32, own=False, **more):
    """x, q, meta and what may be given beside them; q is None where x is its own metric."""
    inputs = draw((B, N, K, C if own else D, C), dtype, backend.device, **more)
    return only(inputs, "x", "q", "meta", *EXTRAS) | ({"q": None} if own else {})


def check(backend, inputs, similarity="cosine", temperature=1.0, weight="softmax", mask=None, extras=EXTRAS):
    given = only(inputs, *extras) | ({} if mask is None else {"mask": mask})
    x, q, meta = inputs["x"], inputs["q"], inputs["meta"]
    check_assign_merge(backend.impl, x, q, meta, similarity, temperature, weight, given)


def call(backend, similarity="cosine", weight="softmax", mask=None):
    """`assign_merge` as a function of its inputs by name, with named outputs."""

    def through(x, meta, q=None, size=None, positions=None, fill=None):
        out, plan = assign_merge(x, q, meta, similarity, 1.0, weight, mask, size, positions, fill, backend.impl)
        return fields(plan) | fields(out) | {"index": plan.index}

    return through


def apart(backend, similarity="cosine", weight="softmax", mask=None):
    def through(x, meta, q=None, size=None, positions=None, fill=None):
        plan = sttm.assign(x if q is None else q, meta, similarity, 1.0, weight, mask, backend.impl)
        out = sttm.merge(x, plan, size, positions, "mean", fill, backend.impl)
        return fields(plan) | fields(out) | {"index": plan.index}

    return through


def given(inputs):
    return {name: value for name, value in inputs.items() if value is not None}


@each_dtype
@each("shape", SHAPES, ids=str)
def test_shapes(backend, shape, dtype):
    check(backend, tokens(backend, *shape, dtype))


@each_layout
@each("own", [True, False], ids=["by x", "by q"])
def test_layouts_are_read_in_place(backend, dtype, layout, own):
    similarity = SIMILARITIES[(LAYOUTS.index(layout) + own) % 3]
    weight = ("softmax", "uniform")[(LAYOUTS.index(layout) + DTYPES.index(dtype)) % 2]
    with unwritten(given(tokens(backend, 2, 19, 6, 20, 24, dtype, own, layout=layout))) as held:
        check(backend, held | ({"q": None} if own else {}), similarity, 2.0, weight, make_mask(2, 19, backend.device))


@each_similarity
@each_weight
def test_x_as_its_own_metric(backend, similarity, weight):
    inputs = tokens(backend, 2, 20, 6, 0, 40, own=True)
    check(backend, inputs, similarity, temperature_of(similarity, 40), weight, extras=())


@pytest.mark.shipped_blocks
@each_dtype
@each(("N", "K", "C"), [(65, 17, 70)] if SMALL else [(150, 100, 136), (37, 5, 2056), (150, 5, 768)])
def test_more_than_one_tile_or_warp_takes(backend, N, K, C, dtype):
    check(backend, tokens(backend, 1, N, K, 0, C, dtype, own=True))
    check(backend, tokens(backend, 1, N, K, 8, C, dtype), extras=())


def test_mean_over_heads(backend):
    check(backend, tokens(backend, 2, 19, 5, 20, 24, heads=3))


def test_shared_meta_positions_and_fill(backend):
    inputs = tokens(backend, 3, 18, 5, 20, 24)
    check(backend, inputs | {name: inputs[name][0] for name in ("meta", "positions", "fill")})


# As assign and merge do


@each(("N", "K"), [(257, 3), (5, 129)])
def test_long_sequences_give_the_bits_of_two_verbs(backend, N, K):
    inputs = given(tokens(backend, 1, N, K, 8, 4))
    with torch.no_grad():
        fused, two = (verb(backend)(**inputs) for verb in (call, apart))
    for name, value in two.items():
        assert_equal(name, fused[name], value)


@each("dtypes", [("float16", "float32"), ("float32", "bfloat16")], ids=str)
def test_a_metric_of_another_dtype(backend, dtypes):
    inputs = tokens(backend, 2, 7, 3, 4, 5, getattr(torch, dtypes[0]))
    metric = {name: inputs[name].to(getattr(torch, dtypes[1])) for name in ("q", "meta")}
    fused, two = (verb(backend)(**inputs | metric) for verb in (call, apart))
    for name in ("index", "x", "score"):
        assert_equal(name, fused[name], two[name])


def test_a_tie_goes_to_the_lowest_meta_token(backend):
    x = make_tokens(1, 20, 24, device=backend.device).round()
    meta = make_tokens(1, 1, 24, device=backend.device, seed=1).round().expand(1, 40 if SMALL else 128, 24)
    _, plan = assign_merge(x, None, meta, "dot", impl=backend.impl)
    assert_equal("index", plan.index, torch.zeros_like(plan.index))


def test_a_group_of_tokens_without_size_is_empty(backend):
    inputs = tokens(backend, 1, 20, 4, 8, 8)
    inputs["size"].zero_()
    out, _ = assign_merge(**inputs, impl=backend.impl)
    assert_equal("x", out.x, inputs["fill"])
    assert_equal("positions", out.positions, torch.zeros_like(out.positions))


@each("own", [True, False], ids=["by x", "by q"])
@each("masked", [False, True], ids=["all", "masked"])
def test_tokens_are_sorted_once(backend, own, masked, asked):
    """The plan has their order if all have a group, and gradients take it. That of x, if x is the metric, is made by
    one kernel, and not by that of the merge."""
    inputs = tokens(backend, 2, 19, 6, 8, 12, own=own)
    x, mask = inputs["x"].requires_grad_(), make_mask(2, 19, backend.device) if masked else None
    out, plan = assign_merge(x, inputs["q"], inputs["meta"].requires_grad_(), mask=mask, impl=backend.impl)
    assert (plan.order is None, plan.offsets is None) == (masked, masked)
    assert_order(plan.index, plan.num_groups, plan.order, plan.offsets)
    out.x.square().sum().backward()
    assert_order(plan.index.where(plan.index >= 0, 6), 7, asked[0].order, None)
    assert asked[0].needs[:2] == [not own, True]


# What is not a number


@each("name", ["x", "q"])
def test_a_token_that_is_not_a_number_spoils_its_group_only(backend, name):
    inputs = tokens(backend, 1, 40, 8, 20, 24)
    with torch.no_grad():
        clean = call(backend)(**inputs)
        inputs[name][0, 7] = torch.nan
        spoiled = call(backend)(**inputs)
    group = torch.arange(8, device=backend.device)
    other = (group != spoiled["index"][0, 7]) & (group != clean["index"][0, 7])
    for field in ("x", "size", "positions"):
        assert bool(spoiled[field][0, other].isfinite().all()), field
        if backend.impl != "triton":  # which adds up a frame with such a token in another order
            assert_equal(field, spoiled[field][0, other], clean[field][0, other])
