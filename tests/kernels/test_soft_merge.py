"""soft_merge: values and gradients over both normalizations against the float64 specification."""

import pytest
import torch
from cases import (
    SHAPES,
    SIMILARITIES,
    SMALL,
    draw,
    each,
    each_dtype,
    each_layout,
    each_normalize,
    each_similarity,
    each_with_dtype,
    only,
    temperature_of,
    unwritten,
)

import sttm_kernels as sttm
from sttm_kernels.checks import check_soft_merge, make_mask
from sttm_kernels.testing import LAYOUTS, assert_verb_within_budget, assert_within_budget, make_tokens

INPUTS = ("x", "q", "meta", "size", "positions")


def tokens(backend, B, N, K, D, C, dtype=torch.float32, **more):
    return only(draw((B, N, K, D, C), dtype, backend.device, **more), *INPUTS)


def check(backend, inputs, normalize="meta", similarity="cosine", mask=None):
    temperature = temperature_of(similarity, inputs["meta"].shape[-1])
    return check_soft_merge(
        backend.impl, **inputs, similarity=similarity, temperature=temperature, normalize=normalize, mask=mask
    )


@each_with_dtype("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@each_normalize
def test_shapes(backend, shape, dtype, normalize):
    at = SHAPES.index(shape) + (normalize == "meta")
    inputs = tokens(backend, *shape, dtype)
    if shape.N == 1:  # sums that cancel have no budget: of x alone they do so exactly
        inputs = only(inputs, "x", "q", "meta")
    check(backend, inputs, normalize, SIMILARITIES[at % 3])


@each_normalize
@each_similarity
def test_without_sizes_and_positions_and_with_many_features(backend, similarity, normalize):
    D = 80 if SMALL else 200
    check(backend, only(tokens(backend, 1, 9, 5, D, 20), "x", "q", "meta"), normalize, similarity)


@pytest.mark.shipped_blocks
@each_dtype
def test_many_channels(backend, dtype):
    check(backend, tokens(backend, 1, 33, 5, 88, 130, dtype))


@each("P", [1, 8, 19])
def test_positions_of_any_width(backend, P):
    check(backend, tokens(backend, 1, 17 if SMALL else 70, 5, 16, 20, P=P))


@each_layout
@each_normalize
def test_layouts_are_read_in_place(backend, layout, dtype, normalize):
    inputs = tokens(backend, 2, 17, 5, 20, 20, dtype, layout=layout)
    inputs["size"], inputs["positions"] = inputs["size"].mT.contiguous().mT, inputs["positions"][0]
    mask = make_mask(17, 2, backend.device).mT
    with unwritten(inputs) as held:
        check(backend, held, normalize, SIMILARITIES[LAYOUTS.index(layout) % 3], mask)


@each_normalize
def test_mean_over_heads_and_shared_meta(backend, normalize):
    inputs = tokens(backend, 2, 17, 5, 20, 20, heads=3)
    check(backend, inputs, normalize)
    interleaved = make_tokens(2, 17, 60, device=backend.device).view(2, 17, 3, 20).transpose(1, 2)
    check(backend, inputs | {"q": interleaved, "meta": inputs["meta"][0]}, normalize, "dot")


@each("dtypes", [("float32", "float16"), ("bfloat16", "float32")], ids=str)
def test_a_metric_of_another_dtype(backend, dtypes):
    inputs = tokens(backend, 1, 17, 5, 20, 20, getattr(torch, dtypes[0]))
    check(backend, inputs | {name: inputs[name].to(getattr(torch, dtypes[1])) for name in ("q", "meta")})


@each_normalize
@each_dtype
def test_an_item_without_tokens(backend, dtype, normalize):
    mask = make_mask(2, 17, backend.device)
    mask[1] = False
    out = check(backend, tokens(backend, 2, 17, 5, 20, 20, dtype), normalize, mask=mask)
    assert not any(value[1].any() for value in out.values())


@each_normalize
def test_tiny_weights_of_half_precision_tokens_keep_their_digits(backend, normalize):
    """A meta token that every token is far from: its weights are below the range of float16, its mean is not."""
    inputs = only(tokens(backend, 1, 17, 2, 16, 20, torch.float16), "x", "q", "meta")
    inputs["q"].fill_(1)
    inputs["q"][:, :, 0] = torch.linspace(0.9, 1, 17)
    inputs["meta"].fill_(1)
    inputs["meta"][:, 1] = -1
    given = {"similarity": "dot", "normalize": normalize}
    out = sttm.soft_merge(**inputs, **given, impl=backend.impl)
    truth = sttm.soft_merge(**{name: t.double() for name, t in inputs.items()}, **given, impl="reference")
    plain = sttm.soft_merge(**inputs, **given, impl="reference")
    assert normalize == "tokens" or 0 < truth.size[0, 1] < 1e-10
    assert_within_budget("x", out.x, truth.x, plain.x, 17 + 16 + 2)


def test_weights_below_the_normal_range_count(backend):
    """Of a meta token that every token is so far from."""
    if backend.impl not in ("torch", "cpu"):
        pytest.skip("a GPU may take numbers below the normal range for 0")
    inputs = only(tokens(backend, 1, 17, 2, 8, 20), "x", "q", "meta")
    inputs["meta"] = torch.tensor([[0.0] * 8, [3.4] * 8], device=backend.device)
    inputs["q"].mul_(0.01)
    out = sttm.soft_merge(**inputs, similarity="l2", impl=backend.impl)
    truth = sttm.soft_merge(**{name: t.double() for name, t in inputs.items()}, similarity="l2", impl="reference")
    mass, floats = truth.size[0, 1], torch.finfo(torch.float32)
    assert 1e-42 < mass < floats.tiny
    # Every weight is rounded to a multiple of the smallest number, in the sum and in the mass that divides it.
    budget = 2 * 17 * floats.smallest_normal * floats.eps / mass * inputs["x"].abs().max()
    assert (out.x[0, 1] - truth.x[0, 1]).abs().max() <= budget < 0.5 * truth.x[0, 1].abs().max()


@each("output", ["x", "size", "positions"])
@each_normalize
def test_a_loss_of_one_output(backend, output, normalize):
    def through(verb, **more):
        return lambda **leaves: {output: getattr(verb(**leaves, temperature=0.2, normalize=normalize, **more), output)}

    actual, specification = through(sttm.soft_merge, impl=backend.impl), through(sttm.soft_merge, impl="reference")
    inputs = tokens(backend, 1, 17, 5, 20, 20)
    assert_verb_within_budget(f"soft_merge: {output}", actual, specification, inputs, 42, 62)


@each("sized", [False, True])
def test_gradients_of_groups_far_from_every_token_are_finite(backend, sized):
    """Under the loss scale of mixed precision 1 / mass times a gradient overflows, yet no gradient is large."""
    sides = 1 - 2 * (torch.arange(16)[:, None] >> torch.arange(8) & 1)
    far, scale = 3.2 * sides.float().to(backend.device), 2.0**16
    far[0] = 0
    inputs = tokens(backend, 1, 17, 16, 8, 20) | {"meta": far}
    inputs["q"].mul_(0.05)
    if not sized:
        inputs = only(inputs, "x", "q", "meta")
    else:
        inputs["size"][0, 3] = 0

    def gradients(dtype, impl, scale=scale):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        out = sttm.soft_merge(**leaves, similarity="l2", impl=impl)
        results = (out.x, out.size, out.positions)
        loss = sum((t * torch.arange(1, 1 + t.shape[-1], device=t.device)).sum() for t in results if t is not None)
        return out.size, torch.autograd.grad(loss * scale, leaves.values())

    mass, found = gradients(torch.float32, backend.impl)
    _, truth = gradients(torch.float64, "reference")
    _, plain = gradients(torch.float32, "reference", scale=1.0)  # the formulas as they stand overflow with it
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    assert tiny < mass[0, 1:].min() <= mass[0, 1:].max() < 20 * scale / largest
    for name, got, expected, unscaled in zip(inputs, found, truth, plain, strict=True):
        assert_within_budget(f"gradient of {name}", got, expected, unscaled * scale, 17 + 20 + 16)
