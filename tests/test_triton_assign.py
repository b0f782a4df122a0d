"""The Triton kernels of assign through the interpreter, against the reference in float64."""

import contextlib

import pytest
import torch
from torch import Tensor

from sttm_kernels import dispatch, testing
from sttm_kernels.checks import check_assign, fields
from sttm_kernels.functional import assign
from sttm_kernels.testing import (
    assert_assign_within_budget,
    assert_equal,
    assert_index_in_range,
    assign_at,
    guarded,
    make_tokens,
)

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

from sttm_kernels.impl.triton import config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def small_blocks():
    """Several tiles of tokens, meta tokens and features in small tensors; up to 64 features stay on chip."""
    with (
        config.forced("assign", BLOCK_N=16, BLOCK_K=16, BLOCK_D=64),
        config.forced("assign_backward", BLOCK_OWN=16, BLOCK_OTHER=16, BLOCK_D=64, SLICE=64),
        config.forced("assign_gather", BLOCK_N=16, BLOCK_D=64),
    ):
        yield


@pytest.fixture
def blocks():
    with small_blocks():
        yield


def draw(B, N, K, D, dtype=torch.float32, heads=None, layout="contiguous"):
    if heads:
        q = torch.stack([make_tokens(B, N, D, dtype, seed=1 + h, layout=layout) for h in range(heads)], 1)
    else:
        q = make_tokens(B, N, D, dtype, seed=1, layout=layout)
    return {"q": q, "meta": make_tokens(B, K, D, dtype, seed=9, layout=layout)}


def random_mask(B, N):
    return torch.rand(B, N, generator=torch.Generator().manual_seed(5)) > 0.3


def temperature_of(similarity, D):
    """What keeps S of order one, as a user would: dot and l2 grow with D."""
    return {"cosine": 0.1, "dot": D**0.5, "l2": float(D)}[similarity]


def check(inputs, similarity="cosine", weight="softmax", mask=None):
    temperature = temperature_of(similarity, inputs["q"].shape[-1])
    check_assign("triton", **inputs, similarity=similarity, temperature=temperature, weight=weight, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "similarity", "weight"),
    [
        ((1, 1, 1, 3), "cosine", "softmax"),
        ((2, 17, 1, 3), "dot", "softmax"),
        ((1, 15, 16, 64), "cosine", "softmax"),
        ((1, 16, 17, 88), "l2", "softmax"),
        ((1, 17, 15, 80), "dot", "softmax"),
        ((1, 33, 33, 20), "l2", "softmax"),
        ((1, 17, 17, 88), "cosine", "softmax"),
        ((1, 17, 15, 80), "cosine", "uniform"),
        ((2, 15, 17, 3), "l2", "uniform"),
        ((1, 16, 16, 64), "dot", "uniform"),
    ],
    ids=str,
)
def test_forward_and_gradients(shape, similarity, weight, dtype, blocks):
    check(draw(*shape, dtype), similarity, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_masked_tokens(weight, dtype, blocks):
    inputs = draw(2, 17, 18, 20, dtype)
    mask = random_mask(2, 17)
    check(inputs, "cosine", weight, mask)
    q, meta = (t.clone().requires_grad_() for t in inputs.values())
    with torch.no_grad():
        q[~mask] = torch.nan
    plan = assign(q, meta, "cosine", 0.1, weight, mask, impl="triton")
    assert_equal("masked", plan.index < 0, ~mask)
    sum(value.sum() for value in fields(plan).values()).backward()
    assert meta.grad.isfinite().all()
    assert not q.grad[~mask].any()
    assert q.grad[mask].isfinite().all()
    assert q.grad[mask].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_mean_over_heads(weight, dtype, blocks):
    check(draw(1, 17, 5, 20, dtype, heads=3), "cosine", weight)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts_are_read_in_place(layout, blocks):
    inputs = draw(2, 17, 18, 20, torch.float32, layout=layout)
    before = {name: guarded(t) for name, t in inputs.items()}
    check({name: one.tensor for name, one in before.items()})
    for name, one in before.items():
        one.check(name)
    permuted = make_tokens(2, 17, 60, torch.float32).view(2, 17, 3, 20).transpose(1, 2)
    check({"q": permuted, "meta": make_tokens(1, 18, 20, torch.float32)[0].expand(2, -1, -1)})


@pytest.mark.parametrize("D", [64, 144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shipped_blocks(dtype, D):
    check(draw(1, 65, 33, D, dtype))


def test_ties_go_to_the_lowest_meta_token(blocks):
    q, meta = draw(2, 20, 11, 24).values()
    index = assign(q, meta.repeat(1, 4, 1), impl="triton").index
    assert_equal("index", index, assign(q, meta, impl="triton").index)
    assert_equal("index", assign(torch.zeros_like(q), meta.repeat(1, 4, 1), impl="triton").index, 0 * index)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_rows_of_zeros_and_below_the_norm_floor(similarity, blocks):
    inputs = draw(1, 17, 18, 20)
    inputs["q"][:, 3], inputs["meta"][:, 5] = 0, 0
    inputs["q"][:, 4] *= 1e-8
    plan = assign(**inputs, similarity=similarity, weight="uniform", impl="triton")
    assert_assign_within_budget(plan, *inputs.values(), similarity, weight="uniform")
    q, meta = (t.clone().requires_grad_() for t in inputs.values())
    for weight in ("softmax", "uniform"):
        plan = assign(q, meta, similarity, 1.0, weight, impl="triton")
        found = torch.autograd.grad(sum(value.sum() for value in fields(plan).values()), (q, meta))
        wide = [t.detach().double().requires_grad_() for t in (q, meta)]
        truth = assign_at(plan.index, *wide, similarity, 1.0, weight)
        expected = torch.autograd.grad(sum(value.sum() for value in fields(truth).values()), wide)
        for name, got, value in zip(("q", "meta"), found, expected, strict=True):
            # Rows at the floor have gradients a million times those of others: every row has a budget of its own.
            for row in range(got.shape[1]):
                scale = float(value[:, row].abs().max()) + float(value.abs().median())
                assert (
                    float((got[:, row] - value[:, row]).abs().max()) <= 64 * torch.finfo(torch.float32).eps * scale
                ), f"gradient of {name}[{row}], {similarity}, {weight}"


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Everything the implementation allocates lies amid poison; `check` looks at it."""
    made = []
    new_empty = Tensor.new_empty

    def allocate(*args, **kwargs):
        made.append(guarded(new_empty(*args, **kwargs)))
        return made[-1].tensor

    monkeypatch.setattr(Tensor, "new_empty", allocate)
    yield made
    for one in made:
        one.check("output")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_features_that_are_not_numbers_stay_in_bounds(similarity, value, blocks, guarded_outputs):
    inputs = draw(2, 17, 18, 20)
    inputs["q"][0, ::3], inputs["q"][1], inputs["meta"][0, 4:] = value, value, value
    before = {name: guarded(t) for name, t in inputs.items()}
    q, meta = (one.tensor.requires_grad_() for one in before.values())
    plan = assign(q, meta, similarity, impl="triton")
    assert_index_in_range("index", plan.index, 18)
    assert (plan.index >= 0).all()
    (plan.score.sum() + plan.lse.sum()).backward()
    for name, one in before.items():
        one.check(name)
    assert len(guarded_outputs) >= 6


def test_gradients_with_any_index_stay_in_bounds(blocks, guarded_outputs):
    q, meta = draw(2, 17, 18, 20).values()
    index = torch.arange(34, dtype=torch.int32).view(2, 17) - 8
    index[1, 3:5] = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    grad, other = torch.ones(2, 17), torch.zeros(2, 17)
    for grad_lse in (None, grad):
        args = (grad, grad_lse, q, meta, index, other, other, "cosine", 1.0, (True, True))
        grad_q, grad_meta = dispatch.kernel("assign_backward", "triton", "cpu", torch.float32)(*args)
        outside = (index < 0) | (index >= 18)
        assert not grad_q[outside].any()
        assert grad_q[~outside].any(-1).all()
        assert grad_meta.isfinite().all()


def run(q, meta, mask=None, weight="softmax"):
    """Every output and gradient."""
    q, meta = q.detach().requires_grad_(), meta.detach().requires_grad_()
    plan = assign(q, meta, "cosine", 0.1, weight, mask, impl="triton")
    seed = torch.linspace(-1, 1, plan.score.shape[1])
    grads = torch.autograd.grad(sum((value * seed).sum() for value in fields(plan).values()), (q, meta))
    return [plan.index, *(value.detach() for value in fields(plan).values()), *grads]


@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_the_rest_of_the_batch_changes_no_bit(weight, blocks):
    q, meta = draw(3, 17, 5, 20, torch.float16).values()
    mask = random_mask(3, 17)
    together = run(q, meta, mask, weight)
    for item in range(3):
        alone = run(*(t[item : item + 1] for t in (q, meta, mask)), weight)
        for whole, one in zip(together, alone, strict=True):
            assert_equal("item alone", one, whole[item : item + 1])


def test_only_the_gradient_that_is_needed():
    q, meta = draw(2, 9, 5, 20).values()
    both = run(q, meta)[-2:]
    for at, wanted in enumerate((q, meta)):
        leaves = [t.detach().requires_grad_(t is wanted) for t in (q, meta)]
        plan = assign(*leaves, "cosine", 0.1, impl="triton")
        seed = torch.linspace(-1, 1, 9)
        loss = sum((value * seed).sum() for value in fields(plan).values())
        assert_equal("gradient", torch.autograd.grad(loss, leaves[at])[0], both[at])


def test_an_empty_batch():
    q, meta = torch.empty(0, 5, 8, requires_grad=True), torch.empty(0, 3, 8, requires_grad=True)
    plan = assign(q, meta, impl="triton")
    assert plan.index.shape == plan.lse.shape == (0, 5)
    plan.score.sum().backward()
    assert q.grad.shape == q.shape
