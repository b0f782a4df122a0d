"""ToMe's and tomesd's functions against a slow, plain reading of what they do: one batch item, one token at a time."""

import pytest
import torch

from sttm_kernels.compat import tome, tomesd
from sttm_kernels.testing import assert_equal, make_tokens

REDUCE = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin, "prod": torch.prod}


def plain_groups(metric, src, dst, r):
    """The groups of one batch item as lists of tokens: `src` that stay and `dst`, each by token index."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    partner, score = {}, {}
    for s in src:
        similarity = [float(unit[s] @ unit[d]) for d in dst]
        score[s] = max(similarity)
        partner[s] = dst[similarity.index(score[s])]
    merged = set(sorted(src, key=lambda s: -score[s])[:r])
    groups = {token: [token] for token in [*src, *dst] if token not in merged}
    for s in sorted(merged):
        groups[partner[s]].append(s)
    return [sorted(groups[s]) for s in src if s not in merged], [sorted(groups[d]) for d in dst]


def plain_tome(metric, r, class_token, distill_token):
    N = metric.shape[0]
    r = min(r, (N - class_token - distill_token) // 2)
    src = [n for n in range(0, N, 2) if not (class_token and n == 0)]
    dst = [n for n in range(1, N, 2) if not (distill_token and n == 1)]
    kept, received = plain_groups(metric, src, dst, r)
    prefix = [[0]] * class_token + [[1]] * distill_token
    return prefix + kept + received


def groups_of(merge, N):
    """The groups that a merge makes, read off a merged identity, one list per batch item."""
    source = merge(torch.eye(N).expand(merge.plan.index.shape[0], -1, -1), mode="amax")
    return [[row.nonzero().flatten().tolist() for row in item] for item in source]


@pytest.mark.parametrize("mode", list(REDUCE))
@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("N", "r"), [(9, 1), (10, 3), (10, 50)])
def test_matching_and_every_mode(N, r, class_token, distill_token, mode):
    metric, x = make_tokens(2, N, 6), make_tokens(2, N, 5, seed=1)
    merge, unmerge = tome.bipartite_soft_matching(metric, r, class_token, distill_token)
    out = merge(x, mode=mode)
    back = unmerge(out)
    for b in range(2):
        groups = plain_tome(metric[b], r, class_token, distill_token)
        expected = torch.stack([REDUCE[mode](x[b, group], 0) for group in groups])
        torch.testing.assert_close(out[b], expected)
        for k, group in enumerate(groups):
            assert_equal("unmerged", back[b, group], out[b, k].expand(len(group), -1))


def test_a_distillation_token_alone():
    metric = make_tokens(2, 9, 6)
    merge, _ = tome.bipartite_soft_matching(metric, 3, distill_token=True)
    for b, groups in enumerate(groups_of(merge, 9)):
        assert [1] in groups
        expected = plain_tome(metric[b], 3, False, True)
        assert sorted(groups) == sorted(expected)


def test_nothing_to_merge():
    x = make_tokens(1, 4, 3)
    for merge, unmerge in (
        tome.bipartite_soft_matching(x, 0),
        tome.bipartite_soft_matching(x, -1),
        tome.bipartite_soft_matching(x[:, :1], 5),
        tome.kth_bipartite_soft_matching(x, 1),
        tome.random_bipartite_soft_matching(x, 0),
        tomesd.bipartite_soft_matching_random2d(x, 2, 2, 2, 2, 0),
        tomesd.bipartite_soft_matching_random2d(x, 4, 1, 2, 2, 3),
    ):
        assert merge(x, mode="sum") is x
        assert unmerge(x) is x


@pytest.mark.parametrize("k", [2, 3, 10])
def test_every_kth_token(k):
    metric, x = make_tokens(2, 10, 6), make_tokens(2, 10, 5, seed=1)
    merge, unmerge = tome.kth_bipartite_soft_matching(metric, k)
    N = 10 // k * k
    dst = list(range(k - 1, N, k))
    src = [n for n in range(N) if n not in dst]
    out = merge(x)
    assert unmerge(out).shape == (2, N, 5)
    for b in range(2):
        _, groups = plain_groups(metric[b], src, dst, len(src))
        torch.testing.assert_close(out[b], torch.stack([x[b, group].mean(0) for group in groups]))
    source = tome.merge_source(merge, x, dense=False)
    assert source.shape == (2, 10)
    assert bool((source[:, N:] == -1).all())


def test_random_tokens():
    metric = make_tokens(2, 12, 6)
    torch.manual_seed(3)
    merge, _ = tome.random_bipartite_soft_matching(metric, 5)
    torch.manual_seed(3)
    drawn = torch.rand(2, 12, 1).argsort(dim=1)[..., 0].tolist()
    for b, groups in enumerate(groups_of(merge, 12)):
        _, expected = plain_groups(metric[b], sorted(drawn[b][:5]), sorted(drawn[b][5:]), 5)
        assert groups == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_average(dtype):
    metric, x = make_tokens(2, 10, 6), make_tokens(2, 10, 5, dtype, seed=1)
    size = torch.randint(1, 9, (2, 10, 1)).to(dtype)
    merge, _ = tome.bipartite_soft_matching(metric, 4, class_token=True)
    for given in (None, size):
        out, count = tome.merge_wavg(merge, x, given)
        weight = torch.ones(2, 10, 1, dtype=dtype) if given is None else size
        assert (out.dtype, count.dtype, count.shape) == (dtype, dtype, (2, 6, 1))
        for b in range(2):
            for k, group in enumerate(plain_tome(metric[b], 4, True, False)):
                w = weight[b, group].double()
                assert float(count[b, k]) == float(w.sum())
                torch.testing.assert_close(out[b, k], ((w * x[b, group].double()).sum(0) / w.sum()).to(dtype))


def test_weighted_average_takes_any_merge_function():
    x = make_tokens(1, 4, 3)
    out, count = tome.merge_wavg(lambda x, mode: x.unflatten(1, (2, 2)).sum(2), x)
    torch.testing.assert_close(out, x.unflatten(1, (2, 2)).mean(2))
    assert count.flatten().tolist() == [2.0, 2.0]


def test_the_source_of_two_merges():
    x = make_tokens(2, 11, 6)
    first, _ = tome.bipartite_soft_matching(x, 3, class_token=True)
    y = first(x)
    second, _ = tome.bipartite_soft_matching(y, 2, class_token=True)
    dense = tome.merge_source(second, y, tome.merge_source(first, x))
    sparse = tome.merge_source(second, y, tome.merge_source(first, x, dense=False), dense=False)
    assert (dense.shape, sparse.dtype) == ((2, 6, 11), torch.int32)
    assert_equal("source", dense.argmax(1).int(), sparse)
    assert_equal("column sums", dense.sum(1), torch.ones(2, 11))


def test_integer_tokens_and_gradients():
    x = make_tokens(1, 6, 4).requires_grad_()
    merge, unmerge = tome.bipartite_soft_matching(x, 2)
    assert merge(torch.ones(1, 6, 1, dtype=torch.int64), mode="sum").sum() == 6
    (gradient,) = torch.autograd.grad(unmerge(merge(x, mode="sum")).sum(), x)
    counts = unmerge(merge(torch.ones(1, 6, 1), mode="sum"))
    assert_equal("gradient", gradient, counts.expand(-1, -1, 4))


@pytest.mark.parametrize(
    ("num_layers", "r", "expected"),
    [
        (4, 8, [8, 8, 8, 8]),
        (4, (8, 0.0), [8, 8, 8, 8]),
        (5, (8, -1.0), [16, 12, 8, 4, 0]),
        (5, (8, 1.0), [0, 4, 8, 12, 16]),
        (3, [5], [5, 0, 0]),
        (1, (8, 0.5), [4]),
    ],
)
def test_schedules(num_layers, r, expected):
    assert tome.parse_r(num_layers, r) == expected


@pytest.mark.parametrize(("h", "w", "sx", "sy"), [(4, 6, 2, 2), (5, 7, 2, 2), (5, 7, 3, 2)])
@pytest.mark.parametrize("r", [1, 9, 99])
@pytest.mark.parametrize("no_rand", [True, False])
def test_cells(h, w, sx, sy, r, no_rand):
    N = h * w
    metric = make_tokens(2, N, 6)
    rows, columns = h // sy, w // sx
    drawn = torch.zeros(rows, columns, dtype=torch.int64)
    if not no_rand:
        generator = torch.Generator().manual_seed(7)
        drawn = torch.randint(sy * sx, (rows, columns, 1), generator=generator)[..., 0]
    dst = sorted(
        (sy * i + int(drawn[i, j]) // sx) * w + sx * j + int(drawn[i, j]) % sx
        for i in range(rows)
        for j in range(columns)
    )
    src = [n for n in range(N) if n not in dst]
    generator = torch.Generator().manual_seed(7)
    merge, _ = tomesd.bipartite_soft_matching_random2d(metric, w, h, sx, sy, r, no_rand, generator)
    for b, groups in enumerate(groups_of(merge, N)):
        kept, received = plain_groups(metric[b], src, dst, min(r, len(src)))
        assert groups == kept + received


X = torch.zeros(1, 6, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tome.bipartite_soft_matching(X[0], 1), ValueError, r"metric must have shape .*got \(6, 4\)"),
        (lambda: tome.bipartite_soft_matching(X.long(), 1), TypeError, "metric must be float32"),
        (lambda: tome.kth_bipartite_soft_matching(X, 7), ValueError, "k must be at most .* 6, got 7"),
        (lambda: tome.random_bipartite_soft_matching(X, 6), ValueError, "r must be less than the number of tokens, 6"),
        (lambda: tome.bipartite_soft_matching(X, 1)[0](X[:, :5]), ValueError, r"x must have shape .*got \(1, 5, 4\)"),
        (lambda: tome.bipartite_soft_matching(X, 1)[0](X, "median"), ValueError, "mode must be one of"),
        (lambda: tome.merge_wavg(tome.bipartite_soft_matching(X, 1)[0], X, X), ValueError, "size must have shape"),
        (lambda: tome.merge_source(lambda x, mode: x, X, dense=False), TypeError, "merge must come from a matching"),
        (lambda: tome.parse_r(0, 1), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: tomesd.bipartite_soft_matching_random2d(X, 2, 2, 2, 2, 1), ValueError, r"h \* w = 4 tokens, got 6"),
        (lambda: tomesd.bipartite_soft_matching_random2d(X, 3, 2, 0, 2, 1), ValueError, "sx must be at least 1, got 0"),
    ],
)
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()
