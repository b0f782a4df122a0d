"""The fused assign + merge through Triton's interpreter, against the reference of the two in float64."""

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

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1: runs in a process of its own", allow_module_level=True)

from sttm_kernels.impl.triton import config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (1, 1, 1, 64, 1),
    (2, 16, 1, 16, 17),
    (3, 17, 5, 3, 20),
    (2, 31, 33, 80, 64),
    (1, 33, 16, 88, 15),
    (1, 15, 15, 64, 33),
]


@pytest.fixture(autouse=True)
def _tensor_cores():
    """True float32 products take two launches; the fused kernel is for those that tensor cores can do."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def small_blocks():
    """Several tiles of tokens, features and channels in small tensors."""
    with config.forced("assign_merge", BLOCK_N=64, BLOCK_K=64, BLOCK_R=16, BLOCK_D=32, BLOCK_C=16):
        yield


def check(inputs, similarity="cosine", temperature=1.0, weight="softmax", mask=None):
    """Forward and gradients against the specification at the choices that were made."""

    def run(x, q, meta, size, positions, fill):
        out, plan = assign_merge(x, q, meta, similarity, temperature, weight, mask, size, positions, fill, "triton")
        return out, plan

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


def draw(B, N, K, D, C, dtype, own_metric=False, extras=True, heads=None, layout="contiguous"):
    """Inputs of `assign_merge` by name."""
    x = make_tokens(B, N, C, dtype, layout=layout)
    if own_metric:
        q, D = None, C
    elif heads:
        q = torch.stack([make_tokens(B, N, D, dtype, seed=h) for h in range(heads)], 1)
    else:
        q = make_tokens(B, N, D, dtype, seed=1, layout=layout)
    generator = torch.Generator().manual_seed(2)
    return {
        "x": x,
        "q": q,
        "meta": make_tokens(B, K, D, dtype, seed=3),
        "size": torch.rand(B, N, generator=generator) + 0.5 if extras else None,
        "positions": torch.randn(B, N, 3, generator=generator) if extras else None,
        "fill": make_tokens(B, K, C, dtype, seed=4) if extras else None,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_assign_then_merge(shape, dtype, small_blocks):
    check(draw(*shape, dtype))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("weight", ["softmax", "uniform"])
def test_x_as_its_own_metric(similarity, weight, small_blocks):
    check(draw(2, 20, 6, 0, 40, torch.float32, own_metric=True, extras=False), similarity, 1.0, weight)


def test_shipped_blocks():
    check(draw(1, 65, 17, 0, 70, torch.float16, own_metric=True))


def test_mean_over_heads(small_blocks):
    check(draw(2, 19, 5, 20, 24, torch.float32, heads=3))


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced"])
def test_layouts_are_read_in_place(layout, small_blocks):
    check(draw(2, 18, 5, 20, 24, torch.float32, layout=layout))


def test_shared_meta_positions_and_fill(small_blocks):
    inputs = draw(3, 18, 5, 20, 24, torch.float32)
    check(inputs | {name: inputs[name][0] for name in ("meta", "positions", "fill")})


def test_masked_tokens_are_not_read(small_blocks):
    inputs = draw(2, 20, 4, 20, 24, torch.float32)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[1] = False
    for name in ("x", "q"):
        inputs[name][~mask] = torch.nan
    check(inputs, mask=mask)


def test_a_tie_goes_to_the_lowest_meta_token(small_blocks):
    x = make_tokens(1, 20, 24).round()
    meta = make_tokens(1, 1, 24, seed=1).round().expand(1, 40, 24)
    _, plan = assign_merge(x, None, meta, "dot", impl="triton")
    assert_equal("index", plan.index, torch.zeros_like(plan.index))


def test_the_batch_changes_no_bit(small_blocks):
    inputs = draw(3, 20, 6, 20, 24, torch.float32)
    together, _ = assign_merge(**inputs, impl="triton")
    alone, _ = assign_merge(**{name: value[1:2] for name, value in inputs.items()}, impl="triton")
    assert_equal("x", alone.x, together.x[1:2])
    assert_equal("positions", alone.positions, together.positions[1:2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_stay_in_bounds_and_in_their_group(bad, small_blocks):
    inputs = {name: guarded(value) for name, value in draw(2, 20, 6, 20, 24, torch.float32).items()}
    inputs["q"].tensor[0, 3:5] = bad
    inputs["x"].tensor[0, 4] = bad
    out, plan = assign_merge(**{name: value.tensor for name, value in inputs.items()}, impl="triton")
    assert bool(((plan.index >= 0) & (plan.index < 6)).all())
    finite = out.x.isfinite().all(-1) & out.positions.isfinite().all(-1)
    spoiled = torch.zeros(2, 6, dtype=torch.bool)
    spoiled[0, plan.index[0, 3:5].long()] = True
    assert_equal("finite", finite, ~spoiled)
    for name, value in inputs.items():
        value.check(name)


@pytest.mark.parametrize(("N", "K"), [(257, 3), (5, 129)])
def test_long_sequences_take_two_launches(N, K):
    inputs = draw(1, N, K, 8, 4, torch.float32)
    out, plan = assign_merge(**inputs, impl="triton")
    apart = assign(inputs["q"], inputs["meta"], impl="triton")
    expected = merge(inputs["x"], apart, inputs["size"], inputs["positions"], fill=inputs["fill"], impl="triton")
    assert_equal("index", plan.index, apart.index)
    assert_equal("x", out.x, expected.x)


def test_empty_batch():
    out, plan = assign_merge(torch.empty(0, 4, 8), None, torch.empty(0, 2, 8), impl="triton")
    assert out.x.shape == (0, 2, 8)
    assert plan.index.shape == (0, 4)
