"""The values that travel between the verbs, and between a verb and its implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergePlan:
    """A weighted bipartite graph from N tokens to K groups, stored as one int32 per token.

    Attributes:
        index: int32 `(B, N)`. The group of each token, in [0, K), or -1 for a token that takes part in nothing.
            `merge`, `unmerge` and `compose` treat any value outside [0, K) as -1.
        num_groups: K, the same for every batch item.
        score: float32 `(B, N)` (float64 for float64 features) or None. From `assign`: the similarity of the token to
            its meta token over the temperature, differentiable, 0 where masked. From `match`: the cosine similarity
            of a src token to its most similar dst token, -inf for a token that had no partner to look for, or is
            masked; not differentiable.
        lse: like `score`, or None. From `assign` with `weight="softmax"`: logsumexp over the meta tokens,
            differentiable, 0 where masked.
        weight: like `score`, or None, which means 1 for every token. From `assign` with `weight="softmax"`: the
            softmax probability of the chosen meta token, differentiable, 0 where masked.
        order: int32 `(B, N)` or None. The token indices sorted by group, by token index within a group. Only present
            when every token has a group, from `match` and `assign_merge`; a shortcut for `merge` and for gradients,
            which believe it: a plan whose index you change must leave out order and offsets, `MergePlan(index,
            num_groups)`.
        offsets: int32 `(B, K + 1)` or None. Group k of item b is `order[b, offsets[b, k] : offsets[b, k + 1]]`.
        lengths: of packed sequences how many tokens each has, or None. Such a plan has B = 1: the T tokens of all
            sequences are its N, and their groups, numbered through from one sequence to the next, its K. `merge`,
            `unmerge` and `compose` take it as any other, and features without the batch, `(T, C)`.
        merged_lengths: with `lengths`, how many groups each sequence has.

    Registered as a pytree, so a plan passes through `torch.compile`, `torch.export` and activation checkpointing, and
    as safe for `torch.load`.
    """

    index: Tensor
    num_groups: int
    score: Tensor | None = None
    lse: Tensor | None = None
    weight: Tensor | None = None
    order: Tensor | None = None
    offsets: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    merged_lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MergedTokens:
    """What `merge` and `soft_merge` return.

    Attributes:
        x: `(B, K, C)`, the dtype of the tokens that were merged.
        size: float32 `(B, K)` (float64 for float64 tokens), how many tokens stand behind each merged one.
        positions: float32 `(B, K, P)` (float64 for float64 tokens), the weighted mean position of each group in the
            units of the positions given, or None if none were.
        lengths: of packed sequences how many of the K merged tokens each has, or None.

    Of tokens `(T, C)` of packed sequences none of them has a batch: `(K, C)`, `(K,)`, `(K, P)`. Registered as a pytree.
    """

    x: Tensor
    size: Tensor
    positions: Tensor | None = None
    lengths: tuple[int, ...] | None = None


def exportable(cls: type) -> None:
    """Takes a dataclass for the inputs and results of exported programs, by a name of this copy of the package."""
    torch.export.register_dataclass(cls, serialized_type_name=f"{__package__}.{cls.__name__}")


for _cls in (MergePlan, MergedTokens):
    exportable(_cls)
    torch.serialization.add_safe_globals([_cls])


class Merged(NamedTuple):
    """`MergedTokens` as implementations of `merge` return them: with the mass of each group, float32 `(B, K)`.

    Where the plan had no `order` and `offsets`, these are made: as in `MergePlan`, tokens without a group last.
    """

    x: Tensor
    size: Tensor
    positions: Tensor | None
    mass: Tensor
    order: Tensor | None = None
    offsets: Tensor | None = None


class SoftMerged(NamedTuple):
    """`MergedTokens` as implementations of `soft_merge` return them: with the logsumexp that normalises the weights.

    It is float32 `(B, N)` over meta tokens, `(B, K)` over tokens.
    """

    x: Tensor
    size: Tensor
    positions: Tensor | None
    lse: Tensor


class MergedGrads(NamedTuple):
    """Gradients of `MergedTokens`; None for a zero one."""

    x: Tensor | None
    size: Tensor | None
    positions: Tensor | None


class Similarity(NamedTuple):
    """How tokens are compared to meta tokens: S[n, k] = kind(q_n, m_k) / temperature."""

    kind: str = "cosine"
    temperature: float = 1.0


class MatchBounds(NamedTuple):
    """What bounds the merges of a `match` beside r.

    Attributes:
        num_groups: K, the same for every batch item.
        mask: bool `(B, N)`, True = a real token, or None.
        limit: int32 `(B,)`, the most merges of each item, or None.
        threshold: a src merges if its similarity is above this; -inf: whatever it is.
    """

    num_groups: int
    mask: Tensor | None = None
    limit: Tensor | None = None
    threshold: float = -math.inf


class Packed(NamedTuple):
    """Packed sequences of a `match`.

    Attributes:
        num_groups: K, of all sequences.
        sequences: int32 `(S, 6)`, as `sequences.table` makes it.
        tiles: how many tiles all sequences have.
        pairs: how many pairs of src and dst are compared.
        threshold: as in `MatchBounds`.
    """

    num_groups: int
    sequences: Tensor
    tiles: int
    pairs: int
    threshold: float = -math.inf


class PlanGrads(NamedTuple):
    """Gradients of a plan of `assign`; None for a zero one."""

    score: Tensor | None
    lse: Tensor | None
    weight: Tensor | None


class MergedToo(NamedTuple):
    """For the gradient of q where its mean over heads was merged along the plan, too, by "mean".

    Attributes:
        grad_y: the gradient of what it became, `(B, K, D)`.
        size: of the tokens, float32 `(B, N)`, or None.
        mass: of the groups, float32 `(B, K)`.
    """

    grad_y: Tensor
    size: Tensor | None
    mass: Tensor


class OfAssign(NamedTuple):
    """For what `assign` is differentiated: whether a gradient is needed, or the gradient, None if it is not."""

    q: Any
    meta: Any


class OfMerge(NamedTuple):
    """As `OfAssign`, for `merge`; `weight` is that of the plan."""

    x: Any
    weight: Any
    size: Any
    positions: Any


class OfSoftMerge(NamedTuple):
    """As `OfAssign`, for `soft_merge`."""

    x: Any
    q: Any
    meta: Any
    size: Any
    positions: Any
