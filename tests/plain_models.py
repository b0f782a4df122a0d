"""A Transformer that merges tokens, written plainly: one token after another, nothing of the package used."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = list[list[int]]
"""The tokens of every group, in the order of groups."""


@dataclass
class PlainLayer:
    """The parts of a layer; q, k and v give `(B, H, N, D)`."""

    norm1: Callable[[Tensor], Tensor]
    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of q or k by the places `(B, N)` of the tokens."""
    post_norm: bool = False


def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """`(B, N, H * D)`: every key counts as often as its size `(B, N)` says."""
    weight = (q @ k.mT * q.shape[-1] ** -0.5).exp() * size[:, None, None, :]
    return (weight / weight.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


def match(keys: Tensor, r: int, prefix: int, protect: Collection[int] = ()) -> Groups:
    """Of one clip's metric `(N, D)`."""
    may = [n for n in range(prefix, len(keys)) if n not in protect]
    src, dst = [n for n in may if n % 2 == 0], [n for n in may if n % 2 == 1]
    best = {n: max(dst, key=lambda m: (float(F.cosine_similarity(keys[n], keys[m], 0)), -m)) for n in src}
    score = {n: float(F.cosine_similarity(keys[n], keys[m], 0)) for n, m in best.items()}
    gone = sorted(src, key=lambda n: (-score[n], n))[: min(r, len(may) // 2)]
    kept = [[n] for n in range(prefix)] + [[n] for n in sorted(protect)] + [[n] for n in src if n not in gone]
    return kept + [[m] + [n for n in gone if best[n] == m] for m in dst]


def merge(x: Tensor, size: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """x `(N, C)` and size `(N)` of one clip."""
    new = [sum(size[n] * x[n] for n in group) / sum(size[n] for n in group) for group in groups]
    return torch.stack(new), torch.stack([sum(size[n] for n in group) for group in groups])


def forward(
    x: Tensor, layers: list[PlainLayer], counts: list[int], prefix: int, protect: Collection[int] = ()
) -> Tensor:
    """x `(B, N, C)` through the layers, the l-th merging counts[l] tokens; every token gets what its group became."""
    batch, tokens = x.shape[:2]
    first = True
    size = x.new_ones(batch, tokens)
    where = torch.arange(tokens).repeat(batch, 1)
    places = torch.arange(tokens - prefix).repeat(batch, 1)
    for layer, r in zip(layers, counts, strict=True):
        h = x if layer.post_norm else layer.norm1(x)
        q, k, v = layer.q(h), layer.k(h), layer.v(h)
        metric = k.mean(1)
        if layer.rotate is not None:
            q, k = layer.rotate(q, places), layer.rotate(k, places)
        h = layer.out(attention(q, k, v, size))
        x = x + (layer.norm1(h) if layer.post_norm else h)
        if r:
            clips, sizes, ids = [], [], []
            for b in range(batch):
                if first:
                    groups = match(metric[b], r, prefix, protect)
                else:  # the first merge has put them behind the prefix
                    groups = match(metric[b], r, prefix + len(protect))
                clip, counted = merge(x[b], size[b], groups)
                clips.append(clip)
                sizes.append(counted)
                ids.append(torch.stack([places[b, group[0] - prefix] for group in groups[prefix:]]))
                went = {n: number for number, group in enumerate(groups) for n in group}
                where[b] = torch.tensor([went[int(n)] for n in where[b]])
            first = False
            x, size, places = torch.stack(clips), torch.stack(sizes), torch.stack(ids)
        x = x + (layer.norm2(layer.mlp(x)) if layer.post_norm else layer.mlp(layer.norm2(x)))
    return x.gather(1, where[..., None].expand(-1, -1, x.shape[2]))
