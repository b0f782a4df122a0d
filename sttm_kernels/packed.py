"""Packed sequences: the tokens of all of them in one row, without padding, and how many each has.

A plan over them is a plan of one item whose groups are numbered through from one sequence to the next. So what follows
a plan (`merge`, `unmerge`, `compose`, their derivatives) knows nothing of sequences; finding one does. The verbs here
take `one`, the verb for the sequences one after another, with all that is the same for every sequence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sttm_kernels import dispatch, ops, sequences, torch_private, validate
from sttm_kernels.partition import PackedLists
from sttm_kernels.plan import MergedTokens, MergePlan, Packed
from sttm_kernels.reference import acc_dtype
from sttm_kernels.sequences import Lengths, joined, starts

QUERIES = "(T, D) or (H, T, D)"


def row(name: str, features: Any, layout: str, *counts: int) -> Tensor:
    """Features of T tokens with a batch of one."""
    validate.features(name, features, layout, *counts)
    return features[None]


def column(name: str, values: Any) -> Tensor:
    """Numbers of T tokens with a batch of one."""
    validate.tensor(name, values)
    validate.dims(name, values, "(T,)", 1, batched=1)
    return values[None]


def without_batch(x: Any) -> bool:
    """Whether x, of packed sequences, is `(T, C)`."""
    return isinstance(x, Tensor) and x.dim() == 2


def unbatched(merged: MergedTokens) -> MergedTokens:
    positions = None if merged.positions is None else merged.positions[0]
    return MergedTokens(merged.x[0], merged.size[0], positions, merged.lengths)


def checked(name: str, features: Any, lengths: Any, mask: Any, layout: str, *counts: int) -> tuple[Tensor, Lengths]:
    """Features of packed tokens with a batch of one, and their lengths."""
    if mask is not None:
        raise ValueError(f"mask must be None with lengths, for packed tokens are all real, got {type(mask).__name__}")
    features = row(name, features, layout, *counts)
    return features, validate.lengths("lengths", lengths, features.shape[-2])


def split(values: Tensor | None, lengths: Lengths, dim: int) -> Sequence[Any]:
    """The values of each sequence, None of None."""
    return (None,) * len(lengths) if values is None else values.split(lengths, dim)


def sets(name: str, values: Any, channels: str, lengths: Lengths, each: Any = None) -> tuple[Tensor, Lengths | None]:
    """What each sequence has of its own, (S, K, ...), or what is alike for all, (K, ...); as it is.

    Or, where they have `each` so many, (sum of K, ...): as (S, K, ...) if all have as many, else as it is and how many.
    """
    if each is not None:
        K = validate.features(name, values, f"(sum of meta_lengths, {channels})", 2)[0]
        counts = validate.lengths("meta_lengths", each, K)
        if len(counts) != len(lengths) or min(counts) < 1:
            raise ValueError(
                f"meta_lengths must be at least 1 for each of the S = {len(lengths)} sequences, got {counts}"
            )
        alike = len(set(counts)) == 1
        return (values.unflatten(0, (-1, counts[0])), None) if alike else (values, counts)
    validate.features(name, values, f"(S, K, {channels}) or (K, {channels})", 2, 3)
    if values.dim() == 3 and values.shape[0] != len(lengths):
        shape = validate.shape_text(values.shape)
        raise ValueError(f"{name} must have S = {len(lengths)} items, one for each sequence, got {shape}")
    return values, None


def items(values: Tensor | None, lengths: Lengths, each: Lengths | None = None) -> Sequence[Any]:
    """Of each sequence: (1, K, ...) of values (S, K, ...), or what is alike for all, (K, ...) or None; or its own, of
    which there are `each` so many."""
    if values is not None and each is not None:
        return values.split(each)
    return (values,) * len(lengths) if values is None or values.dim() == 2 else values.split(1)


def merges(r: Any, lengths: Lengths, num_prefix: int) -> Lengths:
    """How many tokens each sequence is to merge away, before it is clamped."""
    short = [n for n in lengths if n < num_prefix]
    if short:
        raise ValueError(f"num_prefix must be at most the tokens of every sequence, got {num_prefix} for {short[0]}")
    if isinstance(r, float):
        if not 0 <= r <= 1:
            raise ValueError(f"r must be in [0, 1] as a share of the tokens behind the prefix, got {r}")
        return tuple(int(r * (n - num_prefix)) for n in lengths)
    each = None if type(r) is int else validate.amounts("r", r, len(lengths), "S")
    return (validate.integer("r", r, 0),) * len(lengths) if each is None else each


def grids(grid: Any, lengths: Lengths) -> Sequence[Any]:
    """The grid of each sequence, from one for all or from one each."""
    if grid is None or (isinstance(grid, (tuple, list)) and grid and isinstance(grid[0], (int, torch.SymInt))):
        return (grid,) * len(lengths)
    if not isinstance(grid, Sequence) or len(grid) != len(lengths):
        raise ValueError(f"grid must be (T, H, W), or one for each of the S = {len(lengths)} sequences, got {grid!r}")
    return grid


def match(
    one: Callable[..., MergePlan], lists: Callable[..., PackedLists] | None, metric: Tensor, r: Any, num_prefix: int,
    partition: str | Tensor, grid: Any, window: Any, protect: Any, lengths: Lengths, threshold: float | None, impl: str,
) -> MergePlan:  # fmt: skip
    """`lists` of all sequences are their src and dst; None where they cannot be known on the host."""
    T = metric.shape[-2]
    num_prefix = validate.integer("num_prefix", num_prefix, 0)
    amounts, geometry = merges(r, lengths, num_prefix), grids(grid, lengths)
    validate.partition(partition)
    if isinstance(partition, Tensor):
        validate.shape("partition", partition, "(T,)", (T,))
    parts = partition.split(lengths) if isinstance(partition, Tensor) else (partition,) * len(lengths)
    protected = [] if protect is None else validate.tokens("protect", protect, T)
    if threshold is not None:
        validate.finite("threshold", threshold)
    plain = grid is None and window is None and not protected
    if plain and isinstance(partition, str) and partition == "alternate" and together("match", metric, impl):
        return _match_at_once(metric, amounts, num_prefix, lengths, threshold, impl)
    if lists is not None and together("match", metric, impl, lists=True):
        given = lists(lengths, num_prefix, partition, geometry, protected)
        return _match_at_once(metric, amounts, num_prefix, lengths, threshold, impl, given)
    start = starts(lengths)
    stays = [[n - start[s] for n in protected if start[s] <= n < start[s + 1]] for s in range(len(lengths))]
    plans: dict[int, MergePlan] = {}
    for s, own in enumerate(metric.split(lengths, -2)):
        if lengths[s] > 0:
            plans[s] = one(own, amounts[s], num_prefix, parts[s], geometry[s], window, impl, protect=stays[s] or None)
    return joined(plans, lengths, threshold=threshold is not None)


def together(verb: str, features: Tensor, impl: str, lists: bool = False) -> bool:
    """Whether an implementation takes all sequences together, here: not in a transform, where a batch joins theirs."""
    if torch_private.transforming() or hasattr(features, "device_mesh"):
        return False
    if verb != "match" and torch.compiler.is_exporting():  # what is exported can become plain ATen
        return False
    if lists and torch.compiler.is_compiling():  # which cannot look at how long they are
        return False
    if lists and features.is_cuda and torch.cuda.is_current_stream_capturing():  # see sequences.on_device
        return False
    return dispatch.takes_sequences(verb, impl, features.device, features.dtype, lists)


def _match_at_once(
    metric: Tensor, amounts: Lengths, num_prefix: int, lengths: Lengths, threshold: float | None, impl: str,
    given: PackedLists | None = None,
) -> MergePlan:  # fmt: skip
    """In one launch for all sequences: of every second token, or of lists."""
    free = [n - num_prefix for n in lengths]
    most = tuple(n // 2 for n in free) if given is None else given.most
    limits = tuple(map(min, amounts, most))
    merged = lengths if threshold is not None else tuple(n - r for r, n in zip(limits, lengths, strict=True))
    table = sequences.table(lengths, merged, limits, metric.device)
    if given is None:
        num_dst = [(n + num_prefix % 2) // 2 for n in free]
        pairs = sum((n - dst) * dst for n, dst in zip(free, num_dst, strict=True))
    else:
        pairs = given.pairs
    least = -math.inf if threshold is None else float(threshold)
    packed = Packed(sum(merged), table, sequences.tiles(lengths), pairs, least)
    metric = metric.detach() if metric.requires_grad else metric
    lists = () if given is None else [sequences.moved(each, metric.device) for each in (given.src, given.dst)]
    plan = ops.match_packed(metric, num_prefix, packed, impl, *lists)
    plan = dataclasses.replace(plan, lengths=lengths, merged_lengths=merged)
    return plan if threshold is None else sequences.without_empty_groups(plan)


def table(lengths: Lengths, groups: int, device: torch.device) -> Tensor:
    """Of sequences that have so many groups each."""
    return sequences.table(lengths, (groups,) * len(lengths), (0,) * len(lengths), device)


def with_lengths(plan: MergePlan, lengths: Lengths) -> MergePlan:
    """A plan of sequences that have equally many groups."""
    S = len(lengths)
    return dataclasses.replace(plan, lengths=lengths, merged_lengths=(plan.num_groups // S,) * S)


def assign(
    one: Callable[..., MergePlan], q: Tensor, meta: Tensor, lengths: Lengths, each: Lengths | None = None
) -> MergePlan:
    pairs = zip(q.split(lengths, -2), items(meta, lengths, each), strict=True)
    plans = {s: one(*pair) for s, pair in enumerate(pairs) if lengths[s] > 0}
    return joined(plans, lengths, each or (meta.shape[-2],) * len(lengths))


def assign_merge(
    one: Callable[..., tuple[MergedTokens, MergePlan]], x: Tensor, q: Tensor | None, meta: Tensor, size: Any,
    positions: Any, fill: Any, lengths: Lengths, each: Lengths | None = None,
) -> tuple[MergedTokens, MergePlan]:  # fmt: skip
    given = _of_each(x, q, meta, size, positions, lengths, each)
    groups = each or (meta.shape[-2],) * len(lengths)
    merged, plans = [], {}
    for s, (own, own_fill) in enumerate(zip(given, items(fill, lengths, each), strict=True)):
        if lengths[s] > 0:
            out, plans[s] = one(*own, own_fill)
            merged.append(out)
        else:
            merged.append(_nothing(x, groups[s], positions, own_fill))
    plan = joined(plans, lengths, groups)
    return _in_row(merged), plan


def soft_merge(
    one: Callable[..., MergedTokens], x: Tensor, q: Tensor, meta: Tensor, size: Any, positions: Any, lengths: Lengths,
    each: Lengths | None = None,
) -> MergedTokens:  # fmt: skip
    given = _of_each(x, q, meta, size, positions, lengths, each)
    groups = each or (meta.shape[-2],) * len(lengths)
    return _in_row(
        [one(*own) if lengths[s] > 0 else _nothing(x, groups[s], positions, None) for s, own in enumerate(given)]
    )


def beside(x: Tensor, q: Any, size: Any, positions: Any, name: str = "q") -> tuple[Any, Tensor | None, Tensor | None]:
    """q, by its `name`, and size with a batch of one, as x has, and positions; checked to be of the tokens of x."""
    T = x.shape[1]
    if q is not None:
        q = row(name, q, QUERIES, 2, 3)
        if q.shape[-2] != T:
            raise ValueError(f"{name} must have the T = {T} tokens of x, got {q.shape[-2]}")
    size = None if size is None else column("size", size)
    if size is not None:
        validate.shape("size", size[0], "(T,)", (T,))
    if positions is not None:
        validate.tensor("positions", positions)
        validate.shape("positions", positions, "(T, P)", (T, *positions.shape[1:]))
        validate.dims("positions", positions, "(T, P)", 2, batched=1)
    return q, size, positions


def _of_each(
    x: Tensor, q: Tensor | None, meta: Tensor, size: Tensor | None, positions: Tensor | None, lengths: Lengths,
    each: Lengths | None,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """x, q, meta, size and positions of every sequence; x, q and size have a batch of one."""
    parts = x.split(lengths, 1), split(q, lengths, -2), items(meta, lengths, each)
    return list(zip(*parts, split(size, lengths, 1), split(positions, lengths, 0), strict=True))


def _nothing(x: Tensor, groups: int, positions: Any, fill: Tensor | None) -> MergedTokens:
    """What a sequence without tokens merges to."""
    size = x.new_zeros((1, groups), dtype=acc_dtype(x.dtype))
    y = x.new_zeros((1, groups, x.shape[2])) if fill is None else fill.expand(1, groups, -1)
    return MergedTokens(y, size, None if positions is None else size.new_zeros((1, groups, positions.shape[1])))


def _in_row(merged: list[MergedTokens]) -> MergedTokens:
    """Merged tokens of all sequences, without a batch."""
    x, size, positions = (
        None if getattr(merged[0], part) is None else torch.cat([getattr(each, part)[0] for each in merged])
        for part in ("x", "size", "positions")
    )
    assert x is not None
    assert size is not None
    return MergedTokens(x, size, positions, tuple(each.x.shape[1] for each in merged))
