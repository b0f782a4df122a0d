"""assign: choices, values and gradients against the float64 specification, and what may not reach them."""

import torch
from cases import (
    SIMILARITIES,
    SMALL,
    draw,
    each,
    each_dtype,
    each_layout,
    each_similarity,
    each_weight,
    kernels_only,
    only,
    run,
    temperature_of,
    unwritten,
)

import sttm_kernels as sttm
from sttm_kernels import ops, reference
from sttm_kernels.checks import check_assign, fields, make_mask
from sttm_kernels.plan import Similarity
from sttm_kernels.testing import (
    DTYPES,
    LAYOUTS,
    assert_assign_within_budget,
    assert_equal,
    assert_within_budget,
    assign_at,
    make_tokens,
)

T = 16 if SMALL else 64  # the tiles of the implementations
CASES = [  # B, N, K, D
    ((1, 1, 1, 3), "cosine", "softmax"),
    ((2, 17, 1, 3), "dot", "softmax"),
    ((1, T - 1, T, 64), "cosine", "softmax"),
    ((1, T, T + 1, 88), "l2", "softmax"),
    ((1, T + 1, T - 1, 80), "dot", "softmax"),
    ((2, 2 * T + 1, 20, 20), "l2", "softmax"),
    ((1, 33, 2 * T + 2, 64), "cosine", "softmax"),
    ((1, T + 1, 33, 80), "cosine", "uniform"),
    ((2, 33, T + 1, 3), "l2", "uniform"),
    ((1, T, 16, 64), "dot", "uniform"),
]
if not SMALL:
    CASES += [
        ((1, 20, 17, 200), "cosine", "softmax"),
        ((1, 65, 33, 300), "l2", "softmax"),
        ((1, 70, 1500, 16), "dot", "softmax"),
        ((1, 1500, 20, 16), "l2", "softmax"),
        ((17, 3, 5, 136), "cosine", "softmax"),
        ((1, 20, 5, 600), "cosine", "uniform"),
    ]


def metrics(backend, B, N, K, D, dtype=torch.float32, **more):
    return only(draw((B, N, K, D, 1), dtype, backend.device, **more), "q", "meta")


def check(backend, inputs, similarity="cosine", weight="softmax", mask=None):
    check_assign(
        backend.impl, **inputs, similarity=similarity, weight=weight, mask=mask,
        temperature=temperature_of(similarity, inputs["q"].shape[-1]),
    )  # fmt: skip


@each_dtype
@each(("shape", "similarity", "weight"), CASES, ids=str)
def test_choices_values_and_gradients(backend, shape, similarity, weight, dtype):
    check(backend, metrics(backend, *shape, dtype), similarity, weight)


EARLIER = [(1, 1, 3), (2, T - 1, 20), (1, T, 64), (2, T + 1, 88), (1, 2 * T + 2, 80)]
EARLIER += [] if SMALL else [(1, 300, 136), (3, 5, 600)]


@each_dtype
@each_similarity
@each("shape", EARLIER, ids=str)
def test_every_token_and_those_before_it(backend, shape, similarity, dtype):
    dense = metrics(backend, *shape[:2], 1, shape[2], dtype)["q"].flatten(0, -3)[: shape[0]]
    similarity = Similarity(similarity, 0.5)
    plain, wide = (reference.assign_earlier(t, similarity) for t in (dense, dense.double()))
    for q in (dense, dense.repeat_interleave(2, 2)[..., ::2], dense.mT.contiguous().mT):
        with unwritten({"q": q}):
            found = ops.assign_earlier(q, similarity, backend.impl)
        assert found[:, 0].tolist() == [-torch.inf] * len(q)
        assert_within_budget("score", found[:, 1:], wide[:, 1:], plain[:, 1:], shape[2], dtype)
        alone = [ops.assign_earlier(one[None], similarity, backend.impl) for one in q]
        assert_equal("score alone", found, torch.cat(alone))


def test_what_comes_later_changes_nothing(backend):
    q = metrics(backend, 2, 2 * T + 3, 1, 20)["q"].flatten(0, -3)
    for later in (1, T, T + 1, 2 * T + 2):
        spoiled = q.clone()
        spoiled[:, later:] = torch.nan
        found = [ops.assign_earlier(t, Similarity(), backend.impl)[:, :later] for t in (q, spoiled)]
        assert_equal(f"score before {later}", *found)


@each_layout
def test_layouts_are_read_in_place(backend, layout, dtype):
    similarity = SIMILARITIES[(LAYOUTS.index(layout) + DTYPES.index(dtype)) % 3]
    mask = make_mask(17, 2, backend.device).mT
    with unwritten(metrics(backend, 2, 17, 18, 20, dtype, layout=layout)) as inputs:
        for weight in ("softmax", "uniform"):
            check(backend, inputs, similarity, weight, mask)


@each_dtype
def test_mean_over_heads_and_shared_meta(backend, dtype):
    """Heads outside of the tokens, between tokens and features, and a slice of wider features."""
    inputs = metrics(backend, 2, 17, 7, 20, dtype, heads=3)
    check(backend, inputs, "cosine", "uniform", make_mask(2, 17, backend.device))
    interleaved = make_tokens(2, 17, 60, dtype, backend.device).view(2, 17, 3, 20).transpose(1, 2)
    check(backend, {"q": interleaved, "meta": inputs["meta"][0]}, "l2", "softmax")
    wide = metrics(backend, 2, 17, 18, 96, dtype)
    sliced = {"q": wide["q"].view(2, 17, 2, 48).transpose(1, 2), "meta": wide["meta"][..., 8:56]}
    check(backend, sliced, "dot", "softmax")


@each_dtype
@each_similarity
def test_ties_go_to_the_lowest_meta_token(backend, dtype, similarity):
    K, copies = (11, 3) if SMALL else (40, 5)
    q, meta = metrics(backend, 2, 20, K, 24, dtype).values()
    many = meta.repeat(1, copies, 1)
    index = sttm.assign(q, many, similarity, impl=backend.impl).index
    assert_equal("index", index, sttm.assign(q, meta, similarity, impl=backend.impl).index)
    itself = sttm.assign(meta, many, similarity, impl=backend.impl).index
    assert int(itself.max()) < K
    if similarity == "l2":
        assert_equal("index", itself, torch.arange(K, dtype=torch.int32, device=q.device).expand(2, -1))
    plan = sttm.assign(torch.zeros_like(q), many, impl=backend.impl)
    assert_equal("index of zero rows", plan.index, torch.zeros_like(plan.index))
    assert_equal("score of zero rows", plan.score, torch.zeros_like(plan.score))


@each_similarity
@each_weight
def test_rows_of_zeros_and_below_the_norm_floor(backend, similarity, weight):
    """Gradients of rows at the floor are a million times those of others: the others have a budget of their own."""
    inputs = metrics(backend, 1, 17, 18, 20)
    inputs["q"][:, 3], inputs["meta"][:, 5] = 0, 0
    inputs["q"][:, 4] *= 1e-8
    settings = (similarity, 20.0 if similarity == "l2" else 1.0, weight)
    plan = sttm.assign(*inputs.values(), *settings, impl=backend.impl)
    assert_assign_within_budget(plan, *inputs.values(), *settings)
    found = run(lambda q, meta: fields(sttm.assign(q, meta, *settings, impl=backend.impl)), inputs)

    def specification(dtype):
        wide = {name: value.to(dtype) for name, value in inputs.items()}
        return run(lambda q, meta: fields(assign_at(plan.index, q, meta, *settings)), wide)

    truth, plain = specification(torch.float64), specification(torch.float32)
    for name, rows in (("q", (3, 4)), ("meta", (5,))):
        key = f"gradient of {name}"
        others = [row for row in range(inputs[name].shape[1]) if row not in rows]
        for part in (others, *([row] for row in rows)):
            assert_within_budget(f"{key} {part}", found[key][:, part], truth[key][:, part], plain[key][:, part], 55)


# What is not a number, not a token, or not inside


@each_similarity
@each("D", (20, 160))
def test_a_token_that_is_not_a_number_reaches_its_own_meta_token_alone(backend, similarity, D):
    """The others have the gradients that they have without it."""
    inputs = metrics(backend, 1, 40, 7, D)
    inputs["q"][0, 11] = torch.nan
    settings = (similarity, temperature_of(similarity, D), "uniform")
    index = sttm.assign(*inputs.values(), *settings, impl=backend.impl).index
    found = run(lambda q, meta: fields(sttm.assign(q, meta, *settings, impl=backend.impl)), inputs)
    without = {"q": torch.arange(40) != 11, "meta": torch.arange(7) != int(index[0, 11])}

    def specification(dtype):
        wide = {name: value.to(dtype) for name, value in inputs.items()}
        wide["q"] = wide["q"][:, without["q"]]
        return run(lambda q, meta: fields(assign_at(index[:, without["q"]], q, meta, *settings)), wide)

    truth, plain = specification(torch.float64), specification(torch.float32)
    for name, kept in without.items():
        key = f"gradient of {name}"
        expected, usual = ((value[key] if name == "q" else value[key][:, kept]) for value in (truth, plain))
        assert_within_budget(key, found[key][:, kept], expected, usual, 40)


@each_similarity
def test_masked_tokens_that_are_not_numbers_change_nothing(backend, similarity):
    """Their gradients are 0, and all others have the bits that they have beside numbers."""
    inputs = metrics(backend, 1, 70, 7, 64)
    mask = torch.arange(70)[None] % 9 != 2
    settings = {"similarity": similarity, "temperature": temperature_of(similarity, 64), "mask": mask}
    found = []
    for beside in (1.0, torch.nan):
        inputs["q"][~mask] = beside
        found.append(run(lambda q, meta: fields(sttm.assign(q, meta, impl=backend.impl, **settings)), inputs))
    assert not found[1]["gradient of q"][~mask].any()
    for name in ("gradient of q", "gradient of meta"):
        assert_equal(name, found[1][name], found[0][name])


@kernels_only
@each_weight
def test_gradients_with_any_index_stay_in_bounds(backend, weight, outputs_amid_poison):
    """What `assign` saved for its gradient is overwritten: an index outside counts as -1."""
    q, meta = (t.requires_grad_() for t in metrics(backend, 2, 17, 18, 20).values())
    plan = sttm.assign(q, meta, weight=weight, impl=backend.impl)
    index = torch.arange(34, dtype=torch.int32).view(2, 17) - 8
    index[1, 3:5] = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    plan.index.data.copy_(index)
    sum(value.sum() for value in fields(plan).values()).backward()
    outside = (index < 0) | (index >= 18)
    assert not q.grad[outside].any()
    assert q.grad[~outside].any(-1).all()
    assert meta.grad.isfinite().all()
