"""How many floating-point operations a model takes, the package's own operators included.

Importing this module registers formulas for them with `torch.utils.flop_counter`: 2 per multiply-add of the products
and of the weighted sums, as PyTorch counts its own; copies, sorts and divisions are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from sttm_kernels import ops

Shape = Sequence[int]


def flops(model: nn.Module, clip_shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """Floating-point operations of `model(clip)` for a clip of this shape, `(B, C, T, H, W)` for `VideoTransformer`.

    The model is run with its parameters and buffers replaced by ones on PyTorch's meta device, so nothing is computed
    or copied, and no GPU is needed. Verbs of `impl="reference"` are counted as the plain PyTorch they are.
    """
    state = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    clip = torch.empty(*clip_shape, dtype=dtype, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(model, state, clip)
    return counter.get_total_flops()


# Every formula is given the operator's arguments with shapes in place of tensors.


def _pairs(q: Shape, meta: Shape) -> int:
    """Products of every token with every meta token."""
    return 2 * q[0] * q[-2] * meta[1] * q[-1]


def _assign(q: Shape, meta: Shape, *_: Any, **__: Any) -> int:
    return _pairs(q, meta)


def _assign_backward(
    grad_score: Shape, grad_lse: Shape | None, q: Shape, meta: Shape, index: Shape, score: Shape, lse: Shape,
    similarity: str, temperature: float, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """For each gradient, the similarities once more and one product; without grad_lse, a gather."""
    return 0 if grad_lse is None else sum(needs) * 2 * _pairs(q, meta)


def _match(metric: Shape, src: Shape | None, dst: Shape | None, r: int, num_prefix: int, *_: Any, **__: Any) -> int:
    if src is not None and dst is not None:
        return 2 * metric[0] * src[1] * src[2] * dst[2] * metric[-1]
    num_dst = metric[-2] // 2 - num_prefix // 2
    return 2 * metric[0] * (metric[-2] - num_prefix - num_dst) * num_dst * metric[-1]


def _merge(
    x: Shape, index: Shape, num_groups: int, weight: Shape | None, size: Shape | None, positions: Shape | None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * x[0] * x[1] * (x[2] + (0 if positions is None else positions[2]))


def _merge_backward(
    grad_y: Shape | None, grad_size: Shape | None, grad_positions: Shape | None, x: Shape, index: Shape,
    num_groups: int, weight: Shape | None, size: Shape | None, positions: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """One pass for the tokens and one for their weights."""
    return 2 * _merge(x, index, num_groups, weight, size, positions)


def _assign_merge(
    x: Shape, q: Shape | None, meta: Shape, mask: Shape | None, size: Shape | None, positions: Shape | None,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _pairs(x if q is None else q, meta) + _merge(x, x, meta[1], None, size, positions)


def _soft_merge(
    x: Shape, q: Shape, meta: Shape, size: Shape | None, positions: Shape | None, *_: Any, **__: Any
) -> int:
    features = x[2] + (0 if positions is None else positions[2])
    return _pairs(q, meta) + 2 * x[0] * x[1] * meta[1] * features


def _soft_merge_backward(
    grad_y: Shape | None, grad_size: Shape | None, grad_positions: Shape | None, x: Shape, q: Shape, meta: Shape,
    size: Shape | None, positions: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The similarities once more, a product for q and for meta, one for the tokens and one for their weights."""
    values = _soft_merge(x, q, meta, size, positions) - _pairs(q, meta)
    return 3 * _pairs(q, meta) + 2 * values


def _farthest_points(q: Shape, num_points: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q) * (num_points + 1)


def _density_peaks(q: Shape, num_peaks: int, *_: Any, **__: Any) -> int:
    """All distances, twice."""
    return 2 * 2 * math.prod(q) * q[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "assign": _assign,
    "assign_backward": _assign_backward,
    "match": _match,
    "merge": _merge,
    "merge_backward": _merge_backward,
    "assign_merge": _assign_merge,
    "soft_merge": _soft_merge,
    "soft_merge_backward": _soft_merge_backward,
    "farthest_points": _farthest_points,
    "density_peaks": _density_peaks,
}

for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(getattr(torch.ops, ops.NAMESPACE), _name))(_formula)
