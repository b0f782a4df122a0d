"""assign in CUDA C++, on the CPU or a GPU, forward and backward, against the float64 reference."""

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
)
from sttm_kernels.testing import make_tokens as make_tokens_on

DEVICE = "cpu" if dispatch.on_host() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs STTM_CUDA_HOST or an NVIDIA GPU", allow_module_level=True)
if dispatch.why_not("assign", "cuda", DEVICE) is not None:
    pytest.skip(str(dispatch.why_not("assign", "cuda", DEVICE)), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("forward", "reverse", "shuffle:1")


def make_tokens(*args, **kwargs):
    return make_tokens_on(*args, device=DEVICE, **kwargs)


def draw(B, N, K, D, dtype=torch.float32, heads=None, layout="contiguous"):
    if heads:
        q = torch.stack([make_tokens(B, N, D, dtype, seed=1 + h, layout=layout) for h in range(heads)], 1)
    else:
        q = make_tokens(B, N, D, dtype, seed=1, layout=layout)
    return {"q": q, "meta": make_tokens(B, K, D, dtype, seed=9, layout=layout)}


def random_mask(B, N):
    return (torch.rand(B, N, generator=torch.Generator().manual_seed(5)) > 0.3).to(DEVICE)


def temperature_of(similarity, D):
    """What keeps S of order one, as a user would: dot and l2 grow with D."""
    return {"cosine": 0.1, "dot": D**0.5, "l2": float(D)}[similarity]


def check(inputs, similarity="cosine", weight="softmax", mask=None):
    temperature = temperature_of(similarity, inputs["q"].shape[-1])
    check_assign("cuda", **inputs, similarity=similarity, temperature=temperature, weight=weight, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "similarity", "weight"),
    [
        ((1, 1, 1, 3), "cosine", "softmax"),
        ((2, 17, 1, 3), "dot", "softmax"),
        ((1, 63, 64, 64), "cosine", "softmax"),
        ((1, 64, 65, 88), "l2", "softmax"),
        ((1, 65, 63, 80), "dot", "softmax"),
        ((2, 129, 20, 20), "l2", "softmax"),
        ((1, 33, 130, 64), "cosine", "softmax"),
        ((1, 20, 17, 200), "cosine", "softmax"),
        ((1, 65, 33, 300), "l2", "softmax"),
        ((1, 65, 33, 80), "cosine", "uniform"),
        ((2, 33, 65, 3), "l2", "uniform"),
        ((1, 64, 16, 64), "dot", "uniform"),
        ((1, 20, 5, 600), "cosine", "uniform"),
    ],
    ids=str,
)
def test_forward_and_gradients(shape, similarity, weight, dtype):
    check(draw(*shape, dtype), similarity, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_masked_tokens(weight, dtype):
    inputs = draw(2, 17, 18, 20, dtype)
    mask = random_mask(2, 17)
    check(inputs, "cosine", weight, mask)
    q, meta = (t.clone().requires_grad_() for t in inputs.values())
    with torch.no_grad():
        q[~mask] = torch.nan
    plan = assign(q, meta, "cosine", 0.1, weight, mask, impl="cuda")
    assert_equal("masked", plan.index < 0, ~mask)
    sum(value.sum() for value in fields(plan).values()).backward()
    assert meta.grad.isfinite().all()
    assert not q.grad[~mask].any()
    assert q.grad[mask].isfinite().all()
    assert q.grad[mask].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_mean_over_heads(weight, dtype):
    check(draw(1, 17, 5, 20, dtype, heads=3), "cosine", weight)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts_are_read_in_place(layout):
    inputs = draw(2, 17, 18, 20, torch.float32, layout=layout)
    before = {name: guarded(t) for name, t in inputs.items()}
    check({name: one.tensor for name, one in before.items()})
    for name, one in before.items():
        one.check(name)
    permuted = make_tokens(2, 17, 60, torch.float32).view(2, 17, 3, 20).transpose(1, 2)
    if layout == "strided":
        inputs = draw(2, 17, 18, 96, torch.bfloat16)
        check({"q": inputs["q"].view(2, 17, 2, 48).transpose(1, 2), "meta": inputs["meta"][..., 8:56]})
    check({"q": permuted, "meta": make_tokens(1, 18, 20, torch.float32)[0].expand(2, -1, -1)})


def test_ties_go_to_the_lowest_meta_token():
    q, meta = draw(2, 20, 11, 24).values()
    index = assign(q, meta.repeat(1, 4, 1), impl="cuda").index
    assert_equal("index", index, assign(q, meta, impl="cuda").index)
    assert_equal("index", assign(torch.zeros_like(q), meta.repeat(1, 4, 1), impl="cuda").index, 0 * index)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_rows_of_zeros_and_below_the_norm_floor(similarity):
    inputs = draw(1, 17, 18, 20)
    inputs["q"][:, 3], inputs["meta"][:, 5] = 0, 0
    inputs["q"][:, 4] *= 1e-8
    temperature = 20.0 if similarity == "l2" else 1.0
    plan = assign(**inputs, similarity=similarity, temperature=temperature, weight="uniform", impl="cuda")
    assert_assign_within_budget(plan, *inputs.values(), similarity, temperature, "uniform")
    q, meta = (t.clone().requires_grad_() for t in inputs.values())
    for weight in ("softmax", "uniform"):
        plan = assign(q, meta, similarity, temperature, weight, impl="cuda")
        found = torch.autograd.grad(sum(value.sum() for value in fields(plan).values()), (q, meta))
        wide = [t.detach().double().requires_grad_() for t in (q, meta)]
        truth = assign_at(plan.index, *wide, similarity, temperature, weight)
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
def test_features_that_are_not_numbers_stay_in_bounds(similarity, value, guarded_outputs):
    inputs = draw(2, 17, 18, 20)
    inputs["q"][0, ::3], inputs["q"][1], inputs["meta"][0, 4:] = value, value, value
    before = {name: guarded(t) for name, t in inputs.items()}
    q, meta = (one.tensor.requires_grad_() for one in before.values())
    plan = assign(q, meta, similarity, impl="cuda")
    assert_index_in_range("index", plan.index, 18)
    assert (plan.index >= 0).all()
    (plan.score.sum() + plan.lse.sum()).backward()
    for name, one in before.items():
        one.check(name)
    assert len(guarded_outputs) >= 6


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_a_token_that_is_not_a_number_reaches_its_own_meta_token_alone(similarity):
    q, meta = (t.requires_grad_() for t in draw(1, 40, 7, 20).values())
    with torch.no_grad():
        q[0, 11] = torch.nan
    plan = assign(q, meta, similarity, weight="uniform", impl="cuda")
    plan.score.sum().backward()
    reached = torch.arange(7, device=DEVICE) == plan.index[0, 11]
    assert meta.grad[0, ~reached].isfinite().all()
    assert not q.grad[0, torch.arange(40, device=DEVICE) != 11].isnan().any()


def test_gradients_with_any_index_stay_in_bounds(guarded_outputs):
    q, meta = draw(2, 17, 18, 20).values()
    index = torch.arange(34, dtype=torch.int32, device=DEVICE).view(2, 17) - 8
    index[1, 3:5] = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32, device=DEVICE)
    grad, other = torch.ones(2, 17, device=DEVICE), torch.zeros(2, 17, device=DEVICE)
    for grad_lse in (None, grad):
        args = (grad, grad_lse, q, meta, index, other, other, "cosine", 1.0, (True, True))
        grad_q, grad_meta = dispatch.kernel("assign_backward", "cuda", DEVICE, torch.float32)(*args)
        outside = (index < 0) | (index >= 18)
        assert not grad_q[outside].any()
        assert grad_q[~outside].any(-1).all()
        assert grad_meta.isfinite().all()


def run(q, meta, mask=None, weight="softmax"):
    """Every output and gradient."""
    q, meta = q.detach().requires_grad_(), meta.detach().requires_grad_()
    plan = assign(q, meta, "cosine", 0.1, weight, mask, impl="cuda")
    seed = torch.linspace(-1, 1, plan.score.shape[1], device=DEVICE)
    grads = torch.autograd.grad(sum((value * seed).sum() for value in fields(plan).values()), (q, meta))
    return [plan.index, *(value.detach() for value in fields(plan).values()), *grads]


@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_the_rest_of_the_batch_changes_no_bit(weight):
    q, meta = draw(3, 17, 5, 20, torch.float16).values()
    mask = random_mask(3, 17)
    together = run(q, meta, mask, weight)
    for item in range(3):
        alone = run(*(t[item : item + 1] for t in (q, meta, mask)), weight)
        for whole, one in zip(together, alone, strict=True):
            assert_equal("item alone", one, whole[item : item + 1])


@pytest.mark.skipif(not dispatch.on_host(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_the_order_of_threads_and_blocks_changes_no_bit(weight, monkeypatch):
    q, meta = draw(2, 70, 66, 72, torch.bfloat16).values()
    results = []
    for order in ORDERS:
        monkeypatch.setenv("STTM_HOST_ORDER", order)
        results.append(run(q, meta, random_mask(2, 70), weight))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_equal("in another order", value, expected)


def test_only_the_gradient_that_is_needed():
    q, meta = draw(2, 9, 5, 20).values()
    both = run(q, meta)[-2:]
    for at, wanted in enumerate((q, meta)):
        leaves = [t.detach().requires_grad_(t is wanted) for t in (q, meta)]
        plan = assign(*leaves, "cosine", 0.1, impl="cuda")
        seed = torch.linspace(-1, 1, 9, device=DEVICE)
        loss = sum((value * seed).sum() for value in fields(plan).values())
        assert_equal("gradient", torch.autograd.grad(loss, leaves[at])[0], both[at])


def test_an_empty_batch():
    q, meta = (torch.empty(0, n, 8, device=DEVICE, requires_grad=True) for n in (5, 3))
    plan = assign(q, meta, impl="cuda")
    assert plan.index.shape == plan.lse.shape == (0, 5)
    plan.score.sum().backward()
    assert q.grad.shape == q.shape
