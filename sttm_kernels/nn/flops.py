"""How many floating-point operations a model takes, the package's own operators included.

Importing this module registers formulas for them with `torch.utils.flop_counter`: 2 per multiply-add of the products
and of the weighted sums, as PyTorch counts its own; copies, sorts, divisions and motion features are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from sttm_kernels import operator

Shape = Sequence[int]


def flops(model: nn.Module, clip_shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """Floating-point operations of `model(clip)` for a clip of this shape, `(B, C, T, H, W)` for `VideoTransformer`.

    The model is run with its parameters and buffers replaced by ones on PyTorch's meta device, so nothing is computed
    or copied, and no GPU is needed. Verbs of `impl="reference"` are counted as the plain PyTorch they are.
    """
    state = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    clip = torch.empty(*clip_shape, dtype=dtype, device="meta")
    return count(lambda: torch.func.functional_call(model, state, clip))


def count(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call, without gradients."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


# Every formula is given the operator's inputs with shapes in place of tensors.


def _pairs(q: Shape, meta: Shape) -> int:
    """Products of every token with every meta token."""
    return 2 * q[0] * q[-2] * meta[1] * q[-1]


def _features(x: Shape, positions: Shape | None) -> int:
    """Channels and positions of all tokens."""
    return x[0] * x[1] * (x[2] + (0 if positions is None else positions[2]))


def _assign(a: Any) -> int:
    return _pairs(a.q, a.meta)


def _assign_earlier(a: Any) -> int:
    """Half of all pairs."""
    return _pairs(a.q, a.q) // 2


def _assign_backward(a: Any) -> int:
    """For each gradient, the similarities once more and one product; where score alone has one, a gather."""
    return 0 if a.grad_lse is None and a.grad_weight is None else sum(a.needs) * 2 * _pairs(a.q, a.meta)


def _match(a: Any) -> int:
    B, N, D = a.metric[0], a.metric[-2], a.metric[-1]
    if a.src is not None and a.dst is not None:
        return 2 * B * a.src[1] * a.src[2] * a.dst[2] * D
    num_dst = N // 2 - a.num_prefix // 2
    return 2 * B * (N - a.num_prefix - num_dst) * num_dst * D


def _match_packed(a: Any) -> int:
    return 2 * a.pairs * a.metric[-1]


def _merge(a: Any) -> int:
    return 2 * _features(a.x, a.positions)


def _merge_backward(a: Any) -> int:
    """One pass for the tokens and one for their weights."""
    return 2 * _merge(a)


def _assign_merge(a: Any) -> int:
    return _pairs(a.x if a.q is None else a.q, a.meta) + _merge(a)


def _soft_merge(a: Any) -> int:
    return _pairs(a.q, a.meta) + 2 * a.meta[1] * _features(a.x, a.positions)


def _soft_merge_backward(a: Any) -> int:
    """The similarities once more, a product for q and for meta, one for the tokens and one for their weights."""
    return 3 * _pairs(a.q, a.meta) + 2 * (_soft_merge(a) - _pairs(a.q, a.meta))


def _farthest_points(q: Shape, num_points: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(q) * (num_points + 1)


def _density_peaks(q: Shape, num_peaks: int, *_: Any, **__: Any) -> int:
    """All distances, twice."""
    return 2 * 2 * math.prod(q) * q[1]


FORMULAS: dict[str, Callable[..., int]] = {
    "assign": _assign,
    "assign_earlier": _assign_earlier,
    "assign_backward": _assign_backward,
    "match": _match,
    "match_packed": _match_packed,
    "merge": _merge,
    "merge_backward": _merge_backward,
    "assign_merge": _assign_merge,
    "soft_merge": _soft_merge,
    "soft_merge_backward": _soft_merge_backward,
    "farthest_points": _farthest_points,
    "density_peaks": _density_peaks,
}


def _register(name: str, formula: Callable[..., int]) -> None:
    known = operator.OPERATORS.get(name)
    by_name = formula if known is None else lambda *args, **_: formula(known.inputs(*args))
    register_flop_formula(getattr(getattr(torch.ops, operator.NAMESPACE), name))(by_name)


for _name, _formula in FORMULAS.items():
    _register(_name, _formula)
