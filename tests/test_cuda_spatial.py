"""assign + merge of short frames in one CUDA kernel, against the reference of the two in float64."""

import pytest
import torch

from sttm_kernels import dispatch, reference
from sttm_kernels.functional import assign, assign_merge, merge
from sttm_kernels.testing import (
    assert_assign_within_budget,
    assert_equal,
    assert_verb_within_budget,
    assign_at,
    guarded,
    make_tokens,
)

DEVICE = "cpu" if dispatch.on_host() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs STTM_CUDA_HOST or an NVIDIA GPU", allow_module_level=True)
if dispatch.why_not("assign_merge", "cuda", DEVICE) is not None:
    pytest.skip(str(dispatch.why_not("assign_merge", "cuda", DEVICE)), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (1, 1, 1, 64, 1),
    (2, 2, 3, 5, 4),
    (2, 16, 1, 16, 17),
    (3, 17, 5, 3, 20),
    (2, 31, 33, 80, 64),
    (1, 65, 64, 64, 33),
    (1, 127, 65, 17, 24),
    (1, 129, 128, 16, 40),
    (1, 256, 9, 8, 8),
]


def check(inputs, similarity="cosine", temperature=1.0, weight="softmax", mask=None):
    """Forward and gradients against the specification at the choices that were made."""

    def run(x, q, meta, size, positions, fill):
        return assign_merge(x, q, meta, similarity, temperature, weight, mask, size, positions, fill, "cuda")

    def outputs(out, plan):
        named = {"x": out.x, "size": out.size, "positions": out.positions}
        named |= {"score": plan.score, "lse": plan.lse, "weight": plan.weight}
        return {name: value for name, value in named.items() if value is not None}

    _, chosen = run(**inputs)
    x, q, meta = inputs["x"], inputs["q"], inputs["meta"]
    assert_assign_within_budget(chosen, x if q is None else q, meta, similarity, temperature, weight, mask)

    def specification(x, q, meta, size, positions, fill):
        plan = assign_at(chosen.index, x if q is None else q, meta, similarity, temperature, weight)
        x = torch.where((chosen.index >= 0)[..., None], x, 0)
        return outputs(reference.merge(x, plan, size, positions, "mean", fill), plan)

    terms = x.shape[1] + meta.shape[-2] + meta.shape[-1] * (q.shape[1] if q is not None and q.dim() == 4 else 1)
    assert_verb_within_budget(
        "assign_merge",
        lambda **given: outputs(*run(**given)),
        specification,
        inputs,
        terms,
        terms + x.shape[2] + 3,
    )


def draw(B, N, K, D, C, dtype=torch.float32, own_metric=False, extras=True, heads=None, layout="contiguous"):
    """Inputs of `assign_merge` by name."""
    x = make_tokens(B, N, C, dtype, DEVICE, layout=layout)
    if own_metric:
        q, D = None, C
    elif heads:
        q = torch.stack([make_tokens(B, N, D, dtype, DEVICE, seed=h) for h in range(heads)], 1)
    else:
        q = make_tokens(B, N, D, dtype, DEVICE, seed=1, layout=layout)
    generator = torch.Generator().manual_seed(2)
    return {
        "x": x,
        "q": q,
        "meta": make_tokens(B, K, D, dtype, DEVICE, seed=3),
        "size": (torch.rand(B, N, generator=generator) + 0.5).to(DEVICE) if extras else None,
        "positions": torch.randn(B, N, 3, generator=generator).to(DEVICE) if extras else None,
        "fill": make_tokens(B, K, C, dtype, DEVICE, seed=4) if extras else None,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_assign_then_merge(shape, dtype):
    check(draw(*shape, dtype))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_x_as_its_own_metric(similarity, weight, temperature):
    check(draw(2, 20, 6, 0, 40, own_metric=True, extras=False), similarity, temperature, weight)


def test_more_groups_than_one_warp_sees():
    """128 groups in two halves of a tile, features in several chunks."""
    check(draw(1, 150, 100, 0, 136, torch.float16, own_metric=True))


@pytest.mark.parametrize(
    ("N", "K", "C", "dtype"),
    [
        (1, 1, 8, torch.float32),
        (33, 7, 20, torch.float32),
        (49, 25, 200, torch.bfloat16),
        (130, 70, 136, torch.float16),
        (256, 128, 16, torch.float16),
        (150, 5, 768, torch.float16),  # too much for shared memory
    ],
)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_features_that_stay_in_shared_memory_give_the_same_bits(N, K, C, dtype, similarity):
    inputs = draw(2, N, K, 0, C, dtype, own_metric=True)
    mask = (torch.rand(2, N, generator=torch.Generator().manual_seed(0)) > 0.1).to(DEVICE)
    mask[:, 0] = True
    inputs["x"][~mask] = torch.nan
    settings = (similarity, 1.0, "softmax", mask)
    given = (inputs["size"], inputs["positions"], inputs["fill"], "cuda")
    stays, plan = assign_merge(inputs["x"], None, inputs["meta"], *settings, *given)
    apart, expected = assign_merge(inputs["x"], inputs["x"].clone(), inputs["meta"], *settings, *given)
    assert_equal("x", stays.x, apart.x)
    assert_equal("positions", stays.positions, apart.positions)
    for field in ("index", "score", "lse", "weight"):
        assert_equal(field, getattr(plan, field), getattr(expected, field))


@pytest.mark.parametrize("C", [8, 200, 2056])
def test_rows_shorter_and_longer_than_a_block(C):
    check(draw(1, 37, 5, 8, C, torch.float16, extras=False))


def test_mean_over_heads():
    check(draw(2, 19, 5, 20, 24, heads=3))


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced", "expanded"])
def test_layouts_are_read_in_place(layout):
    check(draw(2, 18, 5, 20, 24, layout=layout))


def test_shared_meta_positions_and_fill():
    inputs = draw(3, 18, 5, 20, 24)
    check(inputs | {name: inputs[name][0] for name in ("meta", "positions", "fill")})


def test_masked_tokens_are_not_read():
    inputs = draw(2, 20, 4, 20, 24)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[1] = False
    mask = mask.to(DEVICE)
    for name in ("x", "q"):
        inputs[name][~mask] = torch.nan
    check(inputs, mask=mask)


def test_a_tie_goes_to_the_lowest_meta_token():
    x = make_tokens(1, 20, 24, device=DEVICE).round()
    meta = make_tokens(1, 1, 24, device=DEVICE, seed=1).round().expand(1, 128, 24)
    _, plan = assign_merge(x, None, meta, "dot", impl="cuda")
    assert_equal("index", plan.index, torch.zeros_like(plan.index))


def test_a_group_of_tokens_without_size_is_empty():
    inputs = draw(1, 20, 4, 8, 8)
    inputs["size"].zero_()
    out, _ = assign_merge(**inputs, impl="cuda")
    assert_equal("x", out.x, inputs["fill"])
    assert_equal("positions", out.positions, torch.zeros_like(out.positions))


@pytest.mark.parametrize(("N", "K"), [(20, 6), (150, 70)])
def test_the_batch_changes_no_bit(N, K):
    inputs = draw(3, N, K, 20, 24)
    together, plans = assign_merge(**inputs, impl="cuda")
    alone, plan = assign_merge(**{name: value[1:2] for name, value in inputs.items()}, impl="cuda")
    assert_equal("x", alone.x, together.x[1:2])
    assert_equal("positions", alone.positions, together.positions[1:2])
    assert_equal("lse", plan.lse, plans.lse[1:2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_stay_in_bounds(bad):
    inputs = {name: guarded(value) for name, value in draw(2, 20, 6, 20, 24).items()}
    inputs["q"].tensor[0, 3:5] = bad
    inputs["x"].tensor[0, 4] = bad
    _, plan = assign_merge(**{name: value.tensor for name, value in inputs.items()}, impl="cuda")
    assert bool(((plan.index >= 0) & (plan.index < 6)).all())
    for name, value in inputs.items():
        value.check(name)


@pytest.mark.parametrize("name", ["x", "q"])
def test_a_token_that_is_not_a_number_spoils_its_group_only(name):
    inputs = draw(1, 40, 8, 20, 24)
    clean, before = assign_merge(**inputs, impl="cuda")
    inputs[name][0, 7] = torch.nan
    spoiled, after = assign_merge(**inputs, impl="cuda")
    other = torch.arange(8, device=DEVICE) != after.index[0, 7]
    other &= torch.arange(8, device=DEVICE) != before.index[0, 7]
    assert_equal("x", spoiled.x[0, other], clean.x[0, other])
    assert_equal("positions", spoiled.positions[0, other], clean.positions[0, other])


@pytest.mark.parametrize(("N", "K"), [(257, 3), (5, 129)])
def test_long_sequences_take_two_launches(N, K):
    inputs = draw(1, N, K, 8, 4)
    out, plan = assign_merge(**inputs, impl="cuda")
    apart = assign(inputs["q"], inputs["meta"], impl="cuda")
    expected = merge(inputs["x"], apart, inputs["size"], inputs["positions"], fill=inputs["fill"], impl="cuda")
    assert_equal("index", plan.index, apart.index)
    assert_equal("x", out.x, expected.x)


def test_empty_batch():
    x, meta = torch.empty(0, 4, 8, device=DEVICE), torch.empty(0, 2, 8, device=DEVICE)
    out, plan = assign_merge(x, None, meta, impl="cuda")
    assert out.x.shape == (0, 2, 8)
    assert plan.index.shape == (0, 4)
