"""Wrong arguments: the exact type of the error, and a message that names the argument."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sttm_kernels as sttm
from sttm_kernels import dispatch, export
from sttm_kernels.compat import tome, tomesd
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import assert_equal

B, N, K, D, C = 2, 12, 3, 4, 5
X = torch.randn(B, N, C)
Q = torch.randn(B, N, D)
META = torch.randn(B, K, D)
INDEX = torch.zeros(B, N, dtype=torch.int32)
PLAN = sttm.MergePlan(INDEX, K)
MASK = torch.ones(B, N, dtype=torch.bool)
ONE_EACH = torch.eye(2, N, dtype=torch.bool)
UNEVEN = torch.stack([MASK[0], ~MASK[0]])
GRID = (1, 3, 4)


def elsewhere(tensor):
    return tensor.to("meta")


def plan(index=INDEX, groups=K, **fields):
    return sttm.MergePlan(index, groups, **fields)


def at_random(**geometry):
    return sttm.match(Q, 2, partition="random2d", grid=GRID, **geometry)


def packed(lengths, r=1, metric=Q[0], **more):
    return sttm.match(metric, r, lengths=lengths, **more)


TABLE = [
    # assign
    (lambda: sttm.assign([1.0], META), TypeError, r"q must be a torch\.Tensor, got list"),
    (lambda: sttm.assign(Q.long(), META), TypeError, r"q must be float32, .*, got torch\.int64"),
    (lambda: sttm.assign(Q.to(torch.complex64), META), TypeError, r"q must be float32, .*complex64"),
    (lambda: sttm.assign(Q[0], META), ValueError, r"q must have shape \(B, N, D\).*, got \(12, 4\)"),
    (lambda: sttm.assign(Q[None, None], META), ValueError, r"q must have shape .*, got \(1, 1, 2, 12, 4\)"),
    (lambda: sttm.assign(Q[:, :0], META), ValueError, r"q must .*no empty dimension, got \(2, 0, 4\)"),
    (lambda: sttm.assign(Q[..., :0], META[..., :0]), ValueError, r"q must .*no empty dimension, got \(2, 12, 0\)"),
    (lambda: sttm.assign(Q[:, None][:, :0], META), ValueError, r"q must .*no empty dimension, got \(2, 0, 12, 4\)"),
    (lambda: sttm.assign(Q, None), TypeError, r"meta must be a torch\.Tensor, got NoneType"),
    (lambda: sttm.assign(Q, META.half()), TypeError, r"meta must have the dtype of q, torch\.float32, got .*float16"),
    (lambda: sttm.assign(Q, META[:, :0]), ValueError, r"meta must .*no empty dimension, got \(2, 0, 4\)"),
    (lambda: sttm.assign(Q, META[0, :0]), ValueError, r"meta must .*no empty dimension, got \(0, 4\)"),
    (lambda: sttm.assign(Q, META[..., :3]), ValueError, r"meta must have shape .* \(2, 3, 4\), got \(2, 3, 3\)"),
    (lambda: sttm.assign(Q, META[:1]), ValueError, r"meta must have shape .* \(2, 3, 4\), got \(1, 3, 4\)"),
    (lambda: sttm.assign(Q, META[0, 0]), ValueError, r"meta must have shape .*, got \(4\)"),
    (lambda: sttm.assign(Q, elsewhere(META)), ValueError, r"meta must be on the device of q, cpu, got meta"),
    (lambda: sttm.assign(Q, META, "euclidean"), ValueError, r"similarity must be one of .*'l2'.*, got 'euclidean'"),
    (lambda: sttm.assign(Q, META, similarity=None), ValueError, r"similarity must be one of .*, got None"),
    (lambda: sttm.assign(Q, META, temperature=0), ValueError, r"temperature must be positive and finite, got 0"),
    (lambda: sttm.assign(Q, META, temperature=-1.0), ValueError, r"temperature must be positive .*, got -1\.0"),
    (lambda: sttm.assign(Q, META, temperature=float("nan")), ValueError, r"temperature must be positive .*, got nan"),
    (lambda: sttm.assign(Q, META, temperature=float("inf")), ValueError, r"temperature must be .*finite, got inf"),
    (lambda: sttm.assign(Q, META, temperature="1"), TypeError, r"temperature must be a float, got str"),
    (lambda: sttm.assign(Q, META, temperature=True), TypeError, r"temperature must be a float, got bool"),
    (lambda: sttm.assign(Q, META, weight="hard"), ValueError, r"weight must be one of .*, got 'hard'"),
    (lambda: sttm.assign(Q, META, mask=MASK.int()), TypeError, r"mask must be bool, got torch\.int32"),
    (lambda: sttm.assign(Q, META, mask=[True]), TypeError, r"mask must be a torch\.Tensor, got list"),
    (lambda: sttm.assign(Q, META, mask=MASK[0]), ValueError, r"mask must have shape \(B, N\) = \(2, 12\), got \(12\)"),
    (lambda: sttm.assign(Q, META, mask=elsewhere(MASK)), ValueError, r"mask must be on the device of q, cpu"),
    # packed sequences
    (lambda: packed([5, 6]), ValueError, r"lengths must be the tokens of each sequence, 12 together, got \(5, 6\), 11"),
    (
        lambda: packed([0, 5, 12]),
        ValueError,
        r"lengths .* got \(0, 5, 12\), 17 together; of offsets, .* the differences",
    ),
    (
        lambda: torch.func.vmap(lambda q: packed([5, 7], metric=q, threshold=0.1).index)(Q),
        ValueError,
        r"lengths must be None in torch\.func\.vmap where a threshold or pack decides",
    ),
    (lambda: packed([13, -1]), ValueError, r"every number of lengths must be at least 0, got -1"),
    (lambda: packed([]), ValueError, r"lengths must be the tokens of each sequence, 12 together, got \(\), 0"),
    (lambda: packed(12), TypeError, r"lengths must be a sequence of ints or an integer tensor \(S,\), got int"),
    (lambda: packed([12.0]), TypeError, r"every number of lengths must be an int, got float"),
    (lambda: packed(torch.tensor([12.0])), TypeError, r"lengths must be integers, got torch\.float32"),
    (lambda: packed(torch.tensor([[12]])), ValueError, r"lengths must have shape \(S,\), got \(1, 1\)"),
    (
        lambda: packed(elsewhere(torch.tensor([12]))),
        ValueError,
        r"lengths must be on the CPU, .*, got a tensor on meta",
    ),
    (lambda: packed([12], mask=MASK[0]), ValueError, r"mask must be None with lengths"),
    (lambda: packed([12, 0], num_prefix=1), ValueError, r"num_prefix must be at most .* every sequence, got 1 for 0"),
    (lambda: packed([5, 7], r=[1]), ValueError, r"r must have S = 2 numbers, one for each item, got 1"),
    (lambda: packed([5, 7], r=1.5), ValueError, r"r must be in \[0, 1\] as a share .*, got 1\.5"),
    (lambda: packed([5, 7], partition=MASK), ValueError, r"partition must have shape \(T,\) = \(12\), got \(2, 12\)"),
    (
        lambda: packed([4, 8], partition="frames", grid=[GRID]),
        ValueError,
        r"grid must be .* each of the S = 2 sequences",
    ),
    (
        lambda: sttm.assign(Q[0], META[:1], lengths=[5, 7]),
        ValueError,
        r"meta must have S = 2 items, .*, got \(1, 3, 4\)",
    ),
    (
        lambda: sttm.assign(Q[0], META[0], lengths=[5, 7], meta_lengths=[1, 1]),
        ValueError,
        rf"meta_lengths must be the tokens of each sequence, {len(META[0])} together",
    ),
    (
        lambda: sttm.assign(Q[0], META[0], lengths=[5, 7], meta_lengths=[len(META[0])]),
        ValueError,
        r"meta_lengths must be at least 1 for each of the S = 2 sequences",
    ),
    (
        lambda: sttm.assign(Q, META, meta_lengths=[1, 1]),
        ValueError,
        r"meta_lengths must be None without lengths",
    ),
    (
        lambda: sttm.soft_merge(X[0], Q[0, :5], META, lengths=[5, 7]),
        ValueError,
        r"q must have the T = 12 tokens of x, got 5",
    ),
    (lambda: sttm.unmerge(X[0], packed([5, 7])), ValueError, r"x must have shape \(B, K, C\) = \(1, 10, 5\), got"),
    (
        lambda: sttm.merge(X[0], packed([5, 7]), size=X[:, :, 0]),
        ValueError,
        r"size must have shape \(T,\), got \(2, 12\)",
    ),
    (
        lambda: sttm.compose(packed([5, 7]), sttm.match(Q[0, :10], 1, lengths=[5, 5])),
        ValueError,
        r"plan2\.lengths must be plan1\.merged_lengths, \(4, 6\), got \(5, 5\)",
    ),
    (
        lambda: sttm.merge(X[0], dataclasses.replace(packed([5, 7]), lengths=(5, 8))),
        ValueError,
        r"plan\.lengths must be the tokens of each sequence, 12 together",
    ),
    # match
    (lambda: sttm.match("keys", 2), TypeError, r"metric must be a torch\.Tensor, got str"),
    (lambda: sttm.match(Q.to_sparse(), 2), TypeError, r"metric must be a dense tensor, .*, got torch\.sparse_coo"),
    (lambda: sttm.match(Q.int(), 2), TypeError, r"metric must be float32, .*int32"),
    (lambda: sttm.match(Q[0], 2), ValueError, r"metric must have shape .*, got \(12, 4\)"),
    (lambda: sttm.match(Q[:, :0], 2), ValueError, r"metric must .*no empty dimension"),
    (lambda: sttm.match(Q, -1), ValueError, r"r must be at least 0, got -1"),
    (lambda: sttm.match(Q, True), TypeError, r"r must be an int, got bool"),
    (lambda: sttm.match(Q, 0.5), TypeError, r"r must be an int, got float"),
    (lambda: sttm.match(Q, torch.tensor(2)), TypeError, r"r must be an int, got Tensor"),
    (lambda: sttm.match(Q, [2]), ValueError, r"r must have B = 2 numbers, one for each item, got 1"),
    (lambda: sttm.match(Q, [2, -1]), ValueError, r"every number of r must be at least 0, got -1"),
    (lambda: sttm.match(Q, [2, 0.5]), TypeError, r"every number of r must be an int, got float"),
    (lambda: sttm.match(Q, "ab"), TypeError, r"r must be an int, got str"),
    (lambda: sttm.match(Q, torch.tensor([2, 1, 0])), ValueError, r"r must have shape \(B,\) = \(2\), got \(3\)"),
    (lambda: sttm.match(Q, torch.ones(2)), TypeError, r"r must be integers, got torch\.float32"),
    (lambda: sttm.match(Q, elsewhere(torch.tensor([2, 1]))), ValueError, r"r must be on the CPU, .* on meta"),
    (lambda: sttm.match(Q, 2, mask=MASK.int()), TypeError, r"mask must be bool, got torch\.int32"),
    (lambda: sttm.match(Q, 2, mask=MASK[0]), ValueError, r"mask must have shape \(B, N\) = \(2, 12\), got \(12\)"),
    (lambda: sttm.match(Q, 2, mask=elsewhere(MASK)), ValueError, r"mask must be on the device of metric, cpu"),
    (lambda: sttm.match(Q, 2, threshold="0.9"), TypeError, r"threshold must be a float, got str"),
    (lambda: sttm.match(Q, 2, threshold=True), TypeError, r"threshold must be a float, got bool"),
    (lambda: sttm.match(Q, 2, threshold=float("nan")), ValueError, r"threshold must be finite, got nan"),
    (lambda: sttm.match(Q, 2, -1), ValueError, r"num_prefix must be at least 0, got -1"),
    (lambda: sttm.match(Q, 2, 13), ValueError, r"num_prefix must be at most N = 12, got 13"),
    (lambda: sttm.match(Q, 2, 1.0), TypeError, r"num_prefix must be an int, got float"),
    (lambda: sttm.match(Q, 2, partition="odd"), ValueError, r"partition must be one of .*, got 'odd'"),
    (lambda: sttm.match(Q, 2, partition=None), ValueError, r"partition must be one of .*, got None"),
    (lambda: sttm.match(Q, 2, partition=MASK.int()), TypeError, r"partition must be bool, got torch\.int32"),
    (lambda: sttm.match(Q, 2, partition=MASK[:, :5]), ValueError, r"partition must have shape .*, got \(2, 5\)"),
    (lambda: sttm.match(Q, 2, partition=MASK[:1]), ValueError, r"partition must have shape .*, got \(1, 12\)"),
    (lambda: sttm.match(Q, 2, partition=UNEVEN), ValueError, r"partition must have equally many dst .*, got \[12, 0\]"),
    (lambda: sttm.match(Q, 2, partition="frames"), ValueError, r"grid must be \(T, H, W\) .*'frames', got None"),
    (lambda: sttm.match(Q, 2, partition="random2d"), ValueError, r"grid must be \(T, H, W\) .*'random2d', got None"),
    (lambda: sttm.match(Q, 2, window=(1, 2, 2)), ValueError, r"grid must be \(T, H, W\) with window, got None"),
    (lambda: sttm.match(Q, 2, partition="frames", grid=(2, 2, 2)), ValueError, r"grid must hold .* 12 tokens, got"),
    (lambda: sttm.match(Q, 2, 1, grid=GRID, window=(1, 2, 2)), ValueError, r"grid must hold .* 11 tokens, got"),
    (lambda: sttm.match(Q, 2, grid=(12,), window=(1, 1, 2)), ValueError, r"grid must be .*, got \(12,\)"),
    (lambda: sttm.match(Q, 2, grid=12, window=(1, 1, 2)), ValueError, r"grid must be .*, got 12"),
    (lambda: sttm.match(Q, 2, grid=(1, 3, -4), window=(1, 1, 2)), ValueError, r"grid .*must be at least 1, got -4"),
    (lambda: sttm.match(Q, 2, grid=(1, 3, 4.0), window=(1, 1, 2)), TypeError, r"grid .*must be an int, got float"),
    (lambda: sttm.match(Q, 2, grid=GRID, window=(2, 2)), ValueError, r"window must be \(t, h, w\).*, got \(2, 2\)"),
    (lambda: sttm.match(Q, 2, grid=GRID, window=(0, 2, 2)), ValueError, r"window .*must be at least 1, got 0"),
    (lambda: sttm.match(Q, 2, grid=GRID, window="all"), ValueError, r"window must be \(t, h, w\).*, got 'all'"),
    (lambda: at_random(window=(1, 2, 2)), ValueError, r"window must be None with partition 'random2d'"),
    (lambda: at_random(generator=3), TypeError, r"generator must be a torch\.Generator or None, got int"),
    (lambda: at_random(cell=2), ValueError, r"cell must be \(sy, sx\).*, got 2"),
    (lambda: at_random(cell=(0, 2)), ValueError, r"cell .*at least 1, got 0"),
    (lambda: sttm.match(Q, 2, protect=3), TypeError, r"protect must be a bool mask \(N,\) or token indices, got int"),
    (lambda: sttm.match(Q, 2, protect="all"), TypeError, r"protect must be a bool mask .*, got str"),
    (lambda: sttm.match(Q, 2, protect=[1.0]), TypeError, r"every entry of protect must be an int, got float"),
    (lambda: sttm.match(Q, 2, protect=[True] * 12), TypeError, r"every entry of protect must be an int, got bool"),
    (lambda: sttm.match(Q, 2, protect=[-1]), ValueError, r"every entry of protect must be at least 0, got -1"),
    (lambda: sttm.match(Q, 2, protect=[3, 12]), ValueError, r"protect must hold tokens in \[0, N\), N = 12, got 12"),
    (lambda: sttm.match(Q, 2, protect=torch.tensor([-1])), ValueError, r"protect must hold .*, N = 12, got -1"),
    (lambda: sttm.match(Q, 2, protect=torch.ones(3)), TypeError, r"protect must be .* indices, got torch\.float32"),
    (lambda: sttm.match(Q, 2, protect=MASK), ValueError, r"protect must have shape \(N,\) = \(12\), got \(2, 12\)"),
    (lambda: sttm.match(Q, 2, protect=MASK.int()), ValueError, r"protect must have shape \(P,\), got \(2, 12\)"),
    (
        lambda: sttm.match(Q, 2, protect=elsewhere(MASK[0])),
        ValueError,
        r"protect must be on the CPU, .* on meta: .* list",
    ),
    (lambda: sttm.match(Q, 2, partition=ONE_EACH, protect=[1]), ValueError, r"partition must have .*, got \[1, 0\]"),
    # merge
    (lambda: sttm.merge(None, PLAN), TypeError, r"x must be a torch\.Tensor, got NoneType"),
    (lambda: sttm.merge(X.to_sparse(), PLAN), TypeError, r"x must be a dense tensor, .*, got torch\.sparse_coo"),
    (lambda: sttm.merge(X, PLAN, X[..., 0].to_sparse()), TypeError, r"size must be a dense tensor"),
    (lambda: sttm.merge(X.int(), PLAN), TypeError, r"x must be float32, .*int32"),
    (lambda: sttm.merge(X[0], PLAN), ValueError, r"x must have shape \(B, N, C\), got \(12, 5\)"),
    (lambda: sttm.merge(X[..., :0], PLAN), ValueError, r"x must .*no empty dimension, got \(2, 12, 0\)"),
    (lambda: sttm.merge(X, INDEX), TypeError, r"plan must be a MergePlan, got Tensor"),
    (lambda: sttm.merge(X, plan(INDEX.long())), TypeError, r"plan\.index must be int32, got torch\.int64"),
    (lambda: sttm.merge(X, plan([0])), TypeError, r"plan\.index must be a torch\.Tensor, got list"),
    (lambda: sttm.merge(X, plan(INDEX[0])), ValueError, r"plan\.index must have shape \(B, N\)"),
    (lambda: sttm.merge(X, plan(INDEX[:, :5])), ValueError, r"plan\.index must have shape .*\(2, 12\), got \(2, 5\)"),
    (lambda: sttm.merge(X, plan(elsewhere(INDEX))), ValueError, r"plan\.index must be on the device of x, cpu"),
    (lambda: sttm.merge(X, plan(groups=0)), ValueError, r"plan\.num_groups must be at least 1, got 0"),
    (lambda: sttm.merge(X, plan(groups=2.0)), TypeError, r"plan\.num_groups must be an int, got float"),
    (lambda: sttm.merge(X, plan(weight=X[0])), ValueError, r"plan\.weight must have shape \(B, N\)"),
    (
        lambda: sttm.merge(X, plan(weight=elsewhere(X[..., 0]))),
        ValueError,
        r"plan\.weight must be on the device of plan",
    ),
    (lambda: sttm.merge(X, plan(weight=1.0)), TypeError, r"plan\.weight must be a torch\.Tensor, got float"),
    (lambda: sttm.merge(X, plan(weight=INDEX)), TypeError, r"plan\.weight must be float32, .*int32"),
    (lambda: sttm.merge(X, plan(order=INDEX.long())), TypeError, r"plan\.order must be int32, got torch\.int64"),
    (lambda: sttm.merge(X, plan(order=INDEX[:, :4], offsets=INDEX[:, :4])), ValueError, r"plan\.order must have shape"),
    (lambda: sttm.merge(X, plan(order=INDEX, offsets=INDEX)), ValueError, r"plan\.offsets must have shape"),
    (lambda: sttm.merge(X, PLAN, size=3), TypeError, r"size must be a torch\.Tensor, got int"),
    (lambda: sttm.merge(X, PLAN, size=X), ValueError, r"size must have shape \(B, N\) = \(2, 12\), got \(2, 12, 5\)"),
    (lambda: sttm.merge(X, PLAN, size=elsewhere(X[..., 0])), ValueError, r"size must be on the device of x, cpu"),
    (lambda: sttm.merge(X, PLAN, positions=[[0.0]]), TypeError, r"positions must be a torch\.Tensor, got list"),
    (lambda: sttm.merge(X, PLAN, positions=X[0, 0]), ValueError, r"positions must have shape .*, got \(5\)"),
    (lambda: sttm.merge(X, PLAN, positions=X[:, :3]), ValueError, r"positions must have shape .*, got \(2, 3, 5\)"),
    (lambda: sttm.merge(X, PLAN, positions=X[..., :0]), ValueError, r"positions must .*no empty dimension"),
    (lambda: sttm.merge(X, PLAN, positions=elsewhere(X)), ValueError, r"positions must be on the device of x, cpu"),
    (lambda: sttm.merge(X, PLAN, reduce="median"), ValueError, r"reduce must be one of .*, got 'median'"),
    (lambda: sttm.merge(X, PLAN, fill=0.0), TypeError, r"fill must be a torch\.Tensor, got float"),
    (lambda: sttm.merge(X, PLAN, fill=X[:, :K].half()), TypeError, r"fill must have the dtype of x, torch\.float32"),
    (lambda: sttm.merge(X, PLAN, fill=X), ValueError, r"fill must have shape .*\(2, 3, 5\), got \(2, 12, 5\)"),
    (lambda: sttm.merge(X, PLAN, fill=elsewhere(X[:, :K])), ValueError, r"fill must be on the device of x, cpu"),
    # assign_merge
    (lambda: assign_merge(X[0], Q, META), ValueError, r"x must have shape \(B, N, C\), got \(12, 5\)"),
    (lambda: assign_merge(X, Q[:, :5], META), ValueError, r"q must have the B and N of x, \(2, 12\), got \(2, 5, 4\)"),
    (lambda: assign_merge(X, Q, META.half()), TypeError, r"meta must have the dtype of q"),
    (lambda: assign_merge(X, None, META), ValueError, r"meta must have shape .*\(2, 3, 5\), got \(2, 3, 4\)"),
    (lambda: assign_merge(X, Q, META, weight="hard"), ValueError, r"weight must be one of"),
    (lambda: assign_merge(X, Q, META, mask=MASK[0]), ValueError, r"mask must have shape"),
    (lambda: assign_merge(X, Q, META, size=X), ValueError, r"size must have shape"),
    (lambda: assign_merge(X, Q, META, positions=X[0, 0]), ValueError, r"positions must have shape"),
    (lambda: assign_merge(X, Q, META, fill=X), ValueError, r"fill must have shape"),
    # unmerge
    (lambda: sttm.unmerge(1.0, PLAN), TypeError, r"x must be a torch\.Tensor, got float"),
    (lambda: sttm.unmerge(X.long(), PLAN), TypeError, r"x must be float32, .*int64"),
    (lambda: sttm.unmerge(X, PLAN), ValueError, r"x must have shape \(B, K, C\) = \(2, 3, 5\), got \(2, 12, 5\)"),
    (lambda: sttm.unmerge(X[0], PLAN), ValueError, r"x must have shape \(B, K, C\), got \(12, 5\)"),
    (lambda: sttm.unmerge(X[:, :K], None), TypeError, r"plan must be a MergePlan, got NoneType"),
    (lambda: sttm.unmerge(X[:, :K], plan(elsewhere(INDEX))), ValueError, r"plan\.index must be on the device of x"),
    # compose
    (lambda: sttm.compose(INDEX, PLAN), TypeError, r"plan1 must be a MergePlan, got Tensor"),
    (lambda: sttm.compose(PLAN, INDEX), TypeError, r"plan2 must be a MergePlan, got Tensor"),
    (lambda: sttm.compose(PLAN, PLAN), ValueError, r"plan2\.index must have shape .*\(2, 3\), got \(2, 12\)"),
    (lambda: sttm.compose(PLAN, plan(elsewhere(INDEX[:, :K]), 1)), ValueError, r"plan2\.index must be on .*, got meta"),
    # soft_merge
    (lambda: sttm.soft_merge(X.int(), Q, META), TypeError, r"x must be float32, .*int32"),
    (lambda: sttm.soft_merge(X, Q.int(), META), TypeError, r"q must be float32, .*int32"),
    (lambda: sttm.soft_merge(X, Q, META.double()), TypeError, r"meta must have the dtype of q"),
    (lambda: sttm.soft_merge(X, Q[:, :5], META), ValueError, r"q must have the B and N of x, .*, got \(2, 5, 4\)"),
    (lambda: sttm.soft_merge(elsewhere(X), Q, META), ValueError, r"q must be on the device of x, meta, got cpu"),
    (lambda: sttm.soft_merge(X, Q, META, "manhattan"), ValueError, r"similarity must be one of"),
    (lambda: sttm.soft_merge(X, Q, META, temperature=0.0), ValueError, r"temperature must be positive"),
    (lambda: sttm.soft_merge(X, Q, META, normalize="both"), ValueError, r"normalize must be one of .*, got 'both'"),
    (lambda: sttm.soft_merge(X, Q, META, size=X), ValueError, r"size must have shape \(B, N\)"),
    (lambda: sttm.soft_merge(X, Q, META, positions=X[0, 0]), ValueError, r"positions must have shape"),
    (lambda: sttm.soft_merge(X, Q, META, mask=MASK.float()), TypeError, r"mask must be bool, got torch\.float32"),
    (lambda: sttm.soft_merge(X, Q, META, mask=MASK[:, :4]), ValueError, r"mask must have shape"),
    # impl
    (lambda: dispatch.why_not("scatter", "torch", "cpu"), ValueError, r"verb must be one of .*, got 'scatter'"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), TABLE, ids=[re.sub(r"[^\w. ]", "", m)[:50].strip() for _, _, m in TABLE]
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error


CALLS = {
    "assign": lambda impl: sttm.assign(Q, META, impl=impl),
    "match": lambda impl: sttm.match(Q, 2, impl=impl),
    "merge": lambda impl: sttm.merge(X, PLAN, impl=impl),
    "assign_merge": lambda impl: assign_merge(X, Q, META, impl=impl),
    "unmerge": lambda impl: sttm.unmerge(X[:, :K], PLAN, impl=impl),
    "compose": lambda impl: sttm.compose(PLAN, plan(INDEX[:, :K], 1), impl=impl),
    "soft_merge": lambda impl: sttm.soft_merge(X, Q, META, impl=impl),
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_an_implementation_that_cannot_run_says_why(verb, impl):
    reason = dispatch.why_not(verb, impl, "cpu")
    if reason is None:
        pytest.skip("Triton interprets its kernels on CPU tensors here")
    with pytest.raises(RuntimeError, match=f"^impl='{impl}' cannot run {verb}: {re.escape(reason)}$") as caught:
        CALLS[verb](impl)
    assert caught.type is RuntimeError


@pytest.mark.parametrize("verb", CALLS)
def test_an_unknown_implementation_is_named(verb):
    with pytest.raises(ValueError, match=r"impl must be one of .*'auto'.*'reference'.*, got 'gpu'"):
        CALLS[verb]("gpu")


@pytest.mark.parametrize("meta", sttm.nn.GENERATORS)
def test_an_empty_batch_goes_through_the_module(meta):
    merger = sttm.STTM(dim=C, meta=meta, num_prefix=1, temporal_window=2)
    out = merger(torch.randn(0, 1 + 4 * 2 * 2, C), grid=(4, 2, 2))
    groups = merger(torch.randn(1, 1 + 4 * 2 * 2, C), grid=(4, 2, 2)).x.shape[1]
    assert (out.x.shape, out.size.shape) == ((0, groups, C), (0, groups))


def test_numbers_of_numpy_are_taken():
    count = np.int64(4)
    assert_equal("index", sttm.match(Q, count, np.int32(1)).index, sttm.match(Q, 4, 1).index)
    windowed = sttm.match(Q, count, grid=tuple(np.array(GRID)), window=(np.int64(1), 2, 2))
    assert_equal("windowed", windowed.index, sttm.match(Q, 4, grid=GRID, window=(1, 2, 2)).index)
    assert_equal(
        "score", sttm.assign(Q, META, temperature=np.float32(0.5)).score, sttm.assign(Q, META, "cosine", 0.5).score
    )
    clip = torch.randn(1, 8, C)
    for keep in (np.int64(2), np.float32(0.5)):
        assert sttm.STTM(C, keep, np.float64(0.5))(clip, grid=(2, 2, 2)).x.shape == (1, 2, C)
    for wrong in (np.float64(4), np.bool_(True)):
        with pytest.raises(TypeError, match="r must be an int"):
            sttm.match(Q, wrong)


def test_a_device_is_judged_by_its_own_capability(monkeypatch):
    """With two GPUs of different kinds, whichever of them is current."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (9, 0))
    monkeypatch.setattr("sttm_kernels.impl.triton.why_not", lambda verb, device: None)
    dispatch.why_not.cache_clear()
    devices = [torch.device("cuda", i) for i in range(2)]
    newer, older = (dispatch.why_not("merge", "triton", device) for device in devices)
    dispatch.why_not.cache_clear()
    assert newer is None
    assert older == "the triton kernels need compute capability 8.0, this GPU has (7, 5)"


def messages_of(path: Path) -> list[str]:
    """Of the errors that a file raises for what it was given, the messages as they are written."""
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    calls = [
        each for each in raised if isinstance(each, ast.Call) and ast.unparse(each.func) in ("TypeError", "ValueError")
    ]
    return [ast.unparse(each.args[0]) for each in calls]


def test_every_message_says_what_it_got():
    """A model is no value that could be shown: there the message says what of it does not fit."""
    messages = [text for path in Path(sttm.__file__).parent.rglob("*.py") for text in messages_of(path)]
    said = [text for text in messages if " must " in text]
    assert len(said) > 100
    assert [text for text in said if "got " not in text and not re.match(r"""f?["']model must""", text)] == []


def public_names():
    for module in (sttm, sttm.nn):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__)
    for module in (export, tome, tomesd):
        own = {
            name: found for name, found in vars(module).items() if getattr(found, "__module__", "") == module.__name__
        }
        yield from ((f"{module.__name__}.{name}", found) for name, found in own.items() if not name.startswith("_"))


@pytest.mark.parametrize(("name", "found"), public_names(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_name_is_explained_with_its_arguments(name, found):
    """In its own docstring, or by the name of what it does in place of another package."""
    text = found.__doc__
    assert text, name
    if callable(found) and not isinstance(found, type) and not name.startswith("sttm_kernels.compat"):
        missing = [each for each in inspect.signature(found).parameters if each not in re.findall(r"\w+", text)]
        assert missing == [], name
