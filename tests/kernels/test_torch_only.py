"""What only plain PyTorch has: tiles that bound the memory it takes, masses that float32 cannot invert."""

import pytest
import torch
from cases import SIMILARITIES, draw, each, only, short, temperature_of

import sttm_kernels as sttm
from sttm_kernels import dispatch
from sttm_kernels.checks import check_assign, check_match, check_merge, check_soft_merge
from sttm_kernels.impl import eager
from sttm_kernels.testing import make_index, make_tokens

if dispatch.interpreting() or dispatch.on_host():
    pytest.skip("the same in every process", allow_module_level=True)


@each("elements", [1, 100, 700])
@each("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_many_tiles(monkeypatch, elements, dtype):
    """What needs one tile at these sizes, cut into many, as at sizes that are too slow to test."""
    monkeypatch.setattr(eager, "TILE_ELEMENTS", {"cpu": elements, "cuda": elements})
    inputs = draw((2, 37, 9, 12, 10), dtype)
    x, q, meta, size, weight, positions, _, mask = inputs.values()
    for similarity in SIMILARITIES:
        check_assign("torch", q, meta, similarity, temperature_of(similarity, 12), mask=mask)
        for normalize in ("meta", "tokens"):
            given = (similarity, temperature_of(similarity, 12), normalize, size, positions, mask)
            check_soft_merge("torch", x, q, meta, *given)
    check_match("torch", q, 11, 1)
    check_match("torch", q, 11, 1, "alternate", (2, 3, 6), (1, 2, 4))
    check_match("torch", q, 11, 1, "frames", (2, 3, 6), (2, 2, 4))
    check_merge("torch", x, make_index(2, 37, 9), 9, **only(inputs, "size", "weight", "positions"))


@each("sized", [False, True])
def test_gradients_of_a_group_far_from_every_token_are_finite(sized):
    """Its mass is above 0 and 1 / mass above the range of float32, yet no gradient is large."""
    far = torch.tensor([[0.0] * 8, [3.4] * 8])
    size = torch.tensor([[1.0, 2.0, 0.0, 3.0, 1.0]]) if sized else None
    q = 0.01 * make_tokens(1, 5, 8, seed=1)

    def gradients(dtype, impl):
        leaves = [t.to(dtype).requires_grad_() for t in (make_tokens(1, 5, 6), q, far)]
        out = sttm.soft_merge(*leaves, "l2", size=None if size is None else size.to(dtype), impl=impl)
        return out.size, torch.autograd.grad((out.x * torch.arange(6)).sum() + out.size.sin().sum(), leaves)

    mass, found = gradients(torch.float32, "torch")
    _, truth = gradients(torch.float64, "reference")
    assert 0 < mass[0, 1] < 1 / torch.finfo(torch.float32).max
    for got, expected in zip(found, truth, strict=True):
        # A mass as small has only a few of its digits.
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
