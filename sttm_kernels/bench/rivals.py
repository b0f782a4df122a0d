"""What the package is measured against, written from the papers' descriptions."""

from __future__ import annotations

import torch
from torch import Tensor


def tome_match_merge(metric: Tensor, x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching and averaging as Token Merging (arXiv 2210.09461, section 3) describes them.

    Split tokens into even and odd ones, draw an edge from each even token to its most similar odd token, keep the r
    most similar edges, average what they connect by token counts, and concatenate. Whole score matrix, full sort,
    gathers and scatters: the formulation people run. Returns merged tokens (B, N - r, C) and counts (B, N - r, 1).
    """
    unit = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = unit[:, ::2], unit[:, 1::2]
    similarity, partner = (even @ odd.transpose(-1, -2)).max(dim=-1)
    by_similarity = similarity.argsort(dim=-1, descending=True)[..., None]
    merged, kept = by_similarity[:, :r], by_similarity[:, r:]
    target = partner[..., None].gather(1, merged)

    def reduce(tokens: Tensor) -> Tensor:
        even, odd = tokens[:, ::2], tokens[:, 1::2]
        features = tokens.shape[-1]
        stay = even.gather(1, kept.expand(-1, -1, features))
        move = even.gather(1, merged.expand(-1, -1, features))
        return torch.cat([stay, odd.scatter_reduce(1, target.expand(-1, -1, features), move, reduce="sum")], dim=1)

    size = torch.ones_like(x[..., :1])
    total, size = reduce(x * size), reduce(size)
    return total / size, size


def one_hot_merge(x: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The mean of each group as a product with the N x K membership matrix."""
    member = torch.nn.functional.one_hot(index.long(), num_groups).to(x.dtype)
    return member.mT @ x / member.sum(1).clamp_min(1)[..., None]


def index_add_merge(x: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The mean of each group by `index_add`, one atomic addition per element on a GPU."""
    B, N, C = x.shape
    row = (index + num_groups * torch.arange(B, device=x.device)[:, None]).flatten().long()
    total = x.new_zeros(B * num_groups, C).index_add(0, row, x.reshape(B * N, C))
    count = x.new_zeros(B * num_groups).index_add(0, row, torch.ones_like(row, dtype=x.dtype))
    return (total / count.clamp_min(1)[:, None]).view(B, num_groups, C)


def product_and_row_maximum(q: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity as one matrix product and one reduction over it."""
    return (q @ m.mT).max(dim=-1)
