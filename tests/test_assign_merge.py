"""`assign_merge` is `assign` and then `merge`: the same results, and gradients of both together."""

import pytest
import torch

import sttm_kernels as sttm
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import assert_equal, make_tokens

MASK = torch.tensor([[True] * 6 + [False], [True, False] + [True] * 5])


def inputs(own_metric):
    size = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5
    C = 4 if own_metric else 5
    values = {
        "x": make_tokens(2, 7, C, torch.float64),
        "q": None if own_metric else make_tokens(2, 7, 4, torch.float64, seed=1),
        "meta": make_tokens(2, 3, 4, torch.float64, seed=2),
        "size": size,
        "positions": make_tokens(2, 7, 3, torch.float64, seed=3),
        "fill": make_tokens(2, 3, C, torch.float64, seed=4),
    }
    return {name: None if value is None else value.requires_grad_() for name, value in values.items()}


def outputs(out, plan):
    tensors = (out.x, out.size, out.positions, plan.score, plan.lse, plan.weight)
    return tuple(t for t in tensors if t is not None)


@pytest.mark.parametrize("own_metric", [True, False])
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_is_assign_then_merge(impl, weight, own_metric):
    given = inputs(own_metric)
    out, plan = assign_merge(**given, weight=weight, mask=MASK, impl=impl)
    q = given["x"] if own_metric else given["q"]
    apart = sttm.assign(q, given["meta"], weight=weight, mask=MASK, impl=impl)
    merged = sttm.merge(given["x"], apart, given["size"], given["positions"], fill=given["fill"], impl=impl)
    assert_equal("index", plan.index, apart.index)
    for one, other in zip(outputs(out, plan), outputs(merged, apart), strict=True):
        assert_equal("output", one, other)


@pytest.mark.parametrize("own_metric", [True, False])
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_gradients(weight, own_metric):
    given = inputs(own_metric)
    present = [name for name, value in given.items() if value is not None]

    def run(*values):
        here = dict.fromkeys(given) | dict(zip(present, values, strict=True))
        return outputs(*assign_merge(**here, similarity="l2", temperature=0.7, weight=weight, mask=MASK, impl="torch"))

    values = [given[name] for name in present]
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values, fast_mode=True)


def test_a_metric_of_another_dtype():
    x, q, meta = make_tokens(2, 7, 5, torch.float16), make_tokens(2, 7, 4), make_tokens(2, 3, 4)
    out, plan = assign_merge(x, q, meta)
    assert_equal("x", out.x, sttm.merge(x, plan).x)
    assert_equal("score", plan.score, sttm.assign(q, meta).score)
