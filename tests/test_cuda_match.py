"""match in CUDA C++ against the float64 reference: the similarities, the selection, the groups, and their CSR."""

import importlib

import pytest
import torch

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

DEVICE = "cpu" if dispatch.on_host() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs STTM_CUDA_HOST or an NVIDIA GPU", allow_module_level=True)
if dispatch.why_not("match", "cuda", DEVICE) is not None:
    pytest.skip(str(dispatch.why_not("match", "cuda", DEVICE)), allow_module_level=True)

cuda = importlib.import_module("sttm_kernels.impl.cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_LAUNCH = 2048  # kOneLaunch of csrc/include/sttm/match.cuh


def tokens(*args, **kwargs):
    return make_tokens(*args, device=DEVICE, **kwargs)


def check(metric, r, num_prefix=0, partition="alternate", grid=None, window=None):
    """Choices and score against the float64 reference, and the groups of those choices."""
    plan = match(metric, r, num_prefix, partition, grid, window, "cuda")
    N = metric.shape[-2]
    is_dst = splits.destinations(partition, N, num_prefix, grid, (2, 2), None, metric.device)
    block = None if window is None else splits.blocks(grid, window, metric.device)
    assert_match_within_budget(plan, metric, N - plan.num_groups, num_prefix, is_dst, block)
    return plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D", "r", "num_prefix"),
    [
        (1, 64, 1, 0),
        (2, 3, 1, 0),
        (3, 17, 1, 0),
        (16, 80, 5, 1),
        (33, 88, 16, 2),
        (70, 17, 0, 3),
        (5, 8, 9, 5),
        (127, 64, 60, 0),  # a tile of src less one; a tile of dst has 128
        (129, 24, 64, 1),
        (257, 16, 100, 5),
    ],
)
def test_alternate(N, D, r, num_prefix, dtype):
    check(tokens(2, N, D, dtype), r, num_prefix)


@pytest.mark.parametrize("r", [0, 1, 12, 24, 25, 1000])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_any_number_of_merges(r, num_prefix):
    check(tokens(1, 50, 8), r, num_prefix)


@pytest.mark.parametrize("D", [63, 129, 200])
def test_features_in_several_chunks(D):
    check(tokens(1, 40, D, torch.float16), 10)
    check(tokens(1, 40, D), 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [33, 270])
def test_mean_over_heads(N, dtype):
    """Within the kernel where few blocks read a dst, by a launch of its own where more do."""
    check(tokens(2, 3 * N, 20, dtype).view(2, 3, N, 20), N // 3, 1)
    check(tokens(1, N, 48, dtype).view(1, N, 3, 16).transpose(1, 2), N // 3, 1)


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced", "expanded"])
def test_layouts_are_read_in_place(layout):
    metric = guarded(tokens(2, 35, 24, layout=layout))
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
        ("alternate", (2, 9, 17), (2, 9, 17), 1),
        ("frames", (4, 3, 4), (2, 3, 3), 0),
        (mask_of(36, 9, 1), (2, 3, 6), (1, 3, 2), 0),
        (torch.ones(12, dtype=torch.bool), (2, 2, 3), (1, 2, 3), 0),
        (torch.zeros(12, dtype=torch.bool), None, None, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("r", [3, 1000])
def test_partitions_and_windows(partition, grid, window, num_prefix, r):
    N = partition.shape[-1] if grid is None else num_prefix + grid[0] * grid[1] * grid[2]
    check(tokens(2, N, 24), r, num_prefix, partition, grid, window)


def test_random2d():
    metric, grid = tokens(2, 49, 24), (2, 4, 6)
    draw = torch.Generator().manual_seed(5)
    is_dst = splits.destinations("random2d", 49, 1, grid, (2, 3), draw, metric.device)
    plan = match(metric, 20, 1, "random2d", grid, None, "cuda", cell=(2, 3), generator=draw.manual_seed(5))
    assert_match_within_budget(plan, metric, 20, 1, is_dst)


def test_more_tokens_than_one_launch_takes():
    check(tokens(2, ONE_LAUNCH + 151, 8, torch.float16), 700, 1)


@pytest.mark.parametrize("N", [ONE_LAUNCH - 1, ONE_LAUNCH, ONE_LAUNCH + 1])
def test_selection_with_many_equal_scores(N):
    """Scores of five values, in one launch or two: from the highest, and among equals the lowest token."""
    angle = torch.randint(5, (N,), generator=torch.Generator().manual_seed(N)) / 5
    metric = torch.stack([angle.cos(), angle.sin()], 1)
    metric[1::2] = torch.tensor([1.0, 0.0])
    plan = match(metric[None].to(DEVICE), 700, 0, impl="cuda")
    assert plan.score is not None
    score = plan.score[0, ::2].cpu()
    merged = (score + 0.0).argsort(descending=True, stable=True)[:700] * 2
    is_dst = torch.arange(N) % 2 == 1
    got, partner = assert_match_valid(plan, 700, 0, is_dst)
    assert_equal("merged", got[0].cpu().nonzero().flatten(), merged.sort().values)
    assert bool((partner[0, got[0]] == 1).all())  # every dst scores the same, so the lowest


def test_scores_of_every_sign_and_size_are_ranked():
    """Src i has cosine c_i with every dst: the r highest c merge."""
    c = torch.rand(30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    c[:6] = torch.tensor([1e-38, -1e-38, 1e-20, -1e-20, 1.0, -1.0])
    src = torch.stack([c, (1 - c * c).sqrt()], 1)
    metric = torch.stack([src, torch.tensor([1.0, 0.0]).expand(30, 2)], 1).reshape(1, 60, 2).to(DEVICE)
    plan = match(metric, 11, impl="cuda")
    assert plan.score is not None
    merged = (plan.index[0, ::2] >= 19).nonzero().flatten()
    expected = plan.score[0, ::2].argsort(descending=True, stable=True)[:11].sort().values
    assert_equal("merged", merged, expected)


@pytest.mark.parametrize("r", [1, 7, 19])
def test_equal_scores_go_to_the_lowest_token(r):
    """Copies of two directions: every src scores 1 with the first dst of its direction."""
    a, b = torch.eye(8)[:2]
    metric = torch.stack([a, a, b, a, a, b, a, b] * 5)[None].to(DEVICE)
    plan = check(metric, r)
    merged = (plan.index[0, ::2] >= 20 - r).nonzero().flatten()
    assert merged.tolist() == list(range(r))
    first_dst = 20 - r
    own = {0: first_dst, 1: first_dst + 2, 2: first_dst, 3: first_dst}
    assert plan.index[0, : 2 * r : 2].tolist() == [own[i % 4] for i in range(r)]


def test_a_tie_of_distant_dst_goes_to_the_lowest():
    """dst 40 and 130 belong to different warps, the first to the later one."""
    metric = torch.eye(2).repeat(1, 300, 1)
    metric[0, [2 * 40 + 1, 2 * 130 + 1]] = torch.tensor([1.0, 0.0])
    plan = match(metric.to(DEVICE), 300, impl="cuda")
    assert plan.index[0, ::2].unique().tolist() == [40]


def test_zero_of_either_sign_is_one_score():
    """Scores of 0 and of -0 are equal: the lower token merges first."""
    dst = torch.tensor([1.0, 0.0])
    metric = torch.stack([torch.tensor([sign * 0.0, 1.0]) for sign in (-1.0, 1.0, -1.0, 1.0)])
    metric = torch.stack([metric, dst.expand(4, 2)], 1).reshape(1, 8, 2).to(DEVICE)
    plan = match(metric, 2, impl="cuda")
    assert plan.index[0].tolist() == [2, 2, 2, 3, 0, 4, 1, 5]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0])
def test_ties_go_to_the_lowest_tokens(value):
    plan = match(torch.full((1, 8, 4), value, device=DEVICE), 2, impl="cuda")
    assert plan.index[0].tolist() == [2, 2, 2, 3, 0, 4, 1, 5]


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Everything the implementation allocates lies amid poison, which is looked at in the end."""
    made = []

    def amid_poison(allocate):
        def allocated(*args, **kwargs):
            made.append(guarded(allocate(*args, **kwargs)))
            return made[-1].tensor

        return allocated

    monkeypatch.setattr(torch.Tensor, "new_empty", amid_poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", amid_poison(torch.empty_like))
    yield made
    for one in made:
        one.check("output")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("window", [None, (1, 2, 3)])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_features_that_are_not_numbers(value, window, share, guarded_outputs):
    """Exactly r src merge, each into a dst it may meet, and nothing is written elsewhere."""
    bad = torch.rand(2, 36, 24, generator=torch.Generator().manual_seed(2)) < share
    metric = make_tokens(2, 36, 24).masked_fill(bad, value).to(DEVICE)
    plan = match(metric, 14, 0, "alternate", (2, 3, 6), window, "cuda")
    block = None if window is None else splits.blocks((2, 3, 6), window, metric.device)
    assert_match_valid(plan, 36 - plan.num_groups, 0, torch.arange(36) % 2 == 1, block)
    assert len(guarded_outputs) >= 4


def test_a_token_that_is_not_a_number_keeps_to_itself():
    """It merges last, and the others match as if it were not there."""
    metric = tokens(1, 40, 24)
    spoiled = metric.clone()
    spoiled[0, 4] = torch.nan
    spoiled[0, 7] = torch.nan
    metric[0, 7] = 0
    before, after = match(metric, 19, impl="cuda"), match(spoiled, 19, impl="cuda")
    assert before.score is not None
    assert after.score is not None
    assert int(after.index[0, 4]) < 1
    rest = (torch.arange(40) % 2 == 0) & (torch.arange(40) != 4)
    assert_equal("score", after.score[0, rest], before.score[0, rest])


@pytest.mark.parametrize(("N", "window"), [(36, None), (36, (1, 2, 3)), (150, None)])
def test_the_rest_of_the_batch_changes_no_bit(N, window):
    metric = tokens(3, N, 24)
    settings = (10, 0, "alternate", (2, 3, N // 6), window, "cuda")
    together, alone = match(metric, *settings), match(metric[1:2], *settings)
    for field in ("index", "score", "order", "offsets"):
        assert_equal(field, getattr(together, field)[1:2], getattr(alone, field))


def test_an_empty_batch():
    plan = match(tokens(0, 9, 8), 2, impl="cuda")
    assert plan.index.shape == (0, 9)
    assert plan.offsets is not None
    assert plan.offsets.shape == (0, 8)


@pytest.mark.parametrize("name", ["src", "dst"])
def test_lists_that_point_outside_are_not_followed(name):
    """The operator trusts nobody: such entries count as padding."""
    lists = {
        "src": torch.arange(0, 20, 2, dtype=torch.int32, device=DEVICE).view(1, 1, -1),
        "dst": torch.arange(1, 20, 2, dtype=torch.int32, device=DEVICE).view(1, 1, -1),
    }
    lists[name][0, 0, -1] = 20
    lists[name][0, 0, -2] = -7
    index, *_ = cuda.match(tokens(2, 20, 8), lists["src"], lists["dst"], 4, 0)
    assert bool(((index >= -1) & (index < 16)).all())


# The CSR


@pytest.mark.parametrize("kind", ["random", "even", "one", "none"])
@pytest.mark.parametrize(
    ("N", "K"),
    [(1, 1), (16, 40), (77, 5), (257, 255), (300, 256), (300, 1023), (300, 1024), (ONE_LAUNCH + 5, 3000)],
)
def test_tokens_are_sorted_by_group(N, K, kind):
    """By one digit or two, by small blocks or large ones; tokens without a group come last."""
    index = make_index(2, N, K, DEVICE, kind=kind)
    index[0, 0] = 2**31 - 1
    index[1, -1] = -(2**31)
    made = [guarded(index), *(guarded(torch.empty_like(index)) for _ in range(2))]
    made.append(guarded(index.new_empty(2, K + 1)))
    held, order, other, offsets = (one.tensor for one in made)
    cuda._extension().csr(held, K, order, offsets, other, cuda._stream(index))
    assert_order(torch.where((index < 0) | (index >= K), K, index), K, order, offsets)
    for one in made:
        one.check()
