"""STTM: worked cases, plans and counts, motion, prefix, windows, precision, gradients, compilation, bad input."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sttm_kernels as sttm
from sttm_kernels import reference
from sttm_kernels.nn import GENERATORS, STTM, KMeans, Pool, TopK, proportional_attention
from sttm_kernels.nn.sttm import grid_positions
from sttm_kernels.testing import assert_equal, assert_verb_within_budget, assert_within_budget, make_tokens

RED, BLUE = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
each_generator = pytest.mark.parametrize("name", sorted(GENERATORS))


def build(dim: int, *args, seed: int = 0, **kwargs) -> STTM:
    """An STTM whose motion, if any, is not zero."""
    torch.manual_seed(seed)
    module = STTM(dim, *args, **kwargs)
    if module.motion is not None:
        torch.nn.init.normal_(module.motion.weight)
    return module


def part(tokens: sttm.MergedTokens, *where: slice) -> sttm.MergedTokens:
    return sttm.MergedTokens(tokens.x[where], tokens.size[where], tokens.positions[where])


def assert_same_tokens(actual: sttm.MergedTokens, expected: sttm.MergedTokens) -> None:
    for field in ("x", "size", "positions"):
        assert_equal(field, getattr(actual, field), getattr(expected, field))


# Worked cases


def test_two_colours_become_two_tokens_in_space_and_then_in_time(backend):
    frame = torch.stack([RED, RED, BLUE, BLUE] * 2)
    x = frame.repeat(2, 1)[None].to(backend.device)  # 2 frames of 2 x 4 patches, the left half red
    module = STTM(3, 2, 2, impl=backend.impl).to(backend.device)
    out, plan = module(x, (2, 2, 4), return_plan=True)
    assert_equal("x", out.x[0].cpu(), torch.stack([RED, BLUE]))
    assert_equal("size", out.size.cpu(), torch.tensor([[8.0, 8.0]]))
    assert_equal("positions", out.positions.cpu(), torch.tensor([[[0.5, 0.5, 0.5], [0.5, 0.5, 2.5]]]))
    assert plan.num_groups == 2
    assert plan.index.tolist() == [[0, 0, 1, 1] * 4]
    assert module.output_grid((2, 2, 4)) == (1, 1, 2)


def test_a_moving_object_stays_one_token_and_its_second_moment_shows_the_motion():
    strip = torch.stack([RED.repeat(5).view(5, 3)] * 3)
    for t, at in enumerate((0, 2, 4)):
        strip[t, at] = BLUE  # a blue patch that moves 2 patches a frame
    module = build(3, 5, 2, second_moment=True, weight="uniform", meta=KMeans(2))
    out, plan = module(strip.view(1, 15, 3), (3, 1, 5), return_plan=True)
    blue = int(plan.index[0, 0])
    assert plan.index[0, [0, 7, 14]].tolist() == [blue] * 3
    assert sorted(out.size[0].tolist()) == [3, 12]
    # t = 0, 1, 2 and x = 0, 2, 4: E tt = 5/3, E tx = 10/3, E xx = 20/3
    raw = torch.tensor([1, 0, 2, 5 / 3, 0, 10 / 3, 0, 0, 20 / 3], dtype=torch.float64)
    assert_within_budget("positions", out.positions[0, blue], raw, raw.float(), 3)
    # so var t = 2/3, cov tx = 4/3, var x = 8/3: 12 var + 1 is 9 and 33
    seen = torch.tensor([1, 0, 2, math.log(3), 0, math.log(33) / 2, 0, 16 / (3 * 33**0.5), 0], dtype=torch.float64)
    expected = BLUE.double() + module.motion.weight.double() @ seen
    assert_within_budget("x", out.x[0, blue], expected, BLUE + module.motion.weight @ seen.float(), 18)


def test_the_stages_are_assign_and_merge():
    x, metric = make_tokens(2, 24, 6), make_tokens(2, 24, 4, seed=1)
    size = torch.rand(2, 24) + 0.5
    module = STTM(6, 3, 5, "kmeans", motion=False)
    frames, q, p = x.view(6, 8, 6), metric.view(6, 8, 4), grid_positions((3, 2, 4), 0, torch.float32, x.device)
    meta = KMeans()(q, 2, 4, 3, size.view(6, 8))
    plan = sttm.assign(q, meta, temperature=0.1)
    spatial = sttm.merge(frames, plan, size.view(6, 8), p.repeat(2, 1).view(6, 8, 3))
    q = sttm.merge(q, plan, size.view(6, 8)).x.view(2, 9, 4)
    meta = KMeans()(q, 3, 3, 5, spatial.size.view(2, 9), "tall")
    plan = sttm.assign(q, meta, temperature=0.1)
    expected = sttm.merge(spatial.x.view(2, 9, 6), plan, spatial.size.view(2, 9), spatial.positions.view(2, 9, 3))
    assert_same_tokens(module(x, (3, 2, 4), size, metric=metric), expected)


def test_the_metric_is_x_by_default_and_heads_are_averaged():
    x = make_tokens(2, 25, 6)
    heads = make_tokens(2, 75, 4, seed=1).view(2, 3, 25, 4)
    module = STTM(6, num_prefix=1)
    assert_same_tokens(module(x, (4, 2, 3), metric=x.clone()), module(x, (4, 2, 3)))
    assert_same_tokens(module(x, (4, 2, 3), metric=heads), module(x, (4, 2, 3), metric=heads.mean(1)))


# Clips with padding

CLIPS = [  # temporal window; spatial and temporal keep; of (4, 3, 4), the real frames, rows and columns of each clip
    (None, 5, 3, [(4, 3, 4), (1, 3, 4), (2, 3, 4)]),
    (None, 4, 2, [(4, 3, 4), (3, 2, 4), (2, 3, 3)]),
    (2, 0.5, 0.4, [(4, 3, 4), (2, 3, 4)]),
    (None, None, 3, [(4, 3, 4), (2, 2, 3)]),
    (None, 0.3, None, [(3, 3, 4), (1, 3, 4)]),
]


def in_whole_grid(extents: tuple[int, int, int], num_prefix: int) -> Tensor:
    real = torch.zeros(4, 3, 4, dtype=torch.bool)
    t, h, w = extents
    real[:t, :h, :w] = True
    return torch.nn.functional.pad(real.flatten(), (num_prefix, 0), value=True)


@each_generator
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_a_clip_with_padding_is_that_clip_alone(backend, name, case):
    """Its first groups, bit for bit, whatever the padding holds; the others are empty."""
    window, spatial, temporal, clips = case
    module = build(8, spatial, temporal, name, num_prefix=1, temporal_window=window, impl=backend.impl)
    module = module.to(backend.device)
    mask = torch.stack([in_whole_grid(extents, 1) for extents in clips])
    x, metric = make_tokens(len(clips), 49, 8), make_tokens(len(clips), 98, 8, seed=1).view(len(clips), 2, 49, 8)
    size = torch.rand(len(clips), 49, generator=torch.Generator().manual_seed(2)) + 0.5

    def given(b: int | slice, tokens: Tensor | slice) -> dict[str, Tensor]:
        found = {"x": x[b][:, tokens], "metric": metric[b][:, :, tokens], "size": size[b][:, tokens]}
        return {key: value.to(backend.device) for key, value in found.items()}

    def spoil(value: Tensor) -> Tensor:
        real = mask if value.dim() == 2 else mask[..., None] if value.dim() == 3 else mask[:, None, :, None]
        return torch.where(real.to(value.device), value, torch.nan)

    for leave_out in ((), ("metric", "size")):
        batch = {key: spoil(value) for key, value in given(slice(None), slice(None)).items() if key not in leave_out}
        out, plan = module(grid=(4, 3, 4), mask=mask.to(backend.device), return_plan=True, **batch)
        assert_equal("real tokens", plan.index.cpu() >= 0, mask)
        for b, extents in enumerate(clips):
            of_clip = {key: v for key, v in given(slice(b, b + 1), mask[b]).items() if key not in leave_out}
            alone, own = module(grid=extents, return_plan=True, **of_clip)
            K = own.num_groups
            for field in ("x", "size", "positions"):
                found, expected = getattr(out, field)[b, :K], getattr(alone, field)[0]
                if name == "learned" or backend.impl == "torch":  # sums and products whose order depends on N
                    torch.testing.assert_close(found, expected)
                else:
                    assert_equal(f"{field} of {extents}", found, expected)
                assert not bool(getattr(out, field)[b, K:].any())
            assert_equal("plan", plan.index[b].cpu()[mask[b]], own.index[0].cpu())


@each_generator
def test_clips_one_after_another_keep_a_share_of_their_own(backend, name):
    """Each has the counts, the bits and the gradients that it has alone."""
    grids = [(4, 3, 4), (1, 2, 3), (4, 3, 4), (2, 3, 3)]
    module = build(8, 0.5, 0.4, name, num_prefix=1, metric_dim=6, impl=backend.impl).to(backend.device)
    lengths = [1 + math.prod(grid) for grid in grids]
    given = {
        "x": make_tokens(1, sum(lengths), 8)[0],
        "size": torch.rand(sum(lengths), generator=torch.Generator().manual_seed(2)) + 0.5,
        "metric": make_tokens(2, sum(lengths), 6, seed=1),
    }
    given = {name: value.to(backend.device).requires_grad_(name == "x") for name, value in given.items()}
    out, plan = module(grid=torch.tensor(grids), return_plan=True, **given)
    assert out.lengths == plan.merged_lengths == (11, 2, 11, 5)  # 1 + 0.4 of 24, 3, 24 and 10
    assert plan.lengths == tuple(lengths)
    (gradient,) = torch.autograd.grad(out.x.square().sum(), given["x"])
    first, found = 0, [out.x, out.size, out.positions, plan.index[0], gradient]
    dims = {"x": 0, "size": 0, "metric": 1}
    parts = [t.split(n) for t, n in zip(found, [out.lengths] * 3 + [lengths] * 2, strict=True)]
    for grid, *packed, own in zip(
        grids, *parts, zip(*(given[name].split(lengths, dim) for name, dim in dims.items()), strict=True), strict=True
    ):
        own_x, own_size, own_metric = (t.detach()[None] for t in own)
        alone, own_plan = module(own_x.requires_grad_(), grid, own_size, metric=own_metric, return_plan=True)
        (own_gradient,) = torch.autograd.grad(alone.x.square().sum(), own_x)
        expected = [alone.x, alone.size, alone.positions, own_plan.index + first, own_gradient]
        for field, a, b in zip(("x", "size", "positions", "index", "gradient"), packed, expected, strict=True):
            assert_equal(f"{field} of {grid}", a, b[0])
        first += alone.x.shape[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grid": [(1, 2, 2), (1, 1, 1)]},
            r"grid must hold the 9 tokens of x, 1 of every clip before it, got .* are 7",
        ),
        ({"grid": torch.tensor([[1.0, 2, 2], [1, 1, 2]])}, "grid must be of integers on the CPU"),
        ({"grid": []}, "grid must be .* or one of each clip"),
        ({"mask": torch.ones(9, dtype=torch.bool)}, "mask must be None for clips"),
        ({"x": torch.ones(9, 5)}, r"x must have shape \(sum of N, C\) = \(9, 4\), got \(9, 5\)"),
        ({"metric": torch.ones(8, 4)}, "metric must have the T = 9 tokens of x, got 8"),
        ({"size": torch.ones(1, 9)}, r"size must have shape \(T,\)"),
        ({"positions": torch.ones(9, 2)}, "positions must have 3 or 9 channels"),
    ],
    ids=str,
)
def test_clips_one_after_another_that_do_not_fit_are_refused(change, message):
    given = {"x": torch.ones(9, 4), "grid": [(1, 2, 2), (1, 1, 3)]}
    with pytest.raises(ValueError, match=message):
        build(4, num_prefix=1)(**(given | change))


@each_generator
def test_a_clip_of_fewer_tokens_than_meta_tokens_has_no_other_seeds(name):
    """Padding is no meta token, also where nothing else is left."""
    x = -torch.ones(2, 8, 4)
    mask = torch.arange(8) < torch.tensor([[2], [0]])
    module = build(4, None, 5, name, motion=False)
    out, plan = module(x, (2, 2, 2), mask=mask, return_plan=True)
    assert_equal("size", out.size.sum(1), torch.tensor([2.0, 0.0]))
    assert bool((plan.index[0, :2] == plan.index[0, 0]).all())
    assert bool(out.x.isfinite().all())
    q = x.masked_fill(~mask[..., None], 0)
    meta = module.temporal_meta(q, 2, 4, 5, mask.float(), "tall", mask=mask)
    assert bool((meta[0] != 0).any(1).all())


def test_padding_has_no_gradient():
    mask = torch.stack([in_whole_grid(extents, 1) for extents in ((4, 3, 4), (2, 2, 3))])
    x = torch.where(mask[..., None], make_tokens(2, 49, 8), torch.nan).requires_grad_()
    out = build(8, num_prefix=1)(x, (4, 3, 4), mask=mask)
    (out.x.square().sum() + out.positions.sum()).backward()
    assert bool(x.grad.isfinite().all())
    assert not bool(x.grad[~mask].any())
    assert bool((x.grad[mask] != 0).any(1).all())


@each_generator
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_mask_of_real_tokens_changes_nothing(name, similarity, backend):
    """Tokens of size 0, and groups that nothing went to, are there as they are without a mask."""
    for seed in range(8):
        torch.manual_seed(seed)
        x, size = torch.randn(2, 8, 4, device=backend.device), torch.randint(0, 3, (2, 8), device=backend.device)
        module = build(4, 2, 3, name, similarity=similarity, impl=backend.impl).to(backend.device)
        out, plan = module(x, (2, 2, 2), size=size.float(), return_plan=True)
        with_mask, its_plan = module(
            x, (2, 2, 2), size=size.float(), return_plan=True, mask=torch.ones_like(size, dtype=torch.bool)
        )
        assert_equal("plan", its_plan.index, plan.index)
        assert_equal("x", with_mask.x, out.x)
        assert_equal("size", with_mask.size, out.size)


def test_positions_of_padding_have_no_gradient_whatever_they_hold():
    mask = torch.arange(12)[None] < 8
    positions = torch.where(mask[..., None], torch.rand(1, 12, 3), torch.nan).requires_grad_()
    build(4, 2, 3, second_moment=True)(
        torch.randn(1, 12, 4), (3, 2, 2), positions=positions, mask=mask
    ).x.sum().backward()
    assert not bool(positions.grad[~mask].any())
    assert bool(positions.grad[mask].any())


# Counts, plans, chains


@each_generator
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_counts_are_conserved_and_the_plan_leads_from_input_to_output(name, num_prefix):
    grid, N = (4, 3, 5), num_prefix + 60
    x = make_tokens(2, N, 8, torch.float64)
    size = torch.randint(1, 5, (2, N), generator=torch.Generator().manual_seed(0)).double()
    module = build(8, 0.4, 7, name, motion=False, num_prefix=num_prefix, weight="uniform").double()
    out, plan = module(x, grid, size, return_plan=True)
    K = num_prefix + math.prod(module.output_grid(grid))
    assert K == num_prefix + 7
    assert out.x.shape == (2, K, 8)
    assert plan.num_groups == K
    assert_equal("sum of size", out.size.sum(1), size.sum(1))
    # With uniform weights, two means in a row are one mean over all tokens of a group.
    p = grid_positions(grid, num_prefix, torch.float64, x.device)
    at_once = reference.merge(x, plan, size, p)
    assert_equal("size", out.size, at_once.size)
    assert_within_budget("x", out.x, at_once.x, at_once.x, N)
    assert_within_budget("positions", out.positions, at_once.positions, at_once.positions, N)
    copied = sttm.unmerge(out.x, plan)
    assert_equal("unmerged", copied[1, 20], out.x[1, plan.index[1, 20]])
    assert_equal("prefix", copied[:, :num_prefix], x[:, :num_prefix])


def test_spatial_only_temporal_only_and_nothing():
    x, grid = make_tokens(2, 61, 8), (4, 3, 5)
    spatial = STTM(8, 6, None, num_prefix=1)
    temporal = STTM(8, None, 0.25, num_prefix=1)
    assert spatial.output_grid(grid) == (4, 1, 6)
    assert temporal.output_grid(grid) == (1, 1, 15)
    out, plan = spatial(x, grid, return_plan=True)
    assert out.x.shape == (2, 25, 8)
    frame_of_group = (plan.index[:, 1:].view(2, 4, 15) - 1) // 6
    assert_equal("frame", frame_of_group, torch.arange(4).view(1, 4, 1).expand(2, 4, 15).int())
    assert temporal(x, grid).x.shape == (2, 16, 8)

    nothing = STTM(8, None, None, motion=False, num_prefix=1)
    assert nothing.output_grid(grid) == grid
    out, plan = nothing(x, grid, return_plan=True)
    expected = sttm.MergedTokens(x, torch.ones(2, 61), grid_positions(grid, 1, x.dtype, x.device).expand(2, -1, -1))
    assert_same_tokens(out, expected)
    assert_equal("index", plan.index, torch.arange(61, dtype=torch.int32).expand(2, -1))


def test_counts_of_meta_tokens():
    def grid_of(spatial, temporal, **kwargs):
        return STTM(4, spatial, temporal, **kwargs).output_grid((4, 3, 5))

    assert grid_of(0.5, None) == (4, 1, 8)  # 7.5, to the nearest
    assert grid_of(0.01, None) == (4, 1, 1)
    assert grid_of(1.0, None) == (4, 1, 15)
    assert grid_of(1, None) == (4, 1, 1)
    assert grid_of(0.2, 0.5) == (1, 1, 6)
    assert grid_of(0.2, 0.5, temporal_window=2) == (2, 1, 3)


def test_chained_by_output_grid_with_empty_groups_on_the_way():
    x = torch.cat([make_tokens(2, 1, 8), make_tokens(2, 1, 8, seed=1).expand(-1, 48, -1)], 1)  # equal patches
    x = x.clone().requires_grad_()
    first, second = build(8, 5, 6, num_prefix=1, second_moment=True), build(8, None, 3, num_prefix=1)
    out = first(x, (4, 3, 4))
    grid = first.output_grid((4, 3, 4))
    empty = out.size == 0
    assert empty.any()
    assert (out.x[empty] == 0).all()
    assert (out.positions[empty] == 0).all()
    last = second(out.x, grid, out.size, out.positions)
    assert second.output_grid(grid) == (1, 1, 3)
    assert last.positions.shape == (2, 4, 9)
    assert_equal("sum of size", last.size.sum(1), torch.tensor([49.0, 49.0]))

    key = last.x[:, None]
    seen = proportional_attention(key, key, key, last.size)
    seen.square().sum().backward()
    assert seen.isfinite().all()
    assert x.grad.isfinite().all()
    gone = torch.where((last.size == 0)[:, None, :, None], 7.0, key)
    assert (last.size == 0).any()
    assert_equal("without empty groups", proportional_attention(key, gone, gone, last.size), seen)


# Motion


def test_motion_starts_at_zero():
    x = make_tokens(2, 61, 8)
    still, moving = STTM(8, num_prefix=1, motion=False), STTM(8, num_prefix=1)
    assert_same_tokens(moving(x, (4, 3, 5)), still(x, (4, 3, 5)))


@pytest.mark.parametrize("second_moment", [False, True])
def test_motion_is_the_linear_aggregation_of_positions(second_moment):
    """W p_k, worked out as the aggregation of W p_n, and extents and correlations beside; prefix tokens have none."""
    x, grid = make_tokens(2, 61, 8, torch.float64), (4, 3, 5)
    module = build(8, num_prefix=1, weight="uniform", second_moment=second_moment).double()
    out, plan = module(x, grid, return_plan=True)
    still = sttm.merge(x, plan)
    p = grid_positions(grid, 1, torch.float64, x.device).expand(2, -1, -1)
    expected = still.x + sttm.merge(p @ module.motion.weight[:, :3].T, plan).x
    if second_moment:
        apart = p - sttm.unmerge(sttm.merge(p, plan).x, plan)
        covariance = sttm.merge((apart[..., :, None] * apart[..., None, :]).flatten(2), plan).x.unflatten(2, (3, 3))
        extent = (12 * covariance.diagonal(dim1=2, dim2=3) + 1).sqrt()
        correlation = 12 * covariance / (extent[..., :, None] * extent[..., None, :])
        seen = torch.cat((extent.log(), correlation[..., [0, 0, 1], [1, 2, 2]]), -1)
        expected = expected + seen @ module.motion.weight[:, 3:].T
    expected[:, 0] = x[:, 0]
    assert_within_budget("x", out.x, expected, expected, 61 * 9)
    assert not torch.equal(out.x, still.x)


def test_positions_given_are_used():
    x, grid = make_tokens(2, 25, 8), (4, 2, 3)
    module = build(8, num_prefix=1)
    p = grid_positions(grid, 1, torch.float32, x.device)
    assert_same_tokens(module(x, grid, positions=p), module(x, grid))
    twice = module(x, grid, positions=(2 * p).expand(2, -1, -1))
    assert_equal("positions", twice.positions, 2 * module(x, grid).positions)
    own = torch.cat([torch.full((1, 3), 9.0), p[1:]])
    assert_equal("prefix", module(x, grid, positions=own).positions[:, 0], torch.full((2, 3), 9.0))


# Prefix, windows, independence


@each_generator
def test_prefix_is_untouched_and_unseen(name):
    x = make_tokens(2, 62, 8)
    size = torch.rand(2, 62) + 1
    module = build(8, 0.5, 0.5, name, num_prefix=2)
    out = module(x, (4, 3, 5), size)
    assert_equal("x", out.x[:, :2], x[:, :2])
    assert_equal("size", out.size[:, :2], size[:, :2])
    assert (out.positions[:, :2] == 0).all()
    x[:, :2] = math.nan
    assert_equal("the rest", module(x, (4, 3, 5), size).x[:, 2:], out.x[:, 2:])


@each_generator
def test_a_temporal_window_is_a_clip_of_its_own(name):
    x = make_tokens(2, 6 * 12, 8)
    p = grid_positions((6, 3, 4), 0, torch.float32, x.device)
    module = build(8, 5, 4, name, temporal_window=2)
    out = module(x, (6, 3, 4))
    assert module.output_grid((6, 3, 4)) == (3, 1, 4)
    for i in range(3):
        window = slice(24 * i, 24 * (i + 1))
        alone = module(x[:, window], (2, 3, 4), positions=p[window])
        assert_same_tokens(part(out, slice(None), slice(4 * i, 4 * (i + 1))), alone)


@each_generator
def test_a_clip_has_the_same_bits_alone_and_in_a_batch(name, backend):
    x = make_tokens(3, 2 + 4 * 15, 16, device=backend.device)
    module = build(16, meta=name, num_prefix=2, impl=backend.impl).to(backend.device)
    out = module(x, (4, 3, 5))
    assert_same_tokens(module(x, (4, 3, 5)), out)
    for b in range(3):
        one = slice(b, b + 1)
        assert_same_tokens(module(x[one], (4, 3, 5)), part(out, one))


@pytest.mark.parametrize(("dim", "second_moment"), [(5, True), (64, False)])
def test_motion_has_the_same_bits_alone_and_in_a_batch(dim, second_moment):
    """Also of a clip that becomes so few tokens that a library would multiply them in another way."""
    module, x = build(dim, None, 2, second_moment=second_moment), make_tokens(6, 12, dim)
    out = module(x, (2, 2, 3))
    for b in range(6):
        one = slice(b, b + 1)
        assert_same_tokens(module(x[one], (2, 2, 3)), part(out, one))


def test_nan_tokens_give_an_answer_of_the_right_shape():
    x = torch.full((1, 60, 8), math.nan)
    out, plan = STTM(8)(x, (4, 3, 5), return_plan=True)
    assert out.x.shape[1] == plan.num_groups
    assert ((plan.index >= 0) & (plan.index < plan.num_groups)).all()


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    x = make_tokens(2, 61, 8, dtype)
    module = build(8, num_prefix=1)
    module.motion.weight.data = module.motion.weight.bfloat16().float()
    out = module(x, (4, 3, 5))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.x.dtype, out.size.dtype, out.positions.dtype) == (dtype, acc, acc)
    moved = out.x[:, 1:].to(acc) - STTM(8, num_prefix=1)(x, (4, 3, 5)).x[:, 1:].to(acc)
    assert moved.abs().amax(-1).gt(0).equal(out.positions[:, 1:].abs().amax(-1).gt(0))
    for other in (torch.float32, torch.float64, torch.bfloat16):
        assert_same_tokens(module.to(other)(x, (4, 3, 5)), out)


@each_generator
def test_autocast_changes_nothing_inside(name):
    x = make_tokens(2, 61, 8)
    module = build(8, meta=name, num_prefix=1)
    expected = module(x, (4, 3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_tokens(module(x, (4, 3, 5)), expected)
        assert module(x.bfloat16(), (4, 3, 5)).x.dtype == torch.bfloat16


# State


def test_state_is_motion_and_parameters_of_generators():
    def names(*args, **kwargs):
        return list(STTM(8, *args, **kwargs).state_dict())

    assert names() == ["motion.weight"]
    assert names(motion=False) == []
    assert names(meta="topk", spatial_keep=None, motion=False) == [
        "temporal_meta.saliency.weight",
        "temporal_meta.saliency.bias",
    ]
    assert names(meta="learned", temporal_keep=None) == [
        "spatial_meta.queries",
        "spatial_meta.look_for.weight",
        "motion.weight",
    ]
    assert STTM(8).motion.weight.shape == (8, 3)
    assert STTM(8, second_moment=True).motion.weight.shape == (8, 9)


@pytest.mark.parametrize("meta", ["topk", "learned"])
def test_parameters_that_no_layer_is_called_with_are_in_no_linear_layer(meta):
    """Adapters put another forward in place of that of every `nn.Linear`; theirs would never learn."""
    inside = [m for m in STTM(8, meta=meta, motion=False).modules() if any(True for _ in m.parameters(recurse=False))]
    assert inside
    assert not any(isinstance(module, nn.Linear) for module in inside)


def test_a_name_makes_a_generator_per_stage_and_a_module_is_shared():
    by_name, shared = STTM(8, meta="topk"), STTM(8, meta=TopK(8))
    assert by_name.spatial_meta is not by_name.temporal_meta
    assert shared.spatial_meta is shared.temporal_meta


@each_generator
def test_state_dict_pickle_and_deepcopy_round_trip(name):
    x = make_tokens(2, 61, 8)
    module = build(8, meta=name, num_prefix=1)
    expected = module(x, (4, 3, 5))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = build(8, meta=name, num_prefix=1, seed=1)
    loaded.load_state_dict(torch.load(file))
    for twin in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_tokens(twin(x, (4, 3, 5)), expected)


# Gradients


@each_generator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_specification(name, dtype, backend):
    for verb in ("assign", "merge", "soft_merge"):
        backend.needs(verb, dtype)
    module = build(8, 6, 7, name, num_prefix=1, second_moment=True).to(backend.device)
    inputs = {
        "x": make_tokens(2, 61, 8, dtype, backend.device),
        "size": torch.rand(2, 61, generator=torch.Generator().manual_seed(2)).to(backend.device, dtype) + 0.5,
        "positions": make_tokens(2, 61, 3, dtype, backend.device, seed=3),
        **{f"parameter {n}": p.detach() for n, p in module.named_parameters()},
    }

    def run(impl: str, x: Tensor, size: Tensor, positions: Tensor, **parameters: Tensor) -> dict[str, Tensor]:
        twin = copy.deepcopy(module).to(x.dtype)
        for part in twin.modules():
            if hasattr(part, "impl"):
                part.impl = impl
        values = {n.removeprefix("parameter "): p.to(x.dtype) for n, p in parameters.items()}
        arguments = (x, (4, 3, 5), size, positions)
        out, plan = torch.func.functional_call(twin, values, arguments, {"return_plan": True})
        return {"x": out.x, "size": out.size, "positions": out.positions, "index": plan.index}

    terms = 2 * 61 * (8 + 9)
    assert_verb_within_budget("STTM", partial(run, backend.impl), partial(run, "reference"), inputs, terms)


@pytest.mark.parametrize("name", ["topk", "learned"])
def test_generators_learn_through_cosine_assignment(name):
    x = make_tokens(2, 60, 8)
    module = build(8, meta=name)
    module(x, (4, 3, 5)).x.square().sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


# Compilation


@pytest.mark.unpoisoned
@each_generator
def test_fullgraph(name):
    """Forward and backward, compiled in one graph, give what they give in eager mode."""
    torch._dynamo.reset()
    module, x = build(8, meta=name, num_prefix=1, second_moment=True), make_tokens(2, 61, 8)
    exact = copy.deepcopy(module).double()
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager"), exact):
        module.zero_grad()
        leaf = x.to(next(call.parameters()).dtype, copy=True).requires_grad_()
        out, plan = call(leaf, (4, 3, 5), return_plan=True)
        (out.x.sin().sum() + out.positions.sin().sum()).backward()
        results.append((plan.index, out.x, out.size, out.positions, leaf.grad, *(p.grad for p in call.parameters())))
    for i, (eager, compiled, truth) in enumerate(zip(*results, strict=True)):
        if i == 0:
            assert_equal("index", compiled, eager)
            assert_equal("index in float64", truth, eager)
        else:
            assert_within_budget(f"value {i}", compiled, truth, eager, 61 * 17)


@pytest.mark.unpoisoned
def test_changing_grids_do_not_compile_for_ever():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    module = STTM(8)
    run = torch.compile(module, fullgraph=True, backend=counter)
    counts = []
    for grid in ((4, 4, 6), (5, 6, 7), (6, 5, 8), (8, 8, 4), (9, 5, 5), (3, 7, 12)):
        x = make_tokens(2, math.prod(grid), 8)
        assert_same_tokens(run(x, grid), module(x, grid))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[2]


@pytest.mark.unpoisoned
def test_export():
    x = make_tokens(2, 61, 8)
    module = build(8, num_prefix=1)
    exported = torch.export.export(module, (x, (4, 3, 5)))
    assert_same_tokens(exported.module()(x, (4, 3, 5)), module(x, (4, 3, 5)))


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(2, 25, 4, dtype=torch.int64)}, TypeError, "x must be float32, bfloat16, float16 or float64"),
        ({"x": torch.ones(25)}, ValueError, r"x must have shape \(B, N, C\), got \(25\)"),
        ({"x": torch.ones(2, 25, 5)}, ValueError, r"x must have shape \(B, N, C\) = \(2, 25, 4\), got \(2, 25, 5\)"),
        ({"grid": (4, 6)}, ValueError, r"grid must be \(T, H, W\), 3 positive integers, got \(4, 6\)"),
        ({"grid": (4, 0, 3)}, ValueError, r"every extent of grid \(T, H, W\) must be at least 1, got 0"),
        ({"grid": (4, 2.0, 3)}, TypeError, r"every extent of grid \(T, H, W\) must be an int, got float"),
        ({"grid": (5, 5, 1)}, ValueError, r"grid must hold the N - num_prefix = 24 tokens, got \(5, 5, 1\)"),
        ({"grid": (3, 2, 4)}, ValueError, "temporal_window must divide the T = 3 frames of the grid, got 2"),
        ({"grid": (12, 2, 1)}, ValueError, "spatial_keep must be at most the 2 tokens there are to merge, got 3"),
        ({"size": torch.ones(2, 24)}, ValueError, r"size must have shape \(B, N\) = \(2, 25\), got \(2, 24\)"),
        ({"size": 1.0}, TypeError, "size must be a torch.Tensor, got float"),
        ({"positions": torch.ones(24, 3)}, ValueError, r"positions must have shape \(B, N, P\) = \(2, 25, 3\)"),
        ({"positions": torch.ones(25, 2)}, ValueError, "positions must have 3 or 9 channels, got 2"),
        ({"metric": torch.ones(2, 24, 4)}, ValueError, r"metric must have the B and N of x, .*, got \(2, 24, 4\)"),
        ({"metric": torch.ones(25, 4)}, ValueError, r"metric must have shape \(B, N, D\) or \(B, H, N, D\)"),
        ({"metric": torch.ones(2, 25, 4).bool()}, TypeError, "metric must be float32, bfloat16, float16 or float64"),
    ],
)
def test_bad_inputs(change, error, message):
    module = STTM(4, 3, num_prefix=1, temporal_window=2)
    with pytest.raises(error, match=message):
        module(**({"x": torch.ones(2, 25, 4), "grid": (4, 2, 3)} | change))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 4.0}, TypeError, "dim must be an int, got float"),
        ({"spatial_keep": 0.0}, ValueError, r"spatial_keep must be a fraction in \(0, 1\] or a count of at least 1"),
        ({"temporal_keep": 1.5}, ValueError, r"temporal_keep must be a fraction in \(0, 1\] or a count of at least 1"),
        ({"temporal_keep": 0}, ValueError, "temporal_keep must be .* got 0"),
        ({"spatial_keep": math.nan}, ValueError, "spatial_keep must be .* got nan"),
        ({"spatial_keep": True}, TypeError, "spatial_keep must be a float, an int or None, got bool"),
        ({"meta": "median"}, ValueError, "meta must be one of .* got 'median'"),
        ({"meta": Pool}, TypeError, "meta must be a name or a torch.nn.Module, got type"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be at least 0, got -1"),
        ({"similarity": "euclid"}, ValueError, "similarity must be one of .* got 'euclid'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"weight": "hard"}, ValueError, "weight must be one of .* got 'hard'"),
        ({"temporal_window": 0}, ValueError, "temporal_window must be at least 1, got 0"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        STTM(**({"dim": 4} | arguments))


class Noting(torch.nn.Module):
    """Takes the first tokens, and notes what it was told."""

    def __init__(self, told=()):
        super().__init__()
        self.told = told
        self.noted = []

    def forward(self, q, rows, columns, num_meta, size=None, cells="square", mask=None, **told):
        self.noted.append((rows, columns, told))
        return q[:, :num_meta]


def test_a_generator_is_told_what_it_asks_for():
    x, grid = make_tokens(2, 1 + 4 * 6, 8), (4, 2, 3)
    silent, told = Noting(), Noting(("positions", "stage"))
    plain, out = (STTM(8, 2, 3, meta, num_prefix=1, temporal_window=2)(x, grid) for meta in (silent, told))
    assert_same_tokens(plain, out)
    assert [each for *_, each in silent.noted] == [{}, {}]
    (*frame, first), (*window, second) = told.noted
    assert (frame, first["stage"]) == ([2, 3], "spatial")
    assert (window, second["stage"]) == ([2, 2], "temporal")
    places = grid_positions(grid, 0, torch.float32, x.device).view(4, 6, 3)
    assert_equal("positions in a frame", first["positions"], places.repeat(2, 1, 1))
    between = STTM(8, 2, None, "pool", num_prefix=1)
    between.spatial_meta = Noting()
    merged = between(x, grid).positions[:, 1:]
    assert_equal("positions in a window", second["positions"], merged.reshape(4, 4, 3))
