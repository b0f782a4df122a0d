"""What a launch may ask of a GPU: blocks and shared memory."""

import math

import numpy as np
import pytest
import torch

from sttm_kernels import MergePlan, dispatch, functional
from sttm_kernels.impl import cuda
from sttm_kernels.testing import assert_equal, make_tokens

if not dispatch.on_host():
    pytest.skip("needs STTM_CUDA_HOST: runs in a process of its own", allow_module_level=True)

C = cuda._extension()
FLOAT, INT = np.float32, np.int32


def huge(dtype, *shape):
    """An array whose shape and strides say that it is dense. Its memory does not exist: nothing must touch it."""
    one = np.zeros(1, dtype)
    strides = np.cumprod([one.itemsize, *shape[:0:-1]])[::-1]
    return np.lib.stride_tricks.as_strided(one, shape, strides)


def unmerge(B, N):
    C.unmerge(huge(FLOAT, B, 1, 1), huge(INT, B, N), huge(FLOAT, B, N, 1), 0)


def merge_backward(B, N, D, reduce="mean"):
    rows, features = huge(FLOAT, B, 1), huge(FLOAT, B, 1, D)
    C.merge_backward(
        features, None, None, huge(FLOAT, B, N, D), huge(INT, B, N), 1, None, None, None, features, rows,
        huge(INT, B, N), huge(INT, B, 2), None, reduce, huge(FLOAT, B, N, D), None, None, None, None, 0,
    )  # fmt: skip


def match(B, N):
    tokens, metric = huge(INT, B, N), huge(FLOAT, B, N, 1)
    scratch = huge(INT, B * (cuda.MATCH_ROOM * N + 1))
    C.match(
        metric, None, None, None, None, 0, N, 0, -math.inf, False,
        tokens, huge(FLOAT, B, N), tokens, huge(INT, B, N + 1), scratch, None, 0,
    )  # fmt: skip


def assign(B, N):
    C.assign(
        huge(FLOAT, B, N, 1), huge(FLOAT, B, 1, 1), None, None, "dot", 1.0, False,
        None, huge(FLOAT, B, N), None, None, 0,
    )  # fmt: skip


def assign_backward(B, N, K, soft, of_meta):
    tokens, metas, rows = huge(FLOAT, B, N, 1), huge(FLOAT, B, K, 1), huge(FLOAT, B, N)
    lse = rows if soft else None
    scratch = huge(FLOAT, C.assign_scratch(tokens, metas))
    C.assign_backward(
        rows, lse, None, tokens, metas, huge(INT, B, N), rows, lse, None, None, None, None, None, "dot", 1.0, False,
        None if of_meta else tokens, metas if of_meta else None, scratch, 0,
    )  # fmt: skip


def soft_merge(B, N):
    tokens, metas = huge(FLOAT, B, N, 1), huge(FLOAT, B, 1, 1)
    C.soft_merge(
        tokens, tokens, metas, None, None, None, None, "dot", 1.0, True, False,
        metas, huge(FLOAT, B, 1), None, huge(FLOAT, B, N), huge(FLOAT, C.soft_merge_scratch(tokens, 1, 1, 2)), 0,
    )  # fmt: skip


def soft_merge_backward(B, N):
    tokens, metas = huge(FLOAT, B, N, 1), huge(FLOAT, B, 1, 1)
    C.soft_merge_backward(
        metas, None, None, tokens, tokens, metas, None, None, None, None, metas, huge(FLOAT, B, 1), None,
        huge(FLOAT, B, N), "dot", 1.0, True, False, tokens, None, None, None, None, None, None, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "shape", "blocks"),
    [
        (unmerge, (2**29, 2048), (2**32, 1)),
        (unmerge, (2**29, 2049), (9 * 2**29, 1)),
        (merge_backward, (2**17, 2**17, 1), (2**31, 1)),
        (merge_backward, (1, 1, 2**22 + 1, "max"), (1, 2**16 + 1)),
        (match, (2**20, 2**18), (2**31, 1)),
        (assign, (2**20, 2**20), (2**33, 1)),
        (assign_backward, (2**17, 2**18, 1, False, False), (2**33, 1)),
        (assign_backward, (2**17, 1, 2**18, False, True), (2**33, 1)),
        (assign_backward, (2**20, 2**18, 1, True, False), (2**32, 1)),
        (assign_backward, (2**20, 1, 2**18, True, True), (2**32, 1)),
        (soft_merge, (2**20, 2**20), (2**33, 1)),
        (soft_merge_backward, (2**20, 2**18), (2**32, 1)),
    ],
)
def test_more_blocks_than_a_grid_has(call, shape, blocks):
    needed = rf"the arrays of {call.__name__} are too large: a grid of {blocks[0]} x {blocks[1]} blocks is needed"
    with pytest.raises(ValueError, match=rf"{needed}, and 2147483647 x 65535 is the largest \(\w+ \(\d+, "):
        call(*shape)


def test_more_items_than_a_launch_of_merge_has():
    x = make_tokens(2**16 + 1, 2, 1)
    index = torch.zeros(2**16 + 1, 2, dtype=torch.int32)
    out = functional.merge(x, MergePlan(index, 1), reduce="max", impl="cuda")
    assert_equal("x", out.x, x.amax(1, keepdim=True))


@pytest.mark.parametrize("num_groups", [-1, 2**30, 2**31 - 1])
def test_groups_of_csr(num_groups):
    index = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="num_groups must be at least 0 and below 2"):
        C.csr(index, num_groups, index, index, index, 0)


@pytest.mark.parametrize(("N", "D", "K"), [(64, 64, 49), (256, 64, 49), (196, 256, 128)])
def test_shared_memory_of_assign_merge(N, D, K):
    """Static and dynamic together they are more than a block has unasked; the host build ends where nobody asked."""
    x, meta = (make_tokens(2, rows, D, torch.bfloat16, seed=rows) for rows in (N, K))
    out, plan = functional.assign_merge(x, None, meta, weight="uniform", impl="cuda")
    assert_equal("size", out.size.sum(), torch.tensor(2.0 * N))
    assert_equal("index", plan.index, functional.assign(x, meta, impl="cuda").index)
