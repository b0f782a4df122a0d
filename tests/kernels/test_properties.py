"""What holds for every input: conservation, symmetry, and what undoes what."""

import torch
from cases import REDUCTIONS, SMALL, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sttm_kernels as sttm
from sttm_kernels.testing import LAYOUTS, assert_equal, make_index, make_tokens

few = settings(
    max_examples=3 if SMALL else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
extents = st.fixed_dictionaries(
    {
        "B": st.integers(1, 1 if SMALL else 3),
        "N": st.integers(1, 40 if SMALL else 70),
        "K": st.integers(1, 20 if SMALL else 40),
        "C": st.integers(1, 20),
    }
)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1000)


@few
@given(extents, layouts, seeds, st.sampled_from(REDUCTIONS))
def test_merge_conserves_counts(backend, shape, layout, seed, reduce):
    B, N, K, C = shape.values()
    x = make_tokens(B, N, C, device=backend.device, seed=seed, layout=layout)
    index, size = (
        make_index(B, N, K, backend.device, seed),
        draw((B, N, 1, 1, 1), device=backend.device, seed=seed)["size"],
    )
    out = sttm.merge(x, sttm.MergePlan(index, K), size, reduce=reduce, impl=backend.impl)
    assert_equal("count", out.size.sum(1), size.masked_fill(index < 0, 0).sum(1))


@few
@given(extents, layouts, seeds, st.integers(0, 40), st.integers(0, 5))
def test_match_conserves_counts_and_clamps(backend, shape, layout, seed, r, num_prefix):
    B, N, _, C = shape.values()
    num_prefix = min(num_prefix, N)
    x = make_tokens(B, N, C, device=backend.device, seed=seed, layout=layout)
    plan = sttm.match(x, r, num_prefix, impl=backend.impl)
    assert N - min(r, (N - num_prefix) // 2) <= plan.num_groups <= N
    out = sttm.merge(x, plan, impl=backend.impl)
    assert_equal("count", out.size.sum(1), torch.full((B,), float(N), device=x.device))
    assert bool((out.size >= 1).all())  # no group of a match is empty
    assert_equal("prefix", out.x[:, :num_prefix], x[:, :num_prefix])


@few
@given(extents, layouts, seeds)
def test_merge_of_unmerged_groups_gives_them_back(backend, shape, layout, seed):
    B, N, K, C = shape.values()
    groups = make_tokens(B, K, C, device=backend.device, seed=seed, layout=layout)
    plan = sttm.MergePlan(make_index(B, N, K, backend.device, seed), K)
    spread = sttm.unmerge(groups, plan, backend.impl)
    for reduce in ("max", "first"):
        back = sttm.merge(spread, plan, reduce=reduce, impl=backend.impl)
        expected = groups.masked_fill((back.size == 0)[..., None], 0)
        assert_equal(reduce, back.x, expected)
        assert_equal("unmerge, merge, unmerge", sttm.unmerge(back.x, plan, backend.impl), spread)


@few
@given(extents, layouts, seeds)
def test_assigning_twice_assigns_the_same(backend, shape, layout, seed):
    """A meta token is most similar to itself, so tokens that were sent to their meta token stay with it."""
    B, N, K, C = shape.values()
    meta = make_tokens(B, K, C, device=backend.device, seed=seed, layout=layout)
    plan = sttm.assign(make_tokens(B, N, C, device=backend.device, seed=seed + 1), meta, "l2", impl=backend.impl)
    sent = sttm.unmerge(meta, plan, backend.impl)
    again = sttm.assign(sent, meta, "l2", impl=backend.impl)
    distance = (sent - sttm.unmerge(meta, again, backend.impl)).square().sum(-1)
    assert float(distance.max()) <= 1e-5 * float(meta.square().sum(-1).max())


@few
@given(extents, seeds)
def test_merge_does_not_depend_on_the_order_of_tokens(backend, shape, seed):
    B, N, K, C = shape.values()
    x, index = make_tokens(B, N, C, device=backend.device, seed=seed), make_index(B, N, K, backend.device, seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(backend.device)
    whole = (x * 16).round()  # integers, which float32 adds up exactly in any order
    one = sttm.merge(whole, sttm.MergePlan(index, K), reduce="sum", impl=backend.impl)
    two = sttm.merge(whole[:, order], sttm.MergePlan(index[:, order], K), reduce="sum", impl=backend.impl)
    assert_equal("x", two.x, one.x)
    assert_equal("size", two.size, one.size)


@few
@given(extents, seeds)
def test_assign_follows_a_permutation_of_tokens(backend, shape, seed):
    B, N, K, C = shape.values()
    q, meta = (make_tokens(B, n, C, device=backend.device, seed=seed + i) for i, n in enumerate((N, K)))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(backend.device)
    exact = [(t * 8).round().clamp(-64, 64) for t in (q, meta)]  # small integers: scores are exact
    one = sttm.assign(*exact, "dot", impl=backend.impl)
    two = sttm.assign(exact[0][:, order], exact[1], "dot", impl=backend.impl)
    assert_equal("index", two.index, one.index[:, order])
    assert_equal("score", two.score, one.score[:, order])


@few
@given(extents, layouts, seeds, st.sampled_from(["meta", "tokens"]))
def test_soft_merge_stays_within_what_it_averages(backend, shape, layout, seed, normalize):
    B, N, K, C = shape.values()
    x = make_tokens(B, N, C, device=backend.device, seed=seed, layout=layout)
    meta = make_tokens(B, K, C, device=backend.device, seed=seed + 1, layout=layout)
    out = sttm.soft_merge(x, x, meta, normalize=normalize, impl=backend.impl)
    slack = 1e-5 * float(x.abs().max())
    assert bool((out.x <= x.amax(1, keepdim=True) + slack).all())
    assert bool((out.x >= x.amin(1, keepdim=True) - slack).all())
    expected = torch.full((B,), float(N if normalize == "meta" else K), device=x.device)
    torch.testing.assert_close(out.size.sum(1), expected)


@few
@given(extents, seeds)
def test_compose_is_unmerging_twice(backend, shape, seed):
    B, N, K, C = shape.values()
    first = sttm.MergePlan(make_index(B, N, K, backend.device, seed), K)
    second = sttm.MergePlan(make_index(B, K, 4, backend.device, seed + 1), 4)
    x = make_tokens(B, 4, C, device=backend.device, seed=seed)
    once = sttm.unmerge(x, sttm.compose(first, second, backend.impl), backend.impl)
    assert_equal("x", once, sttm.unmerge(sttm.unmerge(x, second, backend.impl), first, backend.impl))
