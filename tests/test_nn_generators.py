"""Meta-token generators: worked cases, exact counts, the same bits alone and in a batch, gradients, bad input."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from sttm_kernels.nn import DPCKNN, GENERATORS, Distinct, FarthestPoint, KMeans, Learned, Pool, TopK
from sttm_kernels.nn.generators import make, pool_plan
from sttm_kernels.testing import assert_equal, assert_within_budget, make_tokens

each_generator = pytest.mark.parametrize("name", sorted(GENERATORS))
CPU = torch.device("cpu")


def generator(name: str, dim: int, device: torch.device | str = CPU, impl: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    return make(name, dim, "cosine", impl).to(device)


def column(*values: float) -> Tensor:
    """One batch item of tokens with one feature each."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None]


# Pooling


@pytest.mark.parametrize("cells", ["square", "tall"])
def test_pool_plan_cuts_into_exactly_k_rectangles(cells):
    for rows, columns in itertools.product((1, 2, 3, 5, 7), repeat=2):
        for K in range(1, rows * columns + 1):
            plan = pool_plan(rows, columns, K, 2, cells, CPU)
            assert plan.num_groups == K
            assert plan.index.shape == (2, rows * columns)
            grid = plan.index[0].view(rows, columns)
            for k in range(K):
                at = (grid == k).nonzero()
                extent = at.amax(0) - at.amin(0) + 1
                assert len(at) == extent.prod(), (rows, columns, K, k)


def test_pool_plan_by_hand():
    def grid(*args: object) -> list[list[int]]:
        return pool_plan(*args, 1, cells, CPU).index.view(args[0], args[1]).tolist()

    cells = "square"
    assert grid(4, 4, 4) == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert grid(2, 8, 4) == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert grid(4, 3, 5) == [[0, 0, 0], [0, 0, 0], [1, 1, 2], [3, 3, 4]]
    cells = "tall"
    assert grid(4, 3, 6) == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert grid(4, 4, 4) == [[0, 1, 2, 3]] * 4
    assert grid(3, 4, 2) == [[0, 0, 1, 1]] * 3


def test_pool_is_the_mean_of_each_cell_weighted_by_size():
    q = column(1, 2, 3, 4, 10, 20, 30, 40)
    assert Pool()(q, 2, 4, 2).flatten().tolist() == [8.25, 19.25]
    size = torch.tensor([[1.0, 0, 0, 0, 3, 0, 0, 0]])
    assert Pool()(q, 2, 4, 2, size).flatten().tolist() == [(1 + 30) / 4, 0]


# k-means


def test_kmeans_moves_pooled_meta_tokens_onto_the_two_colours():
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    frame = torch.stack([red, red, red, blue])[None]  # the right cell is half red, half blue
    assert_equal("meta", KMeans(0)(frame, 1, 4, 2)[0, 1], (red + blue) / 2)
    assert_equal("meta", KMeans(1)(frame, 1, 4, 2)[0], torch.stack([red, blue]))


def test_kmeans_of_no_rounds_is_pooling_and_an_unchosen_meta_token_stays():
    q = make_tokens(2, 12, 5)
    assert_equal("meta", KMeans(0)(q, 3, 4, 5), Pool()(q, 3, 4, 5))
    same = torch.ones(1, 6, 3)
    assert_equal("meta", KMeans(3)(same, 2, 3, 4), torch.ones(1, 4, 3))


# Farthest points


def test_farthest_point_by_hand():
    points = FarthestPoint("l2")
    q = column(0, 1, 2, 10)  # the mean is 3.25: first 10, then 0, then 2 (4 from 0, 64 from 10)
    for K, expected in ((1, [10]), (2, [0, 10]), (3, [0, 2, 10]), (4, [0, 1, 2, 10])):
        assert points(q, 2, 2, K).flatten().tolist() == expected


def test_farthest_point_takes_the_lowest_index_on_a_tie_and_no_token_twice():
    points = FarthestPoint("l2")
    assert points(column(-1, 1), 1, 2, 1).flatten().tolist() == [-1]
    assert points(column(5, 5, 7, 5), 1, 4, 3).flatten().tolist() == [5, 5, 7]


def test_farthest_point_leaves_tokens_of_size_0_for_last():
    size = torch.tensor([[1.0, 1, 0, 1]])
    points = FarthestPoint("l2")
    assert points(column(0, 1, 99, 3), 1, 4, 2, size).flatten().tolist() == [0, 3]
    assert points(column(0, 1, 99, 3), 1, 4, 4, size).flatten().tolist() == [0, 1, 99, 3]


# Distinct tokens


def naive_distinct(q: Tensor, K: int, size: Tensor) -> list[int]:
    """The definition, token by token, for one item (N, D), by cosine."""
    q = q / q.norm(dim=-1, keepdim=True)
    novelty = []
    for n in range(len(q)):
        earlier = [(q[n] @ q[m]).item() for m in range(n) if size[m] != 0]
        novelty.append(-math.inf if size[n] == 0 else -max(earlier, default=-math.inf))
    return sorted(sorted(range(len(q)), key=lambda n: (-novelty[n], n))[:K])


@pytest.mark.parametrize("N", [1, 2, 3, 5, 9, 36, 61])
def test_distinct_is_its_definition(N):
    q = make_tokens(3, N, 4, torch.float64)
    size = torch.arange(3 * N).view(3, N) * 7 % 3 - 1.0
    for counts in (torch.ones(3, N), size):
        for K in {1, -(-N // 2), N}:
            meta = Distinct()(q, 1, N, K, None if counts is not size else size)
            expected = torch.stack([item[naive_distinct(item, K, of)] for item, of in zip(q, counts, strict=True)])
            assert_equal("meta", meta, expected)


def test_of_duplicates_the_first_is_distinct_and_ties_go_to_the_lowest_index():
    distinct = Distinct("l2")
    assert distinct(column(5, 5, 7, 5, 9), 1, 5, 3).flatten().tolist() == [5, 7, 9]
    size = torch.tensor([[0.0, 1, 1, 1, 1]])
    assert distinct(column(5, 5, 7, 5, 7), 1, 5, 2, size).flatten().tolist() == [5, 7]
    assert distinct(column(1, 1, 1, 1), 2, 2, 3).flatten().tolist() == [1, 1, 1]


# Learned saliency


def test_topk_scales_the_most_salient_tokens_about_the_mean():
    topk = TopK(1)
    nn.init.ones_(topk.saliency.weight)
    nn.init.constant_(topk.saliency.bias, -2.0)
    q = column(4, 0, 3, 5)
    expected = [3 + (value - 3) / (1 + math.exp(2 - value)) for value in (4, 5)]
    assert_within_budget("meta", topk(q, 2, 2, 2), torch.tensor(expected).double()[None, :, None], column(*expected), 4)


def test_topk_ties_go_to_the_lowest_index_in_token_order():
    topk = TopK(2)
    with torch.no_grad():
        topk.saliency.weight.copy_(torch.tensor([[1.0, 0.0]]))
    q = torch.tensor([[[1.0, 1], [9, 2], [1, 3], [1, 4]]])
    size = torch.tensor([[1.0, 0, 1, 1]])
    mean = q[0, [0, 2, 3]].mean(0)
    expected = mean + torch.sigmoid(1 + topk.saliency.bias) * (q[0, [0, 2]] - mean)
    assert_within_budget("meta", topk(q, 2, 2, 2, size)[0], expected.double(), expected, 3)


# Learned queries


def test_learned_is_one_cross_attention():
    learned = Learned(6, num_queries=4).double()
    q = make_tokens(2, 10, 6, torch.float64)
    size = torch.rand(2, 10, dtype=torch.float64).round() * 3
    size[:, 0] = 1
    logits = learned.queries @ learned.look_for.weight.T @ q.mT / math.sqrt(6)
    expected = learned.queries + (logits + size.log()[:, None]).softmax(-1) @ q
    assert_within_budget("meta", learned(q, 2, 5, 4, size), expected, expected, 60)


def test_learned_resizes_its_queries():
    learned = Learned(1, num_queries=2)
    with torch.no_grad():
        learned.queries.copy_(torch.tensor([[0.0], [8.0]]))
    for K, expected in ((1, [4]), (2, [0, 8]), (4, [0, 2, 6, 8])):
        assert learned(column(0, 0, 0, 0), 2, 2, K).flatten().tolist() == expected


# Density peaks


def naive_density_peaks(q: Tensor, K: int, neighbours: int) -> list[int]:
    """The definition, token by token, for one item (N, D)."""
    N, D = q.shape
    d = [[(q[i] - q[j]).square().sum().item() / D for j in range(N)] for i in range(N)]
    density = [math.exp(-sum(sorted(d[i][:i] + d[i][i + 1 :])[:neighbours]) / neighbours) for i in range(N)]
    score = []
    for i in range(N):
        denser = [d[i][j] for j in range(N) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * math.sqrt(min(denser) if denser else max(d[i])))
    return sorted(sorted(range(N), key=lambda i: (-score[i], i))[:K])


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
@pytest.mark.parametrize("neighbours", [1, 5])
def test_dpc_knn_is_its_definition(neighbours, similarity):
    q = make_tokens(3, 40, 4, torch.float64)
    places = 2 * torch.nn.functional.normalize(q, dim=-1) if similarity == "cosine" else q
    for K in (1, 2, 7, 40):
        meta = DPCKNN(neighbours, similarity)(q, 5, 8, K)
        chosen = [naive_density_peaks(item, K, neighbours) for item in places]
        assert_equal("meta", meta, torch.stack([item[tokens] for item, tokens in zip(q, chosen, strict=True)]))


def test_dpc_knn_by_cosine_knows_no_scale():
    q = make_tokens(2, 40, 8)
    assert_equal("meta", DPCKNN()(64 * q, 5, 8, 9), 64 * DPCKNN()(q, 5, 8, 9))
    assert not torch.equal(DPCKNN(similarity="l2")(64 * q, 5, 8, 9), 64 * DPCKNN(similarity="l2")(q, 5, 8, 9))


def test_dpc_knn_finds_one_peak_per_cluster_in_chunks_and_far_apart():
    cluster = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    centres = torch.tensor([0.0, 100.0, -300.0])
    q = torch.cat([cluster * 3 + centre for centre in centres])[None]
    meta = DPCKNN(similarity="l2")(q, 20, 30, 3)
    assert_equal("cluster", (meta.mean(-1).sort(1).values / 100).round(), torch.tensor([[-3.0, 0.0, 1.0]]))


def test_dpc_knn_ties_and_a_single_token():
    same = torch.ones(1, 6, 2)
    same[0, 4:] = 9
    chosen = torch.cat([same, torch.arange(6.0)[None, :, None]], -1)
    assert DPCKNN(1)(same, 2, 3, 2).shape == (1, 2, 2)
    assert_equal("meta", DPCKNN()(chosen[:, :1], 1, 1, 1), chosen[:, :1])


# All of them


@each_generator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_count_dtype_and_repeated_bits(name, dtype, backend):
    for verb in ("assign", "merge", "soft_merge"):
        backend.needs(verb, dtype)
    g = generator(name, 12, backend.device, backend.impl)
    for rows, columns in ((1, 1), (1, 7), (7, 1), (3, 5)):
        q = make_tokens(2, rows * columns, 12, dtype, backend.device)
        for K in {1, 2, 3, 7, rows * columns} & set(range(1, rows * columns + 1)):
            for cells in ("square", "tall"):
                meta = g(q, rows, columns, K, None, cells)
                assert meta.shape == (2, K, 12)
                assert meta.dtype == dtype
                assert meta.isfinite().all()
                assert_equal("meta", g(q, rows, columns, K, None, cells), meta)


@each_generator
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (14, 14, 49, 64), (8, 20, 30, 64)], ids=str)
def test_an_item_has_the_same_bits_alone_and_anywhere_in_a_batch(name, shape, backend):
    rows, columns, K, D = shape
    g = generator(name, D, backend.device, backend.impl)
    q = make_tokens(4, rows * columns, D, device=backend.device)
    size = torch.arange(4 * rows * columns, device=backend.device).view(4, -1) % 3.0
    order = torch.tensor([2, 0, 3, 1], device=backend.device)
    for counts in (None, size):
        meta = g(q, rows, columns, K, counts)
        shuffled = g(q[order], rows, columns, K, None if counts is None else counts[order])
        assert_equal("shuffled", shuffled, meta[order])
        for b in range(4):
            alone = g(q[b : b + 1], rows, columns, K, None if counts is None else counts[b : b + 1])
            assert_equal(f"item {b}", alone, meta[b : b + 1])


@each_generator
def test_tokens_of_size_0_count_for_nothing(name):
    g = generator(name, 6)
    q = make_tokens(2, 20, 6)
    size = (torch.arange(20) % 3 != 1).float().expand(2, -1) * 2
    other = torch.where((size == 0)[..., None], make_tokens(2, 20, 6, seed=5) * 10, q)
    assert_equal("meta", g(other, 4, 5, 8, size), g(q, 4, 5, 8, size))


@each_generator
def test_nan_gives_some_answer_of_the_right_shape(name):
    q = make_tokens(2, 12, 6)
    q[0, 3] = math.nan
    q[1] = math.nan
    assert generator(name, 6)(q, 3, 4, 5).shape == (2, 5, 6)


@each_generator
def test_gradients(name):
    g = generator(name, 3).double()
    q = make_tokens(1, 8, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: g(q, 2, 4, 3), q)
    g(q, 2, 4, 3).square().sum().backward()
    for parameter_name, parameter in g.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@each_generator
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor, got NoneType"),
        ({"q": torch.ones(2, 6, 4, dtype=torch.int32)}, TypeError, "q must be float32, bfloat16, float16 or float64"),
        ({"q": torch.ones(6, 4)}, ValueError, r"q must have shape \(B, N, D\), got \(6, 4\)"),
        ({"rows": 3}, ValueError, r"q must hold rows \* columns = 3 \* 3 tokens, got 6"),
        ({"num_meta": 0}, ValueError, "num_meta must be at least 1, got 0"),
        ({"num_meta": 7}, ValueError, "num_meta must be at most N = 6, got 7"),
        ({"num_meta": 2.0}, TypeError, "num_meta must be an int, got float"),
        ({"size": torch.ones(2, 5)}, ValueError, r"size must have shape \(B, N\) = \(2, 6\), got \(2, 5\)"),
    ],
)
def test_bad_inputs(name, change, error, message):
    arguments = {"q": torch.ones(2, 6, 4), "rows": 2, "columns": 3, "num_meta": 2, "size": None} | change
    with pytest.raises(error, match=message):
        generator(name, 4)(**arguments)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: KMeans(-1), ValueError, "rounds must be at least 0, got -1"),
        (lambda: KMeans(1, "euclid"), ValueError, "similarity must be one of"),
        (lambda: FarthestPoint("euclid"), ValueError, "similarity must be one of"),
        (lambda: Learned(6, num_queries=0), ValueError, "num_queries must be at least 1, got 0"),
        (lambda: DPCKNN(0), ValueError, "neighbours must be at least 1, got 0"),
        (lambda: Pool()(torch.ones(1, 6, 4), 2, 3, 2, None, "wide"), ValueError, "cells must be one of"),
    ],
)
def test_bad_settings(build, error, message):
    with pytest.raises(error, match=message):
        build()


@each_generator
def test_vmap_takes_all_at_once(name, capfd):
    made = generator(name, 6)
    q, size = make_tokens(6, 12, 6).unflatten(0, (3, 2)), torch.tensor([1.0, 0, 3, 1]).repeat(2, 3)
    alone = torch.stack([made(one, 3, 4, 5, size) for one in q])
    assert_equal("over q", torch.func.vmap(lambda one: made(one, 3, 4, 5, size))(q), alone)
    sizes = torch.stack([size, size.flip(1)])
    alone = torch.stack([made(q[0], 3, 4, 5, one) for one in sizes])
    assert_equal("over size", torch.func.vmap(lambda one: made(q[0], 3, 4, 5, one))(sizes), alone)
    assert "batching rule" not in capfd.readouterr().err  # PyTorch's warning of one after another
