"""Promises of docs/promises.md that no other test holds."""

import pytest
import torch

import sttm_kernels as sttm
from sttm_kernels.bench.timing import peak_bytes
from sttm_kernels.testing import make_tokens

N, K, D = 8192, 1024, 8
VERBS = {
    "assign": lambda q, meta, impl: sttm.assign(q, meta, impl=impl),
    "assign_merge": lambda q, meta, impl: sttm.assign_merge(q, None, meta, impl=impl),
    "match": lambda q, meta, impl: sttm.match(q, N // 4, impl=impl),
    "soft_merge": lambda q, meta, impl: sttm.soft_merge(q, q, meta, impl=impl),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("impl", ["torch", "auto"])
@pytest.mark.parametrize("verb", list(VERBS))
def test_no_matrix_of_similarities_is_written(verb, impl):
    q, meta = make_tokens(1, N, D), make_tokens(1, K, D, seed=1)
    matrix = 4 * N * (N // 2) // 2 if verb == "match" else 4 * N * K
    extra = peak_bytes(lambda: VERBS[verb](q, meta, impl), torch.device("cpu"))
    assert extra < matrix / 2
