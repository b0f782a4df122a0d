"""soft_merge in CUDA C++, on the CPU or a GPU, forward and backward, against the float64 reference."""

import pytest
import torch
from torch import Tensor

from sttm_kernels import dispatch, reference, testing
from sttm_kernels.checks import check_soft_merge, fields
from sttm_kernels.functional import soft_merge
from sttm_kernels.testing import assert_equal, assert_verb_within_budget, guarded
from sttm_kernels.testing import make_tokens as make_tokens_on

DEVICE = "cpu" if dispatch.on_host() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs STTM_CUDA_HOST or an NVIDIA GPU", allow_module_level=True)
if dispatch.why_not("soft_merge", "cuda", DEVICE) is not None:
    pytest.skip(str(dispatch.why_not("soft_merge", "cuda", DEVICE)), allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUTS = ("x", "q", "meta", "size", "positions")
ORDERS = ("forward", "reverse", "shuffle:1")


def make_tokens(*args, **kwargs):
    return make_tokens_on(*args, device=DEVICE, **kwargs)


def draw(B, N, K, D, C, dtype=torch.float32, heads=None, layout="contiguous", extras=True, P=3):
    """Inputs of `soft_merge` by name."""
    if heads:
        q = torch.stack([make_tokens(B, N, D, dtype, seed=1 + h, layout=layout) for h in range(heads)], 1)
    else:
        q = make_tokens(B, N, D, dtype, seed=1, layout=layout)
    generator = torch.Generator().manual_seed(2)
    return {
        "x": make_tokens(B, N, C, dtype, layout=layout),
        "q": q,
        "meta": make_tokens(B, K, D, dtype, seed=9, layout=layout),
        "size": torch.rand(B, N, generator=generator).to(DEVICE) + 0.5 if extras else None,
        "positions": torch.randn(B, N, P, generator=generator).to(DEVICE) if extras else None,
    }


def random_mask(B, N):
    return (torch.rand(B, N, generator=torch.Generator().manual_seed(5)) > 0.3).to(DEVICE)


def temperature_of(similarity, D):
    """What keeps S of order one, as a user would: dot and l2 grow with D."""
    return {"cosine": 0.2, "dot": D**0.5, "l2": float(D)}[similarity]


def check(inputs, normalize="meta", similarity="cosine", mask=None):
    temperature = temperature_of(similarity, inputs["q"].shape[-1])
    return check_soft_merge(
        "cuda", **inputs, similarity=similarity, temperature=temperature, normalize=normalize, mask=mask
    )


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "similarity", "extras"),
    [
        ((1, 1, 1, 3, 1), "cosine", False),
        ((2, 17, 1, 3, 17), "dot", True),
        ((1, 63, 64, 20, 65), "l2", True),
        ((1, 65, 33, 64, 40), "cosine", True),
        ((1, 33, 65, 88, 130), "cosine", True),
    ],
    ids=str,
)
def test_forward_and_gradients(shape, similarity, extras, dtype, normalize):
    check(draw(*shape, dtype, extras=extras), normalize, similarity)


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_features_in_several_blocks(similarity):
    check(draw(1, 9, 5, 200, 20), "meta", similarity)


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_masked_tokens(dtype, normalize):
    inputs = draw(2, 17, 5, 20, 20, dtype)
    mask = random_mask(2, 17)
    mask[1] = False
    out = check(inputs, normalize, "cosine", mask)
    assert not any(value[1].any() for value in out.values())
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    with torch.no_grad():
        for name in ("x", "q"):
            leaves[name][~mask] = torch.nan
    out = soft_merge(**leaves, temperature=0.2, normalize=normalize, mask=mask, impl="cuda")
    grads = torch.autograd.grad(sum(value.sum() for value in fields(out).values()), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.isfinite().all(), name
        if name != "meta":
            assert not grad[~mask].any(), name


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_mean_over_heads(normalize):
    check(draw(1, 17, 5, 20, 20, torch.float32, heads=3), normalize)


@pytest.mark.parametrize("layout", testing.LAYOUTS[1:])
def test_layouts_are_read_in_place(layout):
    inputs = draw(2, 17, 5, 20, 20, layout=layout)
    inputs["positions"] = inputs["positions"][:1].expand(2, -1, -1)
    before = {name: guarded(t) for name, t in inputs.items()}
    check({name: one.tensor for name, one in before.items()}, "tokens")
    for name, one in before.items():
        one.check(name)


def test_tokens_in_float32_with_a_metric_in_half_precision():
    inputs = draw(1, 17, 5, 20, 20)
    inputs |= {name: inputs[name].half() for name in ("q", "meta")}
    check(inputs)


@pytest.mark.parametrize("P", [1, 8, 19])
def test_more_axes_than_a_block_takes(P):
    check(draw(1, 70, 5, 16, 20, P=P))


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_tiny_weights_of_half_precision_tokens_keep_their_digits(normalize):
    """A meta token that every token is far from: its weights are below the range of float16, its mean is not."""
    inputs = draw(1, 17, 2, 16, 20, torch.float16, extras=False)
    inputs["q"].fill_(1)
    inputs["q"][:, :, 0] = torch.linspace(0.9, 1, 17, device=DEVICE)
    inputs["meta"].fill_(1)
    inputs["meta"][:, 1] = -1
    given = {"similarity": "dot", "normalize": normalize}
    out = soft_merge(**inputs, **given, impl="cuda")
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    truth = reference.soft_merge(**wide, **given)
    assert normalize == "tokens" or 0 < truth.size[0, 1] < 1e-10
    assert float((out.x - truth.x).abs().max()) <= 2e-3 * float(truth.x.abs().max())


@pytest.mark.parametrize("missing", INPUTS)
def test_only_the_gradients_that_are_needed(missing):
    inputs = draw(1, 9, 5, 20, 20)
    seeds = [
        torch.linspace(-1, 1, n, device=DEVICE).expand(shape)
        for n, shape in ((20, (1, 5, 20)), (5, (1, 5)), (3, (1, 5, 3)))
    ]

    def grads(names):
        leaves = {name: value.detach().requires_grad_(name in names) for name, value in inputs.items()}
        out = fields(soft_merge(**leaves, impl="cuda"))
        return torch.autograd.grad(list(out.values()), [leaves[name] for name in names], seeds)

    kept = [name for name in INPUTS if name != missing]
    every = dict(zip(INPUTS, grads(INPUTS), strict=True))
    for name, grad in zip(kept, grads(kept), strict=True):
        assert_equal(name, grad, every[name])
    for name in kept:
        assert_equal(name, grads([name])[0], every[name])


@pytest.mark.parametrize("output", ["x", "size", "positions"])
@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_a_loss_of_one_output(output, normalize):
    inputs = draw(1, 17, 5, 20, 20)
    given = {"temperature": 0.2, "normalize": normalize}

    def through(verb, **more):
        return lambda **leaves: {output: getattr(verb(**leaves, **given, **more), output)}

    assert_verb_within_budget(
        "soft_merge", through(soft_merge, impl="cuda"), through(reference.soft_merge), inputs, 42, 62
    )


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Everything the implementation allocates lies amid poison, which is looked at in the end."""
    made = []
    new_empty, empty_like = Tensor.new_empty, torch.empty_like

    def amid_poison(allocate):
        def allocated(*args, **kwargs):
            made.append(guarded(allocate(*args, **kwargs)))
            return made[-1].tensor

        return allocated

    monkeypatch.setattr(Tensor, "new_empty", amid_poison(new_empty))
    monkeypatch.setattr(torch, "empty_like", amid_poison(empty_like))
    yield made
    for one in made:
        one.check("output")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_features_that_are_not_numbers_stay_in_bounds(normalize, value, guarded_outputs):
    inputs = draw(2, 17, 5, 20, 20)
    for name in INPUTS:
        inputs[name].view(-1)[::3] = value
    before = {name: guarded(t) for name, t in inputs.items()}
    leaves = {name: one.tensor.requires_grad_() for name, one in before.items()}
    out = soft_merge(**leaves, normalize=normalize, impl="cuda")
    sum(v.sum() for v in fields(out).values()).backward()
    for name, one in before.items():
        one.check(name)
    assert len(guarded_outputs) >= 9


@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_the_rest_of_the_batch_changes_no_bit(normalize):
    inputs = draw(2, 17, 5, 20, 20, torch.float16)
    mask = random_mask(2, 17)

    def run(rows):
        leaves = {name: value[rows].detach().requires_grad_() for name, value in inputs.items()}
        out = soft_merge(**leaves, temperature=0.2, normalize=normalize, mask=mask[rows], impl="cuda")
        loss = sum(
            (v * torch.linspace(-1, 1, v.shape[1], device=DEVICE).view(-1, *[1] * (v.dim() - 2))).sum()
            for v in fields(out).values()
        )
        return [*(v.detach() for v in fields(out).values()), *torch.autograd.grad(loss, list(leaves.values()))]

    together = run(slice(None))
    for item in range(2):
        for whole, one in zip(together, run(slice(item, item + 1)), strict=True):
            assert_equal("item alone", one, whole[item : item + 1])


@pytest.mark.skipif(not dispatch.on_host(), reason="a GPU has an order of its own")
@pytest.mark.parametrize("normalize", ["meta", "tokens"])
def test_the_order_of_threads_and_blocks_changes_no_bit(normalize, monkeypatch):
    inputs, mask = draw(2, 70, 66, 20, 140, torch.bfloat16), random_mask(2, 70)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("STTM_HOST_ORDER", order)
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        out = fields(soft_merge(**leaves, temperature=0.2, normalize=normalize, mask=mask, impl="cuda"))
        grads = torch.autograd.grad(sum(value.square().sum() for value in out.values()), list(leaves.values()))
        results.append([*(value.detach() for value in out.values()), *grads])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert_equal("in another order", value, expected)


def test_an_empty_batch():
    inputs = {name: value[:0].requires_grad_() for name, value in draw(1, 5, 3, 8, 4).items()}
    out = soft_merge(**inputs, impl="cuda")
    assert out.x.shape == (0, 3, 4)
    sum(v.sum() for v in fields(out).values()).backward()
    assert all(t.grad.shape == t.shape for t in inputs.values())
