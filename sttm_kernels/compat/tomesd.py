"""tomesd's `tomesd.merge`: the same name, arguments, shapes and dtypes, and the same groups.

    import tomesd
    from sttm_kernels.compat import tomesd as fused
    tomesd.merge.bipartite_soft_matching_random2d = fused.bipartite_soft_matching_random2d

Unmerged src stand by token index, where tomesd has the order of an unstable sort of their scores; equal scores go to
the lower token index; a zero metric row has similarity 0, not NaN.

Source: Token Merging for Stable Diffusion (Bolya and Hoffman, arXiv 2303.17604).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttm_kernels import functional, validate
from sttm_kernels.compat.merger import check_metric, do_nothing, match_split, pair
from sttm_kernels.compat.tome import Function


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Function, Function]:
    """One token of every sx x sy cell is dst, the rest are src; the r pairs of highest cosine similarity merge.

    Args:
        metric: `(B, N, D)`, floating, N = h * w.
        w, h: width and height of the image in tokens.
        sx, sy: width and height of a cell. Cells that do not fit whole into the image hold no dst.
        r: tokens to merge away; clamped to the number of src. 0 or less: nothing merges.
        no_rand: dst is the top left token of its cell, not a random one.
        generator: draws dst, the same cells as tomesd with a generator of the same seed and device; None takes the
            default one of the device of metric.

    Returns:
        (merge, unmerge): `merge(x (B, N, C), mode="mean")` gives `(B, N - r, C)`, `unmerge` the way back. Both also
        carry `.plan`, the `MergePlan`.
    """
    check_metric(metric)
    for name, extent in (("w", w), ("h", h), ("sx", sx), ("sy", sy)):
        validate.integer(name, extent, 1)
    if metric.shape[1] != h * w:
        raise ValueError(f"metric must have N = h * w = {h * w} tokens, got {metric.shape[1]}")
    rows, columns = h // sy, w // sx
    if r <= 0 or rows * columns == 0:
        return do_nothing, do_nothing
    if not no_rand:
        return pair(functional.match(metric, r, 0, "random2d", (h, w), cell=(sy, sx), generator=generator))
    y, x = (torch.arange(extent, device=metric.device) for extent in (h, w))
    is_dst = ((y % sy == 0) & (y < rows * sy))[:, None] & ((x % sx == 0) & (x < columns * sx))
    return pair(match_split(metric, is_dst.view(1, -1), rows * columns, min(r, h * w - rows * columns)))
