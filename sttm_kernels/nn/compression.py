"""Fewer visual tokens for a language model: clips merged to as many tokens as are wanted, and their prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sttm_kernels import validate
from sttm_kernels.functional import compose, match, merge, unmerge
from sttm_kernels.nn.sttm import STTM, Grid, checked_keep, grid_positions, grids_of, kept_count, nearest_place
from sttm_kernels.plan import MergePlan, exportable
from sttm_kernels.reference import acc_dtype

COMPRESSIONS = ("sttm", "tome", "uniform", "random")


@dataclass(frozen=True)
class CompressedTokens:
    """What `compress` returns. `...` is K of one clip, (B, K) of a batch, the sum of all K of clips of several sizes.

    Attributes:
        x: `(..., C)`, the dtype of the tokens.
        size: float32 `(...)` (float64 for float64 tokens): how many tokens stand behind each, at least 1.
        positions: like size, `(..., 3)`: the mean (t, y, x) of these, in the units of the clip's grid.
        places: int64 `(...)`: the token of the clip, counted in its grid, that is nearest to the position. Never falls
            within a clip; of a token that nothing merged with, its own.
        plan: from the tokens that came, as `(1, N, C)`, `(B, N, C)` or `(1, sum of all N, C)`, to those here.
        counts: of each clip, how many tokens came.
        lengths: of each clip, how many are here, K.

    Registered as a pytree.
    """

    x: Tensor
    size: Tensor
    positions: Tensor
    places: Tensor
    plan: MergePlan
    counts: tuple[int, ...]
    lengths: tuple[int, ...]


exportable(CompressedTokens)


def compress(
    tokens: Tensor | Sequence[Tensor],
    grid: Grid | Sequence[Grid] | Tensor,
    keep: float | Sequence[float],
    method: str = "sttm",
    metric: Tensor | Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> CompressedTokens:
    """Merges the tokens that a vision tower made of clips to K of each, for the language model behind it.

    Args:
        tokens: `(N, C)` of one clip, N = T * H * W, frame after frame, row after row; `(B, N, C)` of clips of one grid;
            or of clips of several grids, one after another in one tensor `(sum of all N, C)` or a sequence of `(N, C)`.
        grid: (T, H, W); or that of each clip, as a sequence or an integer tensor `(clips, 3)` on the CPU.
        keep: K as a share of N, a float in (0, 1] (to the nearest count, at least 1), or as a count, an int: note that
            1.0 is all and 1 is one. Or one such number for each clip, in a sequence.
        method: "sttm" groups tokens as `STTM` does by default, within each frame and then across frames, and a meta
            token that no token is most similar to gets the one that is least similar to its own. "tome" merges the most
            similar pairs of `match`, in rounds of which each halves the tokens at most. For comparison, what merges
            nothing: "uniform" keeps tokens at equal distances in the sequence, "random" a random choice; the others
            are in no group.
        metric: like tokens, of D channels: what similarity is measured on; default the tokens.
        generator: draws for "random", clip after clip; on any device.
        impl: of the verbs, see `help(sttm_kernels)`.

    Returns:
        `CompressedTokens`, in the order of their places. Every clip has the bits that it has alone, but for "random".

    Differentiable: x with respect to tokens, also twice. Nothing waits for a device; clips that are alike in N, K and
    grid are merged together.
    Errors: `TypeError` for a wrong type or dtype; `ValueError` for a wrong shape, device or method, a grid that does
    not hold the tokens, and a count above N.
    Source: Spatial-temporal Token Merger (Feng et al., doi 10.1145/3633781), Token Merging (Bolya et al., arXiv
    2210.09461).
    """
    validate.one_of("method", method, COMPRESSIONS)
    validate.generator(generator)
    grids, clips = _clips("tokens", tokens, grid)
    counts = tuple(math.prod(each) for each in grids)
    features = clips if metric is None else _clips("metric", metric, grid)[1]
    if [len(each) for each in features] != list(counts):
        raise ValueError(f"metric must have the tokens of tokens, {counts}, got {[len(each) for each in features]}")
    lengths = _lengths(keep, counts)
    device = clips[0].device
    kept = _retained(method, counts, lengths, generator, device)

    alike: dict[tuple[Grid, int], list[int]] = {}
    for number, key in enumerate(zip(grids, lengths, strict=True)):
        alike.setdefault(key, []).append(number)
    parts: dict[int, _Part] = {}
    for (shape, K), numbers in alike.items():
        x = _stacked(tokens, clips, numbers)
        q = x if metric is None else _stacked(metric, features, numbers)
        if kept is not None:
            index = torch.stack([kept[number] for number in numbers])
        else:
            index = _in_one_each(x) if len(x[0]) == K else FINDERS[method](q.detach(), shape, K, impl)
        parts |= zip(numbers, _merged(x, index, shape, K, impl), strict=True)
    return _together([parts[number] for number in range(len(clips))], tokens, counts, lengths)


def _clips(
    name: str, tokens: Tensor | Sequence[Tensor], grid: Grid | Sequence[Grid] | Tensor
) -> tuple[list[Grid], list[Tensor]]:
    """The grid of each clip and its tokens `(N, C)`, which are views."""
    grids = grids_of(grid)
    if isinstance(tokens, Tensor):
        shape = validate.features(name, tokens, "(N, C) or (B, N, C)", 2, 3)
        if len(shape) == 2:
            wanted = [math.prod(each) for each in grids]
            if sum(wanted) != shape[0]:
                raise ValueError(
                    f"grid must hold the {shape[0]} tokens of {name}, got {grids}, which hold {sum(wanted)}"
                )
            return grids, list(tokens.split(wanted))
        grids, clips = grids * shape[0] if len(grids) == 1 else grids, list(tokens.unbind())
    elif isinstance(tokens, Sequence) and len(tokens):
        clips = list(tokens)
        for each in clips:
            validate.features(f"every one of {name}", each, "(N, C)", 2)
            validate.same_dtype(f"every one of {name}", each, "the first", clips[0])
            validate.same_device(f"every one of {name}", each, "the first", clips[0])
    else:
        raise TypeError(f"{name} must be a torch.Tensor or a sequence of them, got {tokens!r}")
    held = [math.prod(each) for each in grids]
    if held != [len(each) for each in clips] or len({each.shape[1] for each in clips}) > 1:
        shapes = [tuple(each.shape) for each in clips]
        raise ValueError(f"grid must hold the tokens of each clip, {name} {shapes} of one C, got {grids}")
    return grids, clips


def _lengths(keep: float | Sequence[float], counts: Sequence[int]) -> tuple[int, ...]:
    """K of each clip."""
    each: list[Any] = list(keep) if isinstance(keep, (tuple, list)) else [keep] * len(counts)
    if len(each) != len(counts):
        raise ValueError(f"keep must have one number for each of {len(counts)} clips, got {len(each)}")
    numbers = []
    for one, count in zip(each, counts, strict=True):
        if one is None:
            raise TypeError("keep must be a float or an int, got None")
        numbers.append(kept_count("keep", checked_keep("keep", one), count))
    return tuple(numbers)


def _stacked(tokens: Tensor | Sequence[Tensor], clips: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """`(B, N, C)` of the clips of these numbers; no copy of tokens, where they are all of them."""
    if isinstance(tokens, Tensor) and len(numbers) == len(clips):
        return tokens.reshape(len(clips), *clips[0].shape)
    return torch.stack([clips[number] for number in numbers])


def _in_one_each(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[:2]).contiguous()


# Which group each token is in: int `(B, N)`, from features `(B, N, D)`


def _tome(q: Tensor, grid: Grid, K: int, impl: str) -> Tensor:
    plan, size = None, None
    while q.shape[1] > K:
        step = match(q, min(q.shape[1] - K, q.shape[1] // 2), impl=impl)
        merged = merge(q, step, size, impl=impl)
        q, size = merged.x, merged.size
        plan = step if plan is None else compose(plan, step, impl=impl)
    assert plan is not None
    return plan.index


def _sttm(q: Tensor, grid: Grid, K: int, impl: str) -> Tensor:
    T, HW = grid[0], grid[1] * grid[2]
    # Both stages merge alike; and what a frame keeps must be enough for K.
    in_frame = min(HW, max(math.ceil(math.sqrt(K / (T * HW)) * HW), math.ceil(K / T)))
    spatial, temporal = (K, None) if T == 1 else (None if in_frame == HW else in_frame, K)
    merger = STTM(q.shape[-1], spatial, temporal, motion=False, weight="uniform", impl=impl)
    plan = merger(q, grid, return_plan=True)[1]
    means = unmerge(merge(q, plan, impl=impl).x, plan, impl=impl)
    return _none_empty(plan.index.long(), F.cosine_similarity(q.float(), means.float(), -1), K)


FINDERS: dict[str, Callable[[Tensor, Grid, int, str], Tensor]] = {"tome": _tome, "sttm": _sttm}


def _none_empty(index: Tensor, score: Tensor, K: int) -> Tensor:
    """int64 `(B, N)`: the groups of index, where each empty one has got the token of lowest score `(B, N)`, of those
    that are not the best of their group."""
    by_score = score.argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, index.gather(1, by_score).argsort(dim=1, stable=True))
    group = index.gather(1, order)
    is_best = torch.zeros_like(score, dtype=torch.bool).scatter(
        1, order, group != F.pad(group, (1, 0), value=-1)[:, :-1]
    )
    spare = torch.where(is_best, torch.inf, score.nan_to_num(-1)).argsort(dim=1, stable=True)[:, :K]
    some = index.new_zeros(index.shape[0], K).scatter(1, index, 1)
    empty = some.argsort(dim=1, stable=True)  # the empty groups first
    is_empty = some.gather(1, empty) == 0
    return index.scatter(1, spare, torch.where(is_empty, empty, index.gather(1, spare)))


def _retained(
    method: str, counts: Sequence[int], lengths: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> list[Tensor] | None:
    """Of methods that do not look at tokens, int32 `(N,)` for each clip, -1 for a token that is dropped."""
    if method not in ("uniform", "random"):
        return None
    indices = []
    for N, K in zip(counts, lengths, strict=True):
        if method == "uniform":
            chosen = (2 * torch.arange(K, device=device) + 1) * N // (2 * K)
        else:
            where = "cpu" if generator is None else generator.device
            chosen = torch.randperm(N, generator=generator, device=where)[:K].sort().values.to(device)
        index = torch.full((N,), -1, dtype=torch.int32, device=device)
        indices.append(index.index_copy(0, chosen, torch.arange(K, dtype=torch.int32, device=device)))
    return indices


# What is returned


@dataclass(frozen=True)
class _Part:
    """`CompressedTokens` of one clip; index int32 `(N,)`."""

    x: Tensor
    size: Tensor
    positions: Tensor
    places: Tensor
    index: Tensor


def _merged(x: Tensor, index: Tensor, grid: Grid, K: int, impl: str) -> list[_Part]:
    """Merges x `(B, N, C)` by the groups of index, which come in the order of their places."""
    positions = grid_positions(grid, 0, acc_dtype(x.dtype), x.device)
    groups = MergePlan(index.to(torch.int32), K)
    mean = merge(positions.expand(len(x), -1, -1), groups, impl=impl).x
    places, order = nearest_place(mean, grid).sort(dim=1, stable=True)
    rank = order.argsort(1).to(torch.int32)
    moved = torch.where(groups.index < 0, -1, rank.gather(1, groups.index.clamp_min(0).long()))
    out = merge(x, MergePlan(moved, K), positions=positions, impl=impl)
    assert out.positions is not None
    return [_Part(*each) for each in zip(out.x, out.size, out.positions, places, moved, strict=True)]


def _together(
    parts: Sequence[_Part], tokens: Tensor | Sequence[Tensor], counts: tuple[int, ...], lengths: tuple[int, ...]
) -> CompressedTokens:
    batched = isinstance(tokens, Tensor) and tokens.dim() == 3
    if batched and len(set(lengths)) > 1:
        raise ValueError(f"keep must be the same for all clips of a batch (B, N, C), got {lengths}: give a sequence")

    def join(values: list[Tensor]) -> Tensor:
        return torch.stack(values) if batched else torch.cat(values)

    x, size, positions, places = (
        join([getattr(part, name) for part in parts]) for name in ("x", "size", "positions", "places")
    )
    first = 0
    indices = []
    for part, K in zip(parts, lengths, strict=True):
        indices.append(torch.where(part.index < 0, -1, part.index + first))
        first += 0 if batched else K
    index = join(indices)
    plan = MergePlan(index, lengths[0]) if batched else MergePlan(index[None], first)
    return CompressedTokens(x, size, positions, places, plan, counts, lengths)


# The prompt of a language model


def shorten_prompt(input_ids: Tensor, token_id: int, clips: CompressedTokens) -> tuple[Tensor, Tensor]:
    """Which tokens of a prompt stay when a placeholder is left for each token of compressed clips.

    What a model has for every token of the whole prompt, such as rotary ids, is right for what stays: where nothing
    merged it is what it was, a group has that of its place, and it rises through the prompt as it did.

        ids, mask = shorten_prompt(input_ids, config.video_token_id, clips)
        input_ids, attention_mask = input_ids.gather(1, ids), attention_mask.gather(1, ids) * mask
        position_ids = position_ids.gather(2, ids.expand(3, -1, -1))  # (3, B, L) of the whole prompt

    Args:
        input_ids: int64 `(B, L)`, with a placeholder for every token of every clip, in their order, row after row; they
            may be interrupted by other tokens, such as timestamps.
        token_id: the placeholder.
        clips: of `compress`.

    Returns:
        ids int64 `(B, L')`, where in the row of input_ids each token is, and mask bool `(B, L')`, False where a row is
        filled up, at its beginning, to the length of the longest.

    Reads input_ids: where they are on a device, this waits for it.
    Errors: `ValueError` if the placeholders are not as many as the tokens were.
    """
    validate.tensor("input_ids", input_ids)
    B, L = validate.dims("input_ids", input_ids, "(B, L)", 2, batched=2)
    token_id = validate.integer("token_id", token_id, 0)
    is_text = (input_ids != token_id).flatten()
    placeholders = (~is_text).nonzero().flatten()
    if len(placeholders) != sum(clips.counts):
        raise ValueError(
            f"input_ids must have a placeholder {token_id} for each of the {sum(clips.counts)} tokens that were "
            f"compressed, got {len(placeholders)}"
        )
    firsts = torch.tensor((0, *clips.counts[:-1])).cumsum(0)
    first = firsts.repeat_interleave(torch.tensor(clips.lengths)).to(input_ids.device)
    stays = placeholders[clips.places.flatten().to(input_ids.device) + first]
    stays = torch.cat((is_text.nonzero().flatten(), stays)).sort(stable=True).values
    row = stays // L
    per_row = row.bincount(minlength=B)
    longest = int(per_row.max())
    column = torch.arange(len(stays), device=stays.device) - (per_row.cumsum(0) - longest)[row]
    ids = stays.new_zeros(B, longest).index_put((row, column), stays % L)
    return ids, torch.arange(longest, device=stays.device) >= (longest - per_row)[:, None]
