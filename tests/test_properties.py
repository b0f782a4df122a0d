"""What holds for every input: conservation, symmetry, the same bits in every run and whatever else is in the batch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sttm_kernels as sttm
from sttm_kernels.functional import assign_merge
from sttm_kernels.testing import LAYOUTS, assert_equal, make_index, make_tokens

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
extents = st.fixed_dictionaries(
    {"B": st.integers(1, 3), "N": st.integers(1, 70), "K": st.integers(1, 40), "C": st.integers(1, 20)}
)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 1000)


def draw_size(B, N, device, seed):
    """Counts, which float32 adds up exactly in any order."""
    return torch.randint(1, 9, (B, N), generator=torch.Generator().manual_seed(seed)).to(device, torch.float32)


# conservation and symmetry


@few
@given(extents, layouts, seeds, st.sampled_from(["mean", "sum", "max", "first"]))
def test_merge_conserves_counts(backend, shape, layout, seed, reduce):
    backend.needs("merge")
    B, N, K, C = shape.values()
    x = make_tokens(B, N, C, device=backend.device, seed=seed, layout=layout)
    index, size = make_index(B, N, K, backend.device, seed), draw_size(B, N, backend.device, seed)
    out = sttm.merge(x, sttm.MergePlan(index, K), size, reduce=reduce, impl=backend.impl)
    assert_equal("count", out.size.sum(1), size.masked_fill(index < 0, 0).sum(1))


@few
@given(extents, layouts, seeds, st.integers(0, 40), st.integers(0, 5))
def test_match_conserves_counts_and_clamps(backend, shape, layout, seed, r, num_prefix):
    backend.needs("match")
    backend.needs("merge")
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
    backend.needs("merge")
    backend.needs("unmerge")
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
    backend.needs("assign")
    backend.needs("unmerge")
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
    backend.needs("merge")
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
    backend.needs("assign")
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
    backend.needs("soft_merge")
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
def test_compose_is_associative(backend, shape, seed):
    backend.needs("compose")
    B, N, K, C = shape.values()
    plans = [sttm.MergePlan(make_index(B, n, k, backend.device, seed + n), k) for n, k in ((N, K), (K, C), (C, 3))]
    left = sttm.compose(sttm.compose(*plans[:2], impl=backend.impl), plans[2], impl=backend.impl)
    right = sttm.compose(plans[0], sttm.compose(*plans[1:], impl=backend.impl), impl=backend.impl)
    assert_equal("index", left.index, right.index)


# the same bits

INPUTS = {"q": 20, "x": 24, "positions": 3}
DTYPES = (torch.float32, torch.bfloat16)


def make_items(B, N, K, device, dtype, seed=0):
    inputs = {name: make_tokens(B, N, width, dtype, device, seed + i) for i, (name, width) in enumerate(INPUTS.items())}
    inputs["positions"] = inputs["positions"].float()
    inputs["meta"] = make_tokens(B, K, INPUTS["q"], dtype, device, seed + 10)
    inputs["size"] = draw_size(B, N, device, seed)
    inputs["mask"] = (torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) > 0.1).to(device)
    return inputs


def everything(verb, impl, q, x, positions, meta, size, mask):
    """Outputs and gradients of one verb (with what it needs before it), by name."""
    leaves = {"q": q, "x": x, "positions": positions, "meta": meta, "size": size}
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    q, x, positions, meta, size = leaves.values()
    N = q.shape[1]
    if verb == "match":
        plan = sttm.match(q, N // 3, 1, impl=impl)
        found = {"index": plan.index, "score": plan.score, "order": plan.order, "offsets": plan.offsets}
    elif verb.startswith("assign "):
        plan = sttm.assign(q, meta, verb.removeprefix("assign "), 0.5, mask=mask, impl=impl)
        found = {"index": plan.index, "score": plan.score, "lse": plan.lse, "weight": plan.weight}
    elif verb == "assign_merge":
        out, plan = assign_merge(x, q, meta, mask=mask, size=size, positions=positions, impl=impl)
        found = {"index": plan.index, "score": plan.score, "lse": plan.lse, "weight": plan.weight}
        found |= {"x": out.x, "size": out.size, "positions": out.positions}
    elif verb.startswith("merge"):
        plan = sttm.assign(q, meta, mask=mask, impl=impl)
        out = sttm.merge(x, plan, size, positions, verb.removeprefix("merge "), meta.repeat(1, 1, 2)[..., :24], impl)
        found = {"x": out.x, "size": out.size, "positions": out.positions}
    elif verb == "match, merge":
        out = sttm.merge(x, sttm.match(q, N // 3, impl=impl), size, positions, impl=impl)
        found = {"x": out.x, "size": out.size, "positions": out.positions}
    elif verb == "unmerge":
        plan = sttm.assign(q, meta, mask=mask, impl=impl)
        found = {"x": sttm.unmerge(meta, plan, impl)}
    elif verb == "compose":
        plan = sttm.assign(q, meta, mask=mask, impl=impl)
        found = {"index": sttm.compose(plan, sttm.match(meta, 3, impl=impl), impl).index}
    else:
        out = sttm.soft_merge(x, q, meta, "cosine", 0.3, verb.removeprefix("soft_merge "), size, positions, mask, impl)
        found = {"x": out.x, "size": out.size, "positions": out.positions}
    roots = [value for value in found.values() if value.requires_grad]
    result = {name: value.detach() for name, value in found.items()}
    if roots:
        loss = sum((value.float() * value.float().cos().detach()).sum() for value in roots)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        result |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return result


CASES = [
    "assign cosine",
    "assign dot",
    "assign l2",
    "match",
    "merge mean",
    "merge sum",
    "merge max",
    "merge first",
    "match, merge",
    "assign_merge",
    "unmerge",
    "compose",
    "soft_merge meta",
    "soft_merge tokens",
]
each_case = pytest.mark.parametrize("verb", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def needs(backend, verb, dtype):
    """Skips unless `backend` can run every verb of the case."""
    backend.needs(verb.split(",")[0].split(" ")[0], dtype)
    for other in ("assign", "match", "merge"):
        backend.needs(other, dtype)


@each_case
@each_dtype
def test_same_bits_in_every_run(backend, verb, dtype):
    needs(backend, verb, dtype)
    inputs = make_items(2, 150, 13, backend.device, dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):  # BLAS splits a product by the number of threads: each has bits of its own
            torch.set_num_threads(threads)
            expected = everything(verb, backend.impl, **inputs)
            for _ in range(2):
                found = everything(verb, backend.impl, **inputs)
                for name, value in expected.items():
                    assert_equal(f"{verb} with {threads} threads: {name}", found[name], value)
    finally:
        torch.set_num_threads(before)


@each_case
@each_dtype
@pytest.mark.parametrize(("N", "K", "threads"), [(150, 13, 2), (33, 70, 1), (700, 96, 1)])
def test_same_bits_whatever_else_is_in_the_batch(backend, verb, dtype, N, K, threads):
    needs(backend, verb, dtype)
    inputs = make_items(5, N, K, backend.device, dtype)
    others = make_items(5, N, K, backend.device, dtype, seed=50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        full = everything(verb, backend.impl, **inputs)
        for item in (0, 3):
            alone = everything(verb, backend.impl, **{n: t[item : item + 1].clone() for n, t in inputs.items()})
            two = {n: torch.stack([others[n][4], t[item]]) for n, t in inputs.items()}
            pair = everything(verb, backend.impl, **two)
            for name, value in alone.items():
                assert_equal(f"{verb} in a batch of 5: {name}", full[name][item : item + 1], value)
                assert_equal(f"{verb} in a batch of 2: {name}", pair[name][1:], value)
    finally:
        torch.set_num_threads(before)
