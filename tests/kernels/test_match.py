"""match: partners, scores, groups and their CSR against the float64 specification; ties, and what is not a number."""

import math

import pytest
import torch
from cases import (
    NOT_NUMBERS,
    SHAPES,
    SMALL,
    each,
    each_dtype,
    each_layout,
    each_with_dtype,
    kernels_only,
    spoiled,
    unwritten,
)

import sttm_kernels as sttm
from sttm_kernels import functional
from sttm_kernels import partition as splits
from sttm_kernels.checks import check_match
from sttm_kernels.testing import (
    DTYPES,
    LAYOUTS,
    assert_equal,
    assert_match_valid,
    assert_match_within_budget,
    make_tokens,
)


def tokens(backend, *shape, **more):
    return make_tokens(*shape, device=backend.device, **more)


def match(backend, metric, *args, **more):
    return sttm.match(metric.to(backend.device), *args, impl=backend.impl, **more)


CASES = [  # B, N, D, num_prefix
    *((shape.B, shape.N, shape.D, 0) for shape in SHAPES),
    (2, 3, 17, 0),
    (2, 16, 80, 1),
    (2, 33, 88, 2),
    (2, 70, 17, 3),
    (2, 5, 8, 5),
    *([] if SMALL else [(2, 257, 16, 5), (2, 129, 24, 1)]),
]


@each_with_dtype("case", CASES)
def test_any_number_of_merges(backend, case, dtype):
    B, N, D, num_prefix = case
    metric = tokens(backend, B, N, D, dtype=dtype)
    half = (N - num_prefix) // 2
    for r in (N // 3, half) if SMALL else (0, 1, N // 4, half, half + 1, 1000):
        check_match(backend.impl, metric, r, num_prefix)


@each("num_prefix", [0, 1, 4])
def test_none_one_and_too_many_merges(backend, num_prefix):
    metric = tokens(backend, 1, 30, 8)
    for r in (0, 1, 15, 1000):
        check_match(backend.impl, metric, r, num_prefix)


@pytest.mark.shipped_blocks
@each_dtype
@each(("N", "D"), [(150, 64), (40, 63), (40, 129), (40, 200)])
def test_features_in_several_chunks(backend, N, D, dtype):
    check_match(backend.impl, tokens(backend, 1, N, D, dtype=dtype), N // 3, 1)


@each_dtype
@each("N", [33, 66 if SMALL else 270])
def test_mean_over_heads(backend, N, dtype):
    """Within a kernel where few programs read a dst, by a launch of its own where more do."""
    check_match(backend.impl, tokens(backend, 2, 3 * N, 20, dtype=dtype).view(2, 3, N, 20), N // 3, 1)
    interleaved = tokens(backend, 1, N, 48, dtype=dtype).view(1, N, 3, 16).transpose(1, 2)
    check_match(backend.impl, interleaved, N // 3, 1)


@each_layout
def test_layouts_are_read_in_place(backend, layout, dtype):
    num_prefix = (0, 1, 2, 5)[(LAYOUTS.index(layout) + DTYPES.index(dtype)) % 4]
    with unwritten({"metric": tokens(backend, 3, 38, 24, dtype=dtype, layout=layout)}) as held:
        check_match(backend.impl, held["metric"], 9, num_prefix)
        plan, packed = (match(backend, one, 9, num_prefix) for one in (held["metric"], held["metric"].contiguous()))
    if backend.impl != "torch":  # whose products have other bits for other strides
        assert_equal("score", plan.score, packed.score)


# Which tokens may meet


def mask_of(N, num_dst, seed=0):
    order = torch.rand(2, N, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return torch.zeros(2, N, dtype=torch.bool).scatter(1, order[:, :num_dst], True)


PLACES = [  # partition, grid, window, num_prefix
    ("frames", (3, 4, 5), None, 1),
    (mask_of(40, 7), None, None, 0),
    (mask_of(40, 7)[0], None, None, 0),
    (torch.ones(12, dtype=torch.bool), (2, 2, 3), (1, 2, 3), 0),
    (torch.ones(6, dtype=torch.bool), None, None, 2),
    (torch.zeros(12, dtype=torch.bool), None, None, 0),
    (torch.arange(6) == 5, None, None, 2),
    ("alternate", (3, 5, 6), (2, 2, 3), 1),
    ("frames", (4, 3, 4), (2, 3, 3), 0),
    (mask_of(36, 9, 1), (2, 3, 6), (1, 3, 2), 0),
    ("frames", (4, 3, 5), (4, 5, 7), 1),
    (torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask_of(60, 20)], 1), (4, 3, 5), (1, 2, 2), 1),
    *([] if SMALL else [("alternate", (2, 9, 17), (2, 9, 17), 1)]),
]


def name_of(place):
    return "-".join("mask" if isinstance(part, torch.Tensor) else str(part) for part in place)


@each_with_dtype("place", PLACES, ids=name_of)
def test_partitions_and_windows(backend, place, dtype):
    partition, grid, window, num_prefix = place
    N = partition.shape[-1] if grid is None else num_prefix + math.prod(grid)
    metric = tokens(backend, 2, N, 12, dtype=dtype, seed=3)
    for r in (7, 1000) if SMALL else (0, 3, 7, 1000):
        check_match(backend.impl, metric, r, num_prefix, partition, grid, window)


@each(("N", "grid", "cell"), [(91, (3, 5, 6), (2, 3)), (61, (3, 4, 5), (2, 2))])
def test_random2d_draws_what_the_specification_draws(backend, N, grid, cell):
    metric, generator = tokens(backend, 2, N, 24), torch.Generator()
    plan = match(backend, metric, 20, 1, "random2d", grid, cell=cell, generator=generator.manual_seed(7))
    is_dst = splits.destinations("random2d", N, 1, grid, cell, generator.manual_seed(7), torch.device("cpu"))
    assert_match_within_budget(plan, metric, min(20, int((~is_dst[0, 1:]).sum())), 1, is_dst)


# Protected tokens


def protected(N, share=0.25, seed=5):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share


GUARDED = [  # partition, grid, window, num_prefix, share that is protected
    ("alternate", None, None, 0, 0.25),
    ("alternate", None, None, 3, 0.8),
    ("frames", (3, 4, 5), None, 1, 0.25),
    (mask_of(40, 7), None, None, 2, 1.0),
    ("alternate", (3, 5, 6), (2, 2, 3), 1, 0.25),
    ("frames", (4, 3, 4), (2, 3, 3), 0, 0.25),
]


@each_with_dtype("case", GUARDED, ids=name_of)
def test_protected_tokens_are_alone_and_at_the_front(backend, case, dtype):
    partition, grid, window, num_prefix, share = case
    N = num_prefix + math.prod(grid) if grid else 40
    protect = protected(N, share)
    if isinstance(partition, torch.Tensor):
        protect = ~partition.any(0)  # as many dst in either row
        protect[5:9] = False
    metric = tokens(backend, 2, N, 12, dtype=dtype, seed=3)
    for r in (4, 1000) if SMALL else (0, 3, 7, 1000):
        check_match(backend.impl, metric, r, num_prefix, partition, grid, window, protect)


@each_dtype
def test_protection_of_several_heads_in_place(backend, dtype):
    metric = tokens(backend, 2, 38, 48, dtype=dtype).view(2, 38, 3, 16).transpose(1, 2)
    with unwritten({"metric": metric}) as held:
        check_match(backend.impl, held["metric"], 9, 1, protect=protected(38))


def test_ways_to_name_the_protected_tokens(backend):
    metric = tokens(backend, 2, 20, 8)
    expected = match(backend, metric, 4, protect=[3, 8, 19])
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[3, 8, 19]] = True
    for name, way in (
        ("mask", mask), ("indices", torch.tensor([19, 3, 8])), ("unordered", (8, 19, 3, 3)),
        ("int32", mask.nonzero()[:, 0].int()),
    ):  # fmt: skip
        plan = match(backend, metric, 4, protect=way)
        for field in ("index", "score", "order", "offsets"):
            assert_equal(f"{name} {field}", getattr(plan, field), getattr(expected, field))
    none = match(backend, metric, 4, protect=[])
    assert_equal("none", none.index, match(backend, metric, 4).index)
    with torch.inference_mode():
        assert_equal("inference", match(backend, metric, 4, protect=mask).index, expected.index)


# Equal scores


@each("r", [1, 7, 19])
def test_equal_scores_go_to_the_lowest_token(backend, r):
    """Copies of two directions: every src scores 1 with the first dst of its direction."""
    a, b = torch.eye(8)[:2]
    metric = torch.stack([a, a, b, a, a, b, a, b] * 5)[None].to(backend.device)
    check_match(backend.impl, metric, r)
    plan = match(backend, metric, r)
    assert (plan.index[0, ::2] >= 20 - r).nonzero().flatten().tolist() == list(range(r))
    first_dst = 20 - r
    own = {0: first_dst, 1: first_dst + 2, 2: first_dst, 3: first_dst}
    assert plan.index[0, : 2 * r : 2].tolist() == [own[i % 4] for i in range(r)]


@each_dtype
@each("value", [0.0, -0.0, 1.0])
def test_ties_go_to_the_lowest_tokens(backend, value, dtype):
    plan = match(backend, torch.full((1, 8, 4), value, dtype=dtype), 2)
    assert plan.index[0].tolist() == [2, 2, 2, 3, 0, 4, 1, 5]
    same = torch.ones(2, 50, 8, dtype=dtype, device=backend.device)
    plan, expected = match(backend, same, 11, 1), sttm.match(same, 11, 1, impl="reference")
    assert_equal("index", plan.index, expected.index)


def test_zero_of_either_sign_is_one_score(backend):
    """Scores of 0 and of -0 are equal: the lower token merges first."""
    metric = torch.stack([torch.tensor([sign * 0.0, 1.0]) for sign in (-1.0, 1.0, -1.0, 1.0)])
    metric = torch.stack([metric, torch.tensor([1.0, 0.0]).expand(4, 2)], 1).reshape(1, 8, 2)
    assert match(backend, metric, 2).index[0].tolist() == [2, 2, 2, 3, 0, 4, 1, 5]


def test_a_tie_of_distant_dst_goes_to_the_lowest(backend):
    """Of two dst of equal score, in tiles or warps far apart."""
    S, one, other = (60, 8, 50) if SMALL else (300, 40, 130)
    metric = torch.eye(2).repeat(1, S, 1)
    metric[0, [2 * one + 1, 2 * other + 1]] = torch.tensor([1.0, 0.0])
    assert match(backend, metric, S).index[0, ::2].unique().tolist() == [one]


@each("seed", range(3))
def test_scores_of_every_sign_and_size_are_ranked(backend, seed):
    """Src i has cosine c_i with every dst: the r highest c merge."""
    c = torch.rand(30, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    c[:6] = torch.tensor([1e-38, -1e-38, 1e-20, -1e-20, 1.0, -1.0])
    src = torch.stack([c, (1 - c * c).sqrt()], 1)
    metric = torch.stack([src, torch.tensor([1.0, 0.0]).expand(30, 2)], 1).reshape(1, 60, 2)
    plan = match(backend, metric, 11)
    merged = (plan.index[0, ::2] >= 19).nonzero().flatten()
    expected = plan.score[0, ::2].argsort(descending=True, stable=True)[:11].sort().values
    assert_equal("merged", merged, expected)


@each("N", [101, 102, 103] if SMALL else [2047, 2048, 2049])
def test_selection_with_many_equal_scores(backend, N):
    """Scores of five values: from the highest, and among equals the lowest token."""
    r, angle = N // 3, torch.randint(5, (N,), generator=torch.Generator().manual_seed(N)) / 5
    metric = torch.stack([angle.cos(), angle.sin()], 1)
    metric[1::2] = torch.tensor([1.0, 0.0])
    plan = match(backend, metric[None], r)
    merged = (plan.score[0, ::2].cpu() + 0.0).argsort(descending=True, stable=True)[:r] * 2
    got, partner = assert_match_valid(plan, r, 0, torch.arange(N) % 2 == 1)
    assert_equal("merged", got[0].cpu().nonzero().flatten(), merged.sort().values)
    assert bool((partner[0, got[0]] == 1).all())  # every dst scores the same, so the lowest


# What is not a number


@each("value", (*NOT_NUMBERS, None), ids=str)
@each("window", [None, (1, 2, 3)], ids=str)
@each("share", [0.1, 1.0])
def test_features_that_are_not_numbers_leave_a_plan(backend, value, window, share, outputs_amid_poison):
    """Exactly r src merge, each into a dst it may meet, and nothing is written elsewhere."""
    metric = spoiled(tokens(backend, 2, 36, 24), value, share)
    block = None if window is None else splits.blocks((2, 3, 6), window, torch.device("cpu"))
    for r in (14,) if SMALL else (0, 5, 14):
        with unwritten({"metric": metric}) as held:
            plan = match(backend, held["metric"], r, 0, "alternate", (2, 3, 6), window)
        assert_match_valid(plan, 36 - plan.num_groups, 0, torch.arange(36) % 2 == 1, block)
    if window is None:
        plan = match(backend, metric, 10, 0, "frames", (2, 3, 6))
        assert_match_valid(plan, 10, 0, torch.arange(36) >= 18)
    assert backend.impl == "torch" or len(outputs_amid_poison) >= 4


@kernels_only
def test_a_token_that_is_not_a_number_keeps_to_itself(backend):
    """It merges last, and the others match as if it were not there."""
    metric = tokens(backend, 1, 40, 24)
    spoiled = metric.clone()
    spoiled[0, [4, 7]] = torch.nan
    metric[0, 7] = 0
    before, after = match(backend, metric, 19), match(backend, spoiled, 19)
    assert int(after.index[0, 4]) < 1
    rest = (torch.arange(40) % 2 == 0) & (torch.arange(40) != 4)
    assert_equal("score", after.score[0, rest], before.score[0, rest])


@each("partition", ("alternate", "frames"))
def test_lists_that_follow_from_numbers_are_made_once(backend, partition, monkeypatch):
    """Also where the first call was made under inference mode; another grid has lists of its own."""
    metric = tokens(backend, 1, 24, 8)

    def call(metric, **geometry):
        return match(backend, metric, 4, partition=partition, **geometry)

    functional._kept.cache_clear()
    with torch.inference_mode():
        first = call(metric, grid=(2, 3, 4), window=(2, 1, 4))
    other = call(metric, grid=(4, 2, 3), window=(2, 1, 2))
    monkeypatch.setattr(splits, "window_lists", lambda *args: pytest.fail("made again"))
    again = call(metric.requires_grad_(), grid=(2, 3, 4), window=(2, 1, 4))
    assert_equal("index", again.index, first.index)
    assert_equal("index", call(metric, grid=(4, 2, 3), window=(2, 1, 2)).index, other.index)
    assert not torch.equal(other.index, first.index)
