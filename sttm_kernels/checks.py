"""One verb of one implementation held against the float64 specification: what the tests and `verify` both run.

Every function runs the verb and its gradients on the inputs it is given and raises `AssertionError` if a value, a
choice or a gradient is outside of the budget of `sttm_kernels.testing`; the message names the first element that is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sttm_kernels import functional, reference
from sttm_kernels import partition as _partition
from sttm_kernels.plan import MergedTokens, MergePlan
from sttm_kernels.testing import (
    assert_assign_within_budget,
    assert_equal,
    assert_match_within_budget,
    assert_verb_within_budget,
    assign_at,
    make_tokens,
)


def fields(value: MergePlan | MergedTokens) -> dict[str, Tensor]:
    """The floating tensors of a result, by name."""
    names = ("score", "lse", "weight") if isinstance(value, MergePlan) else ("x", "size", "positions")
    return {name: getattr(value, name) for name in names if getattr(value, name) is not None}


def make_rows(B: int, N: int, device: torch.device | str, seed: int) -> Tensor:
    """float32 `(B, N)` in [0.25, 1.25), as sizes and weights are."""
    return (torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) + 0.25).to(device)


def make_mask(B: int, N: int, device: torch.device | str, seed: int = 9) -> Tensor:
    """bool `(B, N)`, four of five True."""
    return (torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) > 0.2).to(device)


def draw(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    heads: int = 0,
    P: int = 3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Everything that a verb may take, by name, for B, N, K, D, C. Sizes are whole numbers."""
    B, N, K, D, C = shape
    q = make_tokens(B, N, D, dtype, device, seed + 1, layout)
    if heads:
        q = torch.stack([make_tokens(B, N, D, dtype, device, seed + 20 + h, layout) for h in range(heads)], 1)
    return {
        "x": make_tokens(B, N, C, dtype, device, seed, layout),
        "q": q,
        "meta": make_tokens(B, K, D, dtype, device, seed + 2, layout),
        "size": torch.randint(1, 9, (B, N), generator=torch.Generator().manual_seed(seed)).to(device, torch.float32),
        "weight": make_rows(B, N, device, seed + 3),
        "positions": make_tokens(B, N, P, device=device, seed=seed + 4),
        "fill": make_tokens(B, K, C, dtype, device, seed + 5, layout),
        "mask": make_mask(B, N, device, seed + 6),
    }


def _terms(q: Tensor) -> int:
    """Of every product of features."""
    return q.shape[-1] * (q.shape[1] if q.dim() == 4 else 1)


def check_assign(
    impl: str,
    q: Tensor,
    meta: Tensor,
    similarity: str = "cosine",
    temperature: float = 1.0,
    weight: str = "softmax",
    mask: Tensor | None = None,
) -> None:
    settings = (similarity, temperature, weight)
    plan = functional.assign(q, meta, *settings, mask, impl)
    assert_assign_within_budget(plan, q, meta, *settings, mask)
    terms = _terms(q) + meta.shape[-2]
    assert_verb_within_budget(
        "assign",
        lambda q, meta: fields(functional.assign(q, meta, *settings, mask, impl)),
        lambda q, meta: fields(assign_at(plan.index, q, meta, *settings)),
        {"q": q, "meta": meta},
        terms,
        terms + q.shape[-2],
    )


def check_match(
    impl: str,
    metric: Tensor,
    r: int,
    num_prefix: int = 0,
    partition: str | Tensor = "alternate",
    grid: tuple[int, int, int] | None = None,
    window: tuple[int, int, int] | None = None,
    protect: Tensor | None = None,
) -> None:
    plan = functional.match(metric, r, num_prefix, partition, grid, window, impl, protect=protect)
    N = metric.shape[-2]
    exact = metric.cpu().double()
    expected = functional.match(exact, r, num_prefix, partition, grid, window, "reference", protect=protect)
    if plan.num_groups != expected.num_groups:
        raise AssertionError(f"num_groups must be {expected.num_groups}, got {plan.num_groups}")
    cpu = torch.device("cpu")
    is_dst = _partition.destinations(partition, N, num_prefix, grid, (2, 2), None, cpu, protect)
    block = None if window is None or grid is None else _partition.blocks(grid, window, cpu)
    assert_match_within_budget(plan, metric, N - plan.num_groups, num_prefix, is_dst, block, protect)


def check_merge(
    impl: str,
    x: Tensor,
    index: Tensor,
    num_groups: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    positions: Tensor | None = None,
    fill: Tensor | None = None,
    reduce: str = "mean",
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> None:
    def run(merge: Any, x: Tensor, size: Tensor, weight: Tensor, positions: Tensor, fill: Tensor) -> dict[str, Tensor]:
        plan = MergePlan(index, num_groups, weight=weight, order=order, offsets=offsets)
        return fields(merge(x, plan, size, positions, reduce, fill))

    assert_verb_within_budget(
        f"merge by {reduce}",
        partial(run, partial(functional.merge, impl=impl)),
        partial(run, reference.merge),
        {"x": x, "size": size, "weight": weight, "positions": positions, "fill": fill},
        x.shape[1],
        x.shape[1] + x.shape[2],
    )


def check_assign_merge(
    impl: str,
    x: Tensor,
    q: Tensor | None,
    meta: Tensor,
    similarity: str,
    temperature: float,
    weight: str,
    extras: dict[str, Tensor] | None = None,
) -> None:
    """`extras`: any of size, positions, fill and mask."""
    settings = (similarity, temperature, weight)
    own = q is None

    def actual(x, q, meta, size=None, positions=None, fill=None, mask=None):
        more = (mask, size, positions, fill)
        out, plan = functional.assign_merge(x, None if own else q, meta, *settings, *more, impl)
        return fields(plan) | fields(out) | {"index": plan.index}

    inputs = {"x": x, "q": q, "meta": meta, **(extras or {})}
    chosen = actual(**inputs)
    K = meta.shape[-2]
    plan = MergePlan(chosen["index"], K, *(chosen.get(name) for name in ("score", "lse", "weight")))
    assert_assign_within_budget(plan, x if q is None else q, meta, *settings, inputs.get("mask"))

    def truth(x, q, meta, size=None, positions=None, fill=None, mask=None):
        here = assign_at(plan.index, x if own else q, meta, *settings)
        return fields(here) | fields(reference.merge(x, here, size, positions, "mean", fill))

    terms = x.shape[1] + K + x.shape[2]
    assert_verb_within_budget("assign_merge", actual, truth, inputs, terms, terms)


def check_unmerge(impl: str, x: Tensor, index: Tensor) -> None:
    plan = MergePlan(index, x.shape[1])
    assert_equal("unmerge", functional.unmerge(x, plan, impl), reference.unmerge(x, plan))
    assert_verb_within_budget(
        "unmerge",
        lambda x: {"x": functional.unmerge(x, plan, impl)},
        lambda x: {"x": reference.unmerge(x, plan)},
        {"x": x},
        1,
        index.shape[1],
    )


def check_compose(impl: str, index1: Tensor, index2: Tensor, num_groups: int) -> None:
    plans = MergePlan(index1, index2.shape[1]), MergePlan(index2, num_groups)
    assert_equal("index", functional.compose(*plans, impl=impl).index, reference.compose(*plans).index)


def check_soft_merge(
    impl: str,
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: str,
    temperature: float,
    normalize: str,
    size: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns the outputs."""

    def run(impl, x, q, meta, size, positions):
        return fields(
            functional.soft_merge(x, q, meta, similarity, temperature, normalize, size, positions, mask, impl)
        )

    terms = x.shape[1] + q.shape[-1] + meta.shape[-2]
    return assert_verb_within_budget(
        f"soft_merge over {normalize}",
        partial(run, impl),
        partial(run, "reference"),
        {"x": x, "q": q, "meta": meta, "size": size, "positions": positions},
        terms,
        terms + x.shape[2],
    )
