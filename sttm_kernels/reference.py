"""The specification: every verb in plain PyTorch, O(N K) memory, any dtype up to float64, autograd by PyTorch.

Letters follow the mathematics: n counts tokens, k groups; q metric features, m meta tokens, S similarities, w weights,
y merged tokens, p positions. Sums run in float32, in float64 for float64 inputs. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttm_kernels.autocast import in_given_dtypes
from sttm_kernels.plan import MatchBounds, MergedTokens, MergePlan, Similarity

COSINE = Similarity()

NORM_FLOOR = 1e-6
"""Norms are clamped here, so that a zero row has cosine similarity 0 to everything, never NaN."""


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums, scores, counts and positions are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mean_over_heads(q: Tensor) -> Tensor:
    """(B, H, N, D) means the mean over heads; (B, N, D) stays."""
    return q.mean(1) if q.dim() == 4 else q


@in_given_dtypes
def pairwise_similarity(q: Tensor, m: Tensor, similarity: Similarity) -> Tensor:
    """S[n, k] = sim(q_n, m_k) / temperature, `(B, N, K)`."""
    q, m = q.to(acc_dtype(q.dtype)), m.to(acc_dtype(m.dtype))
    if similarity.kind == "cosine":
        q = q / q.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        m = m / m.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    dot = q @ m.mT
    if similarity.kind == "l2":
        dot = 2 * dot - q.square().sum(-1)[..., :, None] - m.square().sum(-1)[..., None, :]
    return dot / similarity.temperature


def assign(
    q: Tensor, meta: Tensor, similarity: Similarity = COSINE, weight: str = "softmax", mask: Tensor | None = None
) -> MergePlan:
    """index_n = argmax_k S[n, k], the lowest k on a tie; weight_n = exp(score_n - lse_n) or 1."""
    q = mean_over_heads(q)
    if mask is not None:
        q = torch.where(mask[..., None], q, 0)
    S = pairwise_similarity(q, meta, similarity)
    index = S.argmax(-1)
    score = S.gather(-1, index[..., None]).squeeze(-1)
    lse = S.logsumexp(-1)
    w = (score - lse).exp()
    if mask is not None:
        index = torch.where(mask, index, -1)
        score, lse, w = (torch.where(mask, value, 0.0) for value in (score, lse, w))
    soft = weight == "softmax"
    return MergePlan(index.to(torch.int32), S.shape[-1], score, lse if soft else None, w if soft else None)


def assign_earlier(q: Tensor, similarity: Similarity = COSINE) -> Tensor:
    """max over m < n of sim(q_n, q_m) / temperature, `(B, N)`; -inf for the first token."""
    S = pairwise_similarity(q, q, similarity)
    earlier = torch.ones(S.shape[1:], dtype=torch.bool, device=S.device).tril(-1)
    return S.masked_fill(~earlier, -torch.inf).amax(-1)


def match(
    metric: Tensor,
    r: int,
    num_prefix: int,
    is_dst: Tensor,
    block: Tensor | None = None,
    protected: Tensor | None = None,
    bounds: MatchBounds | None = None,
) -> MergePlan:
    """Each src finds its most similar dst; the r src of highest score merge into it, ties to the lower token.

    `is_dst` is bool `(1 or B, N)`; `block` `(N - num_prefix,)` names the window of each token, and only tokens of one
    window may meet. `protected`, bool `(N,)`, are not src either. Groups: the prefix, then the protected, then the
    unmerged src, then dst, each by token index. A masked token is neither src nor dst and has index -1.
    """
    metric = mean_over_heads(metric.detach())
    B, N, _ = metric.shape
    is_dst = is_dst.expand(B, N)
    token = torch.arange(N, device=metric.device)
    stays = token < num_prefix
    if protected is not None:
        stays = stays | protected
    is_src = ~is_dst & ~stays
    K, mask, limit, threshold = bounds or MatchBounds(N - r)
    if mask is not None:
        is_src, is_dst = is_src & mask, is_dst & mask
    may_meet = is_src[:, :, None] & is_dst[:, None, :]
    if block is not None:
        block = torch.nn.functional.pad(block, (num_prefix, 0), value=-1)
        may_meet = may_meet & (block[:, None] == block[None, :])

    S = pairwise_similarity(metric, metric, COSINE).masked_fill(~may_meet, -torch.inf)
    score, partner = S.max(-1)
    may_merge = may_meet.any(-1)
    if threshold > -torch.inf:
        may_merge = score > threshold

    best_first = score.argsort(dim=-1, descending=True, stable=True)
    among_best = token < (r if limit is None else limit.clamp(max=r)[:, None])
    merged = torch.zeros_like(is_src).scatter(1, best_first, among_best.expand(B, N)) & may_merge

    first_unmerged = stays.sum()
    unmerged = is_src & ~merged
    first_dst = first_unmerged + unmerged.sum(1, keepdim=True)
    group = torch.where(
        is_dst,
        first_dst + is_dst.cumsum(1) - 1,
        torch.where(unmerged, first_unmerged + unmerged.cumsum(1) - 1, stays.cumsum(0) - 1),
    )
    index = torch.where(merged, group.gather(1, partner), group)
    index = index.clamp(max=K - 1)
    if mask is not None:
        index = torch.where(mask, index, -1)
    return MergePlan(index.to(torch.int32), K, score)


def sum_by_group(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """sum_{n: index_n = k} values_n, `(B, N, ...)` to `(B, K, ...)`, added up in token order on a CPU."""
    B = values.shape[0]
    bins = torch.where((index >= 0) & (index < num_groups), index, num_groups).long()
    bins = bins + (num_groups + 1) * torch.arange(B, device=index.device)[:, None]
    total = values.new_zeros((B * (num_groups + 1), *values.shape[2:]))
    total = total.index_add(0, bins.flatten(), values.flatten(0, 1))
    return total.unflatten(0, (B, num_groups + 1))[:, :num_groups]


def merge(
    x: Tensor,
    plan: MergePlan,
    size: Tensor | None = None,
    positions: Tensor | None = None,
    reduce: str = "mean",
    fill: Tensor | None = None,
) -> MergedTokens:
    """y_k = sum_n w_n x_n / mass_k with w_n = size_n weight_n; positions alike; size'_k = sum_n size_n.

    What a token without a group holds counts for nothing, NaN included. A group of mass 0 is empty. `max` and `first`
    look at the members of a group and at no weight; a tie of `max` and the representative of `first` go to the lowest
    token index.
    """
    acc = acc_dtype(x.dtype)
    index, K = plan.index, plan.num_groups
    real = (index >= 0) & (index < K)
    values = torch.where(real[..., None], x.to(acc), 0)
    size = torch.ones(index.shape, dtype=acc, device=x.device) if size is None else torch.where(real, size.to(acc), 0)
    w = size if plan.weight is None else size * torch.where(real, plan.weight.to(acc), 0)

    mass = sum_by_group(w, index, K)
    empty = (mass == 0)[..., None]
    divisor = mass[..., None].masked_fill(empty, 1)

    if reduce == "mean":
        y = sum_by_group(w[..., None] * values, index, K) / divisor
    elif reduce == "sum":
        y = sum_by_group(w[..., None] * values, index, K)
    else:
        member = index[:, :, None] == torch.arange(K, device=index.device)
        if reduce == "max":
            y = torch.where(member[..., None], values[:, :, None], -torch.inf).max(1).values
        else:
            first = member.to(torch.uint8).argmax(1)
            y = values.gather(1, first[..., None].expand(-1, -1, x.shape[-1]))
    y = torch.where(empty, torch.zeros_like(y) if fill is None else fill.to(acc), y)

    if positions is not None:
        positions = torch.where(real[..., None], positions.to(acc).expand(*index.shape, -1), 0)
        positions = sum_by_group(w[..., None] * positions, index, K) / divisor
        positions = positions.masked_fill(empty, 0)
    return MergedTokens(y.to(x.dtype), sum_by_group(size, index, K), positions)


def assign_merge(
    x: Tensor,
    q: Tensor | None,
    meta: Tensor,
    similarity: Similarity = COSINE,
    weight: str = "softmax",
    mask: Tensor | None = None,
    size: Tensor | None = None,
    positions: Tensor | None = None,
    fill: Tensor | None = None,
) -> tuple[MergedTokens, MergePlan]:
    """`assign`, of x itself where q is None, then `merge` by "mean"."""
    plan = assign(x if q is None else q, meta, similarity, weight, mask)
    return merge(x, plan, size, positions, "mean", fill), plan


def unmerge(x: Tensor, plan: MergePlan) -> Tensor:
    """Copies y_{index_n} to every n, 0 where the index is -1."""
    belongs = ((plan.index >= 0) & (plan.index < plan.num_groups))[..., None]
    source = plan.index.long().clamp(0, plan.num_groups - 1)[..., None].expand(-1, -1, x.shape[-1])
    return torch.where(belongs, x.gather(1, source), 0)


def compose(plan1: MergePlan, plan2: MergePlan) -> MergePlan:
    """index12_n = index2[index1_n], -1 where either is."""
    index1, index2 = plan1.index.long(), plan2.index.long()
    onward = index2.gather(1, index1.clamp(0, plan1.num_groups - 1))
    lost = (index1 < 0) | (index1 >= plan1.num_groups) | (onward < 0) | (onward >= plan2.num_groups)
    return MergePlan(torch.where(lost, -1, onward).to(torch.int32), plan2.num_groups)


@in_given_dtypes
def soft_merge(
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    similarity: Similarity = COSINE,
    normalize: str = "meta",
    size: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> MergedTokens:
    """y_k = sum_n size_n A[n, k] x_n / sum_n size_n A[n, k], A the softmax of S over meta tokens or over tokens."""
    acc = acc_dtype(x.dtype)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    real = real[..., None]
    q = torch.where(real, mean_over_heads(q), 0)
    S = pairwise_similarity(q, meta, similarity).to(acc)
    if normalize == "meta":
        A = S.softmax(-1)
    else:
        A = S.masked_fill(~real, -torch.inf).softmax(1).masked_fill(~real.any(1, keepdim=True), 0)
    A = torch.where(real, A, 0)

    W = A if size is None else A * torch.where(real, size.to(acc)[..., None], 0)
    mass = W.sum(1)
    empty = (mass == 0)[..., None]
    total = mass[..., None].masked_fill(empty, 1)
    y = (W.mT @ torch.where(real, x.to(acc), 0) / total).masked_fill(empty, 0)
    if positions is not None:
        positions = positions.to(acc).expand(*S.shape[:2], -1)
        positions = (W.mT @ torch.where(real, positions, 0) / total).masked_fill(empty, 0)
    return MergedTokens(y.to(x.dtype), mass, positions)
