"""Where packed sequences are in the one row that holds them, as numbers and as a table on a device.

What is found in the sequences one after another is put together here, too.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from sttm_kernels import torch_private
from sttm_kernels.plan import MergePlan

Lengths = tuple[int, ...]
TILE = 128
"""Tokens of a sequence that a block of a kernel works on."""


def starts(lengths: Sequence[int]) -> Lengths:
    """Where each sequence begins, and where the last one ends."""
    return tuple(accumulate(lengths, initial=0))


def tiles(lengths: Lengths) -> int:
    """How many tiles all sequences have."""
    return sum(-(-n // TILE) for n in lengths)


def table(lengths: Lengths, merged: Lengths, limits: Lengths, device: torch.device) -> Tensor:
    """int32 (S, 6), of each sequence where it starts, its length, its first group and how many it has, how many of its
    tokens may merge, and how many tiles the ones before it have. Long ones come first: they take longest."""
    order = list(range(len(lengths)))
    if not torch.compiler.is_compiling():  # which would look at the numbers
        order.sort(key=lambda s: -lengths[s])
    start, first = starts(lengths), starts(merged)
    before = starts([-(-lengths[s] // TILE) for s in order])
    rows = [(start[s], lengths[s], first[s], merged[s], limits[s], before[at]) for at, s in enumerate(order)]
    return on_device(rows, device)


def on_device(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """int32, without waiting for a GPU."""
    if device.type == "cpu" and not torch.compiler.is_compiling() and not torch_private.dispatching():
        numbers = array("i", chain.from_iterable(rows))  # which torch.tensor would look through
        return torch.frombuffer(numbers, dtype=torch.int32).view(len(rows), -1)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(rows, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():  # a graph would copy again what the host has here by then
        each = [torch.full((1,), number, dtype=torch.int32, device=device) for row in rows for number in row]
        return torch.cat(each).view(len(rows), -1)
    return moved(torch.tensor(rows, dtype=torch.int32), device)


def moved(host: Tensor, device: torch.device) -> Tensor:
    """What is in the memory of the CPU, without waiting for a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def read(counts: Tensor) -> list[int]:
    """How many groups each sequence has, where only a device knows."""
    if not torch.compiler.is_compiling() and torch_private.is_mapped(counts):
        raise ValueError(
            "lengths must be None in torch.func.vmap where a threshold or pack decides how many groups there are, for "
            f"all that it maps have as many, got those of {len(counts)} sequences: give match a batch and a mask"
        )
    return counts.tolist()


def joined(
    plans: dict[int, MergePlan], lengths: Lengths, groups: Lengths | None = None, threshold: bool = False
) -> MergePlan:
    """The plan of all sequences from those, by number, of the ones that have tokens; others have as many `groups`, or
    none.

    With a `threshold` the groups of each sequence are counted where they are, and read.
    """
    none = groups or (0,) * len(lengths)
    merged = [plans[s].num_groups if s in plans else none[s] for s in range(len(lengths))]
    if threshold:
        counts = read(torch.stack([plan.index.max() for plan in plans.values()]))
        for s, last in zip(plans, counts, strict=True):
            merged[s] = last + 1
    first, begin = starts(merged), starts(lengths)
    index = torch.cat([plan.index + first[s] for s, plan in plans.items()], 1)

    def in_row(part: str) -> Tensor | None:
        values = [getattr(plan, part) for plan in plans.values()]
        return None if any(value is None for value in values) else torch.cat(values, 1)

    order, offsets = in_row("order"), None
    if order is not None:
        order += torch.cat([index.new_full((1, lengths[s]), begin[s]) for s in plans], 1)
        each = [getattr(plans.get(s), "offsets", None) for s in range(len(lengths))]
        at = [
            index.new_full((1, merged[s]), begin[s]) if own is None else own[:, : merged[s]] + begin[s]
            for s, own in enumerate(each)
        ]
        offsets = torch.cat([*at, index.new_full((1, 1), begin[-1])], 1)
    weights = in_row("score"), in_row("lse"), in_row("weight")
    return MergePlan(index, first[-1], *weights, order, offsets, lengths, tuple(merged))


def in_one_row(plan: MergePlan) -> MergePlan:
    """The plan of a batch as one of packed sequences, whose tokens and groups are those of the items."""
    (B, N), K = plan.index.shape, plan.num_groups
    first = K * torch.arange(B, dtype=torch.int32, device=plan.index.device)[:, None]
    index = torch.where((plan.index >= 0) & (plan.index < K), plan.index + first, -1).view(1, -1)
    score, lse, weight = (None if t is None else t.reshape(1, -1) for t in (plan.score, plan.lse, plan.weight))
    return MergePlan(index, B * K, score, lse, weight, lengths=(N,) * B, merged_lengths=(K,) * B)


def without_empty_groups(plan: MergePlan) -> MergePlan:
    """A plan of packed sequences whose groups are counted where they are, and read."""
    assert plan.merged_lengths is not None
    index, T, old = plan.index[0].long(), plan.index.shape[1], plan.num_groups
    if plan.offsets is not None:
        has_tokens = plan.offsets[0, 1:] > plan.offsets[0, :-1]
    else:
        group = torch.where((index >= 0) & (index < old), index, old)
        has_tokens = torch.zeros(old + 1, dtype=torch.bool, device=index.device).scatter(0, group, True)[:-1]
    before = torch.nn.functional.pad(has_tokens.cumsum(0), (1, 0))
    at = on_device([starts(plan.merged_lengths)], index.device)[0]
    merged = tuple(read(before[at].diff()))
    K = sum(merged)
    offsets = plan.offsets
    if offsets is not None and K < T:
        place = torch.where(has_tokens, before[:-1], K)
        begins = torch.where(has_tokens, offsets[0, :-1], T)
        offsets = offsets.new_empty(K + 1).scatter(0, place, begins)[None]
    index = torch.where(index >= 0, before[index.clamp(0, old)], -1)
    return dataclasses.replace(
        plan, index=index.to(torch.int32)[None], num_groups=K, offsets=offsets, merged_lengths=merged
    )


_ROWS = dict.fromkeys(
    ("x", "mask", "size", "positions", "index", "score", "weight", "lse", "grad_score", "grad_lse",
     "grad_weight", "grad_x", "grad_size_in", "grad_positions_in"), 1,
) | {"q": -2, "grad_q": -2}  # fmt: skip
"""Which dimension of arguments and results of operators is rows of tokens. Others have sets of groups, the first."""


def _row_dim(a: Any, field: str) -> int | None:
    over_tokens = field == "lse" and getattr(a, "normalize", None) == "tokens"
    return None if over_tokens else _ROWS.get(field)


def _in_one_row(a: Any, field: str) -> bool:
    """Whether these groups, of `assign_merge`, are in one row rather than in a set for each sequence."""
    merges = hasattr(a, "fill") or hasattr(a, "grad_merged")
    return merges and field in ("y", "size_out", "positions_out", "mass", "fill", "grad_merged")


def _alone(a: Any, values: Any, row: Sequence[int]) -> Any:
    """The arguments or results of an operator of one sequence, where it is as the table says."""
    start, length, first_group, groups = row[:4]
    s = first_group // groups

    def own(field: str, value: Any) -> Any:
        if field == "sequences" or not isinstance(value, Tensor) or value.dim() < 2:
            return None if field == "sequences" else value
        if field == "index":
            value = value - first_group
        if _in_one_row(a, field):
            return value.narrow(1, first_group, groups)
        dim = _row_dim(a, field)
        return value[s : s + 1] if dim is None else value.narrow(dim, start, length)

    return type(values)(*map(own, values._fields, values))


def apart(run: Callable[[Any, Any], Any], a: Any, fields: Sequence[str], out: Any = None) -> list[Tensor | None]:
    """The results, named by `fields`, of `run` of each sequence of an operator's arguments `a` and results `out`, put
    together. Reads where they are, which a GPU is waited for."""
    rows = sorted(a.sequences.tolist(), key=lambda row: row[2])
    found = [run(_alone(a, a, row), None if out is None else _alone(a, out, row)) for row in rows]

    def together(i: int, field: str) -> Tensor | None:
        if found[0][i] is None or field in ("order", "offsets"):  # these are of each one alone
            return None
        values = [each[i] + row[2] if field == "index" else each[i] for each, row in zip(found, rows, strict=True)]
        dim = 1 if _in_one_row(a, field) else _row_dim(a, field)
        return torch.cat(values, 0 if dim is None else dim)

    return [together(i, field) for i, field in enumerate(fields)]
