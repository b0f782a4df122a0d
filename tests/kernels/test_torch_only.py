"""What only plain PyTorch has: tiles that bound the memory it takes."""

import pytest
import torch
from cases import SIMILARITIES, draw, each, only, short, temperature_of

from sttm_kernels import dispatch
from sttm_kernels.checks import check_assign, check_match, check_merge, check_soft_merge
from sttm_kernels.impl import eager
from sttm_kernels.testing import make_index

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
