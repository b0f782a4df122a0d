"""The specification against cases worked out by hand, against plain loops, and its gradients against differences."""

import math
import random
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import sttm_kernels as sttm
from sttm_kernels import partition
from sttm_kernels.testing import make_index, make_tokens

F64 = torch.float64


def rows(*values) -> Tensor:
    """A batch of one item."""
    return torch.tensor([values], dtype=F64)


def at_angles(*degrees: float) -> Tensor:
    """Unit vectors (1, N, 2): the cosine similarity of two tokens is the cosine of the angle between them."""
    angle = torch.tensor([degrees], dtype=F64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], -1)


def plan_of(*index: int, groups: int, weight: Tensor | None = None) -> sttm.MergePlan:
    return sttm.MergePlan(torch.tensor([index], dtype=torch.int32), groups, weight=weight)


assign, match, merge, unmerge, compose, soft_merge = (
    partial(verb, impl="reference")
    for verb in (sttm.assign, sttm.match, sttm.merge, sttm.unmerge, sttm.compose, sttm.soft_merge)
)


# assign


def test_assign_dot_by_hand():
    plan = assign(rows([1, 0], [0, 2], [1, 1]), rows([1, 0], [0, 1]), similarity="dot")
    e = math.e
    assert plan.index.tolist() == [[0, 1, 0]]  # S = [[1, 0], [0, 2], [1, 1]]; the tie goes to the lowest
    assert plan.index.dtype == torch.int32
    assert plan.num_groups == 2
    torch.testing.assert_close(plan.score, torch.tensor([[1.0, 2.0, 1.0]], dtype=F64))
    torch.testing.assert_close(
        plan.lse, torch.tensor([[math.log(e + 1), math.log(1 + e * e), 1 + math.log(2)]], dtype=F64)
    )
    torch.testing.assert_close(plan.weight, torch.tensor([[e / (e + 1), e * e / (1 + e * e), 0.5]], dtype=F64))


def test_assign_l2_by_hand():
    plan = assign(rows([1, 0], [0, 2], [1, 1]), rows([0, 1], [1, 0]), similarity="l2", weight="uniform")
    assert plan.index.tolist() == [[1, 0, 0]]  # S = [[-2, 0], [-1, -5], [-1, -1]]
    assert plan.score.tolist() == [[0, -1, -1]]
    assert plan.lse is None
    assert plan.weight is None


def test_assign_cosine_by_hand():
    plan = assign(rows([3, 4], [0, -7], [0, 0]), rows([0, 10], [2, 0], [0, 0]))
    assert plan.index.tolist() == [[0, 1, 0]]  # S = [[.8, .6, 0], [-1, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(plan.score, torch.tensor([[0.8, 0.0, 0.0]], dtype=F64))
    assert plan.weight[0, 2].item() == pytest.approx(1 / 3)


def test_assign_temperature_divides():
    plan = assign(rows([1, 0]), rows([1, 0], [0, 1]), similarity="dot", temperature=0.5)
    assert plan.score.item() == 2
    assert plan.lse.item() == pytest.approx(math.log(math.exp(2) + 1))


def test_assign_ties_go_to_the_lowest():
    meta = rows([0, 1], [1, 0], [1, 0], [1, 0], [0, 1])
    assert assign(rows([1, 0], [0, 1]), meta).index.tolist() == [[1, 0]]


def test_assign_mask():
    mask = torch.tensor([[True, False, True]])
    plan = assign(rows([1, 0], [0, 2], [1, 1]), rows([1, 0], [0, 1]), mask=mask)
    assert plan.index.tolist() == [[0, -1, 0]]
    for value in (plan.score, plan.lse, plan.weight):
        assert value[0, 1] == 0
        assert (value[0, [0, 2]] != 0).all()


def test_assign_one_token_one_meta_token():
    plan = assign(rows([5.0]), rows([-2.0]))
    assert (plan.index.item(), plan.score.item(), plan.weight.item()) == (0, -1, 1)


def test_assign_takes_the_mean_over_heads():
    q = torch.stack([rows([2, 0], [0, 0]), rows([0, 0], [0, 4])], 1)  # mean: [[1, 0], [0, 2]]
    plan = assign(q, torch.tensor([[1, 0], [0, 1]], dtype=F64), similarity="dot")
    assert plan.index.tolist() == [[0, 1]]
    assert plan.score.tolist() == [[1, 2]]


def test_assign_keeps_large_scores_finite():
    plan = assign(rows([1000.0], [-1000.0]), rows([1000.0], [-1000.0]), similarity="dot")
    assert plan.index.tolist() == [[0, 1]]
    assert plan.weight.tolist() == [[1, 1]]


# match

SIX = at_angles(0, 5, 90, 110, 45, 55)  # src 0, 2, 4 lie 5, 20 and 10 degrees from dst 1, 3 and 5


def test_match_by_hand():
    plan = match(SIX, 2)
    assert plan.num_groups == 4
    assert plan.index.tolist() == [[1, 1, 0, 2, 3, 3]]  # 2 is left over and comes first, then dst 1, 3, 5
    assert plan.index.dtype == torch.int32
    score = torch.tensor([[math.cos(math.radians(d)) for d in (5, 20, 10)]], dtype=F64)
    torch.testing.assert_close(plan.score[:, ::2], score)
    assert (plan.score[:, 1::2] == -math.inf).all()
    assert plan.weight is None


def test_match_by_hand_of_real_tokens():
    mask = torch.tensor([[True] * 5 + [False]])
    plan = match(SIX, 2, mask=mask)  # as of five tokens: src 0, 2, 4, of which 4 is 45 degrees from dst 1 or 3
    assert plan.num_groups == 4
    assert plan.index.tolist() == [[1, 1, 2, 2, 0, -1]]
    assert plan.score[0, 5] == -math.inf
    torch.testing.assert_close(plan.score[0, 4], torch.tensor(math.cos(math.radians(40)), dtype=F64))
    one = match(SIX, 3, mask=torch.tensor([[True, True, False, False, False, False]]))
    assert one.num_groups == 3
    assert one.index.tolist() == [[0, 0, -1, -1, -1, -1]]


def test_match_by_hand_above_a_threshold():
    eleven_degrees = math.cos(math.radians(11))
    plan = match(SIX, 3, threshold=eleven_degrees)
    assert plan.num_groups == 6
    assert plan.index.tolist() == [[1, 1, 0, 2, 3, 3]]
    assert match(SIX, 1, threshold=eleven_degrees).index.tolist() == [[2, 2, 0, 3, 1, 4]]


def test_match_by_hand_a_number_for_each_item():
    plan = match(SIX.expand(3, -1, -1), [2, 0, 1])
    assert plan.num_groups == 6
    assert plan.index.tolist() == [[1, 1, 0, 2, 3, 3], [0, 3, 1, 4, 2, 5], [2, 2, 0, 3, 1, 4]]


def test_match_nothing_still_orders_groups():
    assert match(SIX, 0).index.tolist() == [[0, 3, 1, 4, 2, 5]]


@pytest.mark.parametrize("r", [3, 4, 1000])
def test_match_clamps_r(r):
    plan = match(SIX, r)
    assert plan.num_groups == 3
    assert plan.index.tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("N", "num_prefix", "most"), [(1, 0, 0), (2, 0, 1), (5, 0, 2), (5, 1, 2), (6, 1, 2), (4, 4, 0)]
)
def test_match_clamps_r_as_tome(N, num_prefix, most):
    assert match(make_tokens(1, N, 4), 99, num_prefix).num_groups == N - most


def test_match_ties_go_to_the_lower_token():
    same = torch.ones(1, 8, 3)
    assert match(same, 2).index.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]]  # src 0, 2 merge, and into the first dst


def test_match_zero_rows_have_similarity_zero():
    metric = torch.zeros(1, 4, 2)
    metric[0, 2] = torch.tensor([1.0, 0.0])
    metric[0, 3] = torch.tensor([-1.0, 0.0])
    plan = match(metric, 1)
    assert plan.score[0, [0, 2]].tolist() == [0, 0]
    assert plan.index.tolist() == [[1, 1, 0, 2]]


def test_match_prefix_stays_and_positions_count_from_the_first_token():
    metric = at_angles(0, 0, 5, 90, 100, 45)  # with a prefix of 1: src 2, 4; dst 1, 3, 5
    plan = match(metric, 1, num_prefix=1)
    assert plan.index.tolist() == [[0, 2, 2, 3, 1, 4]]
    assert (plan.score[0, [0, 1, 3, 5]] == -math.inf).all()
    metric = at_angles(0, 0, 5, 90, 100, 45)  # with a prefix of 2: src 2, 4; dst 3, 5
    assert match(metric, 1, num_prefix=2).index.tolist() == [[0, 1, 2, 3, 3, 4]]


def test_match_frames_by_hand():
    metric = at_angles(0, 90, 80, 4, 20, 60)  # frames (0, 1), (2, 3), (4, 5): src 0, 1, 4, 5, dst 2, 3
    plan = match(metric, 2, partition="frames", grid=(3, 1, 2))
    assert plan.index.tolist() == [[3, 2, 2, 3, 0, 1]]  # gaps: 0-3 4, 1-2 10, 4-3 16, 5-2 20 degrees
    with_prefix = match(torch.cat([at_angles(33), metric], 1), 2, 1, partition="frames", grid=(3, 1, 2))
    assert with_prefix.index.tolist() == [[0, 4, 3, 3, 4, 1, 2]]


def test_match_one_frame_has_no_partner():
    plan = match(SIX, 3, partition="frames", grid=(1, 2, 3))
    assert plan.num_groups == 6
    assert plan.index.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert (plan.score == -math.inf).all()


def test_match_window_is_ragged_at_the_end():
    metric = at_angles(0, 90, 45, 1, 30)  # windows (0, 1), (2, 3), (4): 4 meets no dst, though 1 and 3 are dst
    plan = match(metric, 99, grid=(1, 1, 5), window=(1, 1, 2))
    assert plan.num_groups == 3
    assert plan.index.tolist() == [[1, 1, 2, 2, 0]]
    assert plan.score[0, 4] == -math.inf
    assert match(metric, 1, grid=(1, 5), window=(1, 1, 2)).index.tolist() == [[0, 2, 3, 3, 1]]


def test_match_window_confines_in_time_and_space():
    metric = at_angles(0, 90, 90, 0)  # frames (0, 1) and (2, 3): the like of 0 is 3
    apart = match(metric, 2, grid=(2, 1, 2), window=(1, 1, 2))
    assert apart.index.tolist() == [[0, 0, 1, 1]]
    together = match(metric, 2, grid=(2, 1, 2), window=(2, 1, 2))
    assert together.index.tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("shared", [True, False])
def test_match_boolean_mask(shared):
    is_dst = torch.tensor([False, False, True, False, True])
    metric = at_angles(0, 50, 5, 90, 60)  # 0 to 2 (5), 1 to 4 (10), 3 to 4 (30)
    plan = match(metric, 2, partition=is_dst if shared else is_dst[None])
    assert plan.index.tolist() == [[1, 2, 1, 0, 2]]


def test_match_boolean_mask_per_item():
    is_dst = torch.tensor([[True, False, False], [False, False, True]])
    plan = match(at_angles(0, 10, 20).expand(2, -1, -1), 1, partition=is_dst)
    assert plan.index.tolist() == [[1, 1, 0], [0, 1, 1]]


def test_match_random2d_draws_one_dst_per_cell_and_reproduces():
    metric, grid = make_tokens(2, 3 * 5 * 6, 8), (3, 5, 6)

    def draw(seed: int) -> sttm.MergePlan:
        generator = torch.Generator().manual_seed(seed)
        return match(metric, 0, partition="random2d", grid=grid, cell=(2, 3), generator=generator)

    is_dst = (draw(0).score == -math.inf).view(2, *grid)  # every src token has a partner to look for
    assert is_dst[:, :, :4].view(2, 3, 2, 2, 2, 3).transpose(3, 4).sum((-1, -2)).eq(1).all()
    assert not is_dst[:, :, 4:].any()
    assert torch.equal(draw(0).index, draw(0).index)
    assert any(not torch.equal(draw(0).score, draw(seed).score) for seed in range(1, 4))


def test_match_random2d_uses_every_place_of_a_cell():
    metric, found = make_tokens(1, 4, 2), set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        plan = match(metric, 3, partition="random2d", grid=(2, 2), generator=generator)
        assert plan.num_groups == 1
        found.add((plan.score == -math.inf).nonzero()[0, 1].item())
    assert found == {0, 1, 2, 3}


def test_match_protected_by_hand():
    plan = match(SIX, 2, protect=[1, 4])  # src 0, 2; dst 3, 5
    assert plan.num_groups == 4
    assert plan.index.tolist() == [[3, 0, 2, 2, 1, 3]]  # 1 and 4 come first
    assert (plan.score[0, [1, 4]] == -math.inf).all()
    assert match(SIX, 1, protect=[1, 4]).index.tolist() == [[2, 0, 3, 3, 1, 4]]  # 0 is left over
    assert match(SIX, 1, 1, protect=[4, 0]).index.tolist() == [[0, 2, 3, 3, 1, 4]]  # the prefix is so anyway


@pytest.mark.parametrize(
    ("protect", "most"), [([0], 2), ([0, 2], 1), ([0, 2, 4], 0), ([1, 3], 2), ([1, 3, 5], 0), (range(6), 0)]
)
def test_match_clamps_r_to_what_protection_leaves(protect, most):
    """Half of the others, as in Token Merging, and of those only src that have a dst."""
    assert match(SIX, 99, protect=protect).num_groups == 6 - most
    assert match(SIX, 99, protect=protect, grid=(1, 1, 6), window=(1, 1, 6)).num_groups == 6 - most


def test_protected_tokens_do_not_look_at_their_number():
    """What is protected may hold anything; the others merge as in a sequence that has the protected ones in front."""
    metric, protect = make_tokens(2, 30, 6, F64), [3, 4, 12, 29, 17]
    front = protect[:2] + [12, 17, 29]
    rest = [n for n in range(30) if n not in protect]
    is_dst = torch.arange(30) % 2 == 1
    plan = match(metric, 9, 0, protect=protect)
    moved = match(metric[:, front + rest], 9, 5, partition=is_dst[front + rest])
    assert torch.equal(plan.index[:, front + rest], moved.index)
    spoiled = metric.clone()
    spoiled[:, protect] = torch.nan
    assert torch.equal(match(spoiled, 9, protect=protect).index, plan.index)


@pytest.mark.parametrize(
    "case", [{}, {"partition": "frames"}, {"window": (2, 2, 3)}, {"partition": "random2d"}], ids=str
)
def test_protection_of_the_first_tokens_is_a_prefix(case):
    metric, grid = make_tokens(2, 6 + 24, 4, F64), (2, 3, 4)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain, protected = (
        match(metric, 5, 6, grid=grid, generator=generator, protect=protect, **case)
        for generator, protect in zip(generators, (None, range(6)), strict=True)
    )
    assert torch.equal(plain.index, protected.index)


def test_match_random2d_draws_one_unprotected_dst_per_cell():
    grid, protect = (1, 4, 6), torch.zeros(1, 4, 6, dtype=torch.bool)
    protect[0, :2, :2] = True  # all of a cell, and of its neighbour all but one place
    protect[0, :2, 2:4] = torch.tensor([[True, True], [False, True]])
    metric, found = make_tokens(1, 24, 2), set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        plan = match(metric, 99, partition="random2d", grid=grid, generator=generator, protect=protect.flatten())
        assert plan.num_groups == 7 + 5
        is_dst = (plan.score == -math.inf).view(4, 6) & ~protect[0]
        cells = is_dst.view(2, 2, 3, 2).transpose(1, 2).sum((-1, -2))
        assert cells.tolist() == [[0, 1, 1], [1, 1, 1]]
        assert bool(is_dst[1, 2])
        found.add(int(is_dst[:2, 4:].flatten().nonzero()))
    assert found == {0, 1, 2, 3}


def loop_merge(x, metric, sizes, r, src, dst, may_meet=lambda a, b: True):
    """Token merging in plain loops, of one item: returns {set of tokens: weighted mean of their features}.

    Draw an edge from every src token to its most similar dst token, keep the r best edges, average what they connect.
    """

    def cosine(a, b):
        lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(v * w for v, w in zip(a, b, strict=True)) / lengths

    edges = []
    for a in src:
        similar = [(cosine(metric[a], metric[b]), b) for b in dst if may_meet(a, b)]
        if similar:
            best, b = max(similar, key=lambda pair: pair[0])
            edges.append((best, a, b))
    edges.sort(key=lambda edge: -edge[0])
    groups = {n: [n] for n in range(len(metric))}
    for _, a, b in edges[:r]:
        groups[b] += groups.pop(a)
    out = {}
    for members in groups.values():
        total = sum(sizes[n] for n in members)
        mean = [sum(sizes[n] * x[n][c] for n in members) / total for c in range(len(x[0]))]
        out[frozenset(members)] = (mean, total)
    return out


def assert_same_groups(plan, out, expected, item=0):
    assert plan.num_groups == len(expected)
    for k in range(plan.num_groups):
        members = frozenset((plan.index[item] == k).nonzero().flatten().tolist())
        mean, total = expected[members]
        torch.testing.assert_close(out.x[item, k], torch.tensor(mean, dtype=F64))
        assert out.size[item, k].item() == pytest.approx(total)


@pytest.mark.parametrize(
    ("N", "r", "num_prefix"), [(2, 1, 0), (9, 3, 0), (12, 4, 1), (13, 6, 0), (14, 5, 2), (17, 8, 3)]
)
def test_match_and_merge_is_token_merging(N, r, num_prefix):
    metric, x = make_tokens(2, N, 4, F64, seed=N), make_tokens(2, N, 3, F64, seed=N + 1)
    size = torch.randint(1, 9, (2, N), generator=torch.Generator().manual_seed(N)).double()
    plan = match(metric, r, num_prefix)
    out = merge(x, plan, size)
    src = [n for n in range(num_prefix, N) if n % 2 == 0]
    dst = [n for n in range(num_prefix, N) if n % 2 == 1]
    for b in range(2):
        expected = loop_merge(x[b].tolist(), metric[b].tolist(), size[b].tolist(), r, src, dst)
        assert_same_groups(plan, out, expected, b)


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("partition", ["alternate", "frames"])
@pytest.mark.parametrize(
    ("grid", "window"), [((3, 4, 5), None), ((3, 4, 5), (2, 3, 2)), ((4, 3, 3), (2, 2, 3)), ((2, 2, 2), (9, 9, 9))]
)
def test_match_in_a_grid_is_token_merging(partition, grid, window, protected):
    """Within each window, of the tokens that are not protected."""
    (t, h, w), num_prefix = grid, 1
    N = num_prefix + t * h * w
    protect = [n for n in range(N) if protected and n % 3 == 2]
    place = {n: ((n - 1) // (h * w), (n - 1) // w % h, (n - 1) % w) for n in range(num_prefix, N)}
    is_dst = {n: (n if partition == "alternate" else place[n][0]) % 2 == 1 for n in place if n not in protect}

    def window_of(n):
        return tuple(coordinate // extent for coordinate, extent in zip(place[n], window or grid, strict=True))

    metric = make_tokens(1, N, 4, F64, seed=N)
    x, size = make_tokens(1, N, 2, F64), torch.ones(1, N, dtype=F64)
    src, dst = [n for n in is_dst if not is_dst[n]], [n for n in is_dst if is_dst[n]]
    for r in (1, 5, 99):
        plan = match(metric, r, num_prefix, partition=partition, grid=grid, window=window, protect=protect)
        expected = loop_merge(
            x[0].tolist(), metric[0].tolist(), size[0].tolist(), N - plan.num_groups, src, dst,
            lambda a, b: window_of(a) == window_of(b),
        )  # fmt: skip
        assert_same_groups(plan, merge(x, plan), expected)
        assert plan.index[0, [0, *protect]].tolist() == list(range(1 + len(protect)))
    if partition == "frames":  # alternate is clamped to half of the tokens, as without windows
        reachable = [a for a in src if any(window_of(a) == window_of(b) for b in dst)]
        assert N - plan.num_groups == len(reachable)


# merge

TOKENS = rows([1, 10], [3, 20], [5, -60], [7, 40])


def test_merge_mean_by_hand():
    size, weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double(), torch.tensor([[0.5, 0.25, 1.0, 1.0]]).double()
    positions = rows([0, 0, 0], [0, 2, 4], [9, 9, 9], [1, 1, 1])
    out = merge(TOKENS, plan_of(2, 2, 0, -1, groups=4, weight=weight), size, positions)
    # group 2: w = .5, .5, so (1 + 3) / 2 and (10 + 20) / 2; group 0: token 2 alone
    assert out.x.tolist() == [[[5, -60], [0, 0], [2, 15], [0, 0]]]
    assert out.size.tolist() == [[3, 0, 3, 0]]
    assert out.positions.tolist() == [[[9, 9, 9], [0, 0, 0], [0, 1, 2], [0, 0, 0]]]


def test_merge_sum_max_first_by_hand():
    plan = plan_of(1, 0, 1, 1, groups=3, weight=torch.tensor([[2.0, 1.0, 1.0, 0.5]]).double())
    assert merge(TOKENS, plan, reduce="sum").x.tolist() == [[[3, 20], [10.5, -20], [0, 0]]]
    assert merge(TOKENS, plan, reduce="max").x.tolist() == [[[3, 20], [7, 40], [0, 0]]]
    assert merge(TOKENS, plan, reduce="first").x.tolist() == [[[3, 20], [1, 10], [0, 0]]]


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
def test_merge_empty_groups_take_the_fill(reduce):
    fill = rows([1, 1], [2, 2], [3, 3])
    plan, size = plan_of(1, -1, -1, 2, groups=3), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    out = merge(TOKENS, plan, size, reduce=reduce, fill=fill, positions=torch.ones(4, 3))
    assert out.x.tolist() == [[[1, 1], [1, 10], [3, 3]]]  # group 2 has a token, of size 0
    assert out.size.tolist() == [[0, 1, 0]]
    assert out.positions[..., 0].tolist() == [[0, 1, 0]]
    assert merge(TOKENS, plan, size, reduce=reduce).x.tolist() == [[[0, 0], [1, 10], [0, 0]]]


def test_merge_counts_bfloat16_tokens_exactly():
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    out = merge(x, sttm.MergePlan(torch.zeros(1, 1000, dtype=torch.int32), 1))
    assert out.size.dtype == torch.float32
    assert out.size.item() == 1000  # 256 + 1 = 256 in bfloat16
    assert out.x.dtype == torch.bfloat16
    assert out.x.tolist() == [[[1, 1]]]
    assert merge(out.x, sttm.MergePlan(torch.zeros(1, 1, dtype=torch.int32), 1), out.size).size.item() == 1000


def test_merge_max_gradient_goes_to_the_lowest_token_of_a_tie():
    x = rows([2.0], [5.0], [5.0], [1.0]).requires_grad_()
    merge(x, plan_of(0, 0, 0, 0, groups=1), reduce="max").x.sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0, 0]


# unmerge and compose


def test_unmerge_by_hand():
    full = unmerge(rows([1, 2], [3, 4]), plan_of(1, -1, 0, 1, groups=2))
    assert full.tolist() == [[[3, 4], [0, 0], [1, 2], [3, 4]]]


def test_compose_by_hand():
    plan = compose(plan_of(2, 0, -1, 1, groups=3), plan_of(1, -1, 0, groups=2))
    assert plan.index.tolist() == [[0, 1, -1, -1]]
    assert plan.index.dtype == torch.int32
    assert plan.num_groups == 2
    assert plan.weight is None


def test_values_outside_the_groups_mean_no_group():
    wild, tame = plan_of(2, -9, 0, 2**31 - 1, groups=2), plan_of(-1, -1, 0, -1, groups=2)
    assert merge(TOKENS, wild).x.tolist() == merge(TOKENS, tame).x.tolist()
    x = rows([1], [2])
    assert unmerge(x, wild).tolist() == unmerge(x, tame).tolist()
    onward = plan_of(0, -5, groups=1)
    assert compose(wild, onward).index.tolist() == [[-1, -1, 0, -1]]
    assert compose(onward, plan_of(7, groups=2)).index.tolist() == [[-1, -1]]


# soft_merge


def test_soft_merge_over_meta_tokens_by_hand():
    x, q, meta = rows([4.0], [8.0]), rows([math.log(3.0)], [0.0]), rows([1.0], [0.0])
    out = soft_merge(x, q, meta, "dot", positions=rows([0.0], [1.0]))
    # A = [[3/4, 1/4], [1/2, 1/2]]
    torch.testing.assert_close(out.x, rows([(3 + 4) / 1.25], [(1 + 4) / 0.75]))
    torch.testing.assert_close(out.size, torch.tensor([[1.25, 0.75]], dtype=F64))
    torch.testing.assert_close(out.positions, rows([0.5 / 1.25], [0.5 / 0.75]))


def test_soft_merge_over_tokens_by_hand():
    x, q, meta = rows([4.0], [8.0]), rows([math.log(3.0)], [0.0]), rows([1.0], [0.0])
    out = soft_merge(x, q, meta, "dot", normalize="tokens", size=torch.tensor([[1.0, 3.0]]))
    # A = [[3/4, 1/2], [1/4, 1/2]]; times size [[3/4, 1/2], [3/4, 3/2]]
    torch.testing.assert_close(out.x, rows([6.0], [7.0]))
    torch.testing.assert_close(out.size, torch.tensor([[1.5, 2.0]], dtype=F64))


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_soft_merge_mask_leaves_tokens_out(normalize):
    x, q, meta = make_tokens(1, 5, 3, F64), make_tokens(1, 5, 4, F64, seed=1), make_tokens(1, 2, 4, F64, seed=2)
    keep = torch.tensor([[True, False, True, True, False]])
    masked = soft_merge(x, q, meta, normalize=normalize, mask=keep)
    alone = soft_merge(x[:, keep[0]], q[:, keep[0]], meta, normalize=normalize)
    torch.testing.assert_close(masked.x, alone.x)
    torch.testing.assert_close(masked.size, alone.size)
    nothing = soft_merge(x, q, meta, normalize=normalize, mask=torch.zeros_like(keep), positions=torch.ones(5, 3))
    assert nothing.x.eq(0).all()
    assert nothing.size.eq(0).all()
    assert nothing.positions.eq(0).all()


def test_soft_merge_nears_the_hard_merge_as_the_temperature_falls():
    x, q, meta = make_tokens(2, 9, 3, F64), make_tokens(2, 9, 4, F64, seed=1), make_tokens(2, 3, 4, F64, seed=2)
    hard = merge(x, assign(q, meta, weight="uniform"))
    soft = soft_merge(x, q, meta, temperature=1e-4)
    torch.testing.assert_close(soft.x, hard.x)
    torch.testing.assert_close(soft.size, hard.size)


# gradients


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_assign_gradients(similarity):
    q, meta = make_tokens(2, 5, 3, F64).requires_grad_(), make_tokens(2, 4, 3, F64, seed=1).requires_grad_()
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) > 0.2

    def run(q, meta):
        plan = assign(q, meta, similarity, 0.7, mask=mask)
        return plan.score, plan.lse, plan.weight

    assert gradcheck(run, (q, meta))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "first"])
def test_merge_gradients(reduce):
    x, positions = make_tokens(2, 6, 3, F64).requires_grad_(), make_tokens(2, 6, 2, F64, seed=1).requires_grad_()
    size = (make_tokens(2, 6, 1, F64, seed=2)[..., 0].abs() + 0.5).requires_grad_()
    weight = (make_tokens(2, 6, 1, F64, seed=3)[..., 0].abs() + 0.5).requires_grad_()
    fill = make_tokens(2, 4, 3, F64, seed=4).requires_grad_()
    index = make_index(2, 6, 4)

    def run(x, size, weight, positions, fill):
        out = merge(x, sttm.MergePlan(index, 4, weight=weight), size, positions, reduce, fill)
        return out.x, out.size, out.positions

    assert gradcheck(run, (x, size, weight, positions, fill))


def test_unmerge_gradients():
    plan = sttm.MergePlan(make_index(2, 6, 4), 4)
    assert gradcheck(lambda x: unmerge(x, plan), make_tokens(2, 4, 3, F64).requires_grad_())


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_soft_merge_gradients(similarity, normalize):
    x, q = make_tokens(2, 5, 3, F64).requires_grad_(), make_tokens(2, 5, 3, F64, seed=1).requires_grad_()
    meta, positions = make_tokens(2, 3, 3, F64, seed=2).requires_grad_(), make_tokens(2, 5, 2, F64, seed=3)
    positions.requires_grad_()
    size = (make_tokens(2, 5, 1, F64, seed=4)[..., 0].abs() + 0.5).requires_grad_()
    mask = torch.tensor([[True, False, True, True, True], [True] * 5])

    def run(x, q, meta, size, positions):
        out = soft_merge(x, q, meta, similarity, 0.7, normalize, size, positions, mask)
        return out.x, out.size, out.positions

    assert gradcheck(run, (x, q, meta, size, positions))


def test_match_is_not_differentiable():
    plan = match(make_tokens(1, 8, 3).requires_grad_(), 2)
    assert not plan.score.requires_grad


@pytest.mark.parametrize("way", ["alternate", "frames"])
def test_how_many_tokens_can_merge_in_windows(way):
    """Token by token, around protected ones."""
    draw = random.Random(0)
    for _ in range(150):
        grid, window = (tuple(draw.randint(1, 6) for _ in range(3)) for _ in range(2))
        prefix, tokens = draw.randint(0, 2), math.prod(grid)
        protected = sorted(draw.sample(range(prefix, prefix + tokens), min(tokens, draw.choice([0, 0, 1, 5]))))
        src, dst = Counter(), set()
        for n in set(range(tokens)) - {n - prefix for n in protected}:
            at = (n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2])
            here = tuple(a // w for a, w in zip(at, window, strict=True))
            if (prefix + n if way == "alternate" else at[0]) % 2:
                dst.add(here)
            else:
                src[here] += 1
        expected = sum(count for here, count in src.items() if here in dst)
        assert partition.num_matchable(way, prefix + tokens, prefix, grid, window, tuple(protected)) == expected
