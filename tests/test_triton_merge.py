"""merge, unmerge and compose through Triton's interpreter, forward and backward, against the float64 reference."""

import contextlib

import pytest
import torch
from torch import Tensor

from sttm_kernels import dispatch, functional, reference
from sttm_kernels.functional import compose, merge, unmerge
from sttm_kernels.plan import MergePlan
from sttm_kernels.testing import assert_equal, assert_verb_within_budget, guarded, make_index, make_tokens

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

from sttm_kernels.impl.triton import config, launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is not a number

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "max", "first")
SMALL_BLOCKS = {
    "sort": {"BLOCK": 64, "BLOCK_PAIRS": 16},
    "merge": {"BLOCK_K": 4, "BLOCK_R": 8, "BLOCK_C": 16, "BLOCK_P": 4, "STEPS": 3},
    "merge_few": {"BLOCK_K": 16, "BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_P": 4},
    "merge_backward": {"BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_P": 4},
    "merge_max_backward": {"BLOCK_R": 4, "BLOCK_C": 16},
    "centre": {"BLOCK_K": 8, "BLOCK_R": 4},
    "unmerge": {"BLOCK_N": 16, "BLOCK_C": 16},
    "compose": {"BLOCK": 16},
}
EVERYTHING = ("weight", "size", "positions", "fill")


@pytest.fixture
def blocks():
    """Many tiles in small tensors."""
    with contextlib.ExitStack() as stack:
        for name, sizes in SMALL_BLOCKS.items():
            stack.enter_context(config.forced(name, **sizes))
        yield


def draw(B, N, K, C, dtype=torch.float32, given=EVERYTHING, layout="contiguous"):
    """Inputs of merge; those not given are None."""
    rows = torch.Generator().manual_seed(5)
    inputs = {
        "weight": torch.rand(B, N, generator=rows) + 0.1,
        "size": torch.randint(0, 5, (B, N), generator=rows).float(),
        "positions": torch.rand(B, N, 3, generator=rows),
        "fill": make_tokens(B, K, C, dtype, seed=6),
    }
    chosen = {name: value if name in given else None for name, value in inputs.items()}
    return {"x": make_tokens(B, N, C, dtype, layout=layout), **chosen}


def through(index, K, reduce, impl, sort=False):
    order = offsets = None
    if sort:
        order = index.argsort(dim=1, stable=True).to(torch.int32)
        ends = torch.arange(K + 1, dtype=torch.int32).repeat(len(index), 1)
        offsets = torch.searchsorted(index.sort(dim=1).values, ends).to(torch.int32)

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
    return assert_verb_within_budget(reduce, through(index, K, reduce, "triton", sort), truth, inputs, terms)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("given", [(), ("weight",), ("size", "positions"), EVERYTHING])
def test_forward_and_gradients(reduce, given, blocks):
    check(draw(2, 20, 5, 20, given=given), make_index(2, 20, 5), 5, reduce)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("reduce", "given"), [("mean", ()), ("mean", EVERYTHING), ("sum", EVERYTHING), ("max", EVERYTHING)]
)
def test_half_precision(reduce, given, dtype, blocks):
    check(draw(2, 20, 5, 20, dtype, given), make_index(2, 20, 5), 5, reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", ["even", "one", "none"])
def test_empty_groups_and_one_long_group(reduce, kind, blocks):
    check(draw(2, 30, 3, 17), make_index(2, 30, 3, kind=kind), 3, reduce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("N", "K", "C"), [(1, 1, 1), (2, 1, 3), (16, 33, 16), (31, 5, 64), (33, 16, 80), (15, 15, 88), (17, 1, 33)]
)
def test_ragged_shapes(N, K, C, dtype, blocks):
    check(draw(1, N, K, C, dtype), make_index(1, N, K), K)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_sorted_plan(reduce, blocks):
    index = make_index(1, 40, 13, left_out=0.0)
    check(draw(1, 40, 13, 20, torch.float16), index, 13, reduce, sort=True)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("K", [4, 60])
def test_shipped_blocks(reduce, K):
    """Long groups and short ones."""
    check(draw(1, 70, K, 72), make_index(1, 70, K), K, reduce)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("given", [(), EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shipped_blocks_of_few_groups(reduce, given, dtype):
    check(draw(1, 70, 66, 72, dtype, given), make_index(1, 70, 66), 66, reduce)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("transposed", torch.float32),
        ("transposed", torch.float16),
        ("strided", torch.float32),
        ("sliced", torch.float16),
        ("expanded", torch.float32),
    ],
)
def test_layouts_are_read_in_place(layout, dtype, blocks):
    inputs = draw(2, 20, 5, 20, dtype, layout=layout)
    inputs["positions"] = inputs["positions"][:1].expand(2, -1, -1)
    inputs["fill"] = inputs["fill"].mT.contiguous().mT
    inputs["size"] = inputs["size"].mT.contiguous().mT
    before = {name: guarded(value) for name, value in inputs.items()}
    check({name: value.tensor for name, value in before.items()}, make_index(2, 20, 5), 5)
    for name, value in before.items():
        value.check(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_weights_where_tokens_are_alike(dtype, blocks):
    """The tokens of a group differ little from their mean: the rounding of y must not enter the gradient."""
    inputs = draw(2, 20, 5, 20, dtype, ("weight", "size"))
    inputs["x"] = (inputs["x"] / 8 + 20).to(dtype)
    check(inputs, make_index(2, 20, 5), 5)


def test_weights_of_a_token_alone_have_no_gradient(blocks):
    inputs = draw(1, 9, 9, 20, given=("weight",))
    inputs["weight"].requires_grad_()
    out = merge(
        inputs["x"], MergePlan(torch.arange(9, dtype=torch.int32)[None], 9, weight=inputs["weight"]), impl="triton"
    )
    out.x.square().sum().backward()
    assert_equal("gradient of weight", inputs["weight"].grad, torch.zeros(1, 9))


def test_counts_do_not_stall_and_small_shares_count(blocks):
    """4,000 tokens of one group in half precision, of weights from 1e-6 to 1."""
    index = torch.zeros(1, 4000, dtype=torch.int32)
    inputs = draw(1, 4000, 1, 3, torch.float16, ("weight",))
    inputs["weight"] = torch.logspace(-6, 0, 4000)[None]
    inputs["x"] = inputs["x"] + torch.arange(4000)[None, :, None].to(torch.float16) / 400
    with config.forced("merge_few", BLOCK_K=16, BLOCK_N=1024, BLOCK_C=16, BLOCK_P=1):
        out = merge(inputs["x"], MergePlan(index, 1, weight=inputs["weight"]), impl="triton")
    expected = reference.merge(inputs["x"].double(), MergePlan(index, 1, weight=inputs["weight"].double()))
    assert out.size.item() == 4000
    assert torch.allclose(out.x.double(), expected.x, rtol=torch.finfo(torch.float16).eps, atol=0)


def test_a_tie_of_max_goes_to_the_lowest_token(blocks):
    x = torch.tensor([[1.0, 3.0], [2.0, 3.0], [2.0, 0.0], [2.0, 3.0]]).repeat(4, 1)[None].requires_grad_()
    index = torch.tensor([[0] * 8 + [1] * 8], dtype=torch.int32)
    merge(x, MergePlan(index, 2), reduce="max", impl="triton").x.sum().backward()
    expected = torch.zeros(1, 16, 2)
    expected[0, [1, 9], 0] = 1
    expected[0, [0, 8], 1] = 1
    assert_equal("gradient", x.grad, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("dtype", "reduce"),
    [(torch.float32, name) for name in REDUCTIONS]
    + [
        (torch.float16, "mean"),
        (torch.bfloat16, "sum"),
    ],
)
def test_features_that_are_not_numbers_stay_in_their_group(value, dtype, reduce, blocks):
    """Token 3 spoils its group and no other; token 5, in no group, spoils none."""
    index = make_index(2, 20, 5, left_out=0.0)
    index[:, 5] = -1
    x = make_tokens(2, 20, 20, dtype)
    clean = merge(x, MergePlan(index, 5), reduce=reduce, impl="triton").x
    x[0, 3], x[:, 5] = value, value
    spoiled = merge(x, MergePlan(index, 5), reduce=reduce, impl="triton").x
    expected = reference.merge(x.double(), MergePlan(index, 5), reduce=reduce).x
    k = index[0, 3].item()
    assert_equal("group of the token", spoiled[0, k].double(), expected[0, k])
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, k] = False
    budget = 2 * torch.finfo(dtype).eps * expected[others].abs().max()
    assert (spoiled[others].double() - clean[others].double()).abs().max() <= budget


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


@pytest.mark.parametrize(
    ("reduce", "dtype"), [*((name, torch.float32) for name in REDUCTIONS), ("mean", torch.float16)]
)
def test_an_index_far_outside_stays_in_bounds(reduce, dtype, blocks, guarded_outputs):
    """It counts as -1, forward and backward."""
    index = make_index(2, 20, 5)
    wild = torch.where(index < 0, torch.tensor([5, -(2**31), 2**31 - 1, -2]).repeat(5).to(torch.int32), index)
    inputs = draw(2, 20, 5, 20, dtype)
    before = {name: guarded(value) for name, value in inputs.items()}
    check({name: value.tensor for name, value in before.items()}, wild, 5, reduce)
    for name, value in before.items():
        value.check(name)
    assert len(guarded_outputs) >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rest_of_the_batch_changes_no_bit(dtype, blocks):
    inputs, index = draw(3, 20, 5, 20, dtype), make_index(3, 20, 5)

    def run(items):
        given = {name: value[items].clone().requires_grad_() for name, value in inputs.items()}
        out = through(index[items], 5, "mean", "triton")(**given)
        sum(value.square().sum() for value in out.values()).backward()
        return {**out, **{f"gradient of {name}": value.grad for name, value in given.items()}}

    together, alone = run(slice(0, 3)), run(slice(1, 2))
    for name, value in alone.items():
        assert_equal(name, together[name][1:2].detach(), value.detach())


def test_only_the_gradient_that_is_needed(blocks):
    inputs, index = draw(2, 20, 5, 20), make_index(2, 20, 5)
    every = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    through(index, 5, "mean", "triton")(**every)["x"].square().sum().backward()
    for name, value in every.items():
        alone = {other: given.detach() for other, given in every.items()}
        alone[name] = alone[name].clone().requires_grad_()
        through(index, 5, "mean", "triton")(**alone)["x"].square().sum().backward()
        assert_equal(f"gradient of {name}", alone[name].grad, value.grad)


def test_an_empty_batch():
    index = torch.zeros(0, 5, dtype=torch.int32)
    x = torch.zeros(0, 5, 4, requires_grad=True)
    out = merge(x, MergePlan(index, 3), impl="triton")
    assert out.x.shape == (0, 3, 4)
    out.x.sum().backward()
    assert x.grad is not None
    assert unmerge(out.x, MergePlan(index, 3), impl="triton").shape == (0, 5, 4)


@pytest.mark.parametrize(
    ("K", "dtype", "sort", "launches"),
    [
        (9, torch.float16, False, 1),
        (200, torch.float16, False, 2),
        (9, torch.float32, False, 2),
        (200, torch.float16, True, 1),
    ],
)
def test_how_many_launches(K, dtype, sort, launches):
    seen = []
    with launch.launching_instead(lambda *args: seen.append(args[0].__name__)):
        through(make_index(2, 300, K, left_out=0.0), K, "mean", "triton", sort)(**draw(2, 300, K, 20, dtype))
    assert len(seen) == launches, seen


# unmerge and compose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_unmerge(layout, dtype, blocks):
    x, index = guarded(make_tokens(2, 9, 20, dtype, layout=layout)), make_index(2, 33, 9)
    wild = torch.where(index < 0, torch.tensor([9, -1, 2**31 - 1]).repeat(11).to(torch.int32), index)
    assert_verb_within_budget(
        "unmerge",
        lambda x: {"x": unmerge(x, MergePlan(wild, 9), "triton")},
        lambda x: {"x": reference.unmerge(x, MergePlan(wild, 9))},
        {"x": x.tensor},
        1,
        33,
    )
    assert_equal("x", unmerge(x.tensor, MergePlan(wild, 9), "triton"), reference.unmerge(x.tensor, MergePlan(wild, 9)))
    x.check("x")


def test_unmerge_of_a_matched_plan(blocks):
    plan = functional.match(make_tokens(2, 21, 8), 6, impl="triton")
    x = make_tokens(2, 15, 20)
    assert_equal("x", unmerge(x, plan, "triton"), reference.unmerge(x, plan))


def test_compose(blocks, guarded_outputs):
    index1, index2 = make_index(2, 50, 20), make_index(2, 20, 7, seed=1)
    index1[0, 0], index1[1, 1], index2[0, 0], index2[1, 3] = 20, -(2**31), 7, 2**31 - 1
    plan1, plan2 = MergePlan(index1, 20), MergePlan(index2, 7)
    got = compose(plan1, plan2, "triton").index
    assert any(got is one.tensor for one in guarded_outputs)
    assert_equal("index", got, reference.compose(plan1, plan2).index)
