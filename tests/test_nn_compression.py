"""Clips merged to K tokens each, and the prompt that is left."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sttm_kernels as sttm
from sttm_kernels import dispatch
from sttm_kernels.nn import compression, shorten_prompt
from sttm_kernels.testing import DTYPES, assert_equal, make_tokens

GRIDS = [(3, 4, 5), (1, 2, 3), (4, 4, 4), (3, 4, 5)]
SMALL = dispatch.interpreting()
methods = pytest.mark.parametrize("method", compression.COMPRESSIONS)


def tokens(grids=GRIDS, C=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(map(math.prod, grids)), C, generator=generator)


def places_of(grid):
    return torch.cartesian_prod(*(torch.arange(extent) for extent in grid))


@methods
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 5], ids=str)
def test_groups_are_the_tokens_of_the_plan_in_the_order_of_their_places(method, keep):
    x = tokens().double()
    out = sttm.compress(x, GRIDS, keep, method)
    wanted = [keep if isinstance(keep, int) else max(1, int(keep * math.prod(grid) + 0.5)) for grid in GRIDS]
    assert list(out.lengths) == wanted
    assert out.counts == tuple(map(math.prod, GRIDS))
    assert out.x.shape == (sum(wanted), 6)
    here = torch.cat([places_of(grid) for grid in GRIDS])
    for group in range(sum(wanted)):
        members = (out.plan.index[0] == group).nonzero().flatten()
        assert len(members) == out.size[group] >= 1
        torch.testing.assert_close(out.x[group], x[members].mean(0))
        torch.testing.assert_close(out.positions[group], here[members].double().mean(0))
    firsts = torch.tensor(out.counts).cumsum(0) - torch.tensor(out.counts)
    for clip, (places, positions) in enumerate(zip(out.places.split(wanted), out.positions.split(wanted), strict=True)):
        assert (places.diff() >= 0).all()
        assert (places_of(GRIDS[clip])[places] - positions).abs().max() <= 0.5
    alone = out.size == 1
    first_member = torch.stack([(out.plan.index[0] == g).int().argmax() for g in range(sum(wanted))])
    own = first_member - firsts.repeat_interleave(torch.tensor(wanted))
    assert_equal("places of tokens that nothing merged with", out.places[alone], own[alone])
    if method in ("sttm", "tome"):
        assert out.size.sum() == len(x)
    else:
        assert alone.all()


@methods
def test_all_of_the_tokens_are_those_that_came(method):
    x = tokens()
    out = sttm.compress(x, torch.tensor(GRIDS), 1.0, method)
    assert_equal("x", out.x, x)
    assert_equal("plan", out.plan.index, torch.arange(len(x), dtype=torch.int32)[None])
    assert_equal("positions", out.positions.long(), torch.cat([places_of(grid) for grid in GRIDS]))
    assert_equal("places", out.places, torch.cat([torch.arange(math.prod(grid)) for grid in GRIDS]))


@pytest.mark.parametrize("method", ["sttm", "tome", "uniform"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_every_clip_has_the_bits_that_it_has_alone(method, impl):
    x = tokens()
    clips = list(x.split([math.prod(grid) for grid in GRIDS]))
    keep = [0.3, 0.5, 9, 0.3]
    out = sttm.compress(x, GRIDS, keep, method, impl=impl)
    alone = [sttm.compress(*each, method, impl=impl) for each in zip(clips, GRIDS, keep, strict=True)]
    for name in ("x", "size", "positions", "places"):
        assert_equal(name, getattr(out, name), torch.cat([getattr(each, name) for each in alone]))
    listed = sttm.compress(clips, GRIDS, keep, method, impl=impl)
    assert_equal("of a list", listed.x, out.x)
    batch = sttm.compress(torch.stack((clips[0], clips[3])), GRIDS[0], 0.3, method, impl=impl)
    assert_equal("of a batch", batch.x, torch.stack((alone[0].x, alone[3].x)))
    assert_equal("its plan", batch.plan.index, torch.cat((alone[0].plan.index, alone[3].plan.index)))


@st.composite
def batches(draw):
    grids = draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=5))
    grids = [draw(st.sampled_from(grids)) for _ in grids]  # some of them alike
    keep = draw(st.floats(0.01, 1) | st.integers(1, min(map(math.prod, grids))))
    if draw(st.booleans()):
        keep = [draw(st.floats(0.01, 1) | st.integers(1, math.prod(grid))) for grid in grids]
    N, dtype, seed = sum(map(math.prod, grids)), draw(st.sampled_from(DTYPES[:3])), draw(st.integers(0, 99))
    x = make_tokens(1, N, draw(st.integers(1, 9)), dtype, seed=seed)[0]
    metric = make_tokens(1, N, 3, dtype, seed=seed + 1)[0] if draw(st.booleans()) else None
    return x, grids, keep, draw(st.sampled_from(compression.COMPRESSIONS)), metric, seed


def test_random_clips_have_the_bits_that_they_have_alone(backend, request):
    checked = []

    @settings(max_examples=request.config.getoption("batches") or (1 if SMALL else 10), deadline=None, database=None,
              derandomize=True, suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(batches())
    def check(batch):
        x, grids, keep, method, metric, seed = batch
        x, metric = (t if t is None else t.to(backend.device) for t in (x, metric))
        each, counts = keep if isinstance(keep, list) else [keep] * len(grids), [math.prod(grid) for grid in grids]

        def merged(draw, x, grid, keep, metric):
            x = x.detach().requires_grad_()
            out = sttm.compress(x, grid, keep, method, metric, draw, backend.impl)
            (gradient,) = torch.autograd.grad(out.x.float().square().sum(), x)
            return out, gradient

        out, gradient = merged(torch.Generator().manual_seed(seed), x, grids, keep, metric)
        draw = torch.Generator().manual_seed(seed)
        parts = x.split(counts), grids, each, [None] * len(grids) if metric is None else metric.split(counts)
        alone, gradients = zip(*(merged(draw, *own) for own in zip(*parts, strict=True)), strict=True)
        assert out.lengths == tuple(own.lengths[0] for own in alone)
        for name in ("x", "size", "positions", "places"):
            assert_equal(name, getattr(out, name), torch.cat([getattr(own, name) for own in alone]))
        assert_equal("gradient", gradient, torch.cat(gradients))
        first, indices = 0, []
        for own in alone:
            indices.append(torch.where(own.plan.index < 0, -1, own.plan.index + first))
            first += own.lengths[0]
        assert_equal("plan", out.plan.index, torch.cat(indices, 1))
        checked.append(len(grids))

    check()
    print(f"compress, {backend.impl}: {len(checked)} batches, {sum(checked)} clips")


@methods
def test_no_group_is_empty_where_tokens_are_alike(method):
    x = torch.ones(24, 3)
    x[7] = torch.tensor([1.0, -1.0, 0.0])
    out = sttm.compress(x, (2, 3, 4), 10, method)
    assert (out.size >= 1).all()
    assert_equal("groups", out.plan.index[out.plan.index >= 0].unique(), torch.arange(10, dtype=torch.int32))


def test_similarity_may_be_of_other_features():
    x, metric = tokens(), tokens(C=2, seed=1)
    out = sttm.compress(x, GRIDS, 0.5, "tome", metric=metric)
    assert_equal("groups", out.plan.index, sttm.compress(metric, GRIDS, 0.5, "tome").plan.index)
    assert not torch.equal(out.plan.index, sttm.compress(x, GRIDS, 0.5, "tome").plan.index)


@methods
def test_gradients_are_those_of_the_mean(method):
    x = tokens().double().requires_grad_()
    draws = torch.Generator().manual_seed(3)
    out = sttm.compress(x, GRIDS, 0.4, method, generator=draws)
    weights = torch.randn_like(out.x)
    (grad,) = torch.autograd.grad((out.x * weights).sum(), x)
    index = out.plan.index[0].long()
    expected = torch.where((index >= 0)[:, None], (weights / out.size[:, None])[index.clamp_min(0)], 0)
    torch.testing.assert_close(grad, expected)


def test_random_choices_are_those_of_the_generator():
    def drawn(seed):
        return sttm.compress(tokens(), GRIDS, 0.5, "random", generator=torch.Generator().manual_seed(seed)).places

    assert_equal("same seed", drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_prompt_keeps_text_and_the_places_of_the_groups():
    x = tokens([(2, 2, 2), (1, 2, 3)])
    out = sttm.compress(x, [(2, 2, 2), (1, 2, 3)], [3, 2], "tome")
    v, pad = 9, 0
    rows = [[1, v, v, v, v, 2, v, v, v, v, 3], [pad, pad, pad, 4, v, v, v, v, v, v, 5]]  # a timestamp between frames
    input_ids = torch.tensor(rows)
    ids, mask = shorten_prompt(input_ids, v, out)
    first, second = out.places.split([3, 2])
    columns = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9])[first]
    expected = torch.cat((torch.tensor([0, 5, 10]), columns)).sort().values
    assert_equal("first row", ids[0][mask[0]], torch.cat((expected,)))
    assert_equal("second row", ids[1][mask[1]], torch.cat((torch.arange(4), 4 + second, torch.tensor([10]))))
    assert ids.shape[1] == 7
    assert mask.sum(1).tolist() == [6, 7]
    assert not mask[0, 0]
    with pytest.raises(ValueError, match="placeholder 9 for each of the 14 tokens that were compressed, got 13"):
        shorten_prompt(input_ids.masked_fill(input_ids == 2, 1).scatter(1, torch.tensor([[1], [0]]), 1), v, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "keep must be a fraction"),
        ({"keep": 7}, "keep must be at most the 6 tokens"),
        ({"keep": None}, "keep must be a float or an int, got None"),
        ({"keep": [0.5]}, "keep must have one number for each of 4 clips, got 1"),
        ({"grid": (3, 4, 5)}, "grid must hold the 190 tokens of tokens"),
        ({"grid": torch.tensor(GRIDS) * 1.0}, "grid must be of integers on the CPU"),
        ({"method": "mean"}, "method must be one of"),
        ({"metric": tokens()[1:]}, "grid must hold the 189 tokens of metric"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"tokens": [tokens()]}, "grid must hold the tokens of each clip"),
        ({"tokens": "clip"}, "tokens must be"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sttm.compress(**{"tokens": tokens(), "grid": GRIDS, "keep": 0.5, **change})
