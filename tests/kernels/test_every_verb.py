"""What holds for every verb: the same bits in every run and batch, only the gradients that are asked for, no items."""

import torch
from cases import NOT_NUMBERS, SMALL, draw, each, run, short, spoiled, unwritten

import sttm_kernels as sttm
from sttm_kernels import dispatch
from sttm_kernels.checks import fields
from sttm_kernels.console import threads
from sttm_kernels.testing import assert_equal, assert_index_in_range
from sttm_kernels.validate import NORMALIZATIONS, REDUCTIONS, SIMILARITIES, WEIGHTS

VERBS = [
    *(f"assign {how}" for how in (*SIMILARITIES, "uniform")),
    *(f"merge {how}" for how in REDUCTIONS),
    *(f"soft_merge {how}" for how in NORMALIZATIONS),
    *("match", "match window", "match, merge", "assign_merge", "unmerge", "compose"),
]
each_verb = each("verb", VERBS)
FLOAT = torch.float16 if SMALL else torch.float32
"""Triton fuses assign_merge for what tensor cores multiply."""
each_dtype = each("dtype", (torch.float16,) if SMALL else (torch.float32, torch.bfloat16), ids=short)


def calling(verb, impl, masked=True):
    """A verb, with what it needs before it, as a function of its inputs by name, with named outputs."""
    name, *how = verb.replace(",", "").split()
    kind = next((word for word in how if word in SIMILARITIES), "cosine")
    weighted = "uniform" if "uniform" in how else "softmax"

    def plan_fields(plan, *more):
        found = {field: getattr(plan, field) for field in ("index", *more)} | fields(plan)
        return {field: value for field, value in found.items() if value is not None}

    def call(x, q, meta, size, weight, positions, fill, mask):
        mask = mask if masked else None
        if name == "assign":
            return plan_fields(sttm.assign(q, meta, kind, 0.5, weighted, mask, impl))
        if name == "match" and "merge" in how:
            return fields(sttm.merge(x, sttm.match(q, q.shape[1] // 3, impl=impl), size, positions, impl=impl))
        if name == "match":
            where = {"grid": (1, 1, q.shape[1]), "window": (1, 1, 7)} if "window" in how else {"num_prefix": 1}
            return plan_fields(sttm.match(q, q.shape[1] // 3, impl=impl, **where), "order", "offsets")
        if name == "assign_merge":
            compared = (None, fill) if "itself" in how else (q, meta)
            out, plan = sttm.assign_merge(x, *compared, kind, 0.5, weighted, mask, size, positions, fill, impl)
            return plan_fields(plan) | fields(out)
        if name == "soft_merge":
            return fields(sttm.soft_merge(x, q, meta, kind, 0.3, how[-1], size, positions, mask, impl))
        plan = sttm.assign(q.detach(), meta.detach(), mask=mask, impl=impl)
        plan = sttm.MergePlan(plan.index, plan.num_groups, weight=weight)
        if name == "merge":
            return fields(sttm.merge(x, plan, size, positions, *how, fill, impl))
        if name == "unmerge":
            return {"x": sttm.unmerge(meta, plan, impl)}
        return {"index": sttm.compose(plan, sttm.match(meta, meta.shape[1] // 4, impl=impl), impl).index}

    return call


def rows(inputs, items):
    return {name: value[items].clone() for name, value in inputs.items()}


@each_verb
@each_dtype
def test_same_bits_in_every_run(backend, verb, dtype):
    inputs = draw((2, *((33, 9) if SMALL else (150, 13)), 20, 24), dtype, backend.device)
    for count in (1, 3) if backend.impl == "torch" else (1,):  # BLAS splits a product by the number of threads
        with threads(count):
            expected = run(calling(verb, backend.impl), inputs)
            for _ in range(1 if SMALL else 2):
                found = run(calling(verb, backend.impl), inputs)
                for name, value in expected.items():
                    assert_equal(f"{verb} with {count} threads: {name}", found[name], value)


@each_verb
@each_dtype
@each(("N", "K", "count"), [(20, 9, 1)] if SMALL else [(150, 13, 2), (33, 70, 1), (700, 96, 1)])
def test_same_bits_whatever_else_is_in_the_batch(backend, verb, dtype, N, K, count):
    inputs = draw((5, N, K, 20, 24), dtype, backend.device)
    others = draw((5, N, K, 20, 24), dtype, backend.device, seed=50)
    call = calling(verb, backend.impl)
    with threads(count):
        full = run(call, rows(inputs, slice(0, 3 if SMALL else 5)))
        for item in (1,) if SMALL else (0, 3):
            alone = run(call, rows(inputs, slice(item, item + 1)))
            for name, value in alone.items():
                assert_equal(f"{verb} in a batch: {name}", full[name][item : item + 1], value)
            if not SMALL:
                pair = run(call, {name: torch.stack([others[name][4], t[item]]) for name, t in inputs.items()})
                for name, value in alone.items():
                    assert_equal(f"{verb} in a batch of 2: {name}", pair[name][1:], value)


@each_verb
def test_only_the_gradients_that_are_needed(backend, verb):
    """Each gradient alone, and all but one, have the bits that all of them have."""
    inputs = draw((1, 9, 5, 20, 20) if SMALL else (2, 20, 5, 20, 24), device=backend.device)
    call = calling(verb, backend.impl)
    every = {name: value for name, value in run(call, inputs).items() if name.startswith("gradient")}
    leaves = [name.removeprefix("gradient of ") for name in every]
    wanted = [[name] for name in leaves] + ([leaves[1:], leaves[:-1]] if len(leaves) > 2 else [])
    for names in wanted:
        found = run(call, inputs, *names)
        for name in names:
            assert_equal(name, found[f"gradient of {name}"], every[f"gradient of {name}"])


@each_verb
def test_results_can_be_modified_in_place(backend, verb):
    inputs = draw((2, 9, 4, 8, 6), device=backend.device)
    leaves = {name: t.requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    expected = calling(verb, backend.impl)(**leaves)
    for name, result in calling(verb, backend.impl)(**leaves).items():
        assert_equal(name, result.add_(1), expected[name] + 1)


@each_verb
def test_a_sign_that_is_not_in_memory(backend, verb):
    """As `z.conj().imag` has it: of inputs, with and without gradients, and of gradients."""
    inputs = draw((1, 9, 5, 20, 20) if SMALL else (2, 18, 5, 20, 24), device=backend.device)
    call = calling(verb, backend.impl)

    def lazily(t):
        return torch._neg_view(-t)

    def signed(**given):
        outputs = call(**given)
        for value in outputs.values():
            if value.requires_grad:
                value.register_hook(lazily)
        return outputs

    lazy = {name: lazily(t) if t.is_floating_point() else t for name, t in inputs.items()}
    expected, found = run(call, inputs), run(signed, lazy)
    with torch.no_grad():
        found |= {f"{name} alone": value for name, value in call(**lazy).items()}
    for name, value in found.items():
        assert_equal(f"{verb}: {name}", value, expected[name.removesuffix(" alone")])


@each_verb
def test_autocast_changes_nothing(backend, verb):
    """Forward and backward: no product of a verb is rounded to what the layers around it compute in."""
    inputs = draw((2, 18, 5, 20, 24), device=backend.device)
    expected = run(calling(verb, backend.impl), inputs)
    with torch.autocast(backend.device, torch.bfloat16):
        found = run(calling(verb, backend.impl), inputs)
    for name, value in expected.items():
        assert_equal(f"{verb} under autocast: {name}", found[name], value)


@each_verb
@each("impl", ["backend", "reference"])
def test_an_empty_batch(backend, verb, impl):
    call = calling(verb, backend.impl if impl == "backend" else impl, masked=False)
    one = draw((1, 9, 4, 8, 6), device=backend.device)
    expected, found = run(call, one), run(call, rows(one, slice(0, 0)))
    shapes = {name: (0, *value.shape[1:]) for name, value in expected.items()}
    assert {name: value.shape for name, value in found.items()} == shapes


@each("verb", ["assign cosine", "assign_merge", "soft_merge meta", "soft_merge tokens"])
def test_an_empty_batch_with_shared_meta_tokens(backend, verb):
    inputs = rows(draw((1, 9, 4, 8, 6), device=backend.device), slice(0, 0))
    found = run(calling(verb, backend.impl), inputs | {"meta": torch.ones(4, 8, device=backend.device)})
    assert not found["gradient of meta"].any()
    assert all(value.shape[0] == 0 for name, value in found.items() if name != "gradient of meta")


OF_TOKENS = ("x", "q", "size", "weight", "positions")
WITH_MASK = [
    *(f"assign {kind} {weight}" for kind in SIMILARITIES for weight in WEIGHTS),
    *(f"soft_merge {kind} {normalize}" for kind in SIMILARITIES for normalize in NORMALIZATIONS),
    *(f"assign_merge {weight}{compared}" for weight in WEIGHTS for compared in ("", " itself")),
    *(f"merge {reduce}" for reduce in REDUCTIONS),
]


@each("verb", WITH_MASK)
@each("impl", ["backend", "reference"])
def test_masked_tokens_are_not_read(backend, verb, impl):
    """What they hold, NaN included, reaches neither a value nor a gradient, also in an item without other tokens."""
    call = calling(verb, backend.impl if impl == "backend" else impl)
    inputs = draw((2, 20, 4, 20, 24), FLOAT, backend.device)
    mask = inputs["mask"]
    mask[1] = False

    def found(rubbish):
        shapes = {name: (2, 20, *[1] * (inputs[name].dim() - 2)) for name in OF_TOKENS}
        return run(call, inputs | {n: inputs[n].masked_fill(~mask.view(shape), rubbish) for n, shape in shapes.items()})

    clean, dirty = found(0.0), found(torch.nan)
    for name, value in clean.items():
        assert value.isfinite().all(), name
        assert_equal(name, dirty[name], value)
        if name.startswith("gradient") and name.split()[-1] in OF_TOKENS:
            assert not value[~mask].any(), name


@each("verb", WITH_MASK)
@each("value", (torch.nan, None) if SMALL else (*NOT_NUMBERS, None), ids=str)
@each("share", [0.3, 1.0])
def test_features_that_are_not_numbers_stay_in_bounds(backend, verb, value, share, outputs_amid_poison):
    """Forward and backward; and every real token has a group, every masked one none."""
    inputs = draw((2, 17, 18, 20, 24), FLOAT, backend.device)
    bad = {name: spoiled(t, value, share, seed) for seed, (name, t) in enumerate(inputs.items()) if name != "mask"}
    with unwritten(inputs | bad) as held:
        found = run(calling(verb, backend.impl), held)
    if "index" in found:
        assert_index_in_range("index", found["index"], 18)
        assert_equal("index >= 0", found["index"] >= 0, inputs["mask"])
    assert backend.impl == "torch" or len(outputs_amid_poison) >= 6


def test_no_verb_is_left_out():
    assert {verb.split(",")[0].split(" ")[0] for verb in VERBS} == set(dispatch.VERBS)
