"""merge, unmerge and compose in CUDA C++, on the CPU or a GPU, forward and backward, against the float64 reference."""

import pytest
import torch
from torch import Tensor

from sttm_kernels import dispatch, reference
from sttm_kernels.functional import compose, merge, unmerge
from sttm_kernels.plan import MergePlan
from sttm_kernels.testing import (
    RAGGED_SHAPES,
    assert_equal,
    assert_verb_within_budget,
    guarded,
    poisoned_empty,
)
from sttm_kernels.testing import make_index as make_index_on
from sttm_kernels.testing import make_tokens as make_tokens_on

DEVICE = "cpu" if dispatch.on_host() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs STTM_CUDA_HOST or an NVIDIA GPU", allow_module_level=True)
if dispatch.why_not("merge", "cuda", DEVICE) is not None:
    pytest.skip(str(dispatch.why_not("merge", "cuda", DEVICE)), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "max", "first")
ORDERS = ("forward", "reverse", "shuffle:1")
EVERYTHING = ("weight", "size", "positions", "fill")


def make_tokens(*args, **kwargs):
    return make_tokens_on(*args, device=DEVICE, **kwargs)


def make_index(*args, **kwargs):
    return make_index_on(*args, device=DEVICE, **kwargs)


def draw(B, N, K, C, dtype=torch.float32, given=EVERYTHING, layout="contiguous", P=3):
    """Inputs of merge; those not given are None."""
    rows = torch.Generator().manual_seed(5)
    inputs = {
        "weight": torch.rand(B, N, generator=rows).to(DEVICE) + 0.1,
        "size": torch.randint(0, 5, (B, N), generator=rows).to(DEVICE).float(),
        "positions": torch.rand(B, N, P, generator=rows).to(DEVICE),
        "fill": make_tokens(B, K, C, dtype, seed=6),
    }
    chosen = {name: value if name in given else None for name, value in inputs.items()}
    return {"x": make_tokens(B, N, C, dtype, layout=layout), **chosen}


def sorted_by_group(index, K):
    order = index.argsort(dim=1, stable=True).to(torch.int32)
    ends = torch.arange(K + 1, dtype=torch.int32, device=DEVICE).repeat(len(index), 1)
    return order, torch.searchsorted(index.sort(dim=1).values, ends).to(torch.int32)


def through(index, K, reduce, impl, sort=False):
    order, offsets = sorted_by_group(index, K) if sort else (None, None)

    def run(x, weight, size, positions, fill):
        plan = MergePlan(index, K, weight=weight, order=order, offsets=offsets)
        out = merge(x, plan, size, positions, reduce, fill, impl)
        named = {"x": out.x, "size": out.size, "positions": out.positions}
        return {name: value for name, value in named.items() if value is not None}

    return run


def check(inputs, index, K, reduce="mean", sort=False):
    """Forward and gradients."""
    terms = index.shape[1] + inputs["x"].shape[-1]
    truth = through(index, K, reduce, "reference")
    return assert_verb_within_budget(reduce, through(index, K, reduce, "cuda", sort), truth, inputs, terms)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("given", [(), ("weight",), ("size", "positions"), EVERYTHING])
def test_forward_and_gradients(reduce, given):
    check(draw(2, 20, 5, 20, given=given), make_index(2, 20, 5), 5, reduce)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("given", [(), EVERYTHING])
def test_half_precision(reduce, given, dtype):
    check(draw(2, 20, 5, 24, dtype, given), make_index(2, 20, 5), 5, reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", ["even", "one", "none"])
@pytest.mark.parametrize("N", [20, 90])
def test_empty_groups_and_one_long_group(N, reduce, kind):
    check(draw(2, N, 3, 17), make_index(2, N, 3, kind=kind), 3, reduce)


@pytest.mark.parametrize("shape", RAGGED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_shapes(shape, dtype):
    check(draw(shape.B, shape.N, shape.K, shape.C, dtype), make_index(shape.B, shape.N, shape.K), shape.K)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("K", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_owners_of_long_and_short_groups(reduce, K, dtype):
    """A block or a warp each, with more channels than they take at a time and more tokens than a warp looks up."""
    check(draw(1, 300, K, 520, dtype), make_index(1, 300, K), K, reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("left_out", [0.0, 0.3])
def test_a_sorted_plan(reduce, left_out):
    index = make_index(2, 40, 13, left_out=left_out)
    check(draw(2, 40, 13, 20, torch.float16), index, 13, reduce, sort=True)


@pytest.mark.parametrize("P", [1, 7, 40])
def test_positions_of_any_width(P):
    check(draw(2, 20, 5, 8, P=P), make_index(2, 20, 5), 5)


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts_are_read_in_place(layout, dtype):
    inputs = draw(2, 20, 5, 24, dtype, layout=layout)
    inputs["positions"] = inputs["positions"][:1].expand(2, -1, -1)
    inputs["fill"] = inputs["fill"].mT.contiguous().mT
    inputs["size"] = inputs["size"].mT.contiguous().mT
    before = {name: guarded(value) for name, value in inputs.items()}
    check({name: value.tensor for name, value in before.items()}, make_index(2, 20, 5), 5)
    for name, value in before.items():
        value.check(name)


def test_an_expanded_gradient_is_read_in_place():
    inputs, index = draw(2, 20, 5, 24, given=()), make_index(2, 20, 5)
    grads = []
    for impl in ("cuda", "reference"):
        x = inputs["x"].clone().requires_grad_()
        merge(x, MergePlan(index, 5), impl=impl).x.sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_weights_where_tokens_are_alike(dtype):
    """The tokens of a group differ little from their mean: the rounding of y must not enter the gradient."""
    inputs = draw(2, 20, 5, 20, dtype, ("weight", "size"))
    inputs["x"] = (inputs["x"] / 8 + 20).to(dtype)
    check(inputs, make_index(2, 20, 5), 5)


def test_weights_of_a_token_alone_have_no_gradient():
    inputs = draw(1, 9, 9, 20, given=("weight",))
    inputs["weight"].requires_grad_()
    plan = MergePlan(torch.arange(9, dtype=torch.int32, device=DEVICE)[None], 9, weight=inputs["weight"])
    merge(inputs["x"], plan, impl="cuda").x.square().sum().backward()
    assert_equal("gradient of weight", inputs["weight"].grad, torch.zeros(1, 9, device=DEVICE))


def test_counts_do_not_stall_and_small_shares_count():
    """4,000 tokens of one group in half precision, of weights from 1e-6 to 1."""
    index = torch.zeros(1, 4000, dtype=torch.int32, device=DEVICE)
    weight = torch.logspace(-6, 0, 4000, device=DEVICE)[None]
    x = make_tokens(1, 4000, 3, torch.float16)
    x += torch.arange(4000, device=DEVICE)[None, :, None].to(torch.float16) / 400
    out = merge(x, MergePlan(index, 1, weight=weight), impl="cuda")
    expected = reference.merge(x.double(), MergePlan(index, 1, weight=weight.double()))
    assert out.size.item() == 4000
    assert torch.allclose(out.x.double(), expected.x, rtol=torch.finfo(torch.float16).eps, atol=0)


def test_a_tie_of_max_goes_to_the_lowest_token():
    x = torch.tensor([[1.0, 3.0], [2.0, 3.0], [2.0, 0.0], [2.0, 3.0]], device=DEVICE)
    x = x.repeat(4, 1)[None].requires_grad_()
    index = torch.tensor([[0] * 8 + [1] * 8], dtype=torch.int32, device=DEVICE)
    merge(x, MergePlan(index, 2), reduce="max", impl="cuda").x.sum().backward()
    expected = torch.zeros(1, 16, 2, device=DEVICE)
    expected[0, [1, 9], 0] = 1
    expected[0, [0, 8], 1] = 1
    assert_equal("gradient", x.grad, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("N", [20, 60])
@pytest.mark.parametrize(
    ("dtype", "reduce"),
    [*((torch.float32, name) for name in REDUCTIONS), (torch.float16, "mean"), (torch.bfloat16, "sum")],
)
def test_features_that_are_not_numbers_stay_in_their_group(value, N, dtype, reduce):
    """Token 3 spoils its group and no bit of another; token 5, in no group, spoils none. Forward and backward."""
    index = make_index(2, N, 5, left_out=0.0)
    index[:, 5] = -1
    clean = make_tokens(2, N, 20, dtype)
    dirty = clean.clone()
    dirty[0, 3], dirty[:, 5] = value, value
    outs, grads = [], []
    for x in (clean, dirty):
        weight = torch.ones(2, N, device=DEVICE, requires_grad=True)
        leaf = x.clone().requires_grad_()
        outs.append(merge(leaf, MergePlan(index, 5, weight=weight), reduce=reduce, impl="cuda").x)
        outs[-1].float().sum().backward()
        grads.append((leaf.grad, torch.zeros_like(weight) if weight.grad is None else weight.grad))
    k = index[0, 3].item()
    expected = reference.merge(dirty.double(), MergePlan(index, 5), reduce=reduce).x
    assert_equal("group of the token", outs[1][0, k].double().isfinite(), expected[0, k].isfinite())
    others = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    others[0, k] = False
    assert_equal("other groups", outs[1][others], outs[0][others])
    apart = index != k
    apart[1] = True
    for name, before, after in zip(("x", "weight"), *grads, strict=True):
        assert_equal(f"gradient of {name} in other groups", after[apart], before[apart])


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Everything the implementation allocates lies amid poison, which is looked at in the end."""
    made = []

    def amid_poison(allocate):
        def allocated(*args, **kwargs):
            made.append(guarded(allocate(*args, **kwargs)))
            return made[-1].tensor

        return allocated

    monkeypatch.setattr(Tensor, "new_empty", amid_poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", amid_poison(torch.empty_like))
    yield made
    for one in made:
        one.check("output")


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [20, 60])
def test_an_index_far_outside_stays_in_bounds(reduce, dtype, N, guarded_outputs):
    """It counts as -1, forward and backward."""
    index = make_index(2, N, 5)
    far = torch.tensor([5, -(2**31), 2**31 - 1, -2]).repeat(N // 4).to(DEVICE, torch.int32)
    inputs = draw(2, N, 5, 24, dtype)
    before = {name: guarded(value) for name, value in inputs.items()}
    check({name: value.tensor for name, value in before.items()}, torch.where(index < 0, far, index), 5, reduce)
    for name, value in before.items():
        value.check(name)
    assert len(guarded_outputs) >= 8


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("N", [20, 60])
def test_an_order_that_is_not_one_stays_in_bounds(reduce, N):
    """Callers may pass any plan: what it gives is meaningless, but every access is inside (the sanitizer looks)."""
    wild = torch.tensor([-1, N, 2**31 - 1, -(2**31), 3]).to(DEVICE, torch.int32)
    order = wild.repeat(2, N // 5)
    offsets = torch.tensor([[0, 2**31 - 1, 4, -(2**31), N, N + 1], [-9, 0, N, 3, 2, 1]])
    offsets = offsets.to(DEVICE, torch.int32)
    inputs = draw(2, N, 5, 20)
    plan = MergePlan(make_index(2, N, 5), 5, weight=inputs["weight"].requires_grad_(), order=order, offsets=offsets)
    out = merge(inputs["x"].requires_grad_(), plan, inputs["size"], inputs["positions"], reduce, impl="cuda")
    (out.x.sum() + out.positions.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [20, 60])
def test_the_rest_of_the_batch_changes_no_bit(dtype, N):
    inputs, index = draw(3, N, 5, 20, dtype), make_index(3, N, 5)

    def run(items):
        given = {name: value[items].clone().requires_grad_() for name, value in inputs.items()}
        out = through(index[items], 5, "mean", "cuda")(**given)
        sum(value.square().sum() for value in out.values()).backward()
        return {**out, **{f"gradient of {name}": value.grad for name, value in given.items()}}

    together, alone = run(slice(0, 3)), run(slice(1, 2))
    for name, value in alone.items():
        assert_equal(name, together[name][1:2].detach(), value.detach())


@pytest.mark.skipif(not dispatch.on_host(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("N", [20, 60])
def test_the_order_of_threads_and_blocks_changes_no_bit(reduce, N, monkeypatch):
    inputs, index = draw(2, N, 5, 24), make_index(2, N, 5)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("STTM_HOST_ORDER", order)
        given = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        out = through(index, 5, reduce, "cuda")(**given)
        sum(value.square().sum() for value in out.values()).backward()
        grads = {f"gradient of {name}": value.grad for name, value in given.items() if value.grad is not None}
        results.append({**{name: value.detach() for name, value in out.items()}, **grads})
    for other in results[1:]:
        for name, value in results[0].items():
            assert_equal(name, other[name], value)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_only_the_gradient_that_is_needed(reduce):
    inputs, index = draw(2, 20, 5, 20), make_index(2, 20, 5)

    def loss(given):
        out = through(index, 5, reduce, "cuda")(**given)
        return sum(value.square().sum() for value in out.values())

    every = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    loss(every).backward()
    for name, value in every.items():
        alone = {other: given.detach() for other, given in every.items()}
        alone[name] = alone[name].clone().requires_grad_()
        loss(alone).backward()
        assert_equal(f"gradient of {name}", alone[name].grad, value.grad)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_an_empty_batch(reduce):
    index = torch.zeros(0, 5, dtype=torch.int32, device=DEVICE)
    x = torch.zeros(0, 5, 4, device=DEVICE, requires_grad=True)
    out = merge(x, MergePlan(index, 3), reduce=reduce, impl="cuda")
    assert out.x.shape == (0, 3, 4)
    out.x.sum().backward()
    assert x.grad is not None
    assert unmerge(out.x, MergePlan(index, 3), impl="cuda").shape == (0, 5, 4)


# unmerge and compose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 20, 24, 65, 2100])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_unmerge(layout, C, dtype, guarded_outputs):
    x, index = guarded(make_tokens(2, 9, C, dtype, layout=layout)), make_index(2, 33, 9)
    wild = torch.where(index < 0, torch.tensor([9, -1, 2**31 - 1]).repeat(11).to(DEVICE, torch.int32), index)
    plan = MergePlan(wild, 9)
    assert_equal("x", unmerge(x.tensor, plan, "cuda"), reference.unmerge(x.tensor, plan))
    x.check("x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_unmerge(dtype):
    plan = MergePlan(make_index(2, 33, 9), 9)
    assert_verb_within_budget(
        "unmerge",
        lambda x: {"x": unmerge(x, plan, "cuda")},
        lambda x: {"x": reference.unmerge(x, plan)},
        {"x": make_tokens(2, 9, 24, dtype)},
        1,
        33,
    )


def test_compose(guarded_outputs):
    index1, index2 = make_index(2, 50, 20), make_index(2, 20, 7, seed=1)
    index1[0, 0], index1[1, 1], index2[0, 0], index2[1, 3] = 20, -(2**31), 7, 2**31 - 1
    plan1, plan2 = MergePlan(index1, 20), MergePlan(index2, 7)
    got = compose(plan1, plan2, "cuda").index
    assert any(got is one.tensor for one in guarded_outputs)
    assert_equal("index", got, reference.compose(plan1, plan2).index)


def test_every_output_element_is_written():
    with poisoned_empty():
        out = merge(make_tokens(2, 20, 7), MergePlan(make_index(2, 20, 5, kind="even"), 5), impl="cuda")
    assert bool(out.x.isfinite().all())
    assert bool(out.size.isfinite().all())
