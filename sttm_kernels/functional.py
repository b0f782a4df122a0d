"""The verbs: check the arguments, bring them to one form, call the operator.

What is common to all of them is said by the package: `help(sttm_kernels)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sttm_kernels import dispatch, ops, packed, reference, sequences, torch_private, validate
from sttm_kernels import partition as _partition
from sttm_kernels.plan import MatchBounds, MergedTokens, MergePlan, Similarity
from sttm_kernels.reference import acc_dtype

_Made = TypeVar("_Made")
QUERIES = "(B, N, D) or (B, H, N, D)"
IMPL_NAMES = ("auto", *dispatch.IMPLEMENTATIONS)
CELL = (2, 2)


def _check_comparison(
    q: Tensor, shape: tuple[int, ...], meta: Tensor, similarity: str, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Similarity]:
    """Checks what q, of this shape, is compared to and how; returns meta as (B, K, D), and how."""
    B, N, D = shape[0], shape[-2], shape[-1]
    K = validate.features("meta", meta, "(B, K, D) or (K, D)", 2, 3)[-2]
    validate.same_dtype("meta", meta, "q", q)
    if meta.dim() == 2:
        meta = meta.expand(B, -1, -1)
    validate.beside("meta", meta, "(B, K, D)", (B, K, D), "q", q)
    validate.one_of("similarity", similarity, validate.SIMILARITIES)
    validate.positive("temperature", temperature)
    if mask is not None:
        validate.boolean("mask", mask)
        validate.beside("mask", mask, "(B, N)", (B, N), "q", q)
    return meta, Similarity(similarity, float(temperature))


def check_rows(name: str, q: Tensor, x: Tensor, rows: tuple[int, int]) -> tuple[int, ...]:
    """Checks q, which must have the B and N of x; returns its shape."""
    shape = validate.features(name, q, QUERIES, 3, 4)
    if (shape[0], shape[-2]) != rows:
        texts = validate.shape_text(rows), validate.shape_text(shape)
        raise ValueError(f"{name} must have the B and N of x, {texts[0]}, got {texts[1]}")
    validate.same_device(name, q, "x", x)
    return shape


def size_and_positions(x: Tensor, size: Tensor | None, positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Checks both and brings them to the accumulation dtype, positions to (B, N, P)."""
    if size is None and positions is None:
        return None, None
    (B, N, _), acc = x.shape, acc_dtype(x.dtype)
    if size is not None:
        validate.beside("size", size, "(B, N)", (B, N), "x", x)
        size = _to(acc, size)
    if positions is not None:
        validate.tensor("positions", positions)
        shape = validate.dims("positions", positions, "(B, N, P) or (N, P)", 2, 3)
        if len(shape) == 2:
            positions = positions.expand(B, -1, -1)
        validate.beside("positions", positions, "(B, N, P)", (B, N, shape[-1]), "x", x)
        positions = _to(acc, positions)
    return size, positions


def _to(dtype: torch.dtype, value: Tensor) -> Tensor:
    """`value.to(dtype)`, which is not free where it does nothing."""
    return value if value.dtype == dtype else value.to(dtype)


def _check_plan(name: str, plan: MergePlan) -> None:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"{name} must be a MergePlan, got {type(plan).__name__}")
    index, K = plan.index, plan.num_groups
    _check_int32(f"{name}.index", index)
    B, N = validate.dims(f"{name}.index", index, "(B, N)", 2, batched=2)
    validate.integer(f"{name}.num_groups", K, 1)
    if plan.weight is not None:
        validate.floating(f"{name}.weight", plan.weight)
        validate.beside(f"{name}.weight", plan.weight, "(B, N)", (B, N), f"{name}.index", index)
    if plan.order is not None:
        _check_int32(f"{name}.order", plan.order)
        validate.beside(f"{name}.order", plan.order, "(B, N)", (B, N), f"{name}.index", index)
    if plan.offsets is not None:
        _check_int32(f"{name}.offsets", plan.offsets)
        validate.beside(f"{name}.offsets", plan.offsets, "(B, K + 1)", (B, K + 1), f"{name}.index", index)
    if plan.lengths is not None:
        validate.lengths(f"{name}.lengths", plan.lengths, N)
        validate.lengths(f"{name}.merged_lengths", plan.merged_lengths, K)


def _not_packed(meta_lengths: Any) -> ValueError:
    return ValueError(
        f"meta_lengths must be None without lengths, as every item of a batch has K meta tokens, got {meta_lengths}"
    )


def _check_int32(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        validate.tensor(name, value)
        raise TypeError(f"{name} must be int32, got {value.dtype}")


def assign(
    q: Tensor,
    meta: Tensor,
    similarity: str = "cosine",
    temperature: float = 1.0,
    weight: str = "softmax",
    mask: Tensor | None = None,
    impl: str = "auto",
    *,
    lengths: Sequence[int] | Tensor | None = None,
    meta_lengths: Sequence[int] | Tensor | None = None,
) -> MergePlan:
    """Assigns every token to its most similar meta token.

    index_n = argmax_k S[n, k] with S[n, k] = sim(q_n, meta_k) / temperature, the lowest k on a tie.

    Args:
        q: `(B, N, D)`, or `(B, H, N, D)` meaning the mean over heads.
        meta: `(B, K, D)`, or `(K, D)` for one set shared by the batch; the dtype and device of q.
        similarity: "cosine" (norms clamped at 1e-6), "dot" or "l2" (minus the squared distance).
        temperature: positive; S is divided by it.
        weight: "softmax" gives every token the probability of its meta token, exp(score - lse); "uniform" gives 1.
        mask: bool `(B, N)`, True = a real token. The others get index -1 and take part in nothing.
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.
        lengths: of S packed sequences how many of the T tokens each has; then q is `(T, D)` or `(H, T, D)`, and meta
            `(S, K, D)` or `(K, D)`: the K meta tokens of sequence s are groups s K to (s + 1) K. Not with `mask`.
        meta_lengths: with `lengths`, how many meta tokens each sequence has, at least 1; then meta is their `(sum of K,
            D)`. If they are not all as many, all implementations take the sequences one after another.

    Returns:
        A `MergePlan` with `index`, `num_groups` = K and `score`, and with "softmax" also `lse` and `weight`.

    Differentiable: score, lse and weight with respect to q and meta; also twice, through the O(N K) specification.
    Source: token-to-meta-token similarity of the Spatial-temporal Token Merger (Feng et al., doi 10.1145/3633781).
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    if lengths is not None:
        q, lengths = packed.checked("q", q, lengths, mask, packed.QUERIES, 2, 3)
        meta, each = packed.sets("meta", meta, "D", lengths, meta_lengths)
        if each is None and packed.together("assign", q, impl):
            return _assign_packed(q, meta, similarity, temperature, weight, impl, lengths)
        one = partial(assign, similarity=similarity, temperature=temperature, weight=weight, impl=impl)
        return packed.assign(one, q, meta, lengths, each)
    if meta_lengths is not None:
        raise _not_packed(meta_lengths)
    shape = validate.features("q", q, QUERIES, 3, 4)
    meta, comparison = _check_comparison(q, shape, meta, similarity, temperature, mask)
    validate.one_of("weight", weight, validate.WEIGHTS)
    if impl == "reference":
        return reference.assign(q, meta, comparison, weight, mask)
    return ops.assign(q, meta, comparison, weight, mask, impl)


def _assign_packed(
    q: Tensor, meta: Tensor, similarity: str, temperature: float, weight: str, impl: str, lengths: packed.Lengths
) -> MergePlan:
    """`assign` of all sequences together; q has a batch of one."""
    meta, comparison = _check_comparison(q, (len(lengths), *q.shape[1:]), meta, similarity, temperature, None)
    validate.one_of("weight", weight, validate.WEIGHTS)
    table = packed.table(lengths, meta.shape[1], q.device)
    return packed.with_lengths(ops.assign(q, meta, comparison, weight, None, impl, table), lengths)


def match(
    metric: Tensor,
    r: int | Sequence[int] | Tensor,
    num_prefix: int = 0,
    partition: str | Tensor = "alternate",
    grid: tuple[int, ...] | None = None,
    window: tuple[int, int, int] | None = None,
    impl: str = "auto",
    *,
    cell: tuple[int, int] = CELL,
    generator: torch.Generator | None = None,
    protect: Tensor | Iterable[int] | None = None,
    mask: Tensor | None = None,
    threshold: float | None = None,
    lengths: Sequence[int] | Tensor | None = None,
) -> MergePlan:
    """Bipartite soft matching: every src token finds its most similar dst token, the best r src merge into theirs.

    The groups are the prefix, then the protected tokens, then the unmerged src, then dst, each by token index: also
    with r = 0. So what was protected is at the end of a longer prefix of num_prefix + P tokens for whatever follows.

    Args:
        metric: `(B, N, D)`, or `(B, H, N, D)` meaning the mean over heads (ToMe: the attention keys). Compared by
            cosine similarity.
        r: how many tokens to merge away, at least 0. Clamped to the number of src tokens that have a dst token to go
            to, and for "alternate" to (N - num_prefix) // 2 as in ToMe. Equal scores go to the lower token index.
            Or one number for each item: a sequence, or an integer tensor `(B,)` on the CPU.
        num_prefix: the first tokens (class, distillation, registers) that neither merge nor receive.
        partition: "alternate" (even positions, counted from the first token, are src and odd ones dst), "frames"
            (even frames src, odd frames dst; needs `grid`), "random2d" (one random dst in each `cell` of each frame;
            needs `grid`), or a bool tensor `(N,)` or `(B, N)`, True = dst, with equally many dst in every row. A mask
            on a GPU is read back once to learn its counts: keep it on the CPU to avoid that.
        grid: (T, H, W), or (H, W) for one frame; N = num_prefix + T * H * W.
        window: (t, h, w). Tokens meet only inside the blocks of this size that tile the grid, ragged at its end, so
            that the cost is linear in N. Not with "random2d".
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.
        cell: (sy, sx) of "random2d".
        generator: draws for "random2d"; on any device.
        protect: P tokens anywhere that neither merge nor receive, the same in every batch item: a bool tensor `(N,)` or
            their indices, in any order, counted from the first token (those of the prefix are so anyway). All other
            tokens are src or dst as without it; where "random2d" has protected tokens in a cell, its dst is one of the
            others. r is clamped to what then can merge. A tensor must be on the CPU, where it is read: inside
            `torch.compile` and `torch.export` give a list. Costs one copy of `metric`.
        mask: bool `(B, N)`, True = a real token. The others get index -1 and take part in nothing, whatever they hold.
            In each item r is clamped by its own real tokens, so that an item with padding at its end has the groups
            that it has without it. A cell of "random2d" that drew padding has a real token as its dst, if it has any.
        threshold: a src merges only if its cosine similarity to its dst is above it.
        lengths: of packed sequences how many of the T tokens each has; then `metric` is `(T, D)` or `(H, T, D)`, and
            each sequence is matched as if it were alone. r is one number for all, or one for each, or as a float the
            share of the tokens behind the prefix; every sequence begins with num_prefix tokens; `partition` is a name
            or a bool tensor `(T,)`; `grid` is one for all sequences or a list of one for each; `protect` counts from
            the first token of all. With a `threshold` the groups of each sequence are counted on the device, which
            the host waits for, once. Inside `torch.compile` give a list. Not with `mask`.

    Returns:
        A `MergePlan` with `index`, `num_groups` = N - r, `score`, `order` and `offsets`; its weights are uniform.
        Where items merge differently many tokens, the last groups of those with few are empty: their size is 0 after
        `merge`. The prefix and the protected tokens keep their places, empty where they are padding. N - r is then of
        the item of the lowest r. With a `threshold`, which may leave every token alone, `num_groups` is N; with a
        `mask` it is what padding at the end needs: N - r, or more if a partition of your own or `protect` leave few
        tokens without any dst. If another mask leaves more groups than that, those beyond the last join it. With a
        `mask` there are no `order` and `offsets`.
        Of packed sequences: one row of T tokens, with `lengths` and `merged_lengths`, and no empty groups.

    Differentiable: nothing.
    Source: Token Merging (Bolya et al., arXiv 2210.09461); "random2d" Token Merging for Stable Diffusion
    (Bolya and Hoffman, arXiv 2303.17604).
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    if lengths is not None:
        metric, lengths = packed.checked("metric", metric, lengths, mask, packed.QUERIES, 2, 3)
        validate.generator(generator)
        cell = validate.extents("cell", cell, 2, "(sy, sx)")
        one = partial(match, cell=cell, generator=generator, threshold=threshold)
        drawn_on = metric.device if generator is None else generator.device
        on_host = drawn_on.type == "cpu" or not isinstance(partition, str) or partition != "random2d"
        lists = partial(_lists, cell=cell, generator=generator, window=window) if on_host else None
        return packed.match(
            one, lists, metric, r, num_prefix, partition, grid, window, protect, lengths, threshold, impl
        )
    shape = validate.features("metric", metric, QUERIES, 3, 4)
    B, N = shape[0], shape[-2]
    each = None if type(r) is int else validate.amounts("r", r, B)
    r = validate.integer("r", r, 0) if each is None else max(each)
    num_prefix = validate.integer("num_prefix", num_prefix, 0)
    if num_prefix > N:
        raise ValueError(f"num_prefix must be at most N = {N}, got {num_prefix}")
    validate.partition(partition)
    validate.generator(generator)
    cell = cell if cell is CELL else validate.extents("cell", cell, 2, "(sy, sx)")
    if mask is not None:
        validate.boolean("mask", mask)
        validate.beside("mask", mask, "(B, N)", (B, N), "metric", metric)
    if threshold is not None:
        validate.finite("threshold", threshold)
    named = [] if protect is None else validate.tokens("protect", protect, N)
    device, protected = metric.device, tuple(n for n in named if n >= num_prefix)
    split = _Split.of(partition, B, N, num_prefix, grid, window, cell, generator, protected, device)
    partition, geometry, blocks, moved = split.partition, split.grid, split.blocks, split.moved
    r = split.clamped(r)
    bounds = None
    if each is not None or mask is not None or threshold is not None:
        least = r if each is None else min(r, *each)
        num_groups = _partition.most_groups(
            least, partition, N, num_prefix, geometry, blocks is not None, protected, mask is None, threshold is None
        )
        halves = isinstance(partition, str) and partition == "alternate"
        limit = _limit(each, mask if halves else None, num_prefix, moved, device)
        bounds = MatchBounds(num_groups, mask, limit, -math.inf if threshold is None else float(threshold))
    metric = metric.detach() if metric.requires_grad else metric
    if impl == "reference":
        block = None if blocks is None else _partition.blocks(*blocks, device)
        kept = None if moved is None else moved.protected
        return reference.match(metric, r, num_prefix, split.destinations(mask), block, kept, bounds)
    src = dst = None
    if blocks is not None or protected or not (isinstance(partition, str) and partition == "alternate"):
        src, dst = split.src_and_dst(mask)
    run = ops.match if moved is None else partial(_match_moved, moved)
    return run(metric, r, num_prefix + len(protected), src, dst, impl, bounds)


class _Split(NamedTuple):
    """How one sequence of N tokens is split into src and dst; `blocks` is its grid and the window that tiles it."""

    partition: str | Tensor
    num_tokens: int
    num_prefix: int
    grid: tuple[int, int, int] | None
    blocks: tuple[tuple[int, int, int], tuple[int, int, int]] | None
    cell: tuple[int, int]
    generator: torch.Generator | None
    protected: tuple[int, ...]
    moved: _partition.Moved | None
    num_dst: int
    device: torch.device

    @classmethod
    def of(
        cls, partition: str | Tensor, B: int, N: int, num_prefix: int, grid: Any, window: Any, cell: tuple[int, int],
        generator: torch.Generator | None, protected: tuple[int, ...], device: torch.device,
    ) -> _Split:  # fmt: skip
        """Checks the geometry, of which `cell` is checked already."""
        geometry = _check_grid(partition, grid, window, N - num_prefix)
        if isinstance(partition, Tensor):
            partition = _check_partition_mask(partition, B, N, num_prefix, protected)
        blocks = None
        if window is not None and geometry is not None:
            blocks = geometry, validate.extents("window", window, 3, "(t, h, w)")
        num_dst = _partition.num_destinations(partition, N, num_prefix, geometry, cell, protected)
        moved = _table(_partition.move, protected, N, num_prefix, device) if protected else None
        return cls(partition, N, num_prefix, geometry, blocks, cell, generator, protected, moved, num_dst, device)

    def clamped(self, r: int) -> int:
        at = self.num_tokens, self.num_prefix, self.num_dst
        return _partition.clamped(r, self.partition, *at, self.blocks, self.protected)

    def destinations(self, mask: Tensor | None = None) -> Tensor:
        kept = None if self.moved is None else self.moved.protected
        at = self.num_tokens, self.num_prefix, self.grid
        return _partition.destinations(self.partition, *at, self.cell, self.generator, self.device, kept, mask)

    def src_and_dst(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lists of them, by place if tokens are moved."""
        window = None if self.blocks is None else self.blocks[1]
        at = self.num_prefix, self.grid, self.num_dst, window, self.protected
        if isinstance(self.partition, str) and self.partition != "random2d":
            return _table(_partition.known_src_and_dst, self.partition, self.num_tokens, *at, self.device)
        return _partition.src_and_dst(self.partition, self.destinations(mask), *at, self.moved)


def _lists(
    lengths: packed.Lengths, num_prefix: int, partition: str | Tensor, grids: Sequence[Any], stay: Sequence[int], *,
    window: Any, cell: tuple[int, int], generator: torch.Generator | None,
) -> _partition.PackedLists:  # fmt: skip
    """The src and dst of packed sequences, of which the tokens `stay` neither merge nor receive."""
    shapes = [
        _check_grid(partition, grid, window, n - num_prefix) if n else None
        for grid, n in zip(grids, lengths, strict=True)
    ]
    if window is not None:
        window = validate.extents("window", window, 3, "(t, h, w)")
    kept = _partition.mark(tuple(stay), sum(lengths), torch.device("cpu"))
    if isinstance(partition, str) and partition == "random2d":
        drawn = [
            _partition.destinations(
                "random2d",
                n,
                num_prefix,
                shape,
                cell,
                generator,
                kept.device,
                own if bool(own[num_prefix:].any()) else None,
            )[0]
            for n, shape, own in zip(lengths, shapes, kept.split(lengths), strict=True)
            if n
        ]
        partition = torch.cat(drawn)
    return _partition.packed_lists(partition, lengths, num_prefix, shapes, window, kept)


def _limit(
    each: tuple[int, ...] | None,
    mask: Tensor | None,
    num_prefix: int,
    moved: _partition.Moved | None,
    device: torch.device,
) -> Tensor | None:
    """int32 `(B,)`: how many tokens each item may merge away, by `each` and as half of the real ones in `mask`."""
    limit = None if each is None else _table(_partition.amounts, each, device)
    if mask is None:
        return limit
    if moved is not None:
        mask = mask & ~_beside(mask, moved.protected)
    half = mask[:, num_prefix:].sum(1, dtype=torch.int32) // 2
    return half if limit is None else torch.minimum(half, _beside(mask, limit))


def _beside(lead: Tensor, value: Tensor) -> Tensor:
    """`value`, which is alike on every rank, as a DTensor if `lead` is one."""
    if not hasattr(lead, "device_mesh"):
        return value
    from sttm_kernels import sharding  # not before there are DTensors: it imports torch.distributed.tensor

    return sharding.on_every_rank(value, lead)


def _table(make: Callable[..., _Made], *args: Any) -> _Made:
    """What `make` makes of numbers and, last of `args`, a device; kept for later calls, unless it belongs to one who
    listens or to a graph that is captured. Each stream has its own, for none waits for another."""
    device = args[-1]
    on_gpu = device.type == "cuda"
    listened = torch.compiler.is_compiling() or torch_private.observed()
    if listened or device.type not in ("cpu", "cuda") or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return make(*args)
    return _kept(make, torch_private.raw_stream(device.index) if on_gpu else 0, *args)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., _Made], stream: int, *args: Any) -> _Made:
    with torch.inference_mode(False):
        return make(*args)


def _match_moved(
    moved: _partition.Moved, metric: Tensor, r: int, num_prefix: int, src: Tensor | None, dst: Tensor | None, impl: str,
    bounds: MatchBounds | None,
) -> MergePlan:  # fmt: skip
    """The plan of the tokens, by way of that of their places."""
    moved = _partition.Moved(*(_beside(metric, each) for each in moved))
    if bounds is not None and bounds.mask is not None:
        bounds = bounds._replace(mask=bounds.mask.index_select(1, moved.token))
    plan = ops.match(metric.index_select(metric.dim() - 2, moved.token), r, num_prefix, src, dst, impl, bounds)
    assert plan.score is not None
    index, score = (each.index_select(1, moved.place) for each in (plan.index, plan.score))
    order = plan.order
    if order is not None:
        order = moved.token.to(torch.int32).expand(order.shape).gather(1, order.long())
    return dataclasses.replace(plan, index=index, score=score, order=order)


def _check_grid(
    partition: str | Tensor, grid: tuple[int, ...] | None, window: tuple[int, int, int] | None, tokens: int
) -> tuple[int, int, int] | None:
    """Returns the grid as (T, H, W); None if neither the partition nor a window needs one and none was given."""
    by_name = partition if isinstance(partition, str) else "a mask"
    if window is not None and by_name == "random2d":
        raise ValueError(
            f"window must be None with partition 'random2d', whose cells are windows already, got {window}"
        )
    if grid is None:
        if window is not None or by_name in ("frames", "random2d"):
            wanted_by = "window" if window is not None else f"partition {by_name!r}"
            raise ValueError(f"grid must be (T, H, W) with {wanted_by}, got None")
        return None
    count = 2 if isinstance(grid, (tuple, list)) and len(grid) == 2 else 3
    shape = validate.extents("grid", grid, count, "(T, H, W) or (H, W)")
    t, h, w = (1, *shape) if count == 2 else shape
    if t * h * w != tokens:
        raise ValueError(f"grid must hold the N - num_prefix = {tokens} tokens, got {grid} = {t * h * w}")
    return t, h, w


def _check_partition_mask(partition: Tensor, B: int, N: int, num_prefix: int, protected: tuple[int, ...]) -> Tensor:
    """Returns it without the protected tokens."""
    if tuple(partition.shape) not in ((N,), (B, N)):
        shape = validate.shape_text(partition.shape)
        raise ValueError(f"partition must have shape (N,) = ({N},) or (B, N) = ({B}, {N}), got {shape}")
    if protected:
        partition = partition & ~_table(_partition.move, protected, N, num_prefix, partition.device).protected
    counts = partition.reshape(-1, N)[:, num_prefix:].sum(1)
    if counts.numel() > 1 and not torch.compiler.is_compiling() and bool((counts != counts[0]).any()):
        raise ValueError(f"partition must have equally many dst tokens in every row, got {counts.tolist()}")
    return partition


def merge(
    x: Tensor,
    plan: MergePlan,
    size: Tensor | None = None,
    positions: Tensor | None = None,
    reduce: str = "mean",
    fill: Tensor | None = None,
    impl: str = "auto",
) -> MergedTokens:
    """Reduces tokens, their counts and their positions along a plan, in one pass.

    With w_n = size_n * weight_n and mass_k the sum of w over group k: y_k = sum w_n x_n / mass_k, positions alike,
    size'_k = sum size_n.

    Args:
        x: `(B, N, C)`; or `(T, C)` with a plan of packed sequences, `size` then `(T,)` and the results without batch.
        plan: of these tokens, from `assign`, `match` or `compose`.
        size: `(B, N)`, how many tokens stand behind each; default ones. Not negative.
        positions: `(B, N, P)` or `(N, P)`, any unit, for instance (t, y, x) in frames and patches.
        reduce: "mean"; "sum" (of w_n x_n); "max" (elementwise) or "first" (the token of lowest index: pruning), which
            look at no weight. Positions are the weighted mean in every case.
        fill: `(B, K, C)` or `(K, C)`, x's dtype: what a group that no token, or only tokens of size 0, went to gets in
            place of 0. Its size and positions are 0 all the same.
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.

    Returns:
        `MergedTokens(x (B, K, C) in x's dtype, size (B, K), positions (B, K, P) or None)`.

    Differentiable: all outputs with respect to x, size, positions, fill and plan.weight (and through it to what
    `assign` was given); also twice. A tie of "max" sends its gradient to the lowest token index.
    Source: weighted averaging by token counts as in Token Merging (arXiv 2210.09461); position aggregation as in the
    Spatial-temporal Token Merger (doi 10.1145/3633781).
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    if getattr(plan, "lengths", None) is not None and packed.without_batch(x):
        rows = packed.row("x", x, "(T, C)", 2), plan, None if size is None else packed.column("size", size)
        return packed.unbatched(merge(*rows, positions, reduce, fill, impl))
    B, N, _ = validate.features("x", x, "(B, N, C)", 3)
    _check_plan("plan", plan)
    validate.beside("plan.index", plan.index, "(B, N)", (B, N), "x", x)
    size, positions = size_and_positions(x, size, positions)
    validate.one_of("reduce", reduce, validate.REDUCTIONS)
    fill = _check_fill(fill, x, plan.num_groups)
    if impl == "reference":
        return dataclasses.replace(reference.merge(x, plan, size, positions, reduce, fill), lengths=plan.merged_lengths)
    if plan.weight is not None and plan.weight.dtype != acc_dtype(x.dtype):
        plan = dataclasses.replace(plan, weight=plan.weight.to(acc_dtype(x.dtype)))
    out = ops.merge(x, plan, size, positions, reduce, fill, impl)
    return MergedTokens(out.x, out.size, out.positions, plan.merged_lengths)


def assign_merge(
    x: Tensor,
    q: Tensor | None,
    meta: Tensor,
    similarity: str = "cosine",
    temperature: float = 1.0,
    weight: str = "softmax",
    mask: Tensor | None = None,
    size: Tensor | None = None,
    positions: Tensor | None = None,
    fill: Tensor | None = None,
    impl: str = "auto",
    *,
    lengths: Sequence[int] | Tensor | None = None,
    meta_lengths: Sequence[int] | Tensor | None = None,
) -> tuple[MergedTokens, MergePlan]:
    """`assign` and then `merge` by "mean" along its plan, in one launch where an implementation can.

    Args:
        x: `(B, N, C)`.
        q: what similarity is measured on, `(B, N, D)` or `(B, H, N, D)` meaning the mean over heads; None for x itself.
        meta: `(B, K, D)` or `(K, D)`; the dtype and device of q.
        similarity, temperature, weight, mask: as in `assign`.
        size, positions, fill: as in `merge`.
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.
        lengths, meta_lengths: as in `assign`; then x is `(T, C)`, size `(T,)`, positions `(T, P)`, fill `(S, K, C)` or
            `(K, C)`, with meta_lengths `(sum of K, C)`.

    Returns:
        What `merge` returns and the plan that `assign` returns, with `order` and `offsets` where there is neither mask
        nor lengths.

    Differentiable: as the two verbs are.
    Source: the spatial stage of the Spatial-temporal Token Merger (doi 10.1145/3633781).
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    if lengths is not None:
        x, lengths = packed.checked("x", x, lengths, mask, "(T, C)", 2)
        meta, each = packed.sets("meta", meta, "D", lengths, meta_lengths)
        fill = None if fill is None else packed.sets("fill", fill, "C", lengths, meta_lengths)[0]
        q, size, positions = packed.beside(x, q, size, positions)
        if each is None and packed.together("assign_merge", x, impl):
            return _assign_merge_packed(
                x, q, meta, similarity, temperature, weight, size, positions, fill, impl, lengths
            )  # fmt: skip

        def one(
            x: Tensor, q: Tensor | None, meta: Tensor, size: Any, positions: Any, fill: Any
        ) -> tuple[MergedTokens, MergePlan]:
            return assign_merge(x, q, meta, similarity, temperature, weight, None, size, positions, fill, impl)

        return packed.assign_merge(one, x, q, meta, size, positions, fill, lengths, each)
    if meta_lengths is not None:
        raise _not_packed(meta_lengths)
    B, N, C = validate.features("x", x, "(B, N, C)", 3)
    q = None if q is x else q
    metric, shape = (x, (B, N, C)) if q is None else (q, check_rows("q", q, x, (B, N)))
    meta, comparison = _check_comparison(metric, shape, meta, similarity, temperature, mask)
    validate.one_of("weight", weight, validate.WEIGHTS)
    if impl == "reference" or metric.dtype != x.dtype:
        plan = assign(metric, meta, similarity, temperature, weight, mask, impl)
        return merge(x, plan, size, positions, fill=fill, impl=impl), plan
    size, positions = size_and_positions(x, size, positions)
    fill = _check_fill(fill, x, meta.shape[1])
    out, plan = ops.assign_merge(x, q, meta, comparison, weight, mask, size, positions, fill, impl)
    return MergedTokens(out.x, out.size, out.positions), plan


def _assign_merge_packed(
    x: Tensor, q: Tensor | None, meta: Tensor, similarity: str, temperature: float, weight: str, size: Tensor | None,
    positions: Tensor | None, fill: Tensor | None, impl: str, lengths: packed.Lengths,
) -> tuple[MergedTokens, MergePlan]:  # fmt: skip
    """`assign_merge` of all sequences together; x, q and size have a batch of one."""
    S, T = len(lengths), x.shape[1]
    fill = None if fill is None else fill.expand(S, -1, -1).flatten(0, 1)
    if q is not None and q.dtype != x.dtype:
        plan = _assign_packed(q, meta, similarity, temperature, weight, impl, lengths)
        return packed.unbatched(merge(x, plan, size, positions, fill=fill, impl=impl)), plan
    metric, shape = (x, x.shape) if q is None else (q, check_rows("q", q, x, (1, T)))
    meta, comparison = _check_comparison(metric, (S, *shape[1:]), meta, similarity, temperature, None)
    validate.one_of("weight", weight, validate.WEIGHTS)
    size, positions = size_and_positions(x, size, positions)
    fill = _check_fill(fill, x, S * meta.shape[1])
    table = packed.table(lengths, meta.shape[1], x.device)
    out, plan = ops.assign_merge(x, q, meta, comparison, weight, None, size, positions, fill, impl, table)
    plan = packed.with_lengths(plan, lengths)
    return packed.unbatched(MergedTokens(out.x, out.size, out.positions, plan.merged_lengths)), plan


def _check_fill(fill: Tensor | None, x: Tensor, num_groups: int) -> Tensor | None:
    """Returns fill as (B, K, C)."""
    if fill is None:
        return None
    validate.features("fill", fill, "(B, K, C) or (K, C)", 2, 3)
    validate.same_dtype("fill", fill, "x", x)
    if fill.dim() == 2:
        fill = fill.expand(x.shape[0], -1, -1)
    validate.beside("fill", fill, "(B, K, C)", (x.shape[0], num_groups, x.shape[2]), "x", x)
    return fill


def unmerge(x: Tensor, plan: MergePlan, impl: str = "auto") -> Tensor:
    """Copies every group back to its tokens; a token of index -1 gets 0.

    Args:
        x: `(B, K, C)`, K = plan.num_groups; or `(K, C)` with a plan of packed sequences.
        plan: the plan that led to the K groups.
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.

    Returns:
        `(B, N, C)` in x's dtype; `(T, C)` of `(K, C)`.

    Differentiable with respect to x, any number of times: its backward is a `merge` by "sum".
    Source: Token Merging for Stable Diffusion (arXiv 2303.17604).
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    if getattr(plan, "lengths", None) is not None and packed.without_batch(x):
        return unmerge(packed.row("x", x, "(K, C)", 2), plan, impl)[0]
    C = validate.features("x", x, "(B, K, C)", 3)[2]
    _check_plan("plan", plan)
    validate.shape("x", x, "(B, K, C)", (plan.index.shape[0], plan.num_groups, C))
    validate.same_device("plan.index", plan.index, "x", x)
    if impl == "reference":
        return reference.unmerge(x, plan)
    return ops.unmerge(x, plan, impl)


def compose(plan1: MergePlan, plan2: MergePlan, impl: str = "auto") -> MergePlan:
    """The plan that goes where plan1 and then plan2 go: index12_n = index2[index1_n].

    Args:
        plan1: `(B, N)` tokens to K1 groups.
        plan2: `(B, K1)` groups to K2 groups; of packed sequences if plan1 is, with the lengths that plan1 leads to.
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.

    Returns:
        A `MergePlan` of `(B, N)` tokens to K2 groups with uniform weight: it is the map, for `unmerge` and for tracing
        where a token went. To reduce along two weighted plans, merge twice.

    Not differentiable.
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    _check_plan("plan1", plan1)
    _check_plan("plan2", plan2)
    rows = plan1.index.shape[0], plan1.num_groups
    validate.beside("plan2.index", plan2.index, "(B, K1)", rows, "plan1.index", plan1.index)
    if plan1.merged_lengths != plan2.lengths:
        raise ValueError(f"plan2.lengths must be plan1.merged_lengths, {plan1.merged_lengths}, got {plan2.lengths}")
    found = reference.compose(plan1, plan2) if impl == "reference" else ops.compose(plan1, plan2, impl)
    if plan1.lengths is None:
        return found
    return dataclasses.replace(found, lengths=plan1.lengths, merged_lengths=plan2.merged_lengths)


def pack(plan: MergePlan) -> MergePlan:
    """The plan of a batch as one of packed sequences, without the groups that no token went to.

    Of what `match` finds with a `mask` or a `threshold`, items have differently many groups, and the last ones of
    those with few are empty. Of the plan that this makes, `merge(x.flatten(0, 1), pack(plan))` gives the groups of all
    items in one row, without padding, and how many each item has.

    Args:
        plan: `(B, N)` tokens to K groups; or a plan of packed sequences, such as that of `assign`.

    Returns:
        A `MergePlan` of the tokens of all items, one after another: `lengths` is N for each item, `merged_lengths` how
        many groups of each have a token. What was left out by a mask keeps the index -1. There are no `order` and
        `offsets`, but those of packed sequences. Prefix tokens that are padding have no group here.

    The groups are counted on the device, which the host waits for, once. Differentiable: score, lse and weight.
    """
    _check_plan("plan", plan)
    return sequences.without_empty_groups(sequences.in_one_row(plan) if plan.lengths is None else plan)


def soft_merge(
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: str = "cosine",
    temperature: float = 1.0,
    normalize: str = "meta",
    size: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "auto",
    *,
    lengths: Sequence[int] | Tensor | None = None,
    meta_lengths: Sequence[int] | Tensor | None = None,
) -> MergedTokens:
    """Merges every token into every meta token by its softmax weight, never materialising the N x K weights.

    y_k = sum_n size_n A[n, k] x_n / sum_n size_n A[n, k], positions alike, with A the softmax of S.

    Args:
        x: `(B, N, C)`.
        q: `(B, N, D)`, or `(B, H, N, D)` meaning the mean over heads.
        meta: `(B, K, D)` or `(K, D)`; the dtype and device of q.
        similarity, temperature: as in `assign`.
        normalize: "meta" (softmax over meta tokens: every token spreads over groups) or "tokens" (softmax over tokens:
            attention pooling).
        size: `(B, N)`, default ones.
        positions: `(B, N, P)` or `(N, P)`.
        mask: bool `(B, N)`, True = a real token. The others take part in nothing.
        impl: "auto" or an implementation by name, see `help(sttm_kernels)`.
        lengths, meta_lengths: as in `assign`; then x is `(T, C)`, size `(T,)`, positions `(T, P)`.

    Returns:
        `MergedTokens(x (B, K, C) in x's dtype, size (B, K) = sum_n size_n A[n, k], positions (B, K, P) or None)`; a
        group of mass 0 is 0 throughout.

    Differentiable: all outputs with respect to x, q, meta, size and positions; also twice, through the O(N K)
    specification.
    Source: the soft reading of the Spatial-temporal Token Merger (doi 10.1145/3633781).
    """
    validate.one_of("impl", impl, IMPL_NAMES)
    if lengths is not None:
        x, lengths = packed.checked("x", x, lengths, mask, "(T, C)", 2)
        meta, each = packed.sets("meta", meta, "D", lengths, meta_lengths)
        q, size, positions = packed.beside(x, q, size, positions)
        if each is None and packed.together("soft_merge", x, impl):
            return _soft_merge_packed(
                x, q, meta, similarity, temperature, normalize, size, positions, impl, lengths
            )  # fmt: skip

        def one(x: Tensor, q: Tensor, meta: Tensor, size: Any, positions: Any) -> MergedTokens:
            return soft_merge(x, q, meta, similarity, temperature, normalize, size, positions, None, impl)

        return packed.soft_merge(one, x, q, meta, size, positions, lengths, each)
    if meta_lengths is not None:
        raise _not_packed(meta_lengths)
    B, N, _ = validate.features("x", x, "(B, N, C)", 3)
    shape = check_rows("q", q, x, (B, N))
    meta, comparison = _check_comparison(q, shape, meta, similarity, temperature, mask)
    validate.one_of("normalize", normalize, validate.NORMALIZATIONS)
    size, positions = size_and_positions(x, size, positions)
    if impl == "reference":
        return reference.soft_merge(x, q, meta, comparison, normalize, size, positions, mask)
    out = ops.soft_merge(x, q, meta, comparison, normalize, size, positions, mask, impl)
    return MergedTokens(out.x, out.size, out.positions)


def _soft_merge_packed(
    x: Tensor, q: Tensor, meta: Tensor, similarity: str, temperature: float, normalize: str, size: Tensor | None,
    positions: Tensor | None, impl: str, lengths: packed.Lengths,
) -> MergedTokens:  # fmt: skip
    """`soft_merge` of all sequences together; x, q and size have a batch of one."""
    shape = (len(lengths), *check_rows("q", q, x, (1, x.shape[1]))[1:])
    meta, comparison = _check_comparison(q, shape, meta, similarity, temperature, None)
    validate.one_of("normalize", normalize, validate.NORMALIZATIONS)
    size, positions = size_and_positions(x, size, positions)
    table = packed.table(lengths, meta.shape[1], x.device)
    out = ops.soft_merge(x, q, meta, comparison, normalize, size, positions, None, impl, table)
    found = None if out.positions is None else out.positions.flatten(0, 1)
    return MergedTokens(out.x.flatten(0, 1), out.size.flatten(), found, (meta.shape[1],) * len(lengths))
