"""match through Triton's interpreter, and its CSR: many small blocks, windows, ties, and what is not a number."""

import contextlib
import importlib

import pytest
import torch
from torch import Tensor

from sttm_kernels import dispatch
from sttm_kernels import partition as splits
from sttm_kernels.functional import match
from sttm_kernels.testing import (
    assert_equal,
    assert_match_valid,
    assert_match_within_budget,
    assert_order,
    guarded,
    make_index,
    make_tokens,
)

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

from sttm_kernels.impl.triton import config

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is not a number

csr = importlib.import_module("sttm_kernels.impl.triton.csr")
match_file = importlib.import_module("sttm_kernels.impl.triton.match")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL_BLOCKS = {
    "nearest": {"BLOCK_S": 16, "BLOCK_T": 16, "BLOCK_D": 16},
    "select": {"BLOCK": 64, "BLOCK_PAIRS": 16},
    "sort": {"BLOCK": 64, "BLOCK_PAIRS": 16},
    "count": {"BLOCK": 32, "BLOCK_PAIRS": 8},
    "place": {"BLOCK": 16},
    "mean_over_heads": {"BLOCK_N": 16, "BLOCK_D": 32},
}


@pytest.fixture
def blocks():
    """Many tiles in small tensors."""
    with contextlib.ExitStack() as stack:
        for name, sizes in SMALL_BLOCKS.items():
            stack.enter_context(config.forced(name, **sizes))
        yield


@pytest.fixture
def chunks(monkeypatch):
    """Sorts a few tokens as it would many thousands."""
    monkeypatch.setattr(csr, "ONE_PROGRAM", 8)
    monkeypatch.setattr(match_file, "ONE_PROGRAM", 8)
    monkeypatch.setattr(csr, "MAX_CHUNKS", 3)
    monkeypatch.setattr(csr, "LEAST_CHUNK", 16)


def check(metric, r, num_prefix=0, partition="alternate", grid=None, window=None):
    """Choices and score against the float64 reference, and the groups of those choices."""
    plan = match(metric, r, num_prefix, partition, grid, window, "triton")
    N = metric.shape[-2]
    is_dst = splits.destinations(partition, N, num_prefix, grid, (2, 2), None, metric.device)
    block = None if window is None else splits.blocks(grid, window, metric.device)
    assert_match_within_budget(plan, metric, N - plan.num_groups, num_prefix, is_dst, block)
    return plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "D", "r", "num_prefix"),
    [(1, 64, 1, 0), (2, 3, 1, 0), (16, 80, 5, 1), (33, 88, 16, 2), (65, 64, 20, 1), (70, 17, 0, 3), (5, 8, 9, 5)],
)
def test_alternate(N, D, r, num_prefix, dtype, blocks):
    check(make_tokens(2, N, D, dtype), r, num_prefix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [33, 66])
def test_mean_over_heads(N, dtype, blocks):
    """Within the kernel where few programs read a dst, by a launch of its own where more do."""
    metric = make_tokens(2, 3 * N, 20, dtype).view(2, 3, N, 20)
    check(metric, N // 3, 1)
    check(make_tokens(2, N, 60, dtype).view(2, N, 3, 20).transpose(1, 2), N // 3, 1)


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced", "expanded"])
def test_layouts_are_read_in_place(layout, blocks):
    metric = guarded(make_tokens(2, 35, 24, layout=layout))
    assert_equal("score", check(metric.tensor, 9, 1).score, check(metric.tensor.contiguous(), 9, 1).score)
    metric.check("metric")


def mask_of(N, num_dst, seed):
    order = torch.rand(2, N, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return torch.zeros(2, N, dtype=torch.bool).scatter(1, order[:, :num_dst], True)


@pytest.mark.parametrize(
    ("partition", "grid", "window", "num_prefix"),
    [
        ("frames", (3, 4, 5), None, 1),
        (mask_of(40, 7, 0), None, None, 0),
        ("alternate", (3, 5, 6), (2, 2, 3), 1),
        ("frames", (4, 3, 4), (2, 3, 3), 0),
        (mask_of(36, 9, 1), (2, 3, 6), (1, 3, 2), 0),
        (torch.ones(12, dtype=torch.bool), (2, 2, 3), (1, 2, 3), 0),
        (torch.zeros(12, dtype=torch.bool), None, None, 0),
    ],
)
@pytest.mark.parametrize("r", [3, 1000])
def test_partitions_and_windows(partition, grid, window, num_prefix, r, blocks):
    N = partition.shape[-1] if grid is None else num_prefix + grid[0] * grid[1] * grid[2]
    check(make_tokens(2, N, 24), r, num_prefix, partition, grid, window)


def test_random2d(blocks):
    metric, draw = make_tokens(2, 61, 24), torch.Generator()
    plan = match(metric, 20, 1, "random2d", (3, 4, 5), impl="triton", generator=draw.manual_seed(3))
    is_dst = splits.destinations("random2d", 61, 1, (3, 4, 5), (2, 2), draw.manual_seed(3), metric.device)
    assert_match_within_budget(plan, metric, 20, 1, is_dst)


@pytest.mark.parametrize("r", [1, 7, 19])
def test_equal_scores_go_to_the_lowest_token(r, blocks):
    """Copies of two directions: every src scores 1 with the first dst of its direction."""
    a, b = torch.eye(8)[:2]
    metric = torch.stack([a, a, b, a, a, b, a, b] * 5)[None]
    plan = check(metric, r)
    merged = (plan.index[0, ::2] >= 20 - r).nonzero().flatten()
    assert merged.tolist() == list(range(r))
    first_dst = 20 - r
    own = {0: first_dst, 1: first_dst + 2, 2: first_dst, 3: first_dst}
    assert plan.index[0, : 2 * r : 2].tolist() == [own[i % 4] for i in range(r)]


def test_zero_of_either_sign_is_one_score(blocks):
    """Scores of 0 and of -0 are equal: the lower token merges first."""
    dst = torch.tensor([1.0, 0.0])
    metric = torch.stack([torch.tensor([sign * 0.0, 1.0]) for sign in (-1.0, 1.0, -1.0, 1.0)])
    metric = torch.stack([metric, dst.expand(4, 2)], 1).reshape(1, 8, 2)
    plan = match(metric, 2, impl="triton")
    assert plan.index[0].tolist() == [2, 2, 2, 3, 0, 4, 1, 5]


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_every_sign_and_size_are_ranked(seed, blocks):
    """Src i has cosine c_i with every dst: the r highest c merge."""
    c = torch.rand(30, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    c[:6] = torch.tensor([1e-38, -1e-38, 1e-20, -1e-20, 1.0, -1.0])
    src = torch.stack([c, (1 - c * c).sqrt()], 1)
    metric = torch.stack([src, torch.tensor([1.0, 0.0]).expand(30, 2)], 1).reshape(1, 60, 2)
    plan = match(metric, 11, impl="triton")
    merged = (plan.index[0, ::2] >= 19).nonzero().flatten()
    expected = plan.score[0, ::2].argsort(descending=True, stable=True)[:11].sort().values
    assert_equal("merged", merged, expected)


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Everything the implementation allocates lies amid poison, which is looked at in the end."""
    made = []

    def amid_poison(allocate):
        def allocated(*args, **kwargs):
            made.append(guarded(allocate(*args, **kwargs)))
            return made[-1].tensor

        return allocated

    monkeypatch.setattr(Tensor, "new_empty", amid_poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", amid_poison(torch.empty_like))
    yield made
    for one in made:
        one.check("output")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("window", [None, (1, 2, 3)])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_features_that_are_not_numbers(value, window, share, blocks, guarded_outputs):
    """Exactly r src merge, each into a dst it may meet, and nothing is written elsewhere."""
    bad = torch.rand(2, 36, 24, generator=torch.Generator().manual_seed(2)) < share
    metric = make_tokens(2, 36, 24).masked_fill(bad, value)
    plan = match(metric, 14, 0, "alternate", (2, 3, 6), window, "triton")
    block = None if window is None else splits.blocks((2, 3, 6), window, metric.device)
    assert_match_valid(plan, 36 - plan.num_groups, 0, torch.arange(36) % 2 == 1, block)
    assert len(guarded_outputs) >= 5


def test_a_token_that_is_not_a_number_keeps_to_itself(blocks):
    """It merges last, and the others match as if it were not there."""
    metric = make_tokens(1, 40, 24)
    spoiled = metric.clone()
    spoiled[0, 4] = torch.nan
    spoiled[0, 7] = torch.nan
    metric[0, 7] = 0
    before, after = match(metric, 19, impl="triton"), match(spoiled, 19, impl="triton")
    assert after.index[0, 4] < 1
    rest = (torch.arange(40) % 2 == 0) & (torch.arange(40) != 4)
    assert_equal("score", after.score[0, rest], before.score[0, rest])


@pytest.mark.parametrize("window", [None, (1, 2, 3)])
def test_the_rest_of_the_batch_changes_no_bit(window, blocks):
    metric = make_tokens(3, 36, 24)
    settings = (10, 0, "alternate", (2, 3, 6), window, "triton")
    together, alone = match(metric, *settings), match(metric[1:2], *settings)
    for field in ("index", "score", "order", "offsets"):
        assert_equal(field, getattr(together, field)[1:2], getattr(alone, field))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_blocks(dtype):
    check(make_tokens(2, 150, 64, dtype), 60, 1)


def test_shipped_blocks_of_wide_features():
    check(make_tokens(1, 40, 200, torch.float16), 10)


def test_an_empty_batch():
    plan = match(make_tokens(0, 9, 8), 2, impl="triton")
    assert plan.index.shape == (0, 9)
    assert plan.offsets is not None
    assert plan.offsets.shape == (0, 8)


# The CSR


def test_long_sequences_are_sorted_in_chunks(blocks, chunks):
    check(make_tokens(2, 75, 16), 30, 1)


@pytest.mark.parametrize("kind", ["random", "even", "one", "none"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 40), (77, 5), (100, 33)])
@pytest.mark.parametrize("chunked", [False, True])
def test_tokens_are_sorted_by_group(N, K, kind, chunked, blocks, request, guarded_outputs):
    """Those without a group come last, also where the index points far outside."""
    if chunked:
        request.getfixturevalue("chunks")
    index = make_index(2, N, K, kind=kind)
    index[0, 0] = 2**31 - 1
    index[1, -1] = -(2**31)
    held = guarded(index)
    order, offsets = csr.parts(csr.csr(held.tensor, K), *held.tensor.shape, K)
    grouped = torch.where((index < 0) | (index >= K), K, index)
    assert_order(grouped, K, order, offsets)
    held.check("index")
    assert guarded_outputs
