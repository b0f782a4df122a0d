"""What the package is measured against, written from the papers' descriptions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

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


def tomesd_cells(grid: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of src and dst tokens: of each cell of 2 x 2 tokens of a (T, H, W) grid a random one is dst."""
    T, H, W = grid
    cells = T, H // 2, W // 2
    drawn = torch.randint(4, (*cells, 1), generator=generator, device=generator.device)
    is_dst = torch.zeros(*cells, 4, dtype=torch.int8, device=drawn.device).scatter_(-1, drawn, 1)
    is_dst = is_dst.view(*cells, 2, 2).transpose(2, 3).flatten()
    order = is_dst.argsort(stable=True)
    return order[: -drawn.numel()], order[-drawn.numel() :]


def tomesd_match_merge_unmerge(metric: Tensor, x: Tensor, src: Tensor, dst: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merging and unmerging as Token Merging for Stable Diffusion (arXiv 2303.17604) describes them.

    Like Token Merging, with dst tokens (indices) drawn at random, one of each 2 x 2 cell; every token gets the
    mean of its group back. Returns merged tokens (B, N - r, C) and the tokens after unmerging (B, N, C).
    """
    C = x.shape[-1]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    similarity, partner = (unit[:, src] @ unit[:, dst].transpose(-1, -2)).max(dim=-1)
    by_similarity = similarity.argsort(dim=-1, descending=True)[..., None]
    merged, kept = by_similarity[:, :r], by_similarity[:, r:]
    target = partner[..., None].gather(1, merged).expand(-1, -1, C)
    stay = x[:, src].gather(1, kept.expand(-1, -1, C))
    move = x[:, src].gather(1, merged.expand(-1, -1, C))
    means = x[:, dst].scatter_reduce(1, target, move, reduce="mean")
    full = torch.empty_like(x)
    full[:, dst] = means
    full.scatter_(1, src[kept].expand(-1, -1, C), stay)
    full.scatter_(1, src[merged].expand(-1, -1, C), means.gather(1, target))
    return torch.cat([stay, means], dim=1), full


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


def scatter_reduce_merge(x: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The mean of each group by `scatter_reduce`, its index expanded to the channels."""
    B, N, C = x.shape
    into = index.long()[..., None].expand(-1, -1, C)
    return x.new_zeros(B, num_groups, C).scatter_reduce(1, into, x, reduce="mean", include_self=False)


def product_and_row_maximum(q: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine similarity as one matrix product, and one reduction over it: the maxima and where they are."""
    q, m = (t / t.norm(dim=-1, keepdim=True) for t in (q, m))
    return (q @ m.mT).max(dim=-1)


def dense_soft_merge(x: Tensor, meta: Tensor) -> Tensor:
    """Every token into every meta token by its softmax weight over cosine similarities, the weights written out."""
    unit, unit_meta = (t / t.norm(dim=-1, keepdim=True) for t in (x, meta))
    weight = (unit @ unit_meta.mT).softmax(-1)
    return weight.mT @ x / weight.sum(1)[..., None]


def dense_assign_merge(x: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Product, row maximum and softmax weight, and a product with the weighted membership matrix: index, groups."""
    unit, unit_meta = (t / t.norm(dim=-1, keepdim=True) for t in (x, meta))
    weight, index = (unit @ unit_meta.mT).softmax(-1).max(-1)
    member = torch.nn.functional.one_hot(index, meta.shape[1]).to(x.dtype) * weight[..., None]
    mass = member.sum(1)[..., None]
    return index, member.mT @ x / mass.clamp_min(1e-6)


NEAREST = {"flash-kmeans": "flash_kmeans.assign_euclid_triton", "flashlib": "flashlib.primitives.kmeans"}
"""Packages with a kernel for the nearest centroid, and the module it is in; flashlib is flash-kmeans' successor."""


def installed() -> list[str]:
    """Those of `NEAREST` that are here."""
    return [name for name, module in NEAREST.items() if importlib.util.find_spec(module.partition(".")[0]) is not None]


def nearest(package: str, x: Tensor, meta: Tensor) -> Tensor:
    """The nearest meta token (B, N) by squared distance, by the assignment kernel of a package."""
    assign = importlib.import_module(NEAREST[package]).euclid_assign_triton
    if "x_sq" in inspect.signature(assign).parameters:  # older versions of flash-kmeans
        return assign(x, meta, x.float().square().sum(-1))
    return assign(x, meta)
