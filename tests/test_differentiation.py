"""Verb by mode: every way in which PyTorch differentiates and maps a verb, against the specification in the same mode.

The specification is plain PyTorch, which brings these modes along. Every mode that returns a zero or another network's
derivative fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import sttm_kernels as sttm
from sttm_kernels import ops, sequences, validate
from sttm_kernels.functional import assign_merge
from sttm_kernels.plan import Similarity
from sttm_kernels.testing import make_index, make_tokens

pytestmark = pytest.mark.unpoisoned

B, N, K, C, D, P = 2, 6, 3, 4, 3, 2
Run = Callable[..., list[Tensor]]


def floats(*shape: int, seed: int, positive: bool = False) -> Tensor:
    value = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return value.abs() + 0.5 if positive else value


X, META, SIZE = floats(B, N, C, seed=0), floats(B, K, D, seed=1), floats(B, N, seed=2, positive=True)
HEADS, Q = floats(B, 2, N, D, seed=3), floats(B, N, D, seed=4)
WEIGHT, POSITIONS, FILL = floats(B, N, seed=5, positive=True), floats(B, N, P, seed=6), floats(B, K + 1, C, seed=7)
MASK = torch.tensor([[True, True, False, True, True, True], [True] * 6])
INDEX = make_index(B, N, K)
LEFT_OUT = torch.where(MASK, INDEX, -1)
GROUPS = K + 1  # the last one is empty


def plan_of(index: Tensor, weight: Tensor | None = None) -> sttm.MergePlan:
    return sttm.MergePlan(index, GROUPS, weight=weight)


def given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def merged(x: Tensor, weight: Tensor, size: Tensor, positions: Tensor, fill: Tensor, reduce: str, impl: str):
    out = sttm.merge(x, plan_of(LEFT_OUT, weight), size, positions, reduce, fill, impl)
    return given(out.x, out.size, out.positions)


def assigned(q: Tensor, meta: Tensor, similarity: str, weight: str, mask: Tensor | None, impl: str) -> list[Tensor]:
    plan = sttm.assign(q, meta, similarity, 0.7, weight, mask, impl)
    return given(plan.score, plan.lse, plan.weight)


def assigned_and_merged(
    x: Tensor, q: Tensor, meta: Tensor, size: Tensor, positions: Tensor, fill: Tensor, impl: str
) -> list[Tensor]:
    out, plan = assign_merge(x, q, meta, "l2", 0.7, "softmax", MASK, size, positions, fill, impl)
    return given(out.x, out.size, out.positions, plan.score, plan.lse, plan.weight)


def of_itself(x: Tensor, meta: Tensor, impl: str) -> list[Tensor]:
    out, plan = assign_merge(x, None, meta, weight="uniform", impl=impl)
    return given(out.x, plan.score)


def softly(
    x: Tensor, q: Tensor, meta: Tensor, size: Tensor, positions: Tensor, similarity: str, normalize: str,
    mask: Tensor | None, impl: str,
) -> list[Tensor]:  # fmt: skip
    out = sttm.soft_merge(x, q, meta, similarity, 0.7, normalize, size, positions, mask, impl)
    return given(out.x, out.size, out.positions)


def unmerged(x: Tensor, impl: str) -> list[Tensor]:
    return [sttm.unmerge(x, plan_of(LEFT_OUT), impl)]


def matched(x: Tensor, impl: str) -> list[Tensor]:
    """Nothing of match is differentiated; what is merged along it is."""
    return [sttm.merge(x, sttm.match(x, 2, impl=impl), impl=impl).x]


LENGTHS = (4, 0, 2)
EACH = sequences.table(LENGTHS, (K,) * 3, (0,) * 3, torch.device("cpu"))
PACKED = HEADS[:1], floats(3, K, D, seed=10)


def assigned_together(q: Tensor, meta: Tensor, impl: str) -> list[Tensor]:
    """One call of the operator for all sequences, as kernels take them."""
    if impl == "reference":
        plan = sttm.assign(q[0], meta, "l2", 0.7, lengths=LENGTHS, impl=impl)
    else:
        plan = ops.assign(q, meta, Similarity("l2", 0.7), "softmax", None, impl, EACH)
    return given(plan.score, plan.lse, plan.weight)


def softly_together(
    x: Tensor, q: Tensor, meta: Tensor, size: Tensor, positions: Tensor, normalize: str, impl: str
) -> list[Tensor]:
    if impl == "reference":
        rows = {"size": size[0], "positions": positions[0], "lengths": LENGTHS, "impl": impl}
        out = sttm.soft_merge(x[0], q[0], meta, "cosine", 0.7, normalize, **rows)
        return given(out.x.unflatten(0, (3, K)), out.size.unflatten(0, (3, K)), out.positions.unflatten(0, (3, K)))
    found = ops.soft_merge(x, q, meta, Similarity("cosine", 0.7), normalize, size, positions, None, impl, EACH)
    return given(found.x, found.size, found.positions)


def merged_together(
    x: Tensor, q: Tensor, meta: Tensor, size: Tensor, positions: Tensor, fill: Tensor, impl: str
) -> list[Tensor]:
    if impl == "reference":
        rows = {"size": size[0], "positions": positions[0], "fill": fill, "lengths": LENGTHS, "impl": impl}
        out, plan = assign_merge(x[0], q[0], meta, "l2", 0.7, **rows)
        return given(out.x, out.size, out.positions, plan.score, plan.weight)
    rows = None, size, positions, fill.flatten(0, 1)[None], impl, EACH
    out, plan = ops.assign_merge(x, q, meta, Similarity("l2", 0.7), "softmax", *rows)
    return given(out.x[0], out.size[0], out.positions[0], plan.score, plan.weight)


def packed(x: Tensor, q: Tensor, meta: Tensor, impl: str) -> list[Tensor]:
    """Of the public verbs, which a transform takes one sequence after another."""
    out, plan = assign_merge(x[0], q[0], meta, "dot", 0.7, lengths=LENGTHS, impl=impl)
    again = sttm.match(out.x, 1, lengths=out.lengths, impl=impl)
    return given(sttm.merge(out.x, again, out.size, impl=impl).x, plan.score)


VERBS: dict[str, tuple[Callable[..., list[Tensor]], tuple[Tensor, ...]]] = {
    **{
        f"merge {reduce}": (partial(merged, reduce=reduce), (X, WEIGHT, SIZE, POSITIONS, FILL))
        for reduce in validate.REDUCTIONS
    },
    **{
        f"assign {kind}": (partial(assigned, similarity=kind, weight="softmax", mask=MASK), (Q, META))
        for kind in validate.SIMILARITIES
    },
    "assign uniform": (partial(assigned, similarity="dot", weight="uniform", mask=None), (HEADS, META)),
    "assign_merge": (assigned_and_merged, (X, Q, META, SIZE, POSITIONS, FILL[:, :K])),
    "assign_merge of itself": (of_itself, (X, floats(B, K, C, seed=8))),
    **{
        f"soft_merge {kind} {normalize}": (
            partial(softly, similarity=kind, normalize=normalize, mask=MASK if normalize == "meta" else None),
            (X, Q if normalize == "meta" else HEADS, META, SIZE, POSITIONS),
        )
        for kind in validate.SIMILARITIES
        for normalize in validate.NORMALIZATIONS
    },
    "unmerge": (unmerged, (floats(B, GROUPS, C, seed=9),)),
    "match": (matched, (X,)),
    "assign together": (assigned_together, PACKED),
    **{
        f"soft_merge together {normalize}": (
            partial(softly_together, normalize=normalize),
            (X[:1], *PACKED, SIZE[:1], POSITIONS[:1]),
        )
        for normalize in validate.NORMALIZATIONS
    },
    "assign_merge together": (merged_together, (X[:1], *PACKED, SIZE[:1], POSITIONS[:1], floats(3, K, C, seed=12))),
    "packed": (packed, (X[:1], *PACKED)),
}


def directions(inputs: Sequence[Tensor], seed: int = 20) -> tuple[Tensor, ...]:
    return tuple(floats(*t.shape, seed=seed + i) for i, t in enumerate(inputs))


def scalar(run: Run) -> Callable[..., Tensor]:
    """All results in one number, not linear in any."""
    return lambda *inputs: sum((out.sin() * (i + 1)).sum() for i, out in enumerate(run(*inputs)))  # type: ignore[return-value]


def everything(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def reverse(run: Run, inputs: tuple[Tensor, ...]):
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    return torch.autograd.grad(scalar(run)(*inputs), inputs, allow_unused=True, materialize_grads=True)


def reverse_of_many(run: Run, inputs: tuple[Tensor, ...]):
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    return torch.autograd.grad(scalar(run)(*inputs), inputs, floats(3, seed=20), is_grads_batched=True)


def vectorized_hessian(run: Run, inputs: tuple[Tensor, ...]):
    return torch.autograd.functional.hessian(lambda first: scalar(run)(first, *inputs[1:]), inputs[0], vectorize=True)


def double(run: Run, inputs: tuple[Tensor, ...]):
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    grads = torch.autograd.grad(scalar(run)(*inputs), inputs, create_graph=True, materialize_grads=True)
    total = sum((g * g).sum() for g in grads)
    return torch.autograd.grad(total, inputs, materialize_grads=True)


def jvp(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.jvp(run, inputs, directions(inputs))


def forward_mode(run: Run, inputs: tuple[Tensor, ...]):
    with forward_ad.dual_level():
        results = run(*map(forward_ad.make_dual, inputs, directions(inputs)))
        tangents = [forward_ad.unpack_dual(out).tangent for out in results]
    return [torch.zeros_like(out) if t is None else t for out, t in zip(results, tangents, strict=True)]


def reverse_over_forward(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.grad(lambda *given: torch.func.jvp(scalar(run), given, directions(inputs))[1], (0,))(*inputs)


def forward_over_reverse(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.jvp(torch.func.grad(scalar(run), everything(inputs)), inputs, directions(inputs))[1]


def forward_over_forward(run: Run, inputs: tuple[Tensor, ...]):
    def once(*given: Tensor):
        return torch.func.jvp(run, given, directions(inputs))[1]

    return torch.func.jvp(once, inputs, directions(inputs, 40))[1]


def grad(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.grad(scalar(run), everything(inputs))(*inputs)


def grad_of_grad(run: Run, inputs: tuple[Tensor, ...]):
    first = torch.func.grad(scalar(run), everything(inputs))
    return torch.func.grad(lambda *given: sum((g * g).sum() for g in first(*given)), everything(inputs))(*inputs)


def jacrev(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.jacrev(run, everything(inputs))(*inputs)


def jacfwd(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.jacfwd(run, everything(inputs))(*inputs)


def stacked(inputs: Sequence[Tensor], count: int = 3) -> tuple[Tensor, ...]:
    """Copies that differ, but in no choice of a group."""
    return tuple(torch.stack([t * (1 + 0.01 * i) for i in range(count)], 1) for t in inputs)


def vmap(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.vmap(run, in_dims=1)(*stacked(inputs))


def vmap_of_one(run: Run, inputs: tuple[Tensor, ...]):
    """Only the first argument is mapped."""
    first, *rest = inputs
    return torch.func.vmap(lambda t: run(t, *rest), in_dims=1)(stacked([first])[0])


def vmap_grad(run: Run, inputs: tuple[Tensor, ...]):
    return torch.func.vmap(torch.func.grad(scalar(run), everything(inputs)), in_dims=1)(*stacked(inputs))


def grad_vmap(run: Run, inputs: tuple[Tensor, ...]):
    def mapped(*given: Tensor) -> Tensor:
        return torch.func.vmap(scalar(run), in_dims=1)(*given).sin().sum()

    return torch.func.grad(mapped, everything(inputs))(*stacked(inputs))


MODES = (
    reverse, reverse_of_many, vectorized_hessian, double, jvp, forward_mode, reverse_over_forward, forward_over_reverse,
    forward_over_forward, grad, grad_of_grad, jacrev, jacfwd, vmap, vmap_of_one, vmap_grad, grad_vmap,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_mode(verb, mode):
    run, inputs = VERBS[verb]
    found = tree_leaves(mode(partial(run, impl="torch"), inputs))
    truth = tree_leaves(mode(partial(run, impl="reference"), inputs))
    assert len(found) == len(truth) > 0
    assert any(t.abs().max() > 1e-3 for t in truth) or (verb, mode) in LINEAR
    for i, (got, expected) in enumerate(zip(found, truth, strict=True)):
        assert got.shape == expected.shape, f"result {i} of {mode.__name__} of {verb}"
        # float64 against float64 through formulas of a few dozen terms
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


LINEAR = {("unmerge", forward_over_forward), ("match", forward_over_forward)}
"""A tangent of a tangent of what is linear is 0."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangents_have_the_dtype_of_the_result(dtype):
    x, q, meta = make_tokens(B, N, C, dtype), make_tokens(B, N, D, dtype), make_tokens(B, K, D, dtype, seed=1)

    def run(x: Tensor, q: Tensor, meta: Tensor) -> list[Tensor]:
        out, plan = assign_merge(x, q, meta)
        return given(out.x, plan.score)

    primals, tangents = torch.func.jvp(run, (x, q, meta), (x, q, meta))
    assert [t.dtype for t in tangents] == [t.dtype for t in primals] == [dtype, torch.float32]


@pytest.mark.parametrize("mode", [double, jvp])
def test_autocast_changes_no_derivative_that_goes_through_the_specification(mode):
    verb, inputs = VERBS["soft_merge dot meta"]
    run, inputs = partial(verb, impl="torch"), tuple(t.float() for t in inputs)
    expected = tree_leaves(mode(run, inputs))
    with torch.autocast("cpu", torch.bfloat16):
        found = tree_leaves(mode(run, inputs))
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(C, C), nn.Linear(C, 2)
        self.meta = nn.Parameter(floats(K, C, seed=2))

    def forward(self, x: Tensor, impl: str) -> Tensor:
        x = self.inner(x)
        x = sttm.merge(x, sttm.match(x, 2, impl=impl), impl=impl).x
        plan = sttm.assign(x, self.meta, temperature=0.5, impl=impl)
        return self.outer(sttm.merge(x, plan, impl=impl).x.mean(1))


def test_per_sample_gradients_of_a_model_that_merges():
    model = Model().double()
    parameters = dict(model.named_parameters())
    clips = floats(4, N, C, seed=30)

    def loss(parameters, clip: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (clip[None], "auto")).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, clips)
    for i, clip in enumerate(clips):
        model.zero_grad()
        model(clip[None], "reference").square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-9, atol=1e-9)


def test_random_destinations_in_vmap_are_alike_or_not_as_it_is_told():
    clips = floats(1, 1, 30, 4, seed=31).expand(8, -1, -1, -1)

    def destinations(clip: Tensor) -> Tensor:
        """Cells and what of each is dst: with r = 0 dst are the last groups, one by one."""
        return sttm.match(clip, 0, partition="random2d", grid=(5, 6)).index.view(5, 6) >= 30 - 6

    for randomness in ("same", "different"):
        torch.manual_seed(0)
        found = torch.func.vmap(destinations, randomness=randomness)(clips)
        assert (found[:, :4].unflatten(1, (2, 2)).unflatten(3, (3, 2)).sum((2, 4)) == 1).all()
        assert not found[:, 4].any()
        assert (len(found.flatten(1).unique(dim=0)) == 1) == (randomness == "same")


def test_an_operator_in_a_transform_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func.*call sttm_kernels\.unmerge"):
        torch.func.grad(lambda x: torch.ops.sttm_kernels.unmerge(x, INDEX, K, None, None, "torch").sum())(FILL[:, :K])


def test_a_transform_that_is_compiled_says_what_to_do():
    x, plan = make_tokens(B, N, C), plan_of(INDEX)
    run = torch.compile(lambda x: torch.func.grad(lambda x: sttm.merge(x, plan).x.square().sum())(x), backend="eager")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"call sttm_kernels\.merge in a function that is not compiled"):
        run(x)
