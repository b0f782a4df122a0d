"""match with a mask, a threshold, or a number of merges for each item: padding changes no bit of anything else.

Features are signs: of 16 of them norms, products and so scores are exact in every dtype, and many are equal.
"""

import math

import pytest
import torch
from cases import SMALL, each, each_with_dtype, kernels_only, short, unwritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sttm_kernels as sttm
from sttm_kernels import partition
from sttm_kernels.testing import DTYPES, assert_equal, assert_order, make_tokens

GRID = (4, 3, 4)


def signs(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def real_tokens(lengths, N):
    return torch.arange(N) < torch.tensor(lengths)[:, None]


def spoil(values, mask):
    """NaN where there is no real token."""
    return torch.where(mask[..., None], values, torch.nan)


def match(backend, metric, r, mask=None, **more):
    mask = None if mask is None else mask.to(backend.device)
    return sttm.match(metric.to(backend.device), r, mask=mask, impl=backend.impl, **more)


def odd_frames(N, num_prefix):
    """A partition of its own that is "frames" of GRID."""
    return (torch.arange(N) - num_prefix) // 12 % 2 == 1


ALONE = [  # num_prefix, partition, window, protect; of whole frames of GRID
    (0, "alternate", None, ()),
    (1, "alternate", None, ()),
    (2, "alternate", (2, 2, 3), ()),
    (1, "alternate", None, (4, 7, 17, 44)),
    (1, "frames", None, ()),
    (0, "frames", (2, 3, 2), (30,)),
    (1, "random2d", None, ()),
    (2, "random2d", None, (3, 4, 30)),
    (1, odd_frames(49, 1), None, ()),
]


@each(
    ("case", "dtype"),
    [(case, DTYPES[at % 3]) for at, case in enumerate(ALONE)],
    ids=lambda part: short(part) if isinstance(part, torch.dtype) else "-".join(map(str, part))[:30],
)
def test_an_item_with_padding_is_that_item_alone(backend, case, dtype):
    """Bit for bit, whatever the padding holds; its last groups are empty."""
    num_prefix, partition, window, protect = case
    frames = (4, 3) if SMALL else (4, 1, 3, 2)
    lengths = [num_prefix + 12 * t for t in frames]
    N = lengths[0]
    metric, x = signs(len(frames), N, 16).to(dtype), make_tokens(len(frames), N, 20, dtype, seed=1)
    mask = real_tokens(lengths, N)

    def where(n, t):
        part = partition[:n] if isinstance(partition, torch.Tensor) else partition
        return {
            "num_prefix": num_prefix, "partition": part, "window": window, "grid": (t, *GRID[1:]),
            "protect": [at for at in protect if at < n], "generator": torch.Generator().manual_seed(3),
        }  # fmt: skip

    for r in (9,) if SMALL else (9, 1000):
        with unwritten({"metric": spoil(metric, mask), "x": spoil(x, mask)}) as held:
            plan = match(backend, held["metric"], r, mask, **where(N, 4))
            out = sttm.merge(held["x"].to(backend.device), plan, impl=backend.impl)
        whole = plan.index.cpu()
        assert bool((whole[~mask] == -1).all())
        assert bool((plan.score.cpu()[~mask] == -torch.inf).all())
        full = sttm.unmerge(out.x, plan, impl=backend.impl).cpu()
        assert not bool(full[~mask].any())
        for b, (n, t) in enumerate(zip(lengths, frames, strict=True)):
            alone = match(backend, metric[b : b + 1, :n], r, **where(n, t))
            merged = sttm.merge(x[b : b + 1, :n].to(backend.device), alone, impl=backend.impl)
            lost = len(protect) - len(where(n, t)["protect"])  # their places stay, empty
            here = torch.arange(alone.num_groups)
            here = here + (here >= num_prefix + len(protect) - lost) * lost
            assert_equal(f"index {b} r={r}", whole[b, :n], here.int()[alone.index[0].cpu().long()])
            assert_equal("score", plan.score[b, :n], alone.score[0])
            assert_equal("x", out.x[b].cpu()[here], merged.x[0].cpu())
            assert_equal("size", out.size[b].cpu()[here], merged.size[0].cpu())
            assert float(out.size[b].sum()) == n
            assert not bool(out.x[b].cpu().index_fill(0, here, 0).any())


@kernels_only
@each_with_dtype("heads", [0, 3], ids=str)
def test_scores_of_other_lengths_have_the_same_bits(backend, heads, dtype):
    lengths = [70, 33, 1, 52]
    metric = make_tokens(4, 70, 24, dtype)
    if heads:
        metric = make_tokens(4, 70, 24 * heads, dtype).view(4, 70, heads, 24).transpose(1, 2)
    real = real_tokens(lengths, 70)
    blank = real[:, None, :, None] if heads else real[..., None]
    plan = match(backend, torch.where(blank, metric, torch.nan), 20, real, num_prefix=1)
    for b, n in enumerate(lengths):
        alone = match(backend, metric[b : b + 1, ..., :n, :], 20, num_prefix=1)
        assert_equal(f"index of {n}", plan.index[b, :n], alone.index[0])
        assert_equal(f"score of {n}", plan.score[b, :n], alone.score[0])


def as_specified(backend, metric, r, mask, **more):
    """Index and score are those of the specification; a plan without a mask has its order."""
    drawn = {"generator": torch.Generator().manual_seed(5)} if more.get("partition") == "random2d" else {}
    expected = sttm.match(metric.double(), r, mask=mask, impl="reference", **more, **drawn)
    drawn = {"generator": torch.Generator().manual_seed(5)} if drawn else {}
    plan = match(backend, metric if mask is None else spoil(metric, mask), r, mask, **more, **drawn)
    assert plan.num_groups == expected.num_groups
    assert_equal("index", plan.index.cpu(), expected.index)
    assert_equal("score", plan.score.cpu(), expected.score.float())
    if mask is None:
        assert_order(plan.index, plan.num_groups, plan.order, plan.offsets)
    return plan


WAYS = [
    {"partition": "alternate"},
    {"partition": "alternate", "window": (2, 2, 3)},
    {"partition": "frames"},
    {"partition": "frames", "window": (2, 3, 2), "protect": [5, 20]},
    {"partition": "random2d"},
    {"partition": torch.arange(49) % 5 == 4},
]


@each("way", WAYS, ids=str)
@each("amount", [1000, [3, 20]], ids=str)
def test_bounds_together(backend, way, amount):
    """Masks with holes, thresholds and a number for each item, every two together."""
    metric, holes = signs(2, 49, 16, seed=7), torch.rand(2, 49, generator=torch.Generator().manual_seed(2)) < 0.7
    for mask, threshold in ((holes, None), (None, 0.3), (holes, 0.3))[2 * SMALL :]:
        as_specified(backend, metric, amount, mask, threshold=threshold, num_prefix=1, grid=GRID, **way)


@settings(max_examples=5 if SMALL else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_is_as_specified(backend, data):
    B, N = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 99))
    masks = st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=B, max_size=B).map(torch.tensor)
    ends = st.lists(st.integers(0, N), min_size=B, max_size=B).map(lambda lengths: real_tokens(lengths, N))
    as_specified(
        backend,
        signs(B, N, 16, seed=seed),
        data.draw(st.integers(0, N) | st.lists(st.integers(0, N), min_size=B, max_size=B)),
        data.draw(st.none() | masks | ends),
        threshold=data.draw(st.sampled_from([None, -0.5, 0.0, 0.25, 1.0])),
        num_prefix=data.draw(st.integers(0, min(3, N))),
        protect=data.draw(st.sampled_from([None, [N - 1, N // 2]])),
    )


def test_a_cell_that_drew_padding_has_a_real_dst():
    """One that is real and free; cells that drew such a token keep it, and cells of padding their draw."""
    drawn, cpu = torch.Generator(), torch.device("cpu")
    mask = torch.rand(3, 49, generator=drawn.manual_seed(1)) < 0.5
    mask[:, 1:5] = mask[:, 5:9] = False  # two rows of a frame: two cells of padding
    for protected in (None, torch.arange(49) % 6 == 1):
        how = ("random2d", 49, 1, (4, 4, 3), (2, 2))
        before, after = (
            partition.destinations(*how, drawn.manual_seed(3), cpu, protected, given) for given in (None, mask)
        )
        free = mask if protected is None else mask & ~protected

        def cells(marked):
            whole = marked[:, 1:].view(-1, 4, 4, 3)[..., :2]
            return whole.unflatten(2, (2, 2)).transpose(2, 1).flatten(3).flatten(1, 2)

        assert after.shape == (3, 49)
        assert_equal("as many", after.sum(1), before.sum(1).expand(3))
        found, kept = cells(after & free).any(-1), cells(before & free).any(-1)
        assert_equal("a real one", found, cells(free).any(-1))
        assert_equal("where it was", cells(after)[kept], cells(before).expand(3, -1, -1)[kept])
        assert bool((found & ~kept).any())


@each("N", [130] if SMALL else [1500, 2100])
def test_long_sequences(backend, N):
    """Of one launch and of two."""
    metric = signs(2, N, 16, seed=1)
    as_specified(backend, metric, [N // 3, 70], real_tokens([N, N // 3], N), num_prefix=1)
    as_specified(backend, metric, [N // 3, 70], None, num_prefix=1, threshold=0.5)


def test_only_pairs_above_the_threshold_merge(backend):
    """Src i has cosine c_i with every dst: those above merge, at most r; a score at the threshold does not."""
    c = torch.tensor([0.5, 0.25, 0.75, -0.5, 0.5, 1.0])
    metric = torch.stack([c, (1 - c * c).sqrt()], 1)
    metric = torch.stack([metric, torch.tensor([1.0, 0.0]).expand(6, 2)], 1).reshape(1, 12, 2)

    def merged(r, threshold):
        plan = match(backend, metric, r, threshold=threshold)
        assert plan.num_groups == 12
        assert_order(plan.index, 12, plan.order, plan.offsets)
        size = sttm.merge(metric.to(backend.device), plan, impl=backend.impl).size[0].cpu()
        left = int((size > 0).sum())
        assert bool((size[:left] > 0).all())
        return (plan.index[0, ::2].cpu() == plan.index[0, 1].cpu()).nonzero().flatten().tolist(), left

    assert merged(6, 0.6) == ([2, 5], 10)
    assert merged(6, 0.75) == ([5], 11)
    assert merged(6, 1.5) == ([], 12)
    assert merged(6, -1.0) == ([0, 1, 2, 3, 4, 5], 6)
    assert merged(1, -1.0) == ([5], 11)
    assert merged(0, -1.0) == ([], 12)


def test_a_threshold_keeps_what_is_not_a_number(backend):
    metric = signs(1, 20, 16)
    metric[0, [2, 8]] = torch.nan
    plan = match(backend, metric, 10, threshold=-1.5)
    assert backend.impl == "torch" or len({*plan.index[0, [2, 8]].tolist()} & {*plan.index[0, 1::2].tolist()}) == 0
    assert int(plan.index.max()) < 12


def test_no_real_token_at_all(backend):
    plan = match(backend, signs(2, 9, 16), 3, torch.zeros(2, 9, dtype=torch.bool), num_prefix=1)
    assert plan.index.tolist() == [[-1] * 9] * 2
    out = sttm.merge(signs(2, 9, 16).to(backend.device), plan, impl=backend.impl)
    assert not bool(out.x.any() | out.size.any())


def test_masks_of_any_strides(backend):
    metric, mask = signs(3, 30, 16), torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    one = match(backend, metric, 8, mask.T)
    assert_equal("transposed", one.index, match(backend, metric, 8, mask.T.contiguous()).index)
    row = mask.T[:1]
    one = match(backend, metric, 8, row.expand(3, -1))
    assert_equal("expanded", one.index, match(backend, metric, 8, row.repeat(3, 1)).index)


def test_a_history_of_masked_plans(backend):
    """Padding is nowhere, from plan to plan: the groups that are real are those of a size."""
    metric, mask = signs(2, 40, 16), real_tokens([40, 17], 40)
    first = match(backend, metric, 9, mask, num_prefix=1)
    size = sttm.merge(metric.to(backend.device), first, impl=backend.impl).size
    second = match(backend, signs(2, first.num_groups, 16, seed=4), 6, (size > 0).cpu(), num_prefix=1)
    both = sttm.compose(first, second, impl=backend.impl)
    assert bool((both.index.cpu() >= 0).eq(mask).all())
    assert both.index[1].unique().numel() - 1 == 17 - 8 - 4


def test_ways_to_give_a_number_for_each_item(backend):
    metric = signs(3, 20, 16)
    expected = match(backend, metric, [2, 5, 0])
    assert expected.num_groups == 20
    for way in ((2, 5, 0), torch.tensor([2, 5, 0]), torch.tensor([2, 5, 0], dtype=torch.int32)):
        assert_equal("index", match(backend, metric, way).index, expected.index)
    for b, r in enumerate((2, 5, 0)):
        assert_equal("alone", expected.index[b], match(backend, metric[b : b + 1], r).index[0])


def test_real_tokens_that_lose_every_dst_have_a_group(backend):
    """Up to the first dst nobody merges: there are groups for all, by protection and by partitions of one's own."""
    metric = signs(1, 12, 16)
    late = torch.arange(12) >= 9
    for way in ({"protect": [1, 3, 5]}, {"partition": late}):
        for n in (0, 4, 7, 12) if SMALL else range(13):
            plan = match(backend, metric, 1000, real_tokens([n], 12), **way)
            cut = {"protect": [at for at in way["protect"] if at < n]} if "protect" in way else {"partition": late[:n]}
            alone = match(backend, metric[:, :n], 1000, **cut) if n else None
            found = plan.index[0, :n].unique().numel()
            assert found == (alone.index.unique().numel() if alone else 0), (way, n)


def test_no_mask_no_threshold_is_the_call_without(backend):
    metric = make_tokens(2, 30, 8)
    one, other = match(backend, metric, 7), match(backend, metric, 7, torch.ones(2, 30, dtype=torch.bool))
    assert one.num_groups == other.num_groups == 23
    assert_equal("index", one.index, other.index)
    assert one.order is not None
    assert other.order is None


@pytest.mark.parametrize("r", [0, 8, math.inf])
def test_a_gradient_of_padding_is_zero(backend, r):
    """Of the tokens merged along a masked plan, whatever the padding holds."""
    mask = real_tokens([20, 7], 20)
    plan = match(backend, signs(2, 20, 16), int(min(r, 20)), mask)
    x = spoil(make_tokens(2, 20, 6), mask).to(backend.device).requires_grad_()
    out = sttm.merge(x, plan, impl=backend.impl)
    (out.x.square().sum() + sttm.unmerge(out.x, plan, impl=backend.impl).sum()).backward()
    grad = x.grad.cpu()
    assert not bool(grad[~mask].any())
    assert bool(grad[mask].ne(0).any())
    assert bool(grad.isfinite().all())
