"""merge: values and gradients of every reduction against the float64 specification, and what may not reach them."""

import pytest
import torch
from cases import (
    REDUCTIONS,
    SHAPES,
    SMALL,
    draw,
    each,
    each_dtype,
    each_dtype_and_reduction,
    each_layout,
    each_reduction,
    each_shape,
    each_width,
    each_with_dtype,
    only,
    run,
    unwritten,
)

import sttm_kernels as sttm
from sttm_kernels import reference
from sttm_kernels.checks import check_merge, fields, make_rows
from sttm_kernels.testing import (
    DTYPES,
    LAYOUTS,
    assert_equal,
    assert_order,
    assert_within_budget,
    make_index,
    make_tokens,
)

EVERYTHING = ("weight", "size", "positions", "fill")
LENGTHS = (20,) if SMALL else (20, 180)
"""Of tokens in five groups: groups of a few tokens, and of so many that CUDA has a block for each."""


def tokens(backend, B, N, K, C, dtype=torch.float32, given=EVERYTHING, **more):
    """Inputs of `merge` by name, those in `given` beside x; every sixth size or so is zero."""
    inputs = draw((B, N, K, 1, C), dtype, backend.device, **more)
    inputs["size"] = (inputs["size"] - 3).clamp_min(0)
    return only(inputs, "x", *given)


def through(backend, index, K, reduce="mean", order=None, offsets=None):
    """`merge` as a function of its inputs by name, with named outputs."""

    def call(x, weight=None, size=None, positions=None, fill=None):
        plan = sttm.MergePlan(index, K, weight=weight, order=order, offsets=offsets)
        return fields(sttm.merge(x, plan, size, positions, reduce, fill, backend.impl))

    return call


def check(backend, inputs, index, K, reduce="mean", **order):
    check_merge(backend.impl, index=index, num_groups=K, reduce=reduce, **inputs, **order)


@each_shape
@each_dtype
def test_shapes(backend, shape, dtype):
    """Every reduction, with everything that may be given and with nothing, groups without tokens among them."""
    (B, N, K, _, C), device = shape, backend.device
    for at, reduce in enumerate(REDUCTIONS):
        if SMALL and at != (SHAPES.index(shape) + DTYPES.index(dtype)) % 4:
            continue
        check(backend, tokens(backend, B, N, K, C, dtype), make_index(B, N, K, device), K, reduce)
        if not SMALL:
            bare = tokens(backend, B, N, K, C, dtype, ())
            check(backend, bare, make_index(B, N, K, device, kind="even"), K, reduce)


@each_with_dtype("reduce", REDUCTIONS)
@each("given", [(), ("weight",), ("size", "positions"), ("fill",)], ids=" ".join)
def test_what_may_be_left_out(backend, reduce, given, dtype):
    check(backend, tokens(backend, 2, 20, 5, 24, dtype, given), make_index(2, 20, 5, backend.device), 5, reduce)


@each_reduction
@each("kind", ["even", "one", "none"])
@each("N", (30,) if SMALL else (20, 90, 100))
def test_empty_groups_and_one_long_group(backend, N, reduce, kind):
    check(backend, tokens(backend, 2, N, 3, 17), make_index(2, N, 3, backend.device, kind=kind), 3, reduce)


@pytest.mark.shipped_blocks
@each_dtype_and_reduction
@each(("K", "kind"), [(3, "random"), (66, "random"), (66, "one")])
def test_long_and_short_groups_of_many_channels(backend, reduce, K, kind, dtype):
    N, C = (70, 72) if SMALL else (300, 520)
    check(backend, tokens(backend, 1, N, K, C, dtype), make_index(1, N, K, backend.device, kind=kind), K, reduce)


@pytest.mark.shipped_blocks
@each("P", [1, 7, 40])
def test_positions_of_any_width(backend, P):
    check(backend, tokens(backend, 2, 20, 5, 8, P=P), make_index(2, 20, 5, backend.device), 5)


@each_layout
def test_layouts_are_read_in_place(backend, layout, dtype):
    """Of tokens and of everything beside them, the index included."""
    B, N, K, device = 2, 20, 5, backend.device
    reduce = REDUCTIONS[(LAYOUTS.index(layout) + DTYPES.index(dtype)) % 4]
    inputs = tokens(backend, B, N, K, 20, dtype, layout=layout)
    inputs["positions"] = inputs["positions"][:1].expand(B, -1, -1)
    inputs["fill"] = inputs["fill"].mT.contiguous().mT
    inputs["size"] = inputs["size"].mT.contiguous().mT
    inputs["weight"] = make_rows(B, 2 * N, device, 2)[:, ::2]
    with unwritten(inputs) as held:
        for each_reduce in {reduce, "mean"}:
            check(backend, held, make_index(N, B, K, device).mT, K, each_reduce)


@each_dtype_and_reduction
@each("given", [EVERYTHING, ("size",)], ids="-".join)
def test_a_sorted_plan(backend, given, reduce, dtype):
    """A plan that knows its tokens by group, as that of `match` does, merges as one that does not."""
    index = make_index(2, 40, 13, backend.device, left_out=0.0)
    order = index.argsort(dim=1, stable=True).to(torch.int32)
    starts = torch.arange(14, dtype=torch.int32, device=backend.device).repeat(2, 1)
    offsets = torch.searchsorted(index.sort(dim=1).values, starts).to(torch.int32)
    inputs = tokens(backend, 2, 40, 13, 20, dtype, given)
    check(backend, inputs, index, 13, reduce, order=order, offsets=offsets)


def test_an_expanded_gradient_is_read_in_place(backend):
    index, x = make_index(2, 20, 5, backend.device), make_tokens(2, 20, 24, device=backend.device)

    def gradient(impl, dtype):
        leaf = x.to(dtype).requires_grad_()
        sttm.merge(leaf, sttm.MergePlan(index, 5), impl=impl).x.sum().backward()
        return leaf.grad

    truth, plain = gradient("reference", torch.float64), gradient("reference", torch.float32)
    assert_within_budget("gradient of x", gradient(backend.impl, torch.float32), truth, plain, 20)


# Rounding


@each_dtype
def test_gradient_of_weights_where_tokens_are_alike(backend, dtype):
    """The tokens of a group differ little from their mean: the rounding of y must not enter the gradient."""
    inputs = tokens(backend, 2, 20, 5, 20, dtype, ("weight", "size"))
    inputs["x"] = (inputs["x"] / 8 + 20).to(dtype)
    inputs["size"] = make_rows(2, 20, backend.device, 1)
    check(backend, inputs, make_index(2, 20, 5, backend.device), 5)


def test_weights_of_a_token_alone_have_no_gradient(backend):
    inputs = tokens(backend, 1, 9, 9, 20, given=("weight",))
    index = torch.arange(9, dtype=torch.int32, device=backend.device)[None]
    found = run(through(backend, index, 9), inputs)
    assert_equal("gradient of weight", found["gradient of weight"], torch.zeros_like(inputs["weight"]))


@pytest.mark.shipped_blocks
def test_counts_do_not_stall_and_small_shares_count(backend):
    """4,000 tokens of one group in half precision, of weights from 1e-6 to 1."""
    index = torch.zeros(1, 4000, dtype=torch.int32, device=backend.device)
    weight = torch.logspace(-6, 0, 4000, device=backend.device)[None]
    x = make_tokens(1, 4000, 3, torch.float16, backend.device)
    x += torch.arange(4000, device=backend.device)[None, :, None].to(torch.float16) / 400
    out = sttm.merge(x, sttm.MergePlan(index, 1, weight=weight), impl=backend.impl)
    truth = reference.merge(x.double(), sttm.MergePlan(index, 1, weight=weight.double()))
    exact = truth.x.to(torch.float16)  # float32 sums are far closer than the rounding of the output
    assert out.size.item() == 4000
    assert_within_budget("x", out.x, truth.x, exact, 1)


def test_sizes_below_the_normal_range(backend):
    """1 over such a mass is infinite, a share of it is not: it is that of sizes in proportion."""
    if backend.impl not in ("torch", "cpu"):
        pytest.skip("a GPU may take numbers below the normal range for 0")
    inputs = only(draw((1, 40, 4, 1, 19), device=backend.device), "x", "positions")
    inputs["size"] = torch.linspace(1e-42, 9e-42, 40, device=backend.device)[None]
    index = make_index(1, 40, 4, backend.device)

    def gradient(dtype, impl, scale=1.0):
        leaves = {name: t.to(dtype).requires_grad_(name != "size") for name, t in inputs.items()}
        leaves["size"] = leaves["size"] * scale
        out = sttm.merge(**leaves, plan=sttm.MergePlan(index, 4), impl=impl)
        loss = out.x.square().sum() + out.positions.square().sum()
        return out.x, out.positions, *torch.autograd.grad(loss, (leaves["x"], leaves["positions"]))

    results = gradient(torch.float32, backend.impl), gradient(torch.float64, "reference")
    plain = gradient(torch.float32, "reference", 2.0**120)  # which infinities overwhelm without
    for name, *values in zip(
        ("x", "positions", "gradient of x", "gradient of positions"), *results, plain, strict=True
    ):
        assert_within_budget(name, *values, 40)


def test_a_tie_of_max_goes_to_the_lowest_token(backend):
    x = torch.tensor([[1.0, 3.0], [2.0, 3.0], [2.0, 0.0], [2.0, 3.0]], device=backend.device)
    x = x.repeat(4, 1)[None].requires_grad_()
    index = torch.tensor([[0] * 8 + [1] * 8], dtype=torch.int32, device=backend.device)
    sttm.merge(x, sttm.MergePlan(index, 2), reduce="max", impl=backend.impl).x.sum().backward()
    expected = torch.zeros_like(x)
    expected[0, [1, 9], 0] = 1
    expected[0, [0, 8], 1] = 1
    assert_equal("gradient", x.grad, expected.detach())


def test_sizes_and_positions_may_be_integers(backend):
    index, x = make_index(2, 9, 4, backend.device), make_tokens(2, 9, 3, device=backend.device)
    size = torch.arange(18, device=backend.device).view(2, 9)
    positions = torch.arange(27, device=backend.device).view(9, 3)
    call = through(backend, index, 4)
    for name, value in call(x, size=size.float(), positions=positions.float()).items():
        assert_equal(name, call(x, size=size, positions=positions)[name], value)


# What is not a number, not in a group, or not inside


@each("value", [torch.nan, torch.inf])
@each("N", LENGTHS)
@each(("dtype", "reduce"), [*(("float32", reduce) for reduce in REDUCTIONS), ("float16", "mean"), ("bfloat16", "sum")])
def test_features_that_are_not_numbers_stay_in_their_group(backend, value, N, dtype, reduce):
    """Token 3 spoils its group and no bit of another; token 5, in no group, spoils none. Forward and backward."""
    index = make_index(2, N, 5, backend.device, left_out=0.0)
    index[:, 5] = -1
    clean = tokens(backend, 2, N, 5, 20, getattr(torch, dtype), ("weight",))
    clean["weight"].fill_(1)
    dirty = {name: one.clone() for name, one in clean.items()}
    dirty["x"][0, 3], dirty["x"][:, 5] = value, value
    before, after = (run(through(backend, index, 5, reduce), inputs) for inputs in (clean, dirty))
    k = index[0, 3].item()
    expected = reference.merge(dirty["x"].double(), sttm.MergePlan(index, 5), reduce=reduce).x
    assert_equal("group of the token", after["x"][0, k].double().isfinite(), expected[0, k].isfinite())
    groups = torch.ones(2, 5, dtype=torch.bool, device=backend.device)
    groups[0, k] = False
    apart = index != k
    apart[1] = True
    for name, one in before.items():
        where = apart if name.startswith("gradient") else groups
        if backend.impl == "triton" and dtype != "float32":
            # Tiles with such features are added up in another order, and gradients follow the results.
            assert after[name][where].isfinite().all()
            if name == "x":
                plain = reference.merge(clean["x"], sttm.MergePlan(index, 5), reduce=reduce).x
                assert_within_budget("x in other groups", after["x"][where], expected[where], plain[where], N)
            continue
        assert_equal(f"{name} in other groups", after[name][where], one[where])


@each_reduction
@each_width
@each("N", LENGTHS)
def test_an_index_outside_means_no_group(backend, reduce, dtype, N, outputs_amid_poison):
    """Bit for bit that of -1, forward and backward, and every access is inside."""
    index = make_index(2, N, 5, backend.device, left_out=0.4)
    far = torch.tensor([5, -(2**31), 2**31 - 1, -2]).repeat(N // 4).to(backend.device, torch.int32)
    with unwritten(tokens(backend, 2, N, 5, 24, dtype)) as inputs:
        expected = run(through(backend, index, 5, reduce), inputs)
        found = run(through(backend, torch.where(index < 0, far, index), 5, reduce), inputs)
    for name, value in expected.items():
        assert_equal(name, found[name], value)
    assert backend.impl == "torch" or len(outputs_amid_poison) >= 8


def test_tokens_are_sorted_once(backend, asked):
    """The gradient takes the order that the merge made; tokens without a group come last."""
    index, inputs = make_index(2, 20, 5, backend.device, left_out=0.4), tokens(backend, 2, 20, 5, 24, given=("weight",))
    plan = sttm.MergePlan(index, 5, weight=inputs["weight"].requires_grad_())
    sttm.merge(inputs["x"], plan, impl=backend.impl).x.square().sum().backward()
    assert_order(index.where(index >= 0, 5), 6, asked[0].order, None)
    assert_equal("offsets", asked[0].offsets[:, -1], (index >= 0).sum(1).to(torch.int32))


# What is no token


@pytest.mark.kernels_only
@each_reduction
def test_a_plan_that_points_outside_touches_nothing_there(backend, reduce, outputs_amid_poison):
    index = make_index(2, 20, 5, backend.device)
    order = torch.tensor([-(2**31), -1, 20, 35, 3, 2**31 - 1, 7, 19, 41, -20] * 2, dtype=torch.int32).repeat(2, 1)
    offsets = torch.tensor([[0, 4, 8, 12, 16, 20], [-7, 3, 2**31 - 1, -(2**31), 50, 21]], dtype=torch.int32)
    shortcut = {"order": order.to(backend.device), "offsets": offsets.to(backend.device)}
    with unwritten(tokens(backend, 2, 20, 5, 24, given=("weight", "size", "positions"))) as held:
        found = run(through(backend, index, 5, reduce, **shortcut), held)
    for name in ("x", "size", "positions"):
        assert bool(found[name].isfinite().all()), name
