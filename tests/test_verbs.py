"""Every implementation against the float64 specification: values, choices and gradients under the error budget."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import sttm_kernels as sttm
from sttm_kernels import partition as partitions
from sttm_kernels import reference
from sttm_kernels.checks import (
    check_assign,
    check_assign_merge,
    check_compose,
    check_match,
    check_merge,
    check_soft_merge,
    check_unmerge,
    fields,
    make_mask,
    make_rows,
)
from sttm_kernels.functional import assign_merge
from sttm_kernels.impl import eager
from sttm_kernels.testing import (
    DTYPES,
    LAYOUTS,
    RAGGED_SHAPES,
    assert_equal,
    assert_index_in_range,
    assert_match_valid,
    assert_match_within_budget,
    assert_verb_within_budget,
    assign_at,
    evaluate,
    make_index,
    make_tokens,
)

SIMILARITIES = ("cosine", "dot", "l2")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_shape = pytest.mark.parametrize("shape", RAGGED_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_similarity = pytest.mark.parametrize("similarity", SIMILARITIES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


# assign


@each_dtype
@each_shape
@each_similarity
def test_assign(backend, shape, dtype, similarity):
    backend.needs("assign", dtype)
    q = make_tokens(shape.B, shape.N, shape.D, dtype, backend.device)
    meta = make_tokens(shape.B, shape.K, shape.D, dtype, backend.device, seed=1)
    check_assign(backend.impl, q, meta, similarity, 0.5 if shape.K > 5 else 1.0)


@each_dtype
@each_layout
@each_similarity
def test_assign_layouts(backend, layout, dtype, similarity):
    backend.needs("assign", dtype)
    q = make_tokens(2, 33, 24, dtype, backend.device, layout=layout)
    meta = make_tokens(2, 9, 24, dtype, backend.device, seed=1, layout=layout)
    mask = make_mask(33, 2, backend.device).mT
    check_assign(backend.impl, q, meta, similarity, 2.0, "softmax", mask)
    check_assign(backend.impl, q, meta, similarity, 2.0, "uniform", mask)


@each_dtype
@each_similarity
def test_assign_heads_and_shared_meta(backend, dtype, similarity):
    backend.needs("assign", dtype)
    heads = make_tokens(6, 21, 16, dtype, backend.device).view(2, 3, 21, 16)
    meta = make_tokens(1, 7, 16, dtype, backend.device, seed=1)[0]
    check_assign(backend.impl, heads, meta, similarity, mask=make_mask(2, 21, backend.device))
    interleaved = make_tokens(2, 21, 48, dtype, backend.device).view(2, 21, 3, 16).transpose(1, 2)
    check_assign(backend.impl, interleaved, meta, similarity)


@each_dtype
@each_similarity
def test_assign_ties_go_to_the_lowest(backend, dtype, similarity):
    backend.needs("assign", dtype)
    meta = make_tokens(2, 40, 8, dtype, backend.device).repeat(1, 5, 1)
    index = sttm.assign(meta[:, :40], meta, similarity, impl=backend.impl).index
    assert int(index.max()) < 40
    if similarity == "l2":
        assert_equal("index", index, torch.arange(40, dtype=torch.int32, device=index.device).expand(2, -1))
    zeros = torch.zeros(2, 5, 8, dtype=dtype, device=backend.device)
    plan = sttm.assign(zeros, meta, impl=backend.impl)
    assert_equal("index of zero rows", plan.index, torch.zeros_like(plan.index))
    assert_equal("score of zero rows", plan.score, torch.zeros_like(plan.score))


@each_dtype
def test_assign_with_many_meta_tokens(backend, dtype):
    backend.needs("assign", dtype)
    q, meta = (make_tokens(1, n, 16, dtype, backend.device, seed=n) for n in (70, 1500))
    check_assign(backend.impl, q, meta, "dot", 4.0)


# match


@each_dtype
@each_shape
def test_match(backend, shape, dtype):
    backend.needs("match", dtype)
    metric = make_tokens(shape.B, shape.N, shape.D, dtype, backend.device)
    for r in (0, 1, shape.N // 4, shape.N):
        check_match(backend.impl, metric, r)


@each_dtype
@each_layout
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
def test_match_layouts_and_prefix(backend, layout, dtype, num_prefix):
    backend.needs("match", dtype)
    metric = make_tokens(3, 38, 20, dtype, backend.device, layout=layout)
    check_match(backend.impl, metric, 9, num_prefix)


@each_dtype
def test_match_heads(backend, dtype):
    backend.needs("match", dtype)
    check_match(backend.impl, make_tokens(2, 40, 48, dtype, backend.device).view(2, 40, 3, 16).transpose(1, 2), 13, 1)


@each_dtype
@pytest.mark.parametrize("partition", ["alternate", "frames", "mask", "masks"])
@pytest.mark.parametrize("window", [None, (1, 2, 2), (2, 3, 3), (4, 5, 7)], ids=str)
def test_match_partitions_and_windows(backend, partition, window, dtype):
    backend.needs("match", dtype)
    grid, num_prefix, B = (4, 3, 5), 1, 2
    N = num_prefix + math.prod(grid)
    if partition == "mask":
        partition = make_mask(1, N, backend.device)[0]
    elif partition == "masks":
        draw = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(N - 1, generator=draw) for _ in range(B)])
        partition = torch.cat([torch.ones(B, 1, dtype=torch.bool), order < 20], 1).to(backend.device)
    metric = make_tokens(B, N, 12, dtype, backend.device, seed=3)
    for r in (0, 7, N):
        check_match(backend.impl, metric, r, num_prefix, partition, grid, window)


@pytest.mark.parametrize("is_dst", [[True] * 6, [False] * 6, [False] * 5 + [True]], ids=str)
def test_match_lopsided_masks(backend, is_dst):
    backend.needs("match")
    check_match(backend.impl, make_tokens(2, 6, 4, device=backend.device), 3, 0, torch.tensor(is_dst))
    check_match(backend.impl, make_tokens(2, 6, 4, device=backend.device), 3, 2, torch.tensor(is_dst))


def test_match_random2d_is_the_specification(backend):
    backend.needs("match")
    metric = make_tokens(2, 1 + 3 * 5 * 6, 8, device=backend.device)

    def draw(impl):
        generator = torch.Generator().manual_seed(7)
        return sttm.match(metric, 20, 1, "random2d", (3, 5, 6), impl=impl, cell=(2, 3), generator=generator)

    plan, expected = draw(backend.impl), draw("reference")
    is_dst = (expected.score == -math.inf) & (torch.arange(91, device=backend.device) > 0)
    assert_match_within_budget(plan, metric, 20, 1, is_dst)


@each_dtype
def test_match_ties_go_to_the_lower_token(backend, dtype):
    backend.needs("match", dtype)
    same = torch.ones(2, 50, 8, dtype=dtype, device=backend.device)
    plan, expected = (sttm.match(same, 11, 1, impl=impl) for impl in (backend.impl, "reference"))
    assert_equal("index", plan.index, expected.index)


# merge


@each_dtype
@each_shape
@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
def test_merge(backend, shape, dtype, reduce):
    backend.needs("merge", dtype)
    (B, N, K, _, C), device = shape, backend.device
    x = make_tokens(B, N, C, dtype, device)
    size, weight = make_rows(B, N, device, 1, 1), make_rows(B, N, device, 2)
    positions, fill = make_tokens(B, N, 3, device=device, seed=3), make_tokens(B, K, C, dtype, device, seed=4)
    check_merge(backend.impl, x, make_index(B, N, K, device), K, size, weight, positions, fill, reduce)
    check_merge(backend.impl, x, make_index(B, N, K, device, kind="even"), K, None, None, None, None, reduce)


@each_dtype
@each_layout
@pytest.mark.parametrize("kind", ["random", "even", "one", "none"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_merge_layouts(backend, layout, dtype, kind, reduce):
    backend.needs("merge", dtype)
    B, N, K, C, device = 3, 45, 11, 10, backend.device
    x = make_tokens(B, N, C, dtype, device, layout=layout)
    index = make_index(N, B, K, device, kind=kind).mT
    size, weight = make_rows(N, B, device, 1, 1).mT, make_rows(B, 2 * N, device, 2)[:, ::2]
    positions = make_tokens(B, N, 3, device=device, seed=3, layout=layout)
    check_merge(
        backend.impl, x, index, K, size, weight, positions, make_tokens(B, K, C, dtype, device, 4, layout), reduce
    )


@each_dtype
def test_merge_along_match(backend, dtype):
    """The plan of `match` carries the shortcut `order`, `offsets`; weights are uniform and every token has a group."""
    backend.needs("match", dtype)
    backend.needs("merge", dtype)
    x = make_tokens(2, 67, 30, dtype, backend.device, seed=2)
    plan = sttm.match(make_tokens(2, 67, 16, dtype, backend.device), 21, 1, impl=backend.impl)
    bare = sttm.MergePlan(plan.index, plan.num_groups)
    size = make_rows(2, 67, backend.device, 1, 1)
    for reduce in ("mean", "sum", "max", "first"):
        assert_verb_within_budget(
            f"merge by {reduce}",
            lambda x, size: fields(sttm.merge(x, plan, size, reduce=reduce, impl=backend.impl)),  # noqa: B023
            lambda x, size: fields(reference.merge(x, bare, size, reduce=reduce)),  # noqa: B023
            {"x": x, "size": size},
            67,
        )


@each_dtype
@each_similarity
def test_gradients_reach_the_meta_tokens_through_merge(backend, dtype, similarity):
    backend.needs("assign", dtype)
    backend.needs("merge", dtype)
    q, meta = make_tokens(2, 50, 16, dtype, backend.device), make_tokens(2, 7, 16, dtype, backend.device, seed=1)
    x, positions = (
        make_tokens(2, 50, 24, dtype, backend.device, seed=2),
        make_tokens(1, 50, 3, device=backend.device)[0],
    )
    chosen = sttm.assign(q, meta, similarity, 2.0, impl=backend.impl).index
    assert_verb_within_budget(
        "assign, merge",
        lambda q, meta, x, positions: fields(
            sttm.merge(
                x, sttm.assign(q, meta, similarity, 2.0, impl=backend.impl), positions=positions, impl=backend.impl
            )
        ),
        lambda q, meta, x, positions: fields(
            reference.merge(x, assign_at(chosen, q, meta, similarity, 2.0), positions=positions)
        ),
        {"q": q, "meta": meta, "x": x, "positions": positions},
        50,
        50 + 24 + 16,
    )


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)], ids=str)
def test_metric_and_tokens_of_two_dtypes(backend, dtypes):
    """Metric features in one dtype, tokens in another; every gradient comes back in the dtype of its input."""
    for verb in ("assign", "merge", "soft_merge"):
        for dtype in dtypes:
            backend.needs(verb, dtype)
    q, meta = (make_tokens(2, n, 8, dtypes[0], backend.device, seed=n) for n in (12, 3))
    x = make_tokens(2, 12, 5, dtypes[1], backend.device, seed=2)
    leaves = [t.requires_grad_() for t in (q, meta, x)]
    hard = sttm.merge(x, sttm.assign(q, meta, impl=backend.impl), impl=backend.impl)
    soft = sttm.soft_merge(x, q, meta, impl=backend.impl)
    assert (hard.x.dtype, soft.x.dtype) == (dtypes[1], dtypes[1])
    grads = torch.autograd.grad(hard.x.sum() + soft.x.sum(), leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]


# assign_merge


@each_dtype
@each_layout
@pytest.mark.parametrize("own", [True, False], ids=["by x", "by q"])
def test_assign_merge(backend, dtype, layout, own):
    backend.needs("assign_merge", dtype)
    similarity = SIMILARITIES[(LAYOUTS.index(layout) + own) % 3]
    B, N, K, C, device = 2, 49, 9, 20, backend.device
    x, q = (make_tokens(B, N, n, dtype, device, n, layout) for n in (C, 12))
    meta = make_tokens(B, K, C if own else 12, dtype, device, 1, layout)
    fill, positions = make_tokens(B, K, C, dtype, device, 2, layout), make_tokens(B, N, 3, device=device)
    size, mask = make_rows(B, N, device, 1, 1), make_mask(B, N, device)
    for weight in ("softmax", "uniform"):
        for extras in ({}, {"size": size, "positions": positions, "fill": fill, "mask": mask}):
            check_assign_merge(backend.impl, x, None if own else q, meta, similarity, 2.0, weight, extras)


# unmerge and compose


@each_dtype
@each_shape
def test_unmerge(backend, shape, dtype):
    backend.needs("unmerge", dtype)
    B, N, K, _, C = shape
    for layout in LAYOUTS:
        index = make_index(B, N, K, backend.device)
        check_unmerge(backend.impl, make_tokens(B, K, C, dtype, backend.device, layout=layout), index)


def test_unmerge_along_match(backend):
    backend.needs("match")
    backend.needs("unmerge")
    plan = sttm.match(make_tokens(2, 33, 8, device=backend.device), 10, impl=backend.impl)
    bare = sttm.MergePlan(plan.index, plan.num_groups)
    assert_verb_within_budget(
        "unmerge",
        lambda x: {"x": sttm.unmerge(x, plan, backend.impl)},
        lambda x: {"x": reference.unmerge(x, bare)},
        {"x": make_tokens(2, 23, 6, device=backend.device)},
        1,
        33,
    )


@each_shape
def test_compose(backend, shape):
    backend.needs("compose")
    B, N, K, D, _ = shape
    check_compose(backend.impl, make_index(B, N, K, backend.device), make_index(B, K, D, backend.device, seed=1), D)


def test_compose_is_unmerging_twice(backend):
    backend.needs("compose")
    first = sttm.MergePlan(make_index(2, 30, 9, backend.device), 9)
    second = sttm.MergePlan(make_index(2, 9, 4, backend.device, seed=1), 4)
    x = make_tokens(2, 4, 5, device=backend.device)
    once = sttm.unmerge(x, sttm.compose(first, second, backend.impl), backend.impl)
    assert_equal("x", once, sttm.unmerge(sttm.unmerge(x, second, backend.impl), first, backend.impl))


# soft_merge


@each_dtype
@each_shape
@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_soft_merge(backend, shape, dtype, normalize):
    backend.needs("soft_merge", dtype)
    similarity = SIMILARITIES[(RAGGED_SHAPES.index(shape) + (normalize == "meta")) % 3]
    (B, N, K, D, C), device = shape, backend.device
    x, q = make_tokens(B, N, C, dtype, device), make_tokens(B, N, D, dtype, device, seed=1)
    meta, positions = make_tokens(B, K, D, dtype, device, seed=2), make_tokens(B, N, 3, device=device, seed=3)
    temperature = {"cosine": 0.5, "dot": D**0.5, "l2": float(D)}[similarity]
    check_soft_merge(
        backend.impl, x, q, meta, similarity, temperature, normalize, make_rows(B, N, device, 4, 1), positions
    )


@each_dtype
@each_layout
@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_soft_merge_layouts(backend, layout, dtype, normalize):
    backend.needs("soft_merge", dtype)
    B, N, K, D, C, device = 2, 45, 9, 12, 10, backend.device
    x, q = make_tokens(B, N, C, dtype, device, 0, layout), make_tokens(B, N, D, dtype, device, 1, layout)
    meta = make_tokens(B, K, D, dtype, device, 2, layout)
    mask, size = make_mask(N, B, device).mT, make_rows(N, B, device, 4, 1).mT
    check_soft_merge(
        backend.impl, x, q, meta, "cosine", 0.3, normalize, size, make_tokens(1, N, 3, device=device)[0], mask
    )
    check_soft_merge(backend.impl, x, q, meta, "l2", 8.0, normalize)


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_soft_merge_heads_and_shared_meta(backend, normalize):
    backend.needs("soft_merge")
    heads = make_tokens(2, 21, 48, device=backend.device).view(2, 21, 3, 16).transpose(1, 2)
    x, meta = make_tokens(2, 21, 5, device=backend.device), make_tokens(1, 7, 16, device=backend.device, seed=1)[0]
    check_soft_merge(backend.impl, x, heads, meta, "dot", 4.0, normalize)


# tiles


@pytest.mark.parametrize("elements", [1, 100, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_torch_in_many_tiles(monkeypatch, elements, dtype):
    """What needs one tile at these sizes, cut into many, as at sizes that are too slow to test."""
    monkeypatch.setattr(eager, "TILE_ELEMENTS", {"cpu": elements, "cuda": elements})
    mask = make_mask(2, 37, "cpu")
    q, x = make_tokens(2, 37, 12, dtype), make_tokens(2, 37, 10, dtype, seed=1)
    meta, size, positions = make_tokens(2, 9, 12, dtype, seed=2), make_rows(2, 37, "cpu", 3), make_tokens(2, 37, 3)
    for similarity in SIMILARITIES:
        check_assign("torch", q, meta, similarity, 2.0, mask=mask)
        for normalize in ("meta", "tokens"):
            check_soft_merge("torch", x, q, meta, similarity, 2.0, normalize, size, positions, mask)
    check_match("torch", q, 11, 1)
    check_match("torch", q, 11, 1, "alternate", (2, 3, 6), (1, 2, 4))
    check_match("torch", q, 11, 1, "frames", (2, 3, 6), (2, 2, 4))
    check_merge("torch", x, make_index(2, 37, 9), 9, size, make_rows(2, 37, "cpu", 4), positions, None)


# derivatives of derivatives


def check_derivatives(run, *inputs):
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def leaves(*shapes):
    """One float64 leaf per shape; those of two extents are sizes and weights, so positive."""
    made = []
    for seed, shape in enumerate(shapes):
        value = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        made.append((value.abs() + 0.5 if len(shape) == 2 else value).requires_grad_())
    return made


@each_similarity
def test_assign_derivatives(backend, similarity):
    backend.needs("assign", torch.float64)
    mask = torch.tensor([[True, True, False, True]])

    def run(q, meta):
        return tuple(fields(sttm.assign(q, meta, similarity, 0.7, mask=mask, impl=backend.impl)).values())

    check_derivatives(run, *leaves((1, 4, 3), (1, 3, 3)))
    check_derivatives(
        lambda q, meta: sttm.assign(q, meta, similarity, weight="uniform", impl=backend.impl).score,
        *leaves((1, 2, 4, 3), (1, 3, 3)),
    )


def test_assign_merge_derivatives(backend):
    backend.needs("assign_merge", torch.float64)
    mask = torch.tensor([[True, True, False, True]])

    def run(x, size, positions, fill, meta, q=None):
        settings = {"mask": mask, "size": size, "positions": positions, "fill": fill, "impl": backend.impl}
        out, plan = assign_merge(x, q, meta, "dot", 0.7, **settings)
        return tuple((fields(out) | fields(plan)).values())

    shapes = ((1, 4, 2), (1, 4), (1, 4, 1), (1, 2, 2))
    check_derivatives(run, *leaves(*shapes, (1, 2, 2)))
    check_derivatives(run, *leaves(*shapes, (1, 2, 1), (1, 4, 1)))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
def test_merge_derivatives(backend, reduce):
    backend.needs("merge", torch.float64)
    index = torch.tensor([[0, 2, -1, 0, 2]], dtype=torch.int32)

    def run(x, size, weight, positions, fill):
        plan = sttm.MergePlan(index, 3, weight=weight)
        return tuple(fields(sttm.merge(x, plan, size, positions, reduce, fill, backend.impl)).values())

    check_derivatives(run, *leaves((1, 5, 2), (1, 5), (1, 5), (1, 5, 3), (1, 3, 2)))


def test_unmerge_derivatives(backend):
    backend.needs("unmerge", torch.float64)
    plan = sttm.MergePlan(torch.tensor([[0, 2, -1, 0]], dtype=torch.int32), 3)
    check_derivatives(lambda x: sttm.unmerge(x, plan, backend.impl), *leaves((1, 3, 2)))


@each_similarity
@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_soft_merge_derivatives(backend, similarity, normalize):
    backend.needs("soft_merge", torch.float64)
    mask = torch.tensor([[True, True, False, True]])

    def run(x, q, meta, size, positions):
        out = sttm.soft_merge(x, q, meta, similarity, 0.7, normalize, size, positions, mask, backend.impl)
        return tuple(fields(out).values())

    check_derivatives(run, *leaves((1, 4, 2), (1, 4, 3), (1, 2, 3), (1, 4), (1, 4, 2)))


# hostile values

HOSTILE = (math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45)


def make_hostile(B, N, C, device, seed=0):
    """Tokens a third of which hold a value that arithmetic does not survive."""
    x, draw = make_tokens(B, N, C, seed=seed), torch.Generator().manual_seed(seed + 100)
    bad = torch.rand(B, N, 1, generator=draw) < 0.3
    value = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), (B, N, C), generator=draw)]
    return torch.where(bad & (torch.rand(B, N, C, generator=draw) < 0.5), value, x).to(device)


@each_similarity
@pytest.mark.parametrize("seed", range(3))
def test_hostile_features_leave_assign_in_range(backend, similarity, seed):
    backend.needs("assign")
    q, meta = (make_hostile(2, n, 8, backend.device, seed + n) for n in (50, 70))
    mask = make_mask(2, 50, backend.device)
    for weight in ("softmax", "uniform"):
        plan = sttm.assign(q.requires_grad_(), meta.requires_grad_(), similarity, 1.0, weight, mask, backend.impl)
        assert_index_in_range("index", plan.index, 70)
        assert_equal("index >= 0", plan.index >= 0, mask)
        sum(value.sum() for value in fields(plan).values()).backward()
    everything_nan = torch.full_like(q.detach(), math.nan)
    assert_index_in_range("index", sttm.assign(everything_nan, meta, similarity, impl=backend.impl).index, 70)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [None, (1, 4, 5)], ids=str)
def test_hostile_features_leave_match_a_plan(backend, seed, window):
    backend.needs("match")
    grid, num_prefix = (2, 6, 8), 1
    N = num_prefix + math.prod(grid)
    cpu = torch.device("cpu")
    block = None if window is None else partitions.blocks(grid, window, cpu)
    for metric in (make_hostile(2, N, 8, backend.device, seed), torch.full((2, N, 8), math.nan, device=backend.device)):
        for partition in ("alternate", "frames"):
            if partition == "frames" and window is not None:
                continue
            is_dst = partitions.destinations(partition, N, num_prefix, grid, (2, 2), None, cpu)
            for r in (0, 10, 40):
                plan = sttm.match(metric, r, num_prefix, partition, grid, window, backend.impl)
                assert_match_valid(plan, r, num_prefix, is_dst, block)


@pytest.mark.parametrize("impl", ["backend", "reference"])
def test_tokens_without_a_group_do_not_contaminate(backend, impl):
    """What a token of index -1 holds, NaN included, reaches neither a value nor a gradient."""
    backend.needs("merge")
    impl = backend.impl if impl == "backend" else impl
    B, N, K, C = 2, 40, 7, 6
    index = make_index(B, N, K, backend.device, left_out=0.4)
    out = (index < 0)[..., None]

    def run(rubbish):
        x, positions = (
            make_tokens(B, N, n, device=backend.device, seed=n).masked_fill(out, rubbish).requires_grad_()
            for n in (C, 3)
        )
        size, weight = (
            make_rows(B, N, backend.device, s).masked_fill(out[..., 0], rubbish).requires_grad_() for s in (1, 2)
        )
        found = {}
        for reduce in ("mean", "sum", "max", "first"):
            plan = sttm.MergePlan(index, K, weight=weight)
            merged = sttm.merge(x, plan, size, positions, reduce, impl=impl)
            loss = merged.x.square().sum() + merged.size.square().sum() + merged.positions.square().sum()
            grads = torch.autograd.grad(loss, (x, size, weight, positions))
            names = ("x", "size", "weight", "positions")
            found |= {f"{reduce}: {name}": value.detach() for name, value in fields(merged).items()}
            found |= {f"{reduce}: gradient of {name}": g for name, g in zip(names, grads, strict=True)}
        return found

    clean, dirty = run(0.0), run(math.nan)
    for name, value in clean.items():
        assert bool(value.isfinite().all()), name
        assert_equal(name, dirty[name], value)


@each_similarity
@pytest.mark.parametrize("impl", ["backend", "reference"])
def test_masked_tokens_do_not_contaminate(backend, similarity, impl):
    """A masked token may hold NaN: values and gradients are bit for bit those of one that holds zeros."""
    backend.needs("assign")
    backend.needs("soft_merge")
    impl = backend.impl if impl == "backend" else impl
    B, N, K, D = 2, 40, 7, 6
    mask = make_mask(B, N, backend.device)
    meta = make_tokens(B, K, D, device=backend.device, seed=1)

    def run(rubbish):
        inputs = {
            "x": make_tokens(B, N, 5, device=backend.device).masked_fill(~mask[..., None], rubbish),
            "q": make_tokens(B, N, D, device=backend.device, seed=2).masked_fill(~mask[..., None], rubbish),
            "meta": meta,
            "size": make_rows(B, N, backend.device, 3).masked_fill(~mask, rubbish),
            "positions": make_tokens(B, N, 3, device=backend.device).masked_fill(~mask[..., None], rubbish),
        }

        def verbs(x, q, meta, size, positions):
            found = {
                f"assign {n}": v for n, v in fields(sttm.assign(q, meta, similarity, mask=mask, impl=impl)).items()
            }
            for normalize in ("meta", "tokens"):
                out = sttm.soft_merge(x, q, meta, similarity, 1.0, normalize, size, positions, mask, impl)
                found |= {f"soft_merge over {normalize} {name}": value for name, value in fields(out).items()}
            return found

        values, _ = evaluate(verbs, inputs)
        _, grads = evaluate(verbs, inputs, cotangents={name: torch.ones_like(v) for name, v in values.items()})
        return values | {f"gradient of {name}": g for name, g in grads.items()}

    clean, dirty = run(0.0), run(math.nan)
    for name, value in clean.items():
        assert bool(value.isfinite().all()), name
        assert_equal(name, dirty[name], value)


def test_index_out_of_range_means_no_group(backend):
    for verb in ("merge", "unmerge", "compose"):
        backend.needs(verb)
    B, N, K = 2, 30, 5
    tame = make_index(B, N, K, backend.device, left_out=0.4)
    wild = tame.clone()
    values = torch.tensor([K, K + 1, 99, 2**31 - 1, -2, -(2**31)], dtype=torch.int32, device=backend.device)
    wild[tame < 0] = values.repeat(N)[: int((tame < 0).sum())]
    assert bool((wild != tame).any())

    def run(index):
        x, full = make_tokens(B, N, 4, device=backend.device), make_tokens(B, K, 4, device=backend.device)
        x.requires_grad_()
        full.requires_grad_()
        plan = sttm.MergePlan(index, K)
        found = {}
        for reduce in ("mean", "sum", "max", "first"):
            out = sttm.merge(x, plan, reduce=reduce, impl=backend.impl)
            found[reduce], found[f"{reduce} size"] = out.x.detach(), out.size
            found[f"{reduce} gradient"] = torch.autograd.grad(out.x.square().sum(), x)[0]
        spread = sttm.unmerge(full, plan, backend.impl)
        found["unmerge"] = spread.detach()
        found["unmerge gradient"] = torch.autograd.grad(spread.square().sum(), full)[0]
        onto = sttm.MergePlan(make_index(B, K, 3, backend.device), 3)
        before = sttm.MergePlan(make_index(B, 12, N, backend.device), N)
        found["compose first"] = sttm.compose(plan, onto, backend.impl).index
        found["compose second"] = sttm.compose(before, plan, backend.impl).index
        return found

    expected = run(tame)
    for name, value in run(wild).items():
        assert_equal(name, value, expected[name])


def test_sizes_and_positions_may_be_integers(backend):
    backend.needs("merge")
    plan = sttm.MergePlan(make_index(2, 9, 4, backend.device), 4)
    x, size = make_tokens(2, 9, 3, device=backend.device), torch.arange(18, device=backend.device).view(2, 9)
    positions = torch.arange(27, device=backend.device).view(9, 3)
    got = sttm.merge(x, plan, size, positions, impl=backend.impl)
    expected = sttm.merge(x, plan, size.float(), positions.float(), impl=backend.impl)
    for name, value in fields(expected).items():
        assert_equal(name, getattr(got, name), value)
