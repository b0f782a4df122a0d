"""What it takes to check an implementation of the verbs, on any machine: error budgets, score gaps, inputs, poison.

Torch only, no test framework: every check is a function that raises `AssertionError` and says what it saw.

The truth is `sttm_kernels.reference` run in float64 on the very inputs that the implementation got. "Plain" is what
plain PyTorch makes of them in their own dtype: the same formulas, run by `reference` on the inputs as they are, so
with float32 sums and with outputs rounded to the dtype. For float64 inputs, where that would be the truth itself, it is
what float32 makes of them, and its error counts eps(float64) / eps(float32) times. An implementation may be off by
twice what plain is off by, plus eps(dtype) * max|truth| * sqrt(terms) for another order of summation. No tolerance is
tuned by hand.

An argmax or a top-r may flip between scores that close, so a choice passes when the true score of what was chosen is
within the budget of the best one, and everything downstream is compared through the plan that was chosen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sttm_kernels import reference
from sttm_kernels.plan import MergePlan, Similarity

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided", "sliced", "expanded")


class Shape(NamedTuple):
    """B batch items, N tokens, K groups, D metric features, C channels."""

    B: int
    N: int
    K: int
    D: int
    C: int


RAGGED_SHAPES = (
    Shape(1, 1, 1, 3, 1),
    Shape(2, 2, 1, 64, 3),
    Shape(3, 17, 5, 3, 20),
    Shape(2, 31, 33, 80, 64),
    Shape(1, 63, 16, 88, 65),
    Shape(2, 64, 17, 64, 80),
    Shape(2, 65, 64, 80, 88),
    Shape(1, 127, 65, 64, 127),
    Shape(1, 129, 15, 88, 128),
    Shape(2, 257, 129, 3, 33),
)
"""Extents of 1, of a block and of a block plus or minus 1; feature counts that are and are not a power of two."""


# Error budgets


class Comparison(NamedTuple):
    """What one check saw: the largest error of a value or the largest gap of a choice, and what was allowed."""

    name: str
    error: float
    budget: float


_observers: list[Callable[[Comparison], None]] = []


@contextlib.contextmanager
def observed(observer: Callable[[Comparison], None]) -> Iterator[None]:
    """Within it every comparison under a budget is reported to `observer`, before it may fail."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _report(name: str, errors: Tensor, budget: float) -> None:
    """The largest of `errors` to every observer; not worked out if there is none."""
    for observer in _observers:
        observer(Comparison(name, float(errors.max()) if errors.numel() else 0.0, budget))


def error_budget(reference: Tensor, plain: Tensor, dtype: torch.dtype, terms: int) -> float:
    """The largest error allowed: 2 max|plain - reference| + eps(dtype) max|reference| sqrt(terms).

    Args:
        reference: float64, the truth.
        plain: what plain PyTorch makes of the same inputs in their dtype, of float64 ones in float32; the shape of
            `reference`.
        dtype: whose rounding error is granted: the dtype of the result, or of the inputs for a gradient that is worked
            out from rounded outputs. If plain is in a coarser one, its error counts eps(dtype) / eps(plain.dtype)
            times.
        terms: how many terms each element is a sum of.

    Elements that are not finite in either tensor count for nothing; no elements give a budget of 0.
    """
    _same_shape("plain", plain, reference)
    if reference.dtype != torch.float64:
        raise AssertionError(f"reference must be float64, got {reference.dtype}")
    share = min(1.0, torch.finfo(dtype).eps / torch.finfo(plain.dtype).eps)
    truth, plain = reference.detach(), plain.detach().double()
    finite = truth.isfinite() & plain.isfinite()
    if not bool(finite.any()):
        return 0.0
    truth, plain = truth[finite], plain[finite]
    off = float((plain - truth).abs().max())
    eps = torch.finfo(dtype).eps
    return 2 * off * share + eps * float(truth.abs().max()) * math.sqrt(max(terms, 1))


def assert_within_budget(
    name: str, actual: Tensor, reference: Tensor, plain: Tensor, terms: int, dtype: torch.dtype | None = None
) -> None:
    """Checks `actual` against `reference` under `error_budget`; shapes must agree, and the dtypes of actual and plain.

    `dtype` is that of `actual` unless a coarser one is given. Where the reference is finite in the dtype of `actual`, a
    NaN or an infinity fails; where it is not, `actual` must not be finite either.
    """
    _same_shape(name, actual, reference)
    if actual.dtype != plain.dtype and (actual.dtype, plain.dtype) != (torch.float64, torch.float32):
        raise AssertionError(f"{name} must have dtype {plain.dtype}, got {actual.dtype}")
    dtype = max((d for d in (actual.dtype, dtype) if d is not None), key=lambda d: torch.finfo(d).eps)
    budget = error_budget(reference, plain, dtype, terms)
    truth, got = reference.detach(), actual.detach().double()
    error = (got - truth).abs()
    finite = truth.to(actual.dtype).isfinite()
    _report(name, error[finite], budget)
    wrong = torch.where(finite, ~(error <= budget), got.isfinite())
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)} is {got[at].item():.9g}, must be {truth[at].item():.9g}: off by {error[at].item():.3g}, "
            f"budget {budget:.3g}; {int(wrong.sum())} of {wrong.numel()} elements are wrong"
        )


def assert_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """Checks shape, dtype and every bit (any NaN equals any NaN); the message names the first difference."""
    _same_shape(name, actual, expected)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name} must have dtype {expected.dtype}, got {actual.dtype}")
    differs = (actual != expected) & ~((actual != actual) & (expected != expected))
    if bool(differs.any()):
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)} is {actual[at].item()!r}, must be {expected[at].item()!r}; "
            f"{int(differs.sum())} of {differs.numel()} elements differ"
        )


def _same_shape(name: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{name} must have shape {tuple(expected.shape)}, got {tuple(actual.shape)}")


def evaluate(
    run: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor | None],
    dtype: torch.dtype | None = None,
    cotangents: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs `run(**inputs)` and differentiates it; returns its outputs and the gradient of every floating input.

    Floating inputs become leaves over the same memory, or a cast of it if `dtype` is given; the others pass as they
    are. The loss is the sum of <output, cotangent> over the outputs that depend on an input. Without cotangents there
    are no gradients.
    """
    leaves = {name: leaf(value, dtype) for name, value in inputs.items()}
    outputs = dict(run(**leaves))
    wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    roots = [name for name, out in outputs.items() if out.requires_grad]
    if cotangents is None or not roots:
        return {name: out.detach() for name, out in outputs.items()}, {}
    seeds = [cotangents[name].to(outputs[name].dtype) for name in roots]
    found = torch.autograd.grad([outputs[name] for name in roots], list(wanted.values()), seeds, allow_unused=True)
    grads = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), found, strict=True)}
    return {name: out.detach() for name, out in outputs.items()}, grads


def leaf(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A floating tensor as a leaf that requires grad, over the same memory if no cast is due; the rest as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(value.dtype if dtype is None else dtype).requires_grad_()


def plain_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What plain PyTorch casts floating inputs to, given the dtype of the features; None leaves them as they are."""
    return torch.float32 if dtype == torch.float64 else None


def assert_verb_within_budget(
    name: str,
    actual: Callable[..., Mapping[str, Tensor]],
    specification: Callable[..., Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor | None],
    terms: int,
    grad_terms: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Holds every output and every gradient of `actual(**inputs)` against `specification` in float64.

    Args:
        actual, specification: functions of the inputs, by name, that return named outputs; the second is built from
            `sttm_kernels.reference` and must take the choices (the index) that the first one made.
        inputs: tensors, the features first; those with a floating dtype are differentiated.
        terms: of each output.
        grad_terms: of each gradient, `terms` if not given. Gradients are worked out from rounded outputs, so their
            budget grants the rounding of the features' dtype.
        seed: draws the cotangents.

    Returns:
        The outputs of `actual`.
    """
    features = next(t for t in inputs.values() if t is not None and t.is_floating_point())
    draw = torch.Generator().manual_seed(seed)
    out = {n: t.detach() for n, t in actual(**inputs).items() if t.is_floating_point()}
    cotangents = {n: torch.randn(t.shape, generator=draw).to(t.device, t.dtype) for n, t in out.items()}
    got, got_grads = evaluate(actual, inputs, None, cotangents)
    truth, true_grads = evaluate(specification, inputs, torch.float64, cotangents)
    plain, plain_grads = evaluate(specification, inputs, plain_dtype(features.dtype), cotangents)
    for key, value in truth.items():
        if value.is_floating_point():
            assert_within_budget(f"{name}: {key}", got[key], value, plain[key], terms)
        else:
            assert_equal(f"{name}: {key}", got[key], value)
    for key, value in true_grads.items():
        assert_within_budget(
            f"{name}: gradient of {key}", got_grads[key], value, plain_grads[key], grad_terms or terms, features.dtype
        )
    return got


# Choices: the score-gap rule


def assign_at(
    index: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: str = "cosine",
    temperature: float = 1.0,
    weight: str = "softmax",
) -> MergePlan:
    """`reference.assign` with the choice given: score, lse and weight of `index`, differentiable, 0 where it is -1."""
    real = index >= 0
    q = torch.where(real[..., None] if q.dim() == 3 else real[:, None, :, None], q, 0)
    meta = meta.expand(q.shape[0], *meta.shape[-2:])
    S = _similarities(q, meta, similarity, temperature)
    score = S.gather(-1, index.long().clamp_min(0)[..., None]).squeeze(-1)
    lse = S.logsumexp(-1)
    w = (score - lse).exp()
    score, lse, w = (torch.where(real, value, 0.0) for value in (score, lse, w))
    soft = weight == "softmax"
    return MergePlan(index, S.shape[-1], score, lse if soft else None, w if soft else None)


def _similarities(q: Tensor, meta: Tensor, similarity: str, temperature: float) -> Tensor:
    return reference.pairwise_similarity(reference.mean_over_heads(q), meta, Similarity(similarity, temperature))


def assert_choice_within_budget(name: str, chosen: Tensor, best: Tensor, budget: float) -> None:
    """The score-gap rule: the true score of what was chosen is within `budget` of the true best one."""
    _same_shape(name, chosen, best)
    _report(name, (best - chosen)[best > chosen], budget)
    wrong = ~(chosen >= best - budget)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: the choice scores {chosen[at].item():.9g}, the best {best[at].item():.9g}; "
            f"budget {budget:.3g}; {int(wrong.sum())} of {wrong.numel()} choices are wrong"
        )


def assert_assign_within_budget(
    plan: MergePlan,
    q: Tensor,
    meta: Tensor,
    similarity: str = "cosine",
    temperature: float = 1.0,
    weight: str = "softmax",
    mask: Tensor | None = None,
) -> None:
    """Checks the plan that an implementation of `assign` made of finite inputs: index, score, lse, weight."""
    q, meta = q.detach(), meta.detach().expand(q.shape[0], *meta.shape[-2:])
    real = torch.ones(plan.index.shape, dtype=torch.bool, device=q.device) if mask is None else mask
    q = torch.where(real[..., None] if q.dim() == 3 else real[:, None, :, None], q, 0)
    terms = q.shape[-1] * (q.shape[1] if q.dim() == 4 else 1)
    acc = reference.acc_dtype(q.dtype)
    if plan.num_groups != meta.shape[1]:
        raise AssertionError(f"num_groups must be {meta.shape[1]}, got {plan.num_groups}")
    assert_index_in_range("index", plan.index, plan.num_groups)
    assert_equal("index >= 0", plan.index >= 0, real)

    S = _similarities(q.double(), meta.double(), similarity, temperature)
    q_plain, meta_plain = (t.to(plain_dtype(q.dtype) or q.dtype) for t in (q, meta))
    S_plain = _similarities(q_plain, meta_plain, similarity, temperature)
    budget = error_budget(S, S_plain, acc, terms)
    chosen = S.gather(-1, plan.index.long().clamp_min(0)[..., None]).squeeze(-1)
    assert_choice_within_budget("index", chosen[real], S.max(-1).values[real], budget)

    truth = assign_at(plan.index, q.double(), meta.double(), similarity, temperature, weight)
    plain = assign_at(plan.index, q_plain, meta_plain, similarity, temperature, weight)
    for field in ("score", "lse", "weight"):
        got, expected = getattr(plan, field), getattr(truth, field)
        if (got is None) != (expected is None):
            raise AssertionError(f"{field} must be {'None' if expected is None else 'a tensor'}")
        if got is not None:
            more = 0 if field == "score" else plan.num_groups
            assert_within_budget(field, got, expected, getattr(plain, field), terms + more)


def assert_index_in_range(name: str, index: Tensor, num_groups: int) -> None:
    """Checks that `index` is int32 and every value of it in [-1, num_groups)."""
    if index.dtype != torch.int32:
        raise AssertionError(f"{name} must be int32, got {index.dtype}")
    wrong = (index < -1) | (index >= num_groups)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{name}{list(at)} must be in [-1, {num_groups}), got {index[at].item()}")


def assert_order(index: Tensor, num_groups: int, order: Tensor | None, offsets: Tensor | None) -> None:
    """Checks the two shortcuts of a plan, int32 or None: the tokens sorted by group, and where each group starts."""
    if order is not None:
        assert_equal("order", order, index.argsort(dim=1, stable=True).to(torch.int32))
    if offsets is not None:
        group = torch.arange(num_groups + 1, device=index.device).expand(index.shape[0], -1).contiguous()
        starts = torch.searchsorted(index.long().sort(dim=1).values, group)
        assert_equal("offsets", offsets, starts.to(torch.int32))


def assert_match_valid(
    plan: MergePlan,
    r: int,
    num_prefix: int,
    is_dst: Tensor,
    block: Tensor | None = None,
    protected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Checks what holds for a plan of `match` whatever the features, NaN included.

    Exactly r src tokens merge, each into a dst it may meet; the prefix and protected tokens are untouched; groups are
    the prefix, then the protected, then the unmerged src, then dst, each by token index; `order` and `offsets` agree
    with `index`.

    Args:
        plan: with B batch items of N tokens.
        r: tokens merged, after clamping.
        num_prefix: tokens that stay apart.
        is_dst: bool `(N,)`, `(1, N)` or `(B, N)`, False on the prefix and on protected tokens.
        block: int64 `(N - num_prefix,)`, the window of each token, or None.
        protected: bool `(N,)` or None.

    Returns:
        merged, bool `(B, N)`, and partner, int64 `(B, N)`: the dst token that shares the group, of merged tokens.
    """
    B, N = plan.index.shape
    index, device = plan.index.long(), plan.index.device
    assert_index_in_range("index", plan.index, plan.num_groups)
    if plan.num_groups != N - r:
        raise AssertionError(f"num_groups must be N - r = {N - r}, got {plan.num_groups}")
    is_dst = is_dst.to(device).reshape(-1, N).expand(B, N)
    token = torch.arange(N, device=device)
    alone = _alone(N, num_prefix, protected, device)
    is_src = ~is_dst & ~alone
    first_dst = alone.sum() + is_src.sum(1, keepdim=True) - r
    merged = is_src & (index >= first_dst)
    assert_equal("merged tokens per item", merged.sum(1), torch.full((B,), r, device=device))
    unmerged = is_src & ~merged
    expected = torch.where(is_dst, first_dst + is_dst.cumsum(1) - 1, alone.cumsum(0) - 1)
    expected = torch.where(unmerged, alone.sum() + unmerged.cumsum(1) - 1, expected)
    assert_equal("index of tokens that stay", index.masked_fill(merged, -1), expected.masked_fill(merged, -1))
    assert_order(plan.index, plan.num_groups, plan.order, plan.offsets)

    no_group = plan.num_groups
    dst_of_group = torch.full((B, plan.num_groups + 1), -1, device=device)
    dst_of_group = dst_of_group.scatter(1, expected.masked_fill(~is_dst, no_group), token.masked_fill(~is_dst, -1))
    partner = dst_of_group.gather(1, index).masked_fill(~merged, 0)
    if bool((partner < 0).any()):
        raise AssertionError("a merged token shares its group with no dst token")
    if block is not None:
        window = torch.nn.functional.pad(block.to(device), (num_prefix, 0), value=-1)
        apart = merged & (window[partner] != window)
        if bool(apart.any()):
            at = apart.nonzero()[0].tolist()
            raise AssertionError(f"token {at} merged into token {partner[tuple(at)].item()} of another window")
    return merged, partner


def _alone(num_tokens: int, num_prefix: int, protected: Tensor | None, device: torch.device) -> Tensor:
    """Bool `(N,)`: the tokens that neither merge nor receive."""
    prefix = torch.arange(num_tokens, device=device) < num_prefix
    return prefix if protected is None else prefix | protected.to(device)


def assert_match_within_budget(
    plan: MergePlan,
    metric: Tensor,
    r: int,
    num_prefix: int,
    is_dst: Tensor,
    block: Tensor | None = None,
    protected: Tensor | None = None,
) -> None:
    """Checks the plan that an implementation of `match` made of finite features.

    Beside `assert_match_valid`: every partner, and the worst merged token against the best unmerged one, pass the
    score-gap rule; `score` is within the budget, and -inf for a token that had no partner to look for.
    """
    metric = metric.detach()
    N, device = metric.shape[-2], metric.device
    merged, partner = assert_match_valid(plan, r, num_prefix, is_dst, block, protected)
    is_dst = is_dst.to(device).reshape(-1, N).expand(metric.shape[0], N)
    is_src = ~is_dst & ~_alone(N, num_prefix, protected, device)
    may_meet = is_src[:, :, None] & is_dst[:, None, :]
    if block is not None:
        window = torch.nn.functional.pad(block.to(device), (num_prefix, 0), value=-1)
        may_meet = may_meet & (window[:, None] == window[None, :])

    def similarities(metric: Tensor) -> Tensor:
        metric = reference.mean_over_heads(metric)
        return reference.pairwise_similarity(metric, metric, reference.COSINE).masked_fill(~may_meet, -torch.inf)

    S, S_plain = similarities(metric.double()), similarities(metric.to(plain_dtype(metric.dtype) or metric.dtype))
    terms = metric.shape[-1] * (metric.shape[1] if metric.dim() == 4 else 1)
    budget = error_budget(S, S_plain, reference.acc_dtype(metric.dtype), terms)
    best = S.max(-1).values
    chosen = S.gather(-1, partner[..., None]).squeeze(-1)
    assert_choice_within_budget("partner", chosen[merged], best[merged], budget)
    if plan.score is None:
        raise AssertionError("score must be a tensor")
    assert_within_budget("score", plan.score, best, S_plain.max(-1).values, terms)
    assert_equal("score == -inf", plan.score == -torch.inf, best == -torch.inf)
    worst_merged = best.masked_fill(~merged, torch.inf).min(1).values
    best_unmerged = best.masked_fill(~(is_src & ~merged), -torch.inf).max(1).values
    assert_choice_within_budget("set of merged tokens, item ", worst_merged, best_unmerged, budget)


# Inputs


def make_tokens(
    B: int,
    N: int,
    C: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    layout: str = "contiguous",
) -> Tensor:
    """`(B, N, C)` of standard normal values in a memory layout; the same values for the same seed in every layout.

    Layouts: "contiguous"; "transposed" (tokens innermost); "strided" (every second row of a longer tensor); "sliced"
    (a slice of wider rows, so that rows are not aligned); "expanded" (one item, repeated with batch stride 0: here the
    items are equal). What lies between the values in memory is NaN.
    """
    values = torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return values[:1].expand(B, -1, -1)
    if layout == "strided":
        view = values.new_full((B, 2 * N, C), math.nan)[:, ::2]
    elif layout == "sliced":
        view = values.new_full((B, N, C + 4), math.nan)[..., 1 : C + 1]
    else:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return view.copy_(values)


def make_index(
    B: int,
    N: int,
    K: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    kind: str = "random",
    left_out: float = 0.1,
) -> Tensor:
    """int32 `(B, N)` in [-1, K).

    Kinds: "random" (a share `left_out` of tokens is -1); "even" groups (every second group is empty); "one" (all tokens
    in the last group); "none" (all -1).
    """
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(K, (B, N), generator=draw)
    dropped = torch.rand(B, N, generator=draw) < left_out
    if kind == "even":
        index = index // 2 * 2
    elif kind == "one":
        index, dropped = torch.full_like(index, K - 1), torch.zeros_like(dropped)
    elif kind == "none":
        dropped = torch.ones_like(dropped)
    elif kind != "random":
        raise ValueError(f"kind must be 'random', 'even', 'one' or 'none', got {kind!r}")
    return index.masked_fill(dropped, -1).to(device, torch.int32)


# Memory that was never written, and memory that must not be


def poison(tensor: Tensor) -> Tensor:
    """Fills in place with what no result may hold: NaN, -77, the largest unsigned value or True."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(math.nan)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(-77 if torch.iinfo(tensor.dtype).min < 0 else torch.iinfo(tensor.dtype).max)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, what Python code allocates without filling holds poison, so that unwritten outputs show.

    Covers torch.empty, empty_like, empty_strided and Tensor.new_empty, new_empty_strided. Not for use around
    `torch.compile`, which traces them.
    """
    places: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                return poison(allocate(*args, **{**kwargs, "requires_grad": False})).requires_grad_(
                    kwargs.get("requires_grad", False)
                )

        return wrapped

    with torch.device("cpu"):
        torch.empty(0)  # device contexts keep a table of the functions that allocate, made when one is first used
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, poisoning(getattr(owner, name))))
        yield


@dataclass(frozen=True)
class Guarded:
    """A copy of a tensor, its strides kept, amid poisoned memory."""

    tensor: Tensor
    _memory: Tensor
    _outside: Tensor
    _before: Tensor
    _start: int

    def check(self, name: str = "tensor") -> None:
        """Raises `AssertionError` if anything around or between the elements was written."""
        written = (self._memory != self._before).any(1) & self._outside
        if bool(written.any()):
            at = int(written.nonzero()[0]) - self._start
            raise AssertionError(f"{name}: memory outside of it was written, {at} elements from its first one")


def guarded(tensor: Tensor, guard: int = 256) -> Guarded:
    """Copies `tensor`, strides kept, into a buffer with `guard` poisoned elements before and after it."""
    strides = tensor.stride()
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) if tensor.numel() else 0
    buffer = poison(torch.zeros(span + 2 * guard, dtype=tensor.dtype, device=tensor.device))
    view = buffer.as_strided(tensor.shape, strides, guard)
    once = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
    view[once].copy_(tensor.detach()[once])
    outside = torch.ones(span + 2 * guard, dtype=torch.bool, device=tensor.device)
    outside.as_strided(tensor.shape, strides, guard)[once].fill_(False)
    memory = buffer.view(torch.uint8).view(span + 2 * guard, -1)
    return Guarded(view, memory, outside, memory.clone(), guard)
