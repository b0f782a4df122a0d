"""Programs that leave the package behind: every operator as plain ATen, for other runtimes and processes.

A program of `torch.export` holds this package's operators. Where the package is imported they run its kernels; without
it the program does not load. `decompose` writes them out, and `to_onnx` makes an ONNX model of the result. What is
written out is the specification, but without what only some runtimes have, as a stable sort. It takes O(N K) memory for
`assign` and `soft_merge`, O(S T) for `match` of S src and T dst, and the sums of `merge` have no fixed order on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sttm_kernels import ops, reference
from sttm_kernels.nn.generators import CHOICES
from sttm_kernels.operator import OPERATORS
from sttm_kernels.plan import MatchBounds, Merged, MergePlan, Packed, Similarity, SoftMerged
from sttm_kernels.reference import acc_dtype, mean_over_heads, pairwise_similarity


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without this package's operators: plain ATen, which runs where the package is not.

    Args:
        program: of `torch.export.export`. Its inputs and results must be tensors and Python's own containers: a
            `MergePlan` or `MergedTokens` among them is a class of this package, without which it does not load.

    Returns:
        A new program, with the same dynamic shapes. Its choices (`index`) are those of `impl="reference"`, its sums
        equal to rounding. What `module()` of it gives has the same gradients, by the formulas of PyTorch's own
        operators, which keep what they are made of: O(N K) floats where the kernels keep O(N).

    Raises:
        ValueError: it holds an operator that has no plain form, which gradients are.
    """
    if not _ours(program):
        return program
    plain = program.run_decompositions(decompositions())
    if left := _ours(plain):
        raise ValueError(f"program must hold operators that have a plain form, got {', '.join(left)}")
    return plain


def to_onnx(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """An ONNX model of a program that holds this package's operators, in standard operators only.

    Needs onnx and onnxscript. `match` and the generator "topk" select by TopK, sums of groups are scattered with a
    reduction.

    Args:
        program: as `decompose` takes it. Its dynamic shapes are those of the model.
        options: of `torch.onnx.export`, for instance `opset_version`, at least 18, which the reductions need.

    Returns:
        What `torch.onnx.export` returns; its `save(path)` writes the model.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.sort.stable: _sort_in_onnx,
        torch.ops.aten._cdist_forward.default: _distances_in_onnx,
    }
    table |= options.pop("custom_translation_table", {})
    found = torch.onnx.export(decompose(program), (), dynamo=True, custom_translation_table=table, **options)
    assert found is not None
    return found


def _sort_in_onnx(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """TopK of ONNX puts the lower index first where values are equal."""
    import onnxscript

    op: Any = onnxscript.opset18
    count = op.Reshape(op.Gather(op.Shape(self), dim), op.Constant(value_ints=[1]))
    return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)


def _distances_in_onnx(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean, by their differences: a product would cancel."""
    import onnxscript

    if p != 2:
        raise ValueError(f"p of torch.cdist must be 2 in an ONNX model, got {p}")
    op: Any = onnxscript.opset18
    axes = [op.Constant(value_ints=[axis]) for axis in (-2, -3, -1)]
    difference = op.Sub(op.Unsqueeze(x1, axes[0]), op.Unsqueeze(x2, axes[1]))
    return op.Sqrt(op.ReduceSumSquare(difference, axes[2], keepdims=0))


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The plain form of every operator that has one, for a table of `ExportedProgram.run_decompositions`."""
    verbs = {OPERATORS[name].overload: _decomposition(name, plain) for name, plain in _PLAIN.items()}
    operators = getattr(torch.ops, ops.NAMESPACE)
    return verbs | {getattr(operators, name).default: choose for name, choose in CHOICES.items()}


def _ours(program: torch.export.ExportedProgram) -> list[str]:
    """The operators of this package that a program holds, also in the graphs within it, as those without autocast."""
    graphs = (each.graph for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule))
    targets = {node.target for graph in graphs for node in graph.nodes}
    return sorted(str(target) for target in targets if getattr(target, "namespace", None) == ops.NAMESPACE)


def _decomposition(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    operator = OPERATORS[name]

    def written_out(*args: Any) -> Any:
        a = operator.inputs(*args)
        return operator.flat(a, operator.run(plain, a))

    return written_out


def _match(
    metric: Tensor, r: int, num_prefix: int, src: Tensor | None, dst: Tensor | None, bounds: MatchBounds | None = None
) -> MergePlan:
    """`reference.match` of src and dst as lists of tokens `(1 or B, G, S)` and `(1 or B, G, T)` per window, padded with
    -1; None is every other token."""
    metric = mean_over_heads(metric.detach())
    B, N, D = metric.shape
    K, mask, limit, threshold = bounds or MatchBounds(N - r)
    token = torch.arange(N, device=metric.device)
    if src is None or dst is None:
        first_src, first_dst = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
        src, dst = token[first_src::2][None, None], token[first_dst::2][None, None]
        rows, columns = metric[:, first_src::2], metric[:, first_dst::2]
    else:
        src, dst = src.long(), dst.long()
        rows, columns = (
            metric.gather(1, tokens.clamp_min(0).expand(B, -1, -1).flatten(1)[..., None].expand(-1, -1, D))
            .unflatten(1, tokens.shape[1:])
            .flatten(0, 1)
            for tokens in (src, dst)
        )
    G, S, T = src.shape[1], src.shape[2], dst.shape[2]
    src, dst = (_real(tokens.expand(B, -1, -1), mask) for tokens in (src, dst))
    similarity = pairwise_similarity(rows, columns, reference.COSINE).view(B, G, S, T)
    best, position = similarity.masked_fill((dst < 0)[:, :, None], -torch.inf).max(-1)

    place = torch.where(src < 0, N, src).flatten(1)
    score = _placed(best.flatten(1), place, N, -torch.inf)
    partner = _placed(dst.gather(2, position).clamp_min(0).flatten(1), place, N, 0)
    is_dst = _placed(torch.ones_like(dst).flatten(1), torch.where(dst < 0, N, dst).flatten(1), N, 0)
    may_merge = score > threshold if threshold > -torch.inf else score != -torch.inf
    merged = _top(score.masked_fill(~may_merge, -torch.inf), r, limit) & may_merge
    unmerged = _placed(torch.ones_like(place), place, N, 0) * ~merged

    group = torch.where(unmerged > 0, num_prefix - 1 + unmerged.cumsum(1), token)
    group = torch.where(is_dst > 0, num_prefix - 1 + unmerged.sum(1, keepdim=True) + is_dst.cumsum(1), group)
    index = torch.where(merged, group.gather(1, partner), group)
    if mask is not None:
        index = torch.where(mask, index.clamp_max(K - 1), -1)
        return MergePlan(index.to(torch.int32), K, score)

    order, offsets = _csr(index, K)
    return MergePlan(index.to(torch.int32), K, score, order=order, offsets=offsets)


def _csr(index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of a plan; tokens without a group come last."""
    B, N = index.shape
    group = torch.where((index >= 0) & (index < num_groups), index, num_groups).long()
    token = torch.arange(N, device=index.device)
    order = (group * N + token).sort(1).values % N  # no two are equal, so any sort is stable
    counts = group.new_zeros((B, num_groups + 2)).scatter_add(1, group + 1, torch.ones_like(group))
    return order.to(torch.int32), counts[:, :-1].cumsum(1).to(torch.int32)


def _match_packed(metric: Tensor, num_prefix: int, packed: Packed) -> MergePlan:
    """The same of sequences one after another; O(T²) memory, for T tokens of all of them."""
    metric = mean_over_heads(metric.detach())[0]
    T, K = metric.shape[0], packed.num_groups
    start, length, first_group, groups, limit = packed.sequences.long().unbind(1)[:5]
    token = torch.arange(T, device=metric.device)
    member = (token >= start[:, None]) & (token < (start + length)[:, None])
    row = member.int().argmax(0)  # of the table
    place = token - start[row]
    is_dst, is_src = (place % 2 == 1) & (place >= num_prefix), (place % 2 == 0) & (place >= num_prefix)
    may_meet = is_src[:, None] & is_dst & (row[:, None] == row)
    score, partner = pairwise_similarity(metric, metric, reference.COSINE).masked_fill(~may_meet, -torch.inf).max(-1)

    may_merge = score > packed.threshold if packed.threshold > -torch.inf else score != -torch.inf
    best_first = score.masked_fill(~may_merge, -torch.inf).argsort(descending=True, stable=True)
    best_first = best_first[row[best_first].argsort(stable=True)]  # by sequence, then by score
    before = length.cumsum(0) - length
    rank = torch.zeros_like(token).scatter(0, best_first, token - before[row[best_first]])
    merged = may_merge & (rank < limit[row])

    def counted(marked: Tensor) -> Tensor:
        """How many are marked in the sequence of each token up to it."""
        count = marked.cumsum(0)
        return count - torch.nn.functional.pad(count, (1, 0))[start][row]

    unmerged = is_src & ~merged
    first_dst = num_prefix + (member & unmerged).sum(1)[row]
    group = torch.where(unmerged, num_prefix + counted(unmerged) - 1, place)
    group = torch.where(is_dst, first_dst + counted(is_dst) - 1, group)
    index = first_group[row] + torch.minimum(group, groups[row] - 1)
    index = torch.where(merged, index[partner], index)
    order, offsets = _csr(index[None], K)
    return MergePlan(index.to(torch.int32)[None], K, score[None], order=order, offsets=offsets)


def _real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Lists of tokens (B, G, M), -1 in place of what `mask` leaves out."""
    if mask is None:
        return tokens
    real = mask.gather(1, tokens.clamp_min(0).flatten(1)).view(tokens.shape)
    return torch.where(real, tokens, -1)


def _placed(values: Tensor, place: Tensor, N: int, rest: float) -> Tensor:
    """(B, N) with these values (B, M) at their places and `rest` elsewhere; place N is nowhere."""
    return values.new_full((values.shape[0], N + 1), rest).scatter(1, place, values)[:, :N]


def _top(score: Tensor, r: int, limit: Tensor | None) -> Tensor:
    """Marks the r greatest of each row, or as many as `limit` (B,) if that is less, equal ones from the left, by the
    value of the least. NaN counts as +inf."""
    if r == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    score = torch.where(score.isnan(), torch.inf, score)
    greatest = score.topk(r, dim=1).values
    least, count = greatest[:, -1:], torch.full_like(greatest[:, -1:], r, dtype=torch.int64)
    if limit is not None:
        count = limit.long().clamp(max=r)[:, None]
        least = torch.where(count > 0, greatest.gather(1, (count - 1).clamp_min(0)), torch.inf)
    above, level = score > least, score == least
    return above | (level & (level.long().cumsum(1) <= count - above.long().sum(1, keepdim=True)))


def _merge(
    x: Tensor, plan: MergePlan, size: Tensor | None, positions: Tensor | None, reduce: str, fill: Tensor | None
) -> Merged:
    """`reference.merge`, with the members of a group for "max" and "first" found by a reduction, not compared."""
    B, N, C = x.shape
    K = plan.num_groups
    merged = reference.merge(x, plan, size, positions, "mean" if reduce in ("max", "first") else reduce, fill)
    weight = torch.ones(plan.index.shape, dtype=acc_dtype(x.dtype), device=x.device) if size is None else size
    mass = reference.sum_by_group(weight if plan.weight is None else weight * plan.weight, plan.index, K)
    has_order = plan.order is not None and plan.offsets is not None
    made = (None, None) if has_order else _csr(plan.index, K)
    if reduce not in ("max", "first"):
        return Merged(merged.x, merged.size, merged.positions, mass, *made)
    place = torch.where((plan.index >= 0) & (plan.index < K), plan.index, K).long()[..., None].expand(-1, -1, C)
    token = torch.arange(N, device=x.device)[:, None].expand(B, -1, C)
    if reduce == "max":  # found, then taken: so that of equal values the first has the gradient
        values = x.detach()
        highest = values.new_full((B, K + 1, C), -torch.inf).scatter_reduce(1, place, values, "amax")
        token = torch.where((values == highest.gather(1, place)) | values.isnan(), token, N - 1)
    first = token.new_full((B, K + 1, C), N - 1).scatter_reduce(1, place, token, "amin")[:, :K]
    y = x.gather(1, first)
    y = torch.where((mass == 0)[..., None], 0 if fill is None else fill, y)
    return Merged(y.to(x.dtype), merged.size, merged.positions, mass, *made)


def _assign_merge(
    x: Tensor, q: Tensor | None, meta: Tensor, similarity: Similarity, weight: str, mask: Tensor | None,
    size: Tensor | None, positions: Tensor | None, fill: Tensor | None,
) -> tuple[Merged, MergePlan]:  # fmt: skip
    plan = reference.assign(x if q is None else q, meta, similarity, weight, mask)
    return _merge(x, plan, size, positions, "mean", fill), plan


def _soft_merge(
    x: Tensor, q: Tensor, meta: Tensor, similarity: Similarity, normalize: str, size: Tensor | None,
    positions: Tensor | None, mask: Tensor | None,
) -> SoftMerged:  # fmt: skip
    merged = reference.soft_merge(x, q, meta, similarity, normalize, size, positions, mask)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    S = pairwise_similarity(torch.where(real[..., None], mean_over_heads(q), 0), meta, similarity)
    if normalize == "meta":
        lse = torch.where(real, S.logsumexp(-1), 0)
    else:
        some = real.any(1, keepdim=True)
        lse = torch.where(some, S.masked_fill(~real[..., None], -torch.inf).logsumexp(1), 0)
    return SoftMerged(merged.x, merged.size, merged.positions, lse)


_PLAIN: dict[str, Callable[..., Any]] = {
    "assign": reference.assign,
    "assign_earlier": reference.assign_earlier,
    "match": _match,
    "match_packed": _match_packed,
    "merge": _merge,
    "assign_merge": _assign_merge,
    "unmerge": reference.unmerge,
    "compose": reference.compose,
    "soft_merge": _soft_merge,
}
