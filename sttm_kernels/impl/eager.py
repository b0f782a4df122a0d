"""impl="torch": the verbs in eager PyTorch with O(N) extra memory, for devices and machines that have no kernels.

Similarities exist one tile at a time. Sums over a group are `embedding_bag` over the tokens sorted by group, so every
sum has one owner and a fixed order. On a CPU each batch item is computed alone, which makes results independent of the
batch; on a GPU items share a batched product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sttm_kernels.autocast import in_given_dtypes
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
from sttm_kernels.reference import COSINE, NORM_FLOOR, acc_dtype, mean_over_heads
from sttm_kernels.sequences import joined

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Similarities held at once: about the size of a CPU's caches; enough to fill a GPU."""


def _tile_shape(B: int, N: int, K: int, device: torch.device) -> tuple[int, int]:
    """How many items and how many of their tokens make a tile, given K similarities a token."""
    budget = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"])
    tokens = max(1, min(N, budget // K))
    return (1 if device.type == "cpu" else max(1, min(B, budget // (tokens * K)))), tokens


def _tiles(B: int, N: int, K: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(batch slice, token slice) pairs whose similarities to K meta tokens fit a tile."""
    items, tokens = _tile_shape(B, N, K, device)
    for b in range(0, B, items):
        for n in range(0, N, tokens):
            yield slice(b, min(b + items, B)), slice(n, min(n + tokens, N))


def _inverse_norm(q: Tensor) -> Tensor:
    """1 / max(|q|, floor) of every row (B, N, D), in the accumulation dtype: (B, N)."""
    return torch.linalg.vector_norm(q, dim=-1, dtype=acc_dtype(q.dtype)).clamp_min_(NORM_FLOOR).reciprocal_()


def _operand(q: Tensor, similarity: str) -> Tensor:
    """(B, N, D) in the accumulation dtype, unit rows for cosine."""
    q = mean_over_heads(q).to(acc_dtype(q.dtype))
    return q * _inverse_norm(q)[..., None] if similarity == "cosine" else q


class _Similarity:
    """Computes S of one tile after the other in one buffer.

    S is transposed, (b, K, n): a maximum over K then runs along vectors of tokens. `m` are operands; `q` is (B, N, D)
    in any dtype, and where its rows are not of unit length and should be, `inverse` (B, N) is what they lack. `width`
    is the number of elements a token takes in a tile, if that is more than its K similarities.
    """

    def __init__(self, q: Tensor, m: Tensor, similarity: Similarity, width: int = 0, inverse: Tensor | None = None):
        self.q, self.m, self.similarity, self.inverse = q, m, similarity, inverse
        self.shape = (q.shape[0], q.shape[1], max(m.shape[1], width))
        items, tokens = _tile_shape(*self.shape, q.device)
        self.buffer = m.new_empty(items * tokens * m.shape[1])

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        return _tiles(*self.shape, self.q.device)

    def rows(self, b: slice, n: slice) -> Tensor:
        """The rows of q in the accumulation dtype, of unit length for cosine."""
        q = self.q[b, n].to(self.m.dtype)
        return q if self.inverse is None else q * self.inverse[b, n, None]

    def __call__(self, b: slice, n: slice) -> Tensor:
        m = self.m[b]
        scale_S = self.inverse is not None and m.shape[1] < m.shape[2]
        q = self.q[b, n].to(m.dtype) if scale_S else self.rows(b, n)
        S = self.buffer[: m.shape[0] * m.shape[1] * q.shape[1]].view(m.shape[0], m.shape[1], q.shape[1])
        torch.bmm(m, q.mT, out=S)
        if scale_S and self.inverse is not None:
            S.mul_(self.inverse[b, None, n])
        if self.similarity.kind == "l2":
            S.mul_(2).sub_(q.square().sum(-1)[:, None, :]).sub_(m.square().sum(-1)[:, :, None])
        return S if self.similarity.temperature == 1.0 else S.div_(self.similarity.temperature)


def _similarity_to(m: Tensor, q: Tensor, mask: Tensor | None, similarity: Similarity, width: int = 0) -> _Similarity:
    """Of tokens q (B, N, D) or (B, H, N, D), as they are, to the operands m. A masked token has an `inverse` of 0."""
    q = mean_over_heads(q)
    inverse = _inverse_norm(q) if similarity.kind == "cosine" else None
    if inverse is not None and mask is not None:
        inverse.masked_fill_(~mask, 0)
    return _Similarity(q, m, similarity, width, inverse)


@in_given_dtypes
def assign(q: Tensor, meta: Tensor, similarity: Similarity, weight: str, mask: Tensor | None) -> MergePlan:
    soft = weight == "softmax"
    m = _operand(meta, similarity.kind)
    tile = _similarity_to(m, q, mask, similarity)
    B, N, _ = tile.q.shape
    index = m.new_empty((B, N), dtype=torch.int32)
    score = m.new_empty((B, N))
    lse = torch.empty_like(score) if soft else None
    for b, n in tile.tiles():
        S = tile(b, n)
        value, index[b, n] = S.max(1)
        score[b, n] = value
        if lse is not None:
            lse[b, n] = S.sub_(value[:, None]).exp_().sum(1).log_().add_(value)
    w = None if lse is None else (score - lse).exp_()
    if mask is not None:
        index.masked_fill_(~mask, -1)
        for found in (score, lse, w):
            if found is not None:
                found.masked_fill_(~mask, 0)
    return MergePlan(index, meta.shape[1], score, lse, w)


@in_given_dtypes
def assign_earlier(q: Tensor, similarity: Similarity) -> Tensor:
    m = _operand(q, similarity.kind)
    tile = _similarity_to(m, q, None, similarity)
    token, score = torch.arange(q.shape[1], device=q.device), m.new_empty(q.shape[:2])
    for b, n in tile.tiles():
        score[b, n] = tile(b, n).masked_fill_(token[:, None] >= token[n], -torch.inf).amax(1)
    return score


@in_given_dtypes
def assign_backward(
    grads: PlanGrads,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    plan: MergePlan,
    needs: OfAssign,
    merged: MergedToo | None = None,
) -> OfAssign:
    grad_score, grad_lse = _of_scores(grads, plan)
    real, index, lse = plan.index >= 0, plan.index.long().clamp_min(0), plan.lse
    m = _operand(meta, similarity.kind)
    K, D = m.shape[1:]
    tile = _similarity_to(m, q, real, similarity, width=D)
    g = torch.where(real, grad_score / similarity.temperature, 0)
    h = None if grad_lse is None else torch.where(real, grad_lse / similarity.temperature, 0)
    if merged is not None:
        groups = _Groups(plan.index, K)
        w = _weights(plan.weight, merged.size)
        divisor = groups.gather(merged.mass)
        share = (1 if w is None else w) / torch.where(divisor == 0, torch.inf, divisor)
        rows_of_y = F.pad(merged.grad_y.reshape(-1, D), (0, 0, 0, 1))
        bag, share = groups.bag.view(real.shape), torch.where(real, share, 0)

    # dS = g [k = index] + h exp(S - lse), times what is linear in S: to the left for q, to the right for meta.
    grad_q, grad_m = _grad_of_rows(q), torch.zeros_like(m)
    total = torch.zeros_like(m[..., :1])  # of dS over tokens
    for b, n in tile.tiles():
        if h is None:
            grad = m[b].gather(1, index[b, n, None].expand(-1, -1, D)).mul_(g[b, n, None])
        rows = tile.rows(b, n).masked_fill(~real[b, n, None], 0)
        if h is not None and lse is not None:
            dS = tile(b, n).sub_(lse[b, None, n]).exp_().mul_(h[b, None, n]).masked_fill_(~real[b, None, n], 0)
            chosen = index[b, None, n]
            dS.scatter_(1, chosen, dS.gather(1, chosen) + g[b, None, n])
            grad = dS.mT @ m[b]
            grad_m[b] += dS @ rows
            total[b] += dS.sum(-1, keepdim=True)
        if similarity.kind == "l2":
            grad = 2 * (grad - rows * (g if h is None else g + h)[b, n, None])
        if tile.inverse is not None:
            grad = _through_norm(grad, rows, tile.inverse[b, n, None])
        if merged is not None:
            grad = torch.addcmul(grad, rows_of_y[bag[b, n]].to(grad.dtype), share[b, n, None])
        grad_q[b, n] = grad
    if h is None:
        groups = _Groups(torch.where(real, index, -1), K)
        grad_m = groups.sum(tile.q, groups.sort(g if tile.inverse is None else g * tile.inverse)).to(m.dtype)
        total = groups.sum(g[..., None])
    if similarity.kind == "l2":
        grad_m = 2 * (grad_m - m * total)
    if similarity.kind == "cosine":
        grad_m = _through_norm(grad_m, m, _inverse_norm(meta)[..., None])
    return OfAssign(_fresh(_of_heads(grad_q, q), q, needs.q), _fresh(grad_m, meta, needs.meta))


def _of_scores(grads: PlanGrads, plan: MergePlan) -> tuple[Tensor, Tensor | None]:
    """Gradients of score and lse, which that of weight = exp(score - lse) has joined."""
    score, lse, of_weight = grads
    if of_weight is not None:
        through = of_weight if plan.weight is None else of_weight * plan.weight
        score, lse = through if score is None else through + score, -through if lse is None else lse - through
    assert plan.score is not None
    return torch.zeros_like(plan.score) if score is None else score, lse


def _through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Pulls a gradient back through q inverse, inverse = 1 / max(|q|, floor)."""
    radial = (unit * grad).sum(-1, keepdim=True).masked_fill_(inverse >= 1 / NORM_FLOOR, 0)
    return torch.addcmul(grad, unit, radial, value=-1).mul_(inverse)


def _grad_of_rows(q: Tensor) -> Tensor:
    """Where the gradient of q (B, N, D), or of its mean over heads, is written: not rounded before it is spread."""
    B, N, D = q.shape[0], *q.shape[-2:]
    return q.new_empty((B, N, D), dtype=q.dtype if q.dim() == 3 else acc_dtype(q.dtype))


def _of_heads(grad: Tensor, q: Tensor) -> Tensor:
    """The gradient of q from that of its mean over heads."""
    return grad if q.dim() == 3 else (grad / q.shape[1])[:, None].expand(q.shape)


def _fresh(grad: Tensor, like: Tensor, needed: bool) -> Tensor | None:
    return grad.to(like.dtype).contiguous() if needed else None


@in_given_dtypes
def match(
    metric: Tensor, r: int, num_prefix: int, src: Tensor | None, dst: Tensor | None, bounds: MatchBounds | None = None
) -> MergePlan:
    a = _operand(metric.detach(), "cosine")
    B, N, _ = a.shape
    K, mask, limit, threshold = bounds or MatchBounds(N - r)
    at = torch.arange(N, device=a.device)
    if src is None or dst is None:
        first_src, first_dst = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
        token = at[first_src::2].expand(B, -1)
        is_dst = ((at % 2 == 1) & (at >= num_prefix)).expand(B, -1)
        real = None if mask is None else mask[:, first_dst::2]
        best, position = _most_similar(a[:, first_src::2], a[:, first_dst::2], real)
        partner = (first_dst + 2 * position).clamp_max_(N - 1)
        if mask is not None:
            is_dst = is_dst & mask
            best.masked_fill_(~mask[:, first_src::2], -torch.inf)
    else:
        src, dst = src.long(), dst.long()
        if mask is not None:
            src, dst = _real(src, mask), _real(dst, mask)
        is_dst = _spread(dst.flatten(1).expand(B, -1), N, True)
        token, best, partner = _most_similar_in_windows(a, src, dst)

    if bounds is None:
        top = _top(best, r)
    else:
        may_merge = best > threshold if threshold > -torch.inf else best != -torch.inf
        top = _top_of_each(best, may_merge, r if limit is None else limit.clamp(max=r)[:, None])
    is_merged = _spread(token, N, top)
    is_unmerged = ~is_merged & ~is_dst & (at >= num_prefix)
    if mask is not None:
        is_unmerged &= mask

    num_unmerged = is_unmerged.sum(1, keepdim=True)
    group = torch.where(is_unmerged, is_unmerged.cumsum(1) + (num_prefix - 1), at)
    group = torch.where(is_dst, is_dst.cumsum(1) + (num_prefix - 1) + num_unmerged, group)
    index = torch.where(is_merged, group.gather(1, _spread(token, N, partner)), group)
    score = _spread(token, N, best, -torch.inf).contiguous()
    if mask is not None:
        return MergePlan(index.clamp_max_(K - 1).masked_fill_(~mask, -1).to(torch.int32), K, score)

    order, offsets = _csr(index, K)
    return MergePlan(index.to(torch.int32), K, score, order=order, offsets=offsets)


def match_packed(metric: Tensor, num_prefix: int, packed: Packed) -> MergePlan:
    """One sequence after another; reads where they are, which a GPU is waited for."""
    rows = sorted(row for row in packed.sequences.tolist() if row[1] > 0)
    plans = {}
    for s, (start, length, _, groups, limit, _) in enumerate(rows):
        bounds = MatchBounds(groups, threshold=packed.threshold) if packed.threshold > -torch.inf else None
        plans[s] = match(metric[..., start : start + length, :], limit, num_prefix, None, None, bounds)
    return joined(plans, tuple(row[1] for row in rows))


def _real(tokens: Tensor, mask: Tensor) -> Tensor:
    """Lists of tokens (1 or B, G, M) as (B, G, M), -1 in place of what `mask` leaves out."""
    tokens = tokens.expand(mask.shape[0], -1, -1)
    real = mask.gather(1, tokens.clamp_min(0).flatten(1)).view(tokens.shape)
    return tokens.masked_fill(~real, -1)


def _top(best: Tensor, r: int) -> Tensor:
    """Marks the r greatest of each row (B, M), equal ones from the left, by selection, not sort. NaN counts as +inf."""
    if r == 0:
        return torch.zeros_like(best, dtype=torch.bool)
    best = torch.where(best.isnan(), torch.inf, best)
    least = best.kthvalue(best.shape[1] - r + 1, dim=1, keepdim=True).values
    above, level = best > least, best == least
    return above | (level & (level.cumsum(1) <= r - above.sum(1, keepdim=True)))


def _top_of_each(best: Tensor, may_merge: Tensor, r: int | Tensor) -> Tensor:
    """Marks the r (B, 1) greatest of those that may merge of each row (B, M), as `_top`."""
    best = torch.where(best.isnan(), torch.inf, best).masked_fill_(~may_merge, -torch.inf)
    descending = best.argsort(dim=1, descending=True, stable=True)
    among_best = torch.arange(best.shape[1], device=best.device) < r
    return torch.zeros_like(may_merge).scatter_(1, descending, among_best.expand_as(best)) & may_merge


def _spread(token: Tensor, N: int, value: Tensor | bool, rest: float = 0) -> Tensor:
    """(B, N) with `value` at every token of the lists (B, M) and `rest` elsewhere; token -1 is padding."""
    dtype = value.dtype if isinstance(value, Tensor) else torch.bool
    out = torch.full((token.shape[0], N + 1), rest, dtype=dtype, device=token.device)
    return out.scatter_(1, torch.where(token < 0, N, token), value)[:, :N]


def _most_similar(a: Tensor, b: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of every src (B, S, D): the similarity and position of the most similar dst (B, T, D) that is `real` (B, T)."""
    B, S, _ = a.shape
    T = b.shape[1]
    if not (B and S and T):
        return a.new_full((B, S), -torch.inf), torch.zeros((B, S), dtype=torch.int64, device=a.device)
    tile = _Similarity(a, b, COSINE)
    best, position = a.new_empty((B, S)), torch.empty((B, S), dtype=torch.int64, device=a.device)
    for i, n in tile.tiles():
        similarity = tile(i, n)
        if real is not None:
            similarity.masked_fill_(~real[i, :, None], -torch.inf)
        best[i, n], position[i, n] = similarity.max(1)
    return best, position


def _most_similar_in_windows(a: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every src token of the lists (1 or B, G, S): the token, its similarity to and the token of its partner.

    The lists are padded with -1 and come back ascending, (B, G * S), padding first.
    """
    B, _, D = a.shape
    G, S = src.shape[1:]
    src, dst = src.expand(B, -1, -1), dst.expand(B, -1, -1)
    best = a.new_full((B, G, S), -torch.inf)
    partner = torch.zeros_like(src, memory_format=torch.contiguous_format)
    if S and dst.shape[2]:
        for i, g in _tiles(B, G, S * dst.shape[2], a.device):
            s, t = src[i, g].clamp_min(0), dst[i, g]
            rows = a[i].gather(1, s.flatten(1)[..., None].expand(-1, -1, D)).unflatten(1, s.shape[1:])
            columns = a[i].gather(1, t.clamp_min(0).flatten(1)[..., None].expand(-1, -1, D)).unflatten(1, t.shape[1:])
            similarity = torch.bmm(columns.flatten(0, 1), rows.flatten(0, 1).mT)
            similarity.masked_fill_((t < 0).flatten(0, 1)[..., None], -torch.inf)
            value, position = similarity.max(1)
            best[i, g] = value.view(s.shape).masked_fill_(src[i, g] < 0, -torch.inf)
            partner[i, g] = t.gather(2, position.view(s.shape)).clamp_min_(0)
    token, ascending = src.flatten(1).sort(dim=1)
    return token, best.flatten(1).gather(1, ascending), partner.flatten(1).gather(1, ascending)


def _csr(index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of `MergePlan`, tokens without a group last."""
    group = torch.where((index >= 0) & (index < num_groups), index, num_groups).long()
    counts = torch.zeros((index.shape[0], num_groups + 2), dtype=torch.int64, device=index.device)
    offsets = counts.scatter_add_(1, group + 1, torch.ones_like(group))[:, :-1].cumsum(1)
    return group.argsort(dim=1, stable=True).to(torch.int32), offsets.to(torch.int32)


class _Groups:
    """The tokens of a batch sorted by group: group k of item b is bag b * K + k.

    Tokens without a group follow in one last bag, whose sum is computed and dropped. `order` and `offsets` are those of
    `MergePlan`, tokens without a group last, and are made if they are not given and needed.
    """

    def __init__(self, index: Tensor, num_groups: int, order: Tensor | None = None, offsets: Tensor | None = None):
        self.shape = (index.shape[0], num_groups)
        self.num_bags = index.shape[0] * num_groups
        self.index = index
        self.given = order, offsets

    @cached_property
    def csr(self) -> tuple[Tensor, Tensor]:
        order, offsets = self.given
        return _csr(self.index, self.shape[1]) if order is None or offsets is None else (order, offsets)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of the flattened batch in that order, where each bag begins, and the bag of each of these rows."""
        (order, offsets), (B, N) = self.csr, self.index.shape
        members = offsets[:, -1:].long()
        before, total = members.cumsum(0) - members, members.sum(0)
        at, item = torch.arange(N, device=order.device), torch.arange(B, device=order.device)[:, None]
        place = torch.where(at < members, at + before, at - members + total + item * N - before)
        rows = torch.empty_like(place).flatten().scatter_(0, place.flatten(), (order + item * N).flatten())
        starts = torch.cat([(offsets[:, :-1] + before).flatten(), total])
        counts = torch.cat([(offsets[:, 1:] - offsets[:, :-1]).flatten(), B * N - total])
        return rows, starts, torch.repeat_interleave(counts, output_size=B * N)

    @property
    def tokens(self) -> Tensor:
        return self._rows[0]

    @property
    def starts(self) -> Tensor:
        return self._rows[1]

    @property
    def ascending(self) -> Tensor:
        return self._rows[2]

    @cached_property
    def valid(self) -> Tensor:
        return (self.index >= 0) & (self.index < self.shape[1])

    @cached_property
    def bag(self) -> Tensor:
        """The bag of each token of the flattened batch."""
        item = torch.arange(self.shape[0], device=self.index.device)[:, None]
        return torch.where(self.valid, self.index + item * self.shape[1], self.num_bags).flatten()

    def counts(self, dtype: torch.dtype) -> Tensor:
        """How many tokens each group has, (B, K)."""
        ends = F.pad(self.starts, (0, 1), value=self.tokens.numel())[1 : self.num_bags + 1]
        return (ends - self.starts[: self.num_bags]).to(dtype).view(self.shape)

    def sort(self, values: Tensor | None) -> Tensor | None:
        """Values of tokens (B, N) in sorted order, (B * N,)."""
        return None if values is None else values.flatten()[self.tokens]

    def sum(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Sums values (B, N, C) over each group, each token times its `scale` (B * N,) in sorted order: (B, K, C).

        In the dtype of values. The sums run in the accumulation dtype: half precision is widened one slab of channels
        at a time.
        """
        rows = values.reshape(-1, values.shape[-1])
        if rows.dtype == acc_dtype(rows.dtype):
            return self._sum(rows, scale)
        channels = rows.shape[1]
        out = values.new_empty((*self.shape, channels))
        slab = max(64, channels // 8)
        for c in range(0, channels, slab):
            out[..., c : c + slab] = self._sum(rows[:, c : c + slab].to(acc_dtype(rows.dtype)), scale)
        return out

    def _sum(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        if not self.tokens.numel():
            return rows.new_zeros((*self.shape, rows.shape[1]))
        bags = F.embedding_bag(self.tokens, rows, self.starts, mode="sum", per_sample_weights=scale)
        return bags[: self.num_bags].view(*self.shape, -1)

    def max(self, values: Tensor) -> Tensor:
        """The elementwise maximum over each group, (B, K, C); -inf for a group without tokens."""
        out = values.new_full((self.num_bags + 1, values.shape[-1]), -torch.inf)
        bag = self.bag[:, None].expand(-1, values.shape[-1])
        out.scatter_reduce_(0, bag, values.reshape(-1, values.shape[-1]), "amax")
        return out[: self.num_bags].view(*self.shape, values.shape[-1])

    def first(self) -> Tensor:
        """The lowest token of each group, as a row of the flattened batch, (B, K); any row for an empty group."""
        return self.tokens[self.starts[: self.num_bags].clamp_max(self.tokens.numel() - 1)].view(self.shape)

    def gather(self, values: Tensor) -> Tensor:
        """The value (B, K) of the group of each token, (B, N); 0 for a token without a group."""
        return F.pad(values.flatten(), (0, 1))[self.bag].view(self.valid.shape)


def _weights(weight: Tensor | None, size: Tensor | None) -> Tensor | None:
    """w = size * weight, None for all ones."""
    if weight is None or size is None:
        return size if weight is None else weight
    return size * weight


def merge(
    x: Tensor, plan: MergePlan, size: Tensor | None, positions: Tensor | None, reduce: str, fill: Tensor | None
) -> Merged:
    acc = acc_dtype(x.dtype)
    has_order = plan.order is not None and plan.offsets is not None
    groups = _Groups(plan.index, plan.num_groups, plan.order, plan.offsets)
    w = _weights(plan.weight, size)
    counts = groups.counts(acc)
    size_out = counts if size is None else groups.sum(size[..., None]).squeeze(-1)
    if w is None:
        mass = counts.clone()
    else:
        mass = size_out.clone() if w is size else groups.sum(w[..., None].to(acc)).squeeze(-1)
    empty = mass == 0
    w = groups.sort(w)
    divisor = F.pad(mass.masked_fill(empty, 1).flatten(), (0, 1), value=1)[groups.ascending]
    share = (1 if w is None else w) / divisor

    if reduce == "max":
        y = groups.max(x)
    elif reduce == "first":
        y = x.reshape(-1, x.shape[-1])[groups.first()]
    else:
        y = groups.sum(x, share) if reduce == "mean" else groups.sum(x, w)
    if fill is not None:
        y = torch.where(empty[..., None], fill, y)
    elif size is not None or reduce in ("max", "first"):
        y.masked_fill_(empty[..., None], 0)

    if positions is not None:
        positions = groups.sum(positions, share).masked_fill_(empty[..., None], 0)
    return Merged(y, size_out, positions, mass, *((None, None) if has_order else groups.csr))


def merge_backward(
    grads: MergedGrads,
    x: Tensor,
    plan: MergePlan,
    size: Tensor | None,
    positions: Tensor | None,
    out: Merged,
    reduce: str,
    needs: OfMerge,
) -> OfMerge:
    grad_y, grad_size, grad_positions = grads
    mass, weight = out.mass, plan.weight
    need_x, need_weight, need_size, need_positions = needs
    groups = _Groups(plan.index, plan.num_groups, plan.order, plan.offsets)
    weight, size = (None if t is None else t.masked_fill(~groups.valid, 0) for t in (weight, size))
    w = _weights(weight, size)
    divisor = groups.gather(mass)
    divisor.masked_fill_(divisor == 0, torch.inf)
    share = (1 if w is None else w) / divisor
    coefficient = share if reduce == "mean" else (groups.valid.to(share.dtype) if w is None else w * groups.valid)
    if reduce == "sum":
        coefficient = torch.where(divisor.isinf(), 0, coefficient)

    grad_x = None
    need_w = need_weight or need_size
    linear = grad_y is not None and reduce in ("mean", "sum")
    dot = torch.zeros_like(share) if linear and need_w else None  # <g_k, x_n>
    if need_x and not linear:
        grad_x = _to_winners(grad_y, x, out.x, groups, reduce, mass)
    elif need_x and grad_y is not None and w is None and not need_w:
        factor = torch.where(mass == 0, 0, mass.reciprocal()) if reduce == "mean" else None  # of counts
        grad_x = _rows(grad_y, groups, factor, x.dtype)
    elif linear and grad_y is not None:
        grad_x, dot = _gather_grads(grad_y, x, groups, coefficient, need_x, need_w)

    grad_weight = grad_size_in = grad_positions_in = None
    if need_positions and positions is not None:
        grad_positions_in = torch.zeros_like(positions, memory_format=torch.contiguous_format)
        if grad_positions is not None:
            torch.mul(_rows(grad_positions, groups), share[..., None], out=grad_positions_in)
    if need_w:
        # d w_n = (a_n - sum_m share_m a_m) / mass_k, which is <g_k, x_n - y_k> / mass_k without rounding y first.
        centred = torch.zeros_like(share)
        if dot is not None and reduce == "mean":
            centred = dot
        if grad_positions is not None and positions is not None:
            centred = centred + (_rows(grad_positions, groups) * positions).sum(-1)
        mean = groups.sum(centred[..., None], groups.sort(share)).squeeze(-1)
        grad_w = (centred - groups.gather(mean)) / divisor
        if dot is not None and reduce == "sum":
            grad_w = grad_w + torch.where(divisor.isinf(), 0, dot)
        grad_w = grad_w.masked_fill(~groups.valid, 0)
        if need_weight:
            grad_weight = grad_w if size is None else grad_w * size
        if need_size:
            grad_size_in = grad_w if weight is None else grad_w * weight
            if grad_size is not None:
                grad_size_in = grad_size_in + groups.gather(grad_size)
            if grad_size_in is grad_weight:
                grad_size_in = grad_size_in.clone()
    return OfMerge(grad_x, grad_weight, grad_size_in, grad_positions_in)


def _rows(values: Tensor, groups: _Groups, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The row (B, K, P) of the group of each token, times the `scale` (B, K) of the group, in `dtype`: (B, N, P).

    0 for a token without a group.
    """
    P = values.shape[-1]
    padded = values.new_empty((groups.num_bags + 1, P), dtype=dtype or values.dtype)
    padded[-1] = 0
    bags = padded[:-1].view(values.shape)
    if scale is None:
        bags.copy_(values)
    else:
        torch.mul(values, scale[..., None], out=bags)
    return padded.index_select(0, groups.bag).view(*groups.valid.shape, P)


def _gather_grads(
    grad_y: Tensor, x: Tensor, groups: _Groups, coefficient: Tensor, need_x: bool, need_dot: bool
) -> tuple[Tensor, Tensor | None]:
    """coefficient_n g_k in the dtype of x, and <g_k, x_n>, a block of tokens at a time; 0 without a group."""
    B, N, C = x.shape
    rows, share = x.reshape(-1, C), coefficient.flatten()[:, None]
    g = F.pad(grad_y.reshape(-1, C), (0, 0, 0, 1))
    grad_x = x.new_empty(x.shape if need_x else 0)
    dot = coefficient.new_empty((B, N)) if need_dot else None
    step = max(1, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cuda"]) // C)
    for n in range(0, B * N, step):
        here = slice(n, n + step)
        g_rows = g.index_select(0, groups.bag[here]).to(coefficient.dtype)
        if dot is not None:
            dot.view(-1)[here] = (g_rows * rows[here]).sum(-1)
        if need_x:
            grad_x.view(-1, C)[here] = g_rows.mul_(share[here])
    return grad_x, None if dot is None else dot.masked_fill_(~groups.valid, 0)


def _to_winners(grad_y: Tensor | None, x: Tensor, y: Tensor, groups: _Groups, reduce: str, mass: Tensor) -> Tensor:
    """Sends g to the token that `max` or `first` took each value from, the lowest one on a tie."""
    B, N, C = x.shape
    grad_x = x.new_zeros(B * N, C)
    if grad_y is None:
        return grad_x.view(x.shape)
    g = grad_y.masked_fill((mass == 0)[..., None], 0).reshape(-1, C)
    if reduce == "first":
        winner = groups.first().flatten()[:, None].expand(-1, C)
    else:
        rows = x.reshape(-1, C)
        best = F.pad(y.reshape(-1, C), (0, 0, 0, 1))[groups.bag]
        token = torch.arange(B * N, device=x.device)[:, None]
        candidate = torch.where((rows == best) | (rows.isnan() & best.isnan()), token, B * N)
        winner = candidate.new_full((groups.num_bags + 1, C), B * N)
        winner.scatter_reduce_(0, groups.bag[:, None].expand(-1, C), candidate, "amin")
        winner = winner[: groups.num_bags]
    # Empty groups point at a token of another group or past the end: they must write nowhere.
    nowhere = (mass == 0).flatten()[:, None] | (winner >= B * N)
    out = F.pad(grad_x, (0, 0, 0, 1))
    out.scatter_(0, torch.where(nowhere, B * N, winner), g)
    return out[: B * N].view(x.shape)


def assign_merge(
    x: Tensor,
    q: Tensor | None,
    meta: Tensor,
    similarity: Similarity,
    weight: str,
    mask: Tensor | None,
    size: Tensor | None,
    positions: Tensor | None,
    fill: Tensor | None,
) -> tuple[Merged, MergePlan]:
    plan = assign(x if q is None else q, meta, similarity, weight, mask)
    return merge(x, plan, size, positions, "mean", fill), plan


def unmerge(x: Tensor, plan: MergePlan) -> Tensor:
    index, order = plan.index, plan.order
    B, K, C = x.shape
    real = (index >= 0) & (index < K)
    row = index.clamp(0, K - 1) + torch.arange(B, device=x.device)[:, None] * K
    y = x.reshape(B * K, C)[row]
    return y if order is not None else y.masked_fill_(~real[..., None], 0)


def compose(plan1: MergePlan, plan2: MergePlan) -> MergePlan:
    index1, index2, K, num_groups = plan1.index, plan2.index, plan1.num_groups, plan2.num_groups
    onward = index2.gather(1, index1.long().clamp(0, K - 1))
    real = (index1 >= 0) & (index1 < K) & (onward >= 0) & (onward < num_groups)
    return MergePlan(onward.masked_fill_(~real, -1), num_groups)


@in_given_dtypes
def soft_merge(
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    normalize: str,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
) -> SoftMerged:
    tokens = _SoftTokens(x, q, meta, positions, mask, similarity)
    if mask is not None and size is not None:
        size = size.masked_fill(~mask, 0)
    B, N, K = tokens.shape
    acc = acc_dtype(x.dtype)
    if normalize == "meta":
        lse = tokens.m.new_empty((B, N))
    else:
        lse = tokens.lse_over_tokens()
    C = x.shape[-1]
    P = 0 if positions is None else positions.shape[-1]
    total = x.new_zeros((B, K, C), dtype=acc)
    total_positions, mass = total.new_zeros((B, K, P)), total.new_zeros((B, K))
    for b, n in tokens.tiles():
        S = tokens.similarity(b, n)
        if normalize == "meta":
            lse[b, n] = S.logsumexp(1)
        W = tokens.attention(S, lse, b, n, normalize).to(acc)
        if size is not None:
            W = W * size[b, None, n]
        mass[b] += W.sum(-1)
        total[b] += W @ tokens.features(b, n)
        if positions is not None:
            total_positions[b] += W @ tokens.positions(b, n)
    empty = (mass == 0)[..., None]
    divisor = mass[..., None].masked_fill(empty, 1)
    y = (total / divisor).masked_fill_(empty, 0).to(x.dtype)
    if mask is not None and normalize == "meta":
        lse.masked_fill_(~mask, 0)
    mean = None if positions is None else (total_positions / divisor).masked_fill_(empty, 0)
    return SoftMerged(y, mass, mean, lse)


class _SoftTokens:
    """What the passes of `soft_merge` share: tiles of similarities, and rows with masked tokens blanked."""

    def __init__(
        self, x: Tensor, q: Tensor, meta: Tensor, positions: Tensor | None, mask: Tensor | None, similarity: Similarity
    ):
        self.m = _operand(meta, similarity.kind)
        self.x, self.p, self.mask = x, positions, mask
        self.shape = (x.shape[0], x.shape[1], meta.shape[1])
        width = max(x.shape[2], q.shape[-1])
        self.similarity = _similarity_to(self.m, q, mask, similarity, width)
        self.tiles = self.similarity.tiles

    def attention(self, S: Tensor, lse: Tensor, b: slice, n: slice, normalize: str) -> Tensor:
        """A (b, K, n), 0 where masked. Overwrites S."""
        A = S.sub_(lse[b, None, n] if normalize == "meta" else lse[b, :, None]).exp_()
        return A if self.mask is None else A.masked_fill_(~self.mask[b, None, n], 0)

    def lse_over_tokens(self) -> Tensor:
        """logsumexp over the real tokens for each meta token, (B, K); 0 where an item has none."""
        lse = self.m.new_full((self.shape[0], self.shape[2]), -torch.inf)
        for b, n in self.tiles():
            S = self.similarity(b, n)
            if self.mask is not None:
                S.masked_fill_(~self.mask[b, None, n], -torch.inf)
            lse[b] = torch.logaddexp(lse[b], S.logsumexp(-1))
        return lse.masked_fill_(lse == -torch.inf, 0)

    def features(self, b: slice, n: slice) -> Tensor:
        return self._blank(self.x[b, n].to(acc_dtype(self.x.dtype)), b, n)

    def rows(self, b: slice, n: slice) -> Tensor:
        return self._blank(self.similarity.rows(b, n), b, n)

    def positions(self, b: slice, n: slice) -> Tensor:
        assert self.p is not None
        return self._blank(self.p[b, n], b, n)

    def _blank(self, rows: Tensor, b: slice, n: slice) -> Tensor:
        return rows if self.mask is None else rows.masked_fill(~self.mask[b, n, None], 0)


@in_given_dtypes
def soft_merge_backward(
    grads: MergedGrads,
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity,
    normalize: str,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    out: SoftMerged,
    needs: OfSoftMerge,
) -> OfSoftMerge:
    grad_y, grad_size, grad_positions = grads
    y, mass, lse = out.x, out.size, out.lse
    need_x, need_q, need_meta, need_size, need_positions = needs
    tokens = _SoftTokens(x, q, meta, positions, mask, similarity)
    if mask is not None and size is not None:
        size = size.masked_fill(~mask, 0)
    B, N, K = tokens.shape
    acc = acc_dtype(x.dtype)
    divisor = mass.masked_fill(mass == 0, torch.inf)[..., None]

    # dL/dA without its factor size_n is T / mass_k + dL/dsize'_k, T = <g_k, x_n - y_k> and positions alike. What is
    # divided by mass_k is size_n A, which is not greater: 1 / mass_k alone overflows for a group far from all tokens.
    g = None if grad_y is None else grad_y.to(acc)
    constant = torch.zeros_like(mass)
    if g is not None:
        constant -= (g * y.to(acc)).sum(-1)
    if grad_positions is not None and out.positions is not None:
        constant -= (grad_positions * out.positions).sum(-1)

    grad_x = x.new_zeros(x.shape)
    grad_size_in = x.new_zeros((B, N), dtype=acc)
    grad_p = x.new_zeros((B, N, 0 if positions is None else positions.shape[-1]), dtype=acc)
    grad_q, grad_m = _grad_of_rows(q), torch.zeros_like(tokens.m)
    total = torch.zeros_like(grad_m[..., :1])  # of dS over tokens
    for b, n in tokens.tiles():
        A = tokens.attention(tokens.similarity(b, n), lse, b, n, normalize).to(acc)
        weighted = A if size is None else A * size[b, None, n]
        W = weighted / divisor[b]
        T = constant[b, :, None].expand(-1, -1, A.shape[-1])
        if g is not None:
            grad_x[b, n] = W.mT @ g[b]
            T = T + g[b] @ tokens.features(b, n).mT
        if grad_positions is not None:
            grad_p[b, n] = W.mT @ grad_positions[b]
            T = T + grad_positions[b] @ tokens.positions(b, n).mT
        if need_size:
            grad_size_in[b, n] = (A / divisor[b] * T).sum(1)
            if grad_size is not None:
                grad_size_in[b, n] += (A * grad_size[b, :, None]).sum(1)
        if not (need_q or need_meta):
            continue
        WT = W * T
        if grad_size is not None:
            WT += weighted * grad_size[b, :, None]
        # sum_n W T over tokens is mass_k grad_size_k: the rest of T is centred on its own weighted mean.
        if normalize == "meta":
            dS = WT - A * WT.sum(1, keepdim=True)
        else:
            dS = WT if grad_size is None else WT - A * (grad_size * mass)[b, :, None]
        dS = dS.to(tokens.m.dtype).div_(similarity.temperature)
        rows, unit = tokens.rows(b, n), tokens.similarity.inverse
        grad_m[b] += dS @ rows
        total[b] += dS.sum(-1, keepdim=True)
        grad = dS.mT @ tokens.m[b]
        if similarity.kind == "l2":
            grad = 2 * (grad - rows * dS.sum(1)[..., None])
        grad_q[b, n] = grad if unit is None else _through_norm(grad, rows, unit[b, n, None])

    if similarity.kind == "l2":
        grad_m = 2 * (grad_m - tokens.m * total)
    if similarity.kind == "cosine":
        grad_m = _through_norm(grad_m, tokens.m, _inverse_norm(meta)[..., None])
    return OfSoftMerge(
        grad_x if need_x else None,
        _fresh(_of_heads(grad_q, q), q, need_q),
        _fresh(grad_m, meta, need_meta),
        grad_size_in if need_size else None,
        grad_p if need_positions else None,
    )
