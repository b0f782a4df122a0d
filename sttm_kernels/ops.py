"""The operators: for each verb its flat arguments and results, the adapter to its implementations, its gradient.

An implementation takes what `reference.<verb>` takes; a `_backward` takes the gradients of the results first, the
results and what is needed last. The flat lists are what the dispatcher sees. Torch only.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttm_kernels import reference
from sttm_kernels import sequences as sequences_of
from sttm_kernels.operator import NAMESPACE as NAMESPACE
from sttm_kernels.operator import Operator, pull_back
from sttm_kernels.plan import (
    MatchBounds,
    Merged,
    MergedGrads,
    MergedToo,
    MergePlan,
    OfAssign,
    OfMerge,
    OfSoftMerge,
    Packed,
    PlanGrads,
    Similarity,
    SoftMerged,
)
from sttm_kernels.reference import acc_dtype


def _if(given: Any, tensor: Tensor | None) -> Tensor | None:
    """A result, None if what it is made of is not given: the flat form has shape (0,) for it."""
    return tensor if given is not None else None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients; it takes the place of `a`, which must be nobody else's, where nothing is recorded."""
    if a is None or b is None:
        return b if a is None else a
    return a + b if torch.is_grad_enabled() else a.add_(b)


def _similarity(a: Any) -> Similarity:
    return Similarity(a.similarity, a.temperature)


def _features(positions: Tensor | None) -> int:
    return 0 if positions is None else positions.shape[-1]


def _given(sequences: Tensor | None) -> tuple[Tensor, ...]:
    """The last argument of implementations that take all sequences together."""
    return () if sequences is None else (sequences,)


@cache
def _takes_sequences(implementation: Callable[..., Any]) -> bool:
    return "sequences" in inspect.signature(implementation).parameters


def _by_sequence(run: Callable[..., Any], outputs: Any) -> Callable[..., Any]:
    """`run` of an operator; one sequence after another where the implementation does not take all together."""

    def run_all(implementation: Any, a: Any) -> Any:
        if a.sequences is None or _takes_sequences(implementation):
            return run(implementation, a)
        return outputs(*sequences_of.apart(lambda own, _: run(implementation, own), a, outputs._fields))

    return run_all


def _formula_by_sequence(formula: Callable[..., Any]) -> Callable[..., Any]:
    def of_all(a: Any, out: Any) -> Any:
        if a.sequences is None:
            return formula(a, out)
        return sequences_of.apart(formula, a, out._fields, out)

    return of_all


# assign


class AssignIn(NamedTuple):
    q: Tensor
    meta: Tensor
    mask: Tensor | None
    sequences: Tensor | None
    similarity: str
    temperature: float
    weight: str
    impl: str


class AssignOut(NamedTuple):
    index: Tensor  # type: ignore[assignment]
    score: Tensor
    lse: Tensor | None
    weight: Tensor | None


class AssignBackwardIn(NamedTuple):
    grad_score: Tensor | None
    grad_lse: Tensor | None
    grad_weight: Tensor | None
    q: Tensor
    meta: Tensor
    index: Tensor  # type: ignore[assignment]
    score: Tensor
    lse: Tensor
    weight: Tensor | None
    grad_merged: Tensor | None
    size: Tensor | None
    mass: Tensor | None
    sequences: Tensor | None
    similarity: str
    temperature: float
    needs: Sequence[bool]
    impl: str


class AssignBackwardOut(NamedTuple):
    grad_q: Tensor | None
    grad_meta: Tensor | None


def _plan(out: Any, num_groups: int, weight: str) -> MergePlan:
    soft = weight == "softmax"
    return MergePlan(out.index, num_groups, out.score, out.lse if soft else None, out.weight if soft else None)


def _assign_fake(a: AssignIn) -> Sequence[Tensor | None]:
    score = a.q.new_empty((a.q.shape[0], a.q.shape[-2]), dtype=acc_dtype(a.q.dtype))
    index = torch.empty_like(score, dtype=torch.int32)
    return (
        index,
        score,
        *((torch.empty_like(score), torch.empty_like(score)) if a.weight == "softmax" else (None,) * 2),
    )


def _found(q: Tensor, meta: Tensor, index: Tensor, similarity: Similarity) -> tuple[Tensor, Tensor, Tensor]:
    """score, lse and weight of `reference.assign` at the groups that were chosen, without sequences."""
    real = index >= 0
    S = reference.pairwise_similarity(torch.where(real[..., None], reference.mean_over_heads(q), 0), meta, similarity)
    score = S.gather(-1, index.long().clamp_min(0)[..., None]).squeeze(-1)
    lse = S.logsumexp(-1)
    return torch.where(real, score, 0), torch.where(real, lse, 0), torch.where(real, (score - lse).exp(), 0)


def _assign_formula(a: AssignIn, out: AssignOut) -> Sequence[Tensor | None]:
    score, lse, weight = _found(a.q, a.meta, out.index, _similarity(a))
    return (None, score, lse, weight) if a.weight == "softmax" else (None, score, None, None)


def _assign_gradient(a: AssignIn, out: AssignOut, g: AssignOut, needs: AssignIn) -> dict[str, Tensor | None]:
    found = _plan_gradient(a.q, a.meta, a, out, g, OfAssign(needs.q, needs.meta))
    return {"q": found.q, "meta": found.meta}


def _plan_gradient(
    q: Tensor, meta: Tensor, a: Any, out: Any, g: Any, needs: OfAssign, merged: MergedToo | None = None
) -> OfAssign:
    grads = PlanGrads(g.score, g.lse, g.weight)
    if not any(needs) or all(grad is None for grad in grads):
        return OfAssign(None, None)
    plan = _plan(out, meta.shape[1], a.weight)
    return assign_backward(grads, q, meta, _similarity(a), plan, needs, a.impl, a.sequences, merged)


def _assign_run(run: Any, a: AssignIn) -> AssignOut:
    return AssignOut(*_of_plan(run(a.q, a.meta, _similarity(a), a.weight, a.mask, *_given(a.sequences))))


def _assign_backward_run(run: Any, a: AssignBackwardIn) -> Sequence[Tensor | None]:
    plan = MergePlan(a.index, a.meta.shape[1], a.score, a.lse, a.weight)
    grads = PlanGrads(a.grad_score, a.grad_lse, a.grad_weight)
    given = grads, a.q, a.meta, _similarity(a), plan, OfAssign(*a.needs), *_given(a.sequences)
    if a.grad_merged is None or a.mass is None:
        return run(*given)
    return run(*given, merged=MergedToo(a.grad_merged, a.size, a.mass))


def _assign_backward_formula(a: AssignBackwardIn, out: AssignBackwardOut) -> Sequence[Tensor | None]:
    def run(q: Tensor, meta: Tensor) -> Sequence[Tensor | None]:
        found = _found(q, meta, a.index, _similarity(a))
        if a.grad_merged is None:
            return *found, None
        plan = MergePlan(a.index, meta.shape[1], weight=a.weight)
        return *found, reference.merge(reference.mean_over_heads(q), plan, a.size).x

    return pull_back(run, (a.q, a.meta), a.needs, (a.grad_score, a.grad_lse, a.grad_weight, a.grad_merged))


_assign = Operator(
    "assign",
    AssignIn,
    AssignOut,
    _by_sequence(_assign_run, AssignOut),
    _assign_fake,
    _formula_by_sequence(_assign_formula),
    _assign_gradient,
    differentiable=("score", "lse", "weight"),
    shape=lambda a: (a.q.shape[-2], a.meta.shape[-2], a.q.shape[-1]),
)
_assign_backward = Operator(
    "assign_backward",
    AssignBackwardIn,
    AssignBackwardOut,
    _by_sequence(_assign_backward_run, AssignBackwardOut),
    lambda a: [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((a.q, a.meta), a.needs, strict=True)
    ],
    _formula_by_sequence(_assign_backward_formula),
    differentiable=("grad_q", "grad_meta"),
    constants=("score", "lse", "mass"),
    shape=lambda a: (a.q.shape[-2], a.meta.shape[-2], a.q.shape[-1]),
)


class AssignEarlierIn(NamedTuple):
    q: Tensor
    similarity: str
    temperature: float
    impl: str


class AssignEarlierOut(NamedTuple):
    score: Tensor


_assign_earlier = Operator(
    "assign_earlier",
    AssignEarlierIn,
    AssignEarlierOut,
    lambda run, a: AssignEarlierOut(run(a.q, _similarity(a))),
    lambda a: [a.q.new_empty(a.q.shape[:2], dtype=acc_dtype(a.q.dtype))],
    unsaved=("q",),
    shape=lambda a: (a.q.shape[1], a.q.shape[1], a.q.shape[2]),
)


def assign_earlier(q: Tensor, similarity: Similarity, impl: str) -> Tensor:
    """How alike every token `(B, N, D)` is to the earlier one that is most like it, `(B, N)`; -inf for the first."""
    return _assign_earlier(AssignEarlierIn(q, *similarity, impl)).score


def _of_plan(plan: MergePlan) -> tuple[Any, ...]:
    return plan.index, plan.score, plan.lse, plan.weight


def assign(
    q: Tensor, meta: Tensor, similarity: Similarity, weight: str, mask: Tensor | None, impl: str,
    sequences: Tensor | None = None,
) -> MergePlan:  # fmt: skip
    """With `sequences`, as `sequences.table` makes them, of one item of q and a set of meta tokens each."""
    a = (q, meta, mask, sequences, *similarity, weight, impl)
    if sequences is None and (run := _assign.implementation(a)) is not None:
        return run(q, meta, similarity, weight, mask)
    if sequences is not None:
        return _plan(_assign(AssignIn(*a)), meta.shape[0] * meta.shape[1], weight)
    return _plan(_assign.listened(a), meta.shape[1], weight)


def assign_backward(
    grads: PlanGrads, q: Tensor, meta: Tensor, similarity: Similarity, plan: MergePlan, needs: OfAssign,
    impl: str, sequences: Tensor | None = None, merged: MergedToo | None = None,
) -> OfAssign:  # fmt: skip
    assert plan.score is not None
    lse = plan.score if plan.lse is None else plan.lse
    grad_merged, size, mass = merged or (None, None, None)
    a = AssignBackwardIn(
        *grads, q, meta, plan.index, plan.score, lse, plan.weight, grad_merged, size, mass, sequences, *similarity,
        list(needs), impl,
    )  # fmt: skip
    return OfAssign(*map(_needed, needs, _assign_backward(a)))


def _needed(need: bool, tensor: Tensor | None) -> Tensor | None:
    return tensor if need else None


# match


class MatchIn(NamedTuple):
    metric: Tensor
    src: Tensor | None
    dst: Tensor | None
    mask: Tensor | None
    limit: Tensor | None
    r: int
    num_groups: int
    num_prefix: int
    threshold: float | None  # not -inf for none: AOTInductor writes that as JSON that it cannot read
    impl: str


class MatchOut(NamedTuple):
    index: Tensor  # type: ignore[assignment]
    score: Tensor
    order: Tensor | None
    offsets: Tensor | None


def _match_fake(a: MatchIn) -> Sequence[Tensor | None]:
    B, N = a.metric.shape[0], a.metric.shape[-2]
    index = a.metric.new_empty((B, N), dtype=torch.int32)
    score = a.metric.new_empty((B, N), dtype=acc_dtype(a.metric.dtype))
    if a.mask is not None:
        return index, score, None, None
    return index, score, torch.empty_like(index), index.new_empty((B, a.num_groups + 1))


def _match_run(run: Any, a: MatchIn) -> MatchOut:
    bounded = a.mask is not None or a.limit is not None or a.threshold is not None
    threshold = -math.inf if a.threshold is None else a.threshold
    bounds = MatchBounds(a.num_groups, a.mask, a.limit, threshold) if bounded else None
    plan = run(a.metric, a.r, a.num_prefix, a.src, a.dst, bounds)
    return MatchOut(plan.index, plan.score, plan.order, plan.offsets)


_match = Operator(
    "match",
    MatchIn,
    MatchOut,
    _match_run,
    _match_fake,
    unsaved=("metric",),
    shape=lambda a: (a.metric.shape[-2], a.num_groups, a.metric.shape[-1]),
)


def match(
    metric: Tensor, r: int, num_prefix: int, src: Tensor | None, dst: Tensor | None, impl: str,
    bounds: MatchBounds | None = None,
) -> MergePlan:  # fmt: skip
    K, mask, limit, threshold = bounds or MatchBounds(metric.shape[-2] - r)
    a = (metric, src, dst, mask, limit, r, K, num_prefix, None if threshold == -math.inf else threshold, impl)
    if (run := _match.implementation(a)) is not None:
        return run(metric, r, num_prefix, src, dst, bounds)
    out = _match.listened(a)
    if mask is not None:
        return MergePlan(out.index, K, out.score)
    return MergePlan(out.index, K, out.score, order=out.order, offsets=out.offsets)


class MatchPackedIn(NamedTuple):
    metric: Tensor
    sequences: Tensor
    src: Tensor | None
    dst: Tensor | None
    num_groups: int
    num_prefix: int
    tiles: int
    pairs: int
    threshold: float | None
    impl: str


class MatchPackedOut(NamedTuple):
    index: Tensor  # type: ignore[assignment]
    score: Tensor
    order: Tensor
    offsets: Tensor


def _match_packed_run(run: Any, a: MatchPackedIn) -> MatchPackedOut:
    least = -math.inf if a.threshold is None else a.threshold
    packed = Packed(a.num_groups, a.sequences, a.tiles, a.pairs, least)
    plan = run(a.metric, a.num_prefix, packed, *_lists(a.src, a.dst))
    return MatchPackedOut(plan.index, plan.score, plan.order, plan.offsets)


def _match_packed_fake(a: MatchPackedIn) -> Sequence[Tensor | None]:
    index = a.metric.new_empty((1, a.metric.shape[-2]), dtype=torch.int32)
    score = torch.empty_like(index, dtype=acc_dtype(a.metric.dtype))
    return index, score, torch.empty_like(index), index.new_empty((1, a.num_groups + 1))


_match_packed = Operator(
    "match_packed", MatchPackedIn, MatchPackedOut, _match_packed_run, _match_packed_fake, unsaved=("metric",)
)


def _lists(src: Tensor | None, dst: Tensor | None) -> tuple[Tensor, ...]:
    """The last arguments of implementations that take lists of all sequences."""
    return () if src is None or dst is None else (src, dst)


def match_packed(
    metric: Tensor, num_prefix: int, packed: Packed, impl: str, src: Tensor | None = None, dst: Tensor | None = None
) -> MergePlan:
    K, sequences, tiles, pairs, threshold = packed
    least = threshold if threshold > -math.inf else None
    a = (metric, sequences, src, dst, K, num_prefix, tiles, pairs, least, impl)
    if (run := _match_packed.implementation(a)) is not None:
        return run(metric, num_prefix, packed, *_lists(src, dst))
    out = _match_packed.listened(a)
    return MergePlan(out.index, K, out.score, order=out.order, offsets=out.offsets)


# merge


class MergeIn(NamedTuple):
    x: Tensor
    index: Tensor  # type: ignore[assignment]
    num_groups: int
    weight: Tensor | None
    size: Tensor | None
    positions: Tensor | None
    fill: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    reduce: str
    impl: str


class MergeOut(NamedTuple):
    y: Tensor
    size_out: Tensor
    positions_out: Tensor | None
    mass: Tensor
    order_out: Tensor | None
    offsets_out: Tensor | None


class MergeBackwardIn(NamedTuple):
    grad_y: Tensor | None
    grad_size: Tensor | None
    grad_positions: Tensor | None
    x: Tensor
    index: Tensor  # type: ignore[assignment]
    num_groups: int
    weight: Tensor | None
    size: Tensor | None
    positions: Tensor | None
    y: Tensor
    positions_out: Tensor | None
    mass: Tensor
    order: Tensor | None
    offsets: Tensor | None
    reduce: str
    needs: Sequence[bool]
    impl: str


class MergeBackwardOut(NamedTuple):
    grad_x: Tensor | None
    grad_weight: Tensor | None
    grad_size_in: Tensor | None
    grad_positions_in: Tensor | None


def _plan_of(a: Any) -> MergePlan:
    return MergePlan(a.index, a.num_groups, weight=a.weight, order=a.order, offsets=a.offsets)


def _merge_fake(a: Any) -> Sequence[Tensor | None]:
    groups = (a.x.shape[0], a.num_groups)
    mass = a.x.new_empty(groups, dtype=acc_dtype(a.x.dtype))
    positions = _if(a.positions, mass.new_empty((*groups, _features(a.positions))))
    order = offsets = None
    if a.order is None or a.offsets is None:
        order, offsets = a.index.new_empty(a.index.shape), a.index.new_empty((groups[0], a.num_groups + 1))
    return a.x.new_empty((*groups, a.x.shape[-1])), torch.empty_like(mass), positions, mass, order, offsets


def _merge_formula(a: MergeIn, out: MergeOut) -> Sequence[Tensor | None]:
    merged = reference.merge(a.x, _plan_of(a), a.size, a.positions, a.reduce, a.fill)
    return merged.x, merged.size, merged.positions, None, None, None


def _merge_gradient(a: MergeIn, out: MergeOut, g: MergeOut, needs: MergeIn) -> dict[str, Tensor | None]:
    wanted = OfMerge(needs.x, needs.weight, needs.size, needs.positions)
    plan = _plan_of(a)
    if a.order is None or a.offsets is None:
        plan = dataclasses.replace(plan, order=out.order_out, offsets=out.offsets_out)
    found = _reduction_gradient(a.x, plan, a.size, a.positions, out, g, a.reduce, wanted, a.impl)
    return {**found._asdict(), "fill": _fill_gradient(out, g) if needs.fill else None}


def _reduction_gradient(
    x: Tensor, plan: MergePlan, size: Tensor | None, positions: Tensor | None, out: Any, g: Any, reduce: str,
    needs: OfMerge, impl: str,
) -> OfMerge:  # fmt: skip
    grads = MergedGrads(g.y, g.size_out, _if(positions, g.positions_out))
    if not any(needs) or all(grad is None for grad in grads):
        return OfMerge(None, None, None, None)
    merged = Merged(out.y, out.size_out, _if(positions, out.positions_out), out.mass)
    return merge_backward(grads, x, plan, size, positions, merged, reduce, needs, impl)


def _fill_gradient(out: Any, g: Any) -> Tensor | None:
    return None if g.y is None else torch.where((out.mass == 0)[..., None], g.y, 0)


def _merge_backward_run(run: Any, a: MergeBackwardIn) -> Sequence[Tensor | None]:
    grads = MergedGrads(a.grad_y, a.grad_size, a.grad_positions)
    out = Merged(a.y, a.mass, _if(a.positions, a.positions_out), a.mass)
    return run(grads, a.x, _plan_of(a), a.size, a.positions, out, a.reduce, OfMerge(*a.needs))


def _merge_backward_fake(a: MergeBackwardIn) -> Sequence[Tensor | None]:
    row = a.x.new_empty(a.index.shape, dtype=acc_dtype(a.x.dtype))
    need = OfMerge(*a.needs)
    return (
        a.x.new_empty(a.x.shape) if need.x else None,
        torch.empty_like(row) if need.weight else None,
        torch.empty_like(row) if need.size else None,
        row.new_empty(a.positions.shape) if need.positions and a.positions is not None else None,
    )


def _merge_backward_formula(a: MergeBackwardIn, out: MergeBackwardOut) -> Sequence[Tensor | None]:
    def run(x: Tensor, weight: Tensor | None, size: Tensor | None, positions: Tensor | None) -> Sequence[Tensor | None]:
        merged = reference.merge(x, MergePlan(a.index, a.num_groups, weight=weight), size, positions, a.reduce)
        return merged.x, merged.size, merged.positions

    return pull_back(run, (a.x, a.weight, a.size, a.positions), a.needs, (a.grad_y, a.grad_size, a.grad_positions))


_merge = Operator(
    "merge",
    MergeIn,
    MergeOut,
    lambda run, a: MergeOut(*run(a.x, _plan_of(a), a.size, a.positions, a.reduce, a.fill)),
    _merge_fake,
    _merge_formula,
    _merge_gradient,
    differentiable=("y", "size_out", "positions_out"),
    unsaved=("size_out",),
    shape=lambda a: (a.x.shape[1], a.num_groups, a.x.shape[2]),
)
_merge_backward = Operator(
    "merge_backward",
    MergeBackwardIn,
    MergeBackwardOut,
    _merge_backward_run,
    _merge_backward_fake,
    _merge_backward_formula,
    differentiable=MergeBackwardOut._fields,
    constants=("y", "positions_out", "mass", "order", "offsets"),
    shape=lambda a: (a.x.shape[1], a.num_groups, a.x.shape[2]),
)


def merge(
    x: Tensor, plan: MergePlan, size: Tensor | None, positions: Tensor | None, reduce: str, fill: Tensor | None,
    impl: str,
) -> Merged:  # fmt: skip
    a = (x, plan.index, plan.num_groups, plan.weight, size, positions, fill, plan.order, plan.offsets, reduce, impl)
    if (run := _merge.implementation(a)) is not None:
        return run(x, plan, size, positions, reduce, fill)
    out = _merge.listened(a)
    return Merged(out.y, out.size_out, _if(positions, out.positions_out), out.mass)


def merge_backward(
    grads: MergedGrads, x: Tensor, plan: MergePlan, size: Tensor | None, positions: Tensor | None, out: Merged,
    reduce: str, needs: OfMerge, impl: str,
) -> OfMerge:  # fmt: skip
    a = MergeBackwardIn(
        *grads, x, plan.index, plan.num_groups, plan.weight, size, positions, out.x, out.positions, out.mass,
        plan.order, plan.offsets, reduce, list(needs), impl,
    )  # fmt: skip
    return OfMerge(*map(_needed, needs, _merge_backward(a)))


# assign_merge


class AssignMergeIn(NamedTuple):
    x: Tensor
    q: Tensor | None
    meta: Tensor
    mask: Tensor | None
    size: Tensor | None
    positions: Tensor | None
    fill: Tensor | None
    sequences: Tensor | None
    similarity: str
    temperature: float
    weight: str
    impl: str


class AssignMergeOut(NamedTuple):
    index: Tensor  # type: ignore[assignment]
    score: Tensor
    lse: Tensor | None
    weight: Tensor | None
    y: Tensor
    size_out: Tensor
    positions_out: Tensor | None
    mass: Tensor
    order: Tensor | None
    offsets: Tensor | None


def _metric(a: AssignMergeIn) -> Tensor:
    return a.x if a.q is None else a.q


def _groups(a: AssignMergeIn) -> int:
    """How many groups the plan has, which of sequences are in one row."""
    return a.meta.shape[1] if a.sequences is None else a.meta.shape[0] * a.meta.shape[1]


def _assign_merge_run(run: Any, a: AssignMergeIn) -> AssignMergeOut:
    given = a.x, a.q, a.meta, _similarity(a), a.weight, a.mask, a.size, a.positions, a.fill
    merged, plan = run(*given, *_given(a.sequences))
    return AssignMergeOut(*_of_plan(plan), *merged)


def _assign_merge_fake(a: AssignMergeIn) -> Sequence[Tensor | None]:
    plan = _assign_fake(AssignIn(_metric(a), a.meta, a.mask, None, a.similarity, a.temperature, a.weight, a.impl))
    index = plan[0]
    assert index is not None
    merged = MergeIn(a.x, index, _groups(a), None, a.size, a.positions, a.fill, None, None, "mean", a.impl)
    results = _merge_fake(merged)
    return *plan, *(results if a.sequences is None else (*results[:-2], None, None))


def _assign_merge_formula(a: AssignMergeIn, out: AssignMergeOut) -> Sequence[Tensor | None]:
    assigned = AssignIn(_metric(a), a.meta, a.mask, None, a.similarity, a.temperature, a.weight, a.impl)
    _, score, lse, weight = _assign_formula(assigned, AssignOut(out.index, None, None, None))  # type: ignore[arg-type]
    merged = reference.merge(
        a.x, MergePlan(out.index, a.meta.shape[1], weight=weight), a.size, a.positions, "mean", a.fill
    )
    return None, score, lse, weight, merged.x, merged.size, merged.positions, None, None, None


def _order_of(plan: MergePlan, order: Tensor | None, offsets: Tensor | None) -> MergePlan:
    """The plan with the order of its tokens."""
    return MergePlan(plan.index, plan.num_groups, plan.score, plan.lse, plan.weight, order, offsets)


def _assign_merge_gradient(
    a: AssignMergeIn, out: AssignMergeOut, g: AssignMergeOut, needs: AssignMergeIn
) -> dict[str, Tensor | None]:
    of_plan = OfAssign(needs.x if a.q is None else needs.q, needs.meta)
    through_weight = a.weight == "softmax" and any(of_plan)
    of_scores = through_weight or g.score is not None
    # Of x that is the metric one kernel writes the gradient, also what comes by way of y.
    together = a.q is None and needs.x and g.y is not None and of_scores
    wanted = OfMerge(needs.x and not together, through_weight, needs.size, needs.positions)
    plan = _plan(out, _groups(a), a.weight)
    if a.sequences is None:
        plan = _order_of(plan, out.order, out.offsets)
    found = _reduction_gradient(a.x, plan, a.size, a.positions, out, g, "mean", wanted, a.impl)
    g = g._replace(weight=_sum(found.weight, g.weight))
    merged = MergedToo(g.y, a.size, out.mass) if together else None
    of_metric = _plan_gradient(_metric(a), a.meta, a, out, g, of_plan, merged)
    return {
        "x": of_metric.q if together else _sum(found.x, of_metric.q) if a.q is None else found.x,
        "q": of_metric.q if a.q is not None else None,
        "meta": of_metric.meta,
        "size": found.size,
        "positions": found.positions,
        "fill": _fill_gradient(out, g) if needs.fill else None,
    }


_assign_merge = Operator(
    "assign_merge",
    AssignMergeIn,
    AssignMergeOut,
    _by_sequence(_assign_merge_run, AssignMergeOut),
    _assign_merge_fake,
    _formula_by_sequence(_assign_merge_formula),
    _assign_merge_gradient,
    differentiable=("score", "lse", "weight", "y", "size_out", "positions_out"),
    unsaved=("size_out",),
    shape=lambda a: (a.x.shape[1], a.meta.shape[1], a.x.shape[2]),
)


def assign_merge(
    x: Tensor, q: Tensor | None, meta: Tensor, similarity: Similarity, weight: str, mask: Tensor | None,
    size: Tensor | None, positions: Tensor | None, fill: Tensor | None, impl: str, sequences: Tensor | None = None,
) -> tuple[Merged, MergePlan]:  # fmt: skip
    """With `sequences`, as `sequences.table` makes them, of one item of x and q and a set of meta tokens each; all
    groups, and `fill`, are of one item."""
    a = (x, q, meta, mask, size, positions, fill, sequences, *similarity, weight, impl)
    if sequences is None and (run := _assign_merge.implementation(a)) is not None:
        merged, plan = run(x, q, meta, similarity, weight, mask, size, positions, fill)
        return merged, plan if mask is not None else _order_of(plan, merged.order, merged.offsets)
    out = _assign_merge.listened(a) if sequences is None else _assign_merge(AssignMergeIn(*a))
    merged = Merged(out.y, out.size_out, _if(positions, out.positions_out), out.mass)
    plan = _plan(out, _groups(AssignMergeIn(*a)), weight)
    has_order = sequences is None and mask is None  # which plans have if every token has a group
    return merged, _order_of(plan, out.order, out.offsets) if has_order else plan


# unmerge


class UnmergeIn(NamedTuple):
    x: Tensor
    index: Tensor  # type: ignore[assignment]
    num_groups: int
    order: Tensor | None
    offsets: Tensor | None
    impl: str


class UnmergeOut(NamedTuple):
    y: Tensor


def _unmerge_plan(a: UnmergeIn) -> MergePlan:
    return MergePlan(a.index, a.num_groups, order=a.order, offsets=a.offsets)


def _unmerge_gradient(a: UnmergeIn, out: UnmergeOut, g: UnmergeOut, needs: UnmergeIn) -> dict[str, Tensor | None]:
    return {"x": merge(g.y, _unmerge_plan(a), None, None, "sum", None, a.impl).x}


_unmerge = Operator(
    "unmerge",
    UnmergeIn,
    UnmergeOut,
    lambda run, a: UnmergeOut(run(a.x, _unmerge_plan(a))),
    lambda a: [a.x.new_empty((*a.index.shape, a.x.shape[-1]))],
    lambda a, out: [reference.unmerge(a.x, _unmerge_plan(a))],
    _unmerge_gradient,
    differentiable=("y",),
    unsaved=("x", "y"),
    shape=lambda a: (a.index.shape[1], a.num_groups, a.x.shape[2]),
)


def unmerge(x: Tensor, plan: MergePlan, impl: str) -> Tensor:
    a = (x, plan.index, plan.num_groups, plan.order, plan.offsets, impl)
    if (run := _unmerge.implementation(a)) is not None:
        return run(x, plan)
    return _unmerge.listened(a).y


# compose


class ComposeIn(NamedTuple):
    index1: Tensor
    index2: Tensor
    num_groups: int
    impl: str


class ComposeOut(NamedTuple):
    index: Tensor  # type: ignore[assignment]


_compose = Operator(
    "compose",
    ComposeIn,
    ComposeOut,
    lambda run, a: ComposeOut(run(MergePlan(a.index1, a.index2.shape[1]), MergePlan(a.index2, a.num_groups)).index),
    lambda a: [torch.empty_like(a.index1, memory_format=torch.contiguous_format)],
)


def compose(plan1: MergePlan, plan2: MergePlan, impl: str) -> MergePlan:
    a = (plan1.index, plan2.index, plan2.num_groups, impl)
    if (run := _compose.implementation(a)) is not None:
        return run(plan1, plan2)
    return MergePlan(_compose.listened(a).index, plan2.num_groups)


# soft_merge


class SoftMergeIn(NamedTuple):
    x: Tensor
    q: Tensor
    meta: Tensor
    size: Tensor | None
    positions: Tensor | None
    mask: Tensor | None
    sequences: Tensor | None
    similarity: str
    temperature: float
    normalize: str
    impl: str


class SoftMergeOut(NamedTuple):
    y: Tensor
    size_out: Tensor
    positions_out: Tensor | None
    lse: Tensor


class SoftMergeBackwardIn(NamedTuple):
    grad_y: Tensor | None
    grad_size: Tensor | None
    grad_positions: Tensor | None
    x: Tensor
    q: Tensor
    meta: Tensor
    size: Tensor | None
    positions: Tensor | None
    mask: Tensor | None
    sequences: Tensor | None
    y: Tensor
    mass: Tensor
    positions_out: Tensor | None
    lse: Tensor
    similarity: str
    temperature: float
    normalize: str
    needs: Sequence[bool]
    impl: str


class SoftMergeBackwardOut(NamedTuple):
    grad_x: Tensor | None
    grad_q: Tensor | None
    grad_meta: Tensor | None
    grad_size_in: Tensor | None
    grad_positions_in: Tensor | None


def _soft_merge_fake(a: SoftMergeIn) -> Sequence[Tensor | None]:
    groups = a.meta.shape[:2]
    mass = a.x.new_empty(groups, dtype=acc_dtype(a.x.dtype))
    return (
        a.x.new_empty((*groups, a.x.shape[-1])),
        mass,
        _if(a.positions, mass.new_empty((*groups, _features(a.positions)))),
        a.x.new_empty(a.x.shape[:2] if a.normalize == "meta" else groups, dtype=acc_dtype(a.q.dtype)),
    )


def _soft_merge_run(run: Any, a: SoftMergeIn) -> SoftMergeOut:
    given = a.x, a.q, a.meta, _similarity(a), a.normalize, a.size, a.positions, a.mask
    return SoftMergeOut(*run(*given, *_given(a.sequences)))


def _soft_merge_formula(a: SoftMergeIn, out: SoftMergeOut) -> Sequence[Tensor | None]:
    merged = reference.soft_merge(a.x, a.q, a.meta, _similarity(a), a.normalize, a.size, a.positions, a.mask)
    return merged.x, merged.size, merged.positions, None


def _soft_merge_gradient(
    a: SoftMergeIn, out: SoftMergeOut, g: SoftMergeOut, needs: SoftMergeIn
) -> dict[str, Tensor | None]:
    grads = MergedGrads(g.y, g.size_out, _if(a.positions, g.positions_out))
    if all(grad is None for grad in grads):
        return {}
    wanted = OfSoftMerge(needs.x, needs.q, needs.meta, needs.size, needs.positions)
    flat = SoftMergeBackwardIn(
        *grads, a.x, a.q, a.meta, a.size, a.positions, a.mask, a.sequences, out.y, out.size_out,
        _if(a.positions, out.positions_out), out.lse, a.similarity, a.temperature, a.normalize, list(wanted), a.impl,
    )  # fmt: skip
    return OfSoftMerge(*map(_needed, wanted, _soft_merge_backward(flat)))._asdict()


def _soft_merge_backward_run(run: Any, a: SoftMergeBackwardIn) -> Sequence[Tensor | None]:
    return run(
        MergedGrads(a.grad_y, a.grad_size, a.grad_positions), a.x, a.q, a.meta, _similarity(a),
        a.normalize, a.size, a.positions, a.mask, SoftMerged(a.y, a.mass, a.positions_out, a.lse),
        OfSoftMerge(*a.needs), *_given(a.sequences),
    )  # fmt: skip


def _soft_merge_backward_fake(a: SoftMergeBackwardIn) -> Sequence[Tensor | None]:
    need, acc = OfSoftMerge(*a.needs), acc_dtype(a.x.dtype)
    features = [t.new_empty(t.shape) if wanted else None for t, wanted in zip((a.x, a.q, a.meta), need, strict=False)]
    size = a.x.new_empty(a.x.shape[:2], dtype=acc) if need.size else None
    wanted = need.positions and a.positions is not None
    return *features, size, a.x.new_empty(a.positions.shape, dtype=acc) if wanted else None  # type: ignore[union-attr]


def _soft_merge_backward_formula(a: SoftMergeBackwardIn, out: SoftMergeBackwardOut) -> Sequence[Tensor | None]:
    def run(
        x: Tensor, q: Tensor, meta: Tensor, size: Tensor | None, positions: Tensor | None
    ) -> Sequence[Tensor | None]:
        merged = reference.soft_merge(x, q, meta, _similarity(a), a.normalize, size, positions, a.mask)
        return merged.x, merged.size, merged.positions

    inputs = (a.x, a.q, a.meta, a.size, a.positions)
    return pull_back(run, inputs, a.needs, (a.grad_y, a.grad_size, a.grad_positions))


_soft_merge = Operator(
    "soft_merge",
    SoftMergeIn,
    SoftMergeOut,
    _by_sequence(_soft_merge_run, SoftMergeOut),
    _soft_merge_fake,
    _formula_by_sequence(_soft_merge_formula),
    _soft_merge_gradient,
    differentiable=("y", "size_out", "positions_out"),
    shape=lambda a: (a.x.shape[1], a.meta.shape[1], a.x.shape[2]),
)
_soft_merge_backward = Operator(
    "soft_merge_backward",
    SoftMergeBackwardIn,
    SoftMergeBackwardOut,
    _by_sequence(_soft_merge_backward_run, SoftMergeBackwardOut),
    _soft_merge_backward_fake,
    _formula_by_sequence(_soft_merge_backward_formula),
    differentiable=SoftMergeBackwardOut._fields,
    constants=("y", "mass", "positions_out", "lse"),
    shape=lambda a: (a.x.shape[1], a.meta.shape[1], a.x.shape[2]),
)


def soft_merge(
    x: Tensor, q: Tensor, meta: Tensor, similarity: Similarity, normalize: str, size: Tensor | None,
    positions: Tensor | None, mask: Tensor | None, impl: str, sequences: Tensor | None = None,
) -> SoftMerged:  # fmt: skip
    """With `sequences`, as `sequences.table` makes them, of one item of x and q and a set of meta tokens each."""
    a = (x, q, meta, size, positions, mask, sequences, *similarity, normalize, impl)
    if sequences is None and (run := _soft_merge.implementation(a)) is not None:
        return run(x, q, meta, similarity, normalize, size, positions, mask)
    out = _soft_merge.listened(a) if sequences is None else _soft_merge(SoftMergeIn(*a))
    return SoftMerged(out.y, out.size_out, _if(positions, out.positions_out), out.lse)
