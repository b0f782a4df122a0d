"""Meta-token generators: K tokens that stand for what an image or a clip shows, adapted to it.

All of them are called alike, `generator(q, rows, columns, num_meta, size=None, cells="square", mask=None)`:

    q: `(B, N, D)`, the metric features, N = rows * columns.
    rows, columns: how the tokens lie: the height and width of a frame; or frames and slots per frame.
    num_meta: K, 1 <= K <= N, always met exactly.
    size: `(B, N)` or None. How many tokens stand behind each; one of size 0 counts for nothing.
    cells: the shape of pooling cells, see `pool_plan`. Only generators that pool look at it.
    mask: bool `(B, N)`, True = a real token, or None. The others must be 0 and have size 0; pooling cuts up the rows
        and columns that have a real token. An item with fewer tokens or cells than K repeats its first meta token,
        which gets all the tokens of its copies.

They return `(B, K, D)` in q's dtype, differentiable with respect to q and to their parameters, the same bits in every
run and whatever else is in the batch. Errors: `ValueError` for a shape that does not fit or a K out of range. The
shared settings are `similarity` and `impl` of `sttm_kernels.assign`. Generators that choose tokens give them in token
order.

A module of one's own that is called like this is a generator too. If it has an attribute `told`, a tuple of names,
`STTM` gives it these as well, by name:

    positions: `(B, N, P)`, of the tokens, (t, y, x) first: in the temporal stage the means of groups.
    stage: "spatial" or "temporal".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels import validate
from sttm_kernels.functional import assign, merge, soft_merge
from sttm_kernels.operator import NAMESPACE, joined
from sttm_kernels.ops import assign_earlier
from sttm_kernels.plan import MergePlan, Similarity
from sttm_kernels.reference import NORM_FLOOR, acc_dtype

CELLS = ("square", "tall")


def _check(q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None) -> None:
    validate.features("q", q, "(B, N, D)", 3)
    if q.shape[1] != rows * columns:
        raise ValueError(f"q must hold rows * columns = {rows} * {columns} tokens, got {q.shape[1]}")
    validate.integer("num_meta", num_meta, 1)
    if num_meta > q.shape[1]:
        raise ValueError(f"num_meta must be at most N = {q.shape[1]}, got {num_meta}")
    if size is not None:
        validate.shape("size", size, "(B, N)", q.shape[:2])


def _take(q: Tensor, tokens: Tensor) -> Tensor:
    """The rows `tokens` `(B, K)` of q `(B, N, D)`."""
    return q.gather(1, tokens[..., None].expand(-1, -1, q.shape[-1]))


def _constant(size: Tensor | None) -> Tensor | None:
    """Without a gradient, so that the operators that choose tokens leave nothing for a backward pass."""
    return None if size is None else size.detach()


def _stand_in(meta: Tensor, real: Tensor | None) -> Tensor:
    """Meta tokens (B, K, D), the first that is `real` (B, K) in place of those that are not."""
    if real is None:
        return meta
    first = real.to(torch.uint8).argmax(1, keepdim=True)
    return torch.where(real[..., None], meta, _take(meta, first))


def _in_one(q: Tensor, mask: Tensor | None) -> MergePlan:
    """The plan of one group of all tokens."""
    index = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return MergePlan(index if mask is None else index.masked_fill(~mask, -1), 1)


def pool_plan(
    rows: int, columns: int, num_cells: int, batch: int, cells: str, device: torch.device, mask: Tensor | None = None
) -> MergePlan:
    """Cuts a rows x columns grid into exactly `num_cells` cells; the plan `(batch, rows * columns)` of that.

    The rows are cut into bands as equal as can be, and every band into its share of the cells, so that no count needs
    to factor. There are

        "square": sqrt(num_cells * rows / columns) bands, rounded, which makes cells about as high as wide;
        "tall":   ceil(num_cells / columns) bands, the fewest that can hold the cells, which makes them as high as can
                  be: with num_cells = rows / 2 * columns, two rows by one column. Fit for rows that are frames.

    With `mask`, bool `(batch, rows * columns)`, it cuts the rows and columns that have a True, of each item its own;
    other tokens have no cell, and cells beyond the tokens no token.
    """
    validate.one_of("cells", cells, CELLS)
    if mask is not None:
        return _pool_plan_of_real(mask.view(-1, rows, columns), num_cells, cells)
    fewest = -(-num_cells // columns)
    bands = fewest if cells == "tall" else round(math.sqrt(num_cells * rows / columns))
    bands = min(max(bands, fewest), rows, num_cells)

    token = torch.arange(rows * columns, device=device)
    band = token // columns * bands // rows
    first, end = band * num_cells // bands, (band + 1) * num_cells // bands
    cell = first + token % columns * (end - first) // columns
    return MergePlan(cell.to(torch.int32).expand(batch, -1), num_cells)


def _pool_plan_of_real(mask: Tensor, num_cells: int, cells: str) -> MergePlan:
    """`pool_plan` on the device: numbers are (B, 1, 1), and ranks of rows and columns stand for their indices."""
    some_row, some_column = mask.any(2, keepdim=True), mask.any(1, keepdim=True)
    row, column = some_row.cumsum(1) - 1, some_column.cumsum(2) - 1
    rows, columns = (some.sum((1, 2), keepdim=True).clamp_min(1) for some in (some_row, some_column))
    fewest = -(-num_cells // columns)
    bands = fewest if cells == "tall" else (num_cells * rows.double() / columns).sqrt().round().long()
    bands = torch.minimum(torch.maximum(bands, fewest), rows).clamp_max(num_cells)

    band = (row * bands // rows).clamp_min(0)
    first, end = band * num_cells // bands, (band + 1) * num_cells // bands
    cell = (first + column * (end - first) // columns).masked_fill(~mask, -1)
    return MergePlan(cell.flatten(1).to(torch.int32), num_cells)


def _pooled(
    q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None, cells: str, mask: Tensor | None, impl: str
) -> Tensor:
    plan = pool_plan(rows, columns, num_meta, q.shape[0], cells, q.device, mask)
    has_tokens = None
    if mask is not None:  # a cell of tokens of size 0 is one, as it is without a mask
        has_tokens = torch.zeros((q.shape[0], num_meta + 1), dtype=torch.bool, device=q.device)
        has_tokens = has_tokens.scatter(1, plan.index.long() + 1, True)[:, 1:]
    return _stand_in(merge(q, plan, size, impl=impl).x, has_tokens)


class Pool(nn.Module):
    """Grid pooling: the mean of each cell of `pool_plan`, weighted by size; 0 for a cell of size 0. No parameters."""

    def __init__(self, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square",
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check(q, rows, columns, num_meta, size)
        return _pooled(q, rows, columns, num_meta, size, cells, mask, self.impl)


class KMeans(nn.Module):
    """Grid pooling, then `rounds` times: every token to its most similar meta token, every meta token to their mean.

    A meta token that no token went to stays where it was. Means are weighted by size. No parameters.
    """

    def __init__(self, rounds: int = 1, similarity: str = "cosine", impl: str = "auto") -> None:
        super().__init__()
        validate.integer("rounds", rounds, 0)
        validate.one_of("similarity", similarity, validate.SIMILARITIES)
        self.rounds = rounds
        self.similarity = similarity
        self.impl = impl

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square",
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check(q, rows, columns, num_meta, size)
        meta = _pooled(q, rows, columns, num_meta, size, cells, mask, self.impl)
        for _ in range(self.rounds):
            plan = assign(q, meta, self.similarity, weight="uniform", mask=mask, impl=self.impl)
            meta = merge(q, plan, size, fill=meta, impl=self.impl).x
        return meta

    def extra_repr(self) -> str:
        return f"rounds={self.rounds}, similarity={self.similarity!r}"


CHOICES: dict[str, Callable[..., Tensor]] = {}
"""The operators that choose tokens, and the function that each of them is."""


def _operator(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`choose(q, count, ...)` as an operator: a compiler sees one node in place of what may be a round per token.

    It must not modify tensors in place, for it is also the plain form that exported programs are given.
    """
    name = choose.__name__.lstrip("_")
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", choose, mutates_args=())
    operator.register_fake(lambda q, count, *_: q.new_empty((q.shape[0], count), dtype=torch.int64))

    def batch(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        """vmap: the mapped dimension joins the batch."""
        V, (q, *_) = info.batch_size, args
        B = q.shape[0 if in_dims[0] is None else int(in_dims[0] == 0)]
        chosen = operator(*(joined(V, B, arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        return chosen.unflatten(0, (V, B)), 0

    operator.register_vmap(batch)
    CHOICES[name] = choose
    return operator


class _Chosen(nn.Module):
    """The tokens that an operator chooses by their similarities."""

    choose: Callable[[Tensor, int, Tensor | None, str, str], Tensor]

    def __init__(self, similarity: str = "cosine", impl: str = "auto") -> None:
        super().__init__()
        validate.one_of("similarity", similarity, validate.SIMILARITIES)
        self.similarity = similarity
        self.impl = impl

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square",
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check(q, rows, columns, num_meta, size)
        tokens = self.choose(q.detach(), num_meta, _constant(size), self.similarity, self.impl)
        return _stand_in(_take(q, tokens), None if mask is None else mask.gather(1, tokens))

    def extra_repr(self) -> str:
        return f"similarity={self.similarity!r}"


@_operator
def _farthest_points(q: Tensor, num_points: int, size: Tensor | None, similarity: str, impl: str) -> Tensor:
    def distance(point: Tensor) -> Tensor:
        score = assign(q, point, similarity, weight="uniform", impl=impl).score
        assert score is not None
        return -score

    nearest = distance(merge(q, _in_one(q, None), size, impl=impl).x)
    lowest = torch.finfo(nearest.dtype).min
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    chosen = []
    for i in range(num_points):
        if size is not None:
            nearest = nearest.masked_fill(size == 0, lowest)
        point = nearest.masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
        taken = taken.scatter(1, point, True)
        chosen.append(point)
        here = distance(_take(q, point))
        nearest = here if i == 0 else torch.minimum(nearest, here)
    return torch.cat(chosen, 1).sort(1).values


class FarthestPoint(_Chosen):
    """Farthest point sampling: the token farthest from the mean, then K - 1 times the one farthest from those chosen.

    Far means of low similarity. Ties go to the lowest token index; a token of size 0 is taken only when no other is
    left. O(N) memory, K rounds one after another. No parameters; the choice is not differentiable, the tokens are.
    """

    choose = staticmethod(_farthest_points)


def _distinct_tokens(q: Tensor, num_tokens: int, size: Tensor | None, similarity: str, impl: str) -> Tensor:
    if size is not None:
        B, N, _ = q.shape
        present = size != 0
        first = present.to(torch.int64).argmax(1, keepdim=True)
        # In an absent token's place stands the present one before it, a predecessor of all that follow anyway.
        rank = present.cumsum(1) - 1
        ranked = first.expand(-1, N + 1).scatter(
            1, rank.masked_fill(~present, N), torch.arange(N, device=q.device).expand(B, -1)
        )
        q = _take(q, ranked.gather(1, rank.clamp_min(0)))
    novelty = -assign_earlier(q, Similarity(similarity, 1.0), impl)
    if size is not None:
        novelty = novelty.scatter(1, first, torch.inf).masked_fill(~present, -torch.inf)
    return novelty.argsort(dim=1, descending=True, stable=True)[:, :num_tokens].sort(1).values


class Distinct(_Chosen):
    """The K tokens least similar to any earlier one: of near-duplicates the first stays.

    novelty_n = -max over m < n of sim(q_n, q_m), infinite for the first token; the K most novel tokens are taken, ties
    to the lowest token index. A token of size 0 is earlier than none and taken only when no other is left. O(N) memory,
    about half of the O(N^2 D) time that all similarities take. No parameters; the choice is not differentiable, the
    tokens are.
    """

    choose = staticmethod(_distinct_tokens)


class _Weights(nn.Module):
    """The parameters of a linear map, which alone are used. It is no `nn.Linear`, for what looks for those to put
    another forward in their place, as adapters and quantisation do, would train or change what nobody calls."""

    bias: Tensor  # or None, as in nn.Linear

    def __init__(self, width: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` does."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class TopK(nn.Module):
    """The K tokens of highest learned saliency, ties to the lowest token index.

    saliency_n = <v, q_n> + b. A chosen token is scaled by sigmoid(saliency_n) about the mean of all tokens, which lets
    gradients reach v and b under every similarity: scaling about 0 would leave a cosine, and so the loss, as it was.
    A token of size 0 is taken only when no other is left.
    """

    def __init__(self, dim: int, impl: str = "auto") -> None:
        super().__init__()
        self.saliency = _Weights(dim, 1)
        self.impl = impl

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square",
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check(q, rows, columns, num_meta, size)
        # As an assignment to one meta token, <v, q_n> has the bits of a sum that does not depend on the batch.
        score = assign(q, self.saliency.weight.to(q.dtype), "dot", weight="uniform", impl=self.impl).score
        assert score is not None
        saliency = score + self.saliency.bias
        rank = saliency.detach() if size is None else saliency.detach().masked_fill(size == 0, -torch.inf)
        chosen = rank.argsort(dim=1, descending=True, stable=True)[:, :num_meta].sort(1).values
        mean = merge(q, _in_one(q, mask), size, impl=self.impl).x
        # A sigmoid by way of tanh: on a CPU, the last bit of torch.sigmoid depends on where in memory an element lies.
        gate = (saliency.gather(1, chosen) / 2).tanh()[..., None].to(q.dtype) / 2 + 0.5
        meta = mean + gate * (_take(q, chosen) - mean)
        return _stand_in(meta, None if mask is None else mask.gather(1, chosen))


class Learned(nn.Module):
    """Learned queries, refined by one cross-attention to the tokens, as object queries are in DETR (arXiv 2005.12872).

    meta_k = u_k + sum_n A[n, k] q_n, with A the softmax over tokens of <V u_k, q_n> / sqrt(D), each token counting as
    many times as its size: a `soft_merge`, whose bits do not depend on the batch. The tokens themselves are keys and
    values, so that meta tokens lie where tokens do. Queries u are resized to K by linear interpolation, so one set
    serves every K.

    Args:
        dim: D of the metric features.
        num_queries: how many queries are kept as parameters.
    """

    def __init__(self, dim: int, num_queries: int = 64, impl: str = "auto") -> None:
        super().__init__()
        validate.integer("num_queries", num_queries, 1)
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.look_for = _Weights(dim, dim, bias=False)
        self.impl = impl

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square",
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check(q, rows, columns, num_meta, size)
        queries = F.interpolate(self.queries.T[None], size=num_meta, mode="linear")[0].T
        wanted = F.linear(queries, self.look_for.weight).to(q.dtype)
        scale = math.sqrt(q.shape[-1])
        mask = None if size is None else size != 0
        found = soft_merge(q, q, wanted, "dot", scale, "tokens", size, mask=mask, impl=self.impl).x
        return queries.to(q.dtype) + found

    def extra_repr(self) -> str:
        return f"num_queries={self.queries.shape[0]}"


# `cdist` without a matrix product gives every pair the same bits whatever is around it, a distance of exactly 0 to
# itself, and no cancellation.
@_operator
def _density_peaks(q: Tensor, num_peaks: int, neighbours: int, size: Tensor | None) -> Tensor:
    N, D = q.shape[1:]
    q = q.to(acc_dtype(q.dtype))
    absent = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device) if size is None else size == 0
    token = torch.arange(N, device=q.device)
    chunks = [slice(start, start + _CHUNK) for start in range(0, N, _CHUNK)]

    def squared_distance(rows: slice) -> Tensor:
        return torch.cdist(q[:, rows], q, compute_mode="donot_use_mm_for_euclid_dist").square() / D

    def log_density(rows: slice) -> Tensor:
        others = squared_distance(rows).masked_fill(absent[:, None], torch.inf)
        others = others.masked_fill(token[rows, None] == token, torch.inf)
        nearest = others.topk(min(neighbours, N), dim=-1, largest=False).values
        found = nearest < torch.inf
        return -nearest.masked_fill(~found, 0).sum(-1) / found.sum(-1).clamp_min(1)

    density = torch.cat([log_density(rows) for rows in chunks], 1).masked_fill(absent, -torch.inf)
    # A strict order: of equal densities the lower token index is the denser one.
    descending = density.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(descending).scatter(1, descending, token.expand_as(density))

    def log_separation(rows: slice) -> Tensor:
        squared = squared_distance(rows)
        denser = rank[:, None, :] < rank[:, rows, None]
        to_denser = squared.masked_fill(~denser, torch.inf).amin(-1)
        farthest = squared.masked_fill(absent[:, None], 0).amax(-1)
        return torch.where(rank[:, rows] == 0, farthest, to_denser).log() / 2

    score = density + torch.cat([log_separation(rows) for rows in chunks], 1)
    score = score.masked_fill(absent, -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True)[:, :num_peaks].sort(1).values


_CHUNK = 256
"""Rows of the distance matrix that are in memory at once."""


class DPCKNN(nn.Module):
    """Density peaks (Du et al. 2016, and TCFormer, arXiv 2204.08680): tokens that are dense and far from denser ones.

    density_n = exp(-mean of d^2 to the `neighbours` nearest other tokens) with d^2 = |q_n - q_m|^2 / D;
    separation_n = the distance d to the nearest denser token, or to the farthest token for the densest one;
    the K tokens of highest density * separation are taken, ties to the lowest token index. Scores are compared as
    logarithms, so that far-apart tokens do not all have density 0. A token of size 0 is nobody's neighbour and taken
    only when no other is left. O(N) memory, O(N^2 D) time. No parameters; the choice is not differentiable.

    The density has a scale: multiply q by 10, and it alone decides. TCFormer's tokens come from a LayerNorm, those of a
    residual stream do not. So with `similarity="cosine"` all rows are brought to |q_n|^2 = D first, which makes
    d^2 = 2 - 2 cos; with any other, q is taken as it is.
    """

    def __init__(self, neighbours: int = 5, similarity: str = "cosine") -> None:
        super().__init__()
        validate.integer("neighbours", neighbours, 1)
        validate.one_of("similarity", similarity, validate.SIMILARITIES)
        self.neighbours = neighbours
        self.similarity = similarity

    def forward(
        self, q: Tensor, rows: int, columns: int, num_meta: int, size: Tensor | None = None, cells: str = "square",
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        _check(q, rows, columns, num_meta, size)
        places = q.detach().to(acc_dtype(q.dtype))
        if self.similarity == "cosine":
            norm = torch.linalg.vector_norm(places, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
            places = places * (math.sqrt(q.shape[-1]) / norm)
        tokens = _density_peaks(places, num_meta, self.neighbours, _constant(size))
        return _stand_in(_take(q, tokens), None if mask is None else mask.gather(1, tokens))

    def extra_repr(self) -> str:
        return f"neighbours={self.neighbours}, similarity={self.similarity!r}"


GENERATORS: dict[str, Callable[[int, str, str], nn.Module]] = {
    "pool": lambda dim, similarity, impl: Pool(impl),
    "kmeans": lambda dim, similarity, impl: KMeans(1, similarity, impl),
    "distinct": lambda dim, similarity, impl: Distinct(similarity, impl),
    "farthest": lambda dim, similarity, impl: FarthestPoint(similarity, impl),
    "topk": lambda dim, similarity, impl: TopK(dim, impl),
    "learned": lambda dim, similarity, impl: Learned(dim, impl=impl),
    "dpc_knn": lambda dim, similarity, impl: DPCKNN(similarity=similarity),
}


def make(meta: str | nn.Module, dim: int, similarity: str, impl: str) -> nn.Module:
    """A new generator by name; a module is returned as it is."""
    if isinstance(meta, nn.Module):
        return meta
    if not isinstance(meta, str):
        raise TypeError(f"meta must be a name or a torch.nn.Module, got {type(meta).__name__}")
    validate.one_of("meta", meta, tuple(GENERATORS))
    return GENERATORS[meta](dim, similarity, impl)
