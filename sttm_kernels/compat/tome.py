"""ToMe's `tome.merge` and `parse_r`: the same names, arguments, shapes and dtypes, and the same groups.

    import tome.patch.timm
    from sttm_kernels.compat import tome as fused
    tome.patch.timm.bipartite_soft_matching = fused.bipartite_soft_matching
    tome.patch.timm.merge_wavg = fused.merge_wavg

Differences, all of them in what ToMe leaves open or gets wrong. With `class_token` groups come in ToMe's order: the
protected tokens, unmerged src by token index, dst by token index. Without it ToMe's unmerged src stand in the order of
an unstable sort of their scores; here by token index. `random_bipartite_soft_matching` draws the numbers ToMe draws,
and lists dst by token index. Equal scores go to the lower token index. `unmerge` puts the distillation token back where
it was. A zero metric row has similarity 0, not NaN. `merge_wavg` adds up in float32.

Source: Token Merging (Bolya et al., arXiv 2210.09461).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sttm_kernels import functional, validate
from sttm_kernels.compat.merger import Merge, check_metric, do_nothing, match_lists, match_split, pair
from sttm_kernels.plan import MergePlan

Function = Callable[..., Tensor]


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Function, Function]:
    """Even tokens to odd ones: the r pairs of highest cosine similarity merge.

    Args:
        metric: `(B, N, D)`, floating.
        r: tokens to merge away; clamped to half of those that are not protected. 0 or less: nothing merges.
        class_token: protects token 0.
        distill_token: protects token 1.

    Returns:
        (merge, unmerge): `merge(x (B, N, C), mode="mean")` gives `(B, N - r, C)`, `unmerge` the way back. Both also
        carry `.plan`, the `MergePlan`.
    """
    check_metric(metric)
    num_tokens = metric.shape[1]
    r = min(r, (num_tokens - bool(class_token) - bool(distill_token)) // 2)
    if r <= 0:
        return do_nothing, do_nothing
    if distill_token and not class_token:
        token = torch.arange(num_tokens, dtype=torch.int32, device=metric.device)
        src, dst = token[::2], token[3::2]
        return pair(match_lists(metric, src[None, None], dst[None, None], r if len(dst) else 0))
    return pair(functional.match(metric, r, num_prefix=bool(class_token) + bool(distill_token)))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Function, Function]:
    """Every token merges into the most similar of each k-th token; the last N mod k tokens are dropped, as in ToMe.

    Args:
        metric: `(B, N, D)`, floating, N at least k.
        k: 1 or less: nothing merges.

    Returns:
        (merge, unmerge): `(B, N, C)` to `(B, N // k, C)`, and back to `(B, N // k * k, C)`.
    """
    check_metric(metric)
    if k <= 1:
        return do_nothing, do_nothing
    num_tokens = metric.shape[1]
    groups, dropped = divmod(num_tokens, k)
    if groups == 0:
        raise ValueError(f"k must be at most the number of tokens, {num_tokens}, got {k}")
    is_dst = torch.arange(groups * k, device=metric.device) % k == k - 1
    plan = match_split(metric[:, : groups * k], is_dst[None], groups, groups * (k - 1))
    return pair(plan, dropped)


def random_bipartite_soft_matching(metric: Tensor, r: int) -> tuple[Function, Function]:
    """r tokens drawn at random, another draw for every batch item, merge into the most similar of the rest.

    Args:
        metric: `(B, N, D)`, floating.
        r: less than N. 0 or less: nothing merges.

    Returns:
        (merge, unmerge): `(B, N, C)` to `(B, N - r, C)`, and back.
    """
    check_metric(metric)
    if r <= 0:
        return do_nothing, do_nothing
    B, num_tokens, _ = metric.shape
    if r >= num_tokens:
        raise ValueError(f"r must be less than the number of tokens, {num_tokens}, got {r}")
    drawn = torch.rand(B, num_tokens, 1, device=metric.device).argsort(dim=1)[..., 0]
    src, dst = (part.sort(dim=1).values[:, None].to(torch.int32) for part in drawn.split([r, num_tokens - r], dim=1))
    return pair(match_lists(metric, src, dst, r))


def merge_wavg(merge: Function, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of each group weighted by token counts, and the new counts.

    Args:
        merge: from a matching, of this package or of ToMe.
        x: `(B, N, C)`, floating.
        size: `(B, N, 1)`, default ones in x's dtype.

    Returns:
        x `(B, K, C)` in the common dtype of x and size, size `(B, K, 1)` in the dtype of size.
    """
    validate.features("x", x, "(B, N, C)", 3)
    if size is None:
        size = torch.ones_like(x[..., :1])
    if not isinstance(merge, Merge):
        x, size = merge(x * size, mode="sum"), merge(size, mode="sum")
        return x / size, size
    validate.shape("size", size, "(B, N, 1)", (*x.shape[:2], 1))
    out = functional.merge(merge.kept(x), merge.plan, merge.kept(size)[..., 0])
    return out.x.to(torch.result_type(x, size)), out.size[..., None].to(size.dtype)


def merge_source(merge: Function, x: Tensor, source: Tensor | None = None, *, dense: bool = True) -> Tensor:
    """Which of the first tokens each group holds, after this merge.

    Args:
        merge: from a matching.
        x: `(B, N, C)`, the tokens before the merge; only its shape and device are used.
        source: what this function returned for the merge before, None for the first.
        dense: True for ToMe's matrix; False for the int32 map, which needs a `merge` of this package.

    Returns:
        `(B, K, N0)`, 1 where group k holds the first token n and 0 elsewhere; or int32 `(B, N0)`, the group of every
        first token, 1 / K of the memory.
    """
    validate.tensor("x", x)
    if dense:
        if source is None:
            num_tokens = x.shape[1]
            source = torch.eye(num_tokens, device=x.device).expand(x.shape[0], -1, -1)
        return merge(source, mode="amax")
    if merge is do_nothing:
        token = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        return token.expand(x.shape[0], -1).contiguous() if source is None else source
    if not isinstance(merge, Merge):
        raise TypeError(f"merge must come from a matching of sttm_kernels with dense=False, got {merge!r}")
    index = F.pad(merge.plan.index, (0, merge.dropped), value=-1)
    if source is None:
        return index
    here = MergePlan(index, merge.plan.num_groups)
    return functional.compose(MergePlan(source, x.shape[1]), here).index


def parse_r(num_layers: int, r: int | tuple[int, float] | list[int]) -> list[int]:
    """The number of tokens to merge away in every layer.

    Args:
        num_layers: at least 1.
        r: an int, the same in every layer; (r, inflection), rising from layer to layer (1), falling (-1) or anything
            between, r on average; or a list, filled up with 0.
    """
    validate.integer("num_layers", num_layers, 1)
    if isinstance(r, list):
        return r + [0] * (num_layers - len(r))
    r, inflection = r if isinstance(r, tuple) else (r, 0.0)
    first = int(r * (1.0 - inflection))
    step = 2 * (r - first) / max(1, num_layers - 1)
    return [int(first + step * layer) for layer in range(num_layers)]
