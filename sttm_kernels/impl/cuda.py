"""impl="cuda": the verbs in CUDA C++, by way of the extension `sttm_kernels._C`.

Every function has the arguments and results of its namesake in `impl/eager.py`. Outputs and scratch are allocated
here; the extension checks them, launches on the current stream and waits for nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sttm_kernels import dispatch


def _load() -> ModuleType:
    host = os.environ.get("STTM_CUDA_HOST")
    if not host:
        return importlib.import_module("sttm_kernels._C")
    loader = ExtensionFileLoader("sttm_kernels._C", host)
    spec = importlib.util.spec_from_loader("sttm_kernels._C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@cache
def _reason() -> str | None:
    """Why the extension cannot be loaded; None if it can."""
    if not os.environ.get("STTM_CUDA_HOST") and importlib.util.find_spec("sttm_kernels._C") is None:
        note = Path(__file__).parent.parent / "_build.json"
        why = json.loads(note.read_text())["reason"] if note.exists() else "the package was not built, only imported"
        return f"sttm_kernels was installed without its CUDA kernels: {why}"
    try:
        _extension()
    except ImportError as error:
        return f"sttm_kernels._C cannot be loaded: {error}"
    return None


def build_info() -> dict[str, Any]:
    """What `sttm-kernels info` shows of the extension: how it was built, or the "reason" why it is not there."""
    reason = _reason()
    return {"reason": reason} if reason is not None else {"reason": None, **_extension().build_info()}


@cache
def _extension() -> Any:
    return _load()


def why_not(verb: str) -> str | None:
    """The reason why these kernels cannot run `verb` on this installation; None if they can."""
    reason = _reason()
    if reason is None and verb not in globals():
        reason = f"there is no CUDA kernel for {verb}"
    if reason is None:
        problem = _extension().problem()
        reason = problem and f"{problem}; the extension was built for {' '.join(build_info()['architectures'])}"
    return reason


def _stream(t: Tensor) -> int:
    """The current stream of the device of `t`."""
    return torch._C._cuda_getCurrentRawStream(t.device.index) if t.is_cuda else 0


def unmerge(x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor | None) -> Tensor:
    y = x.new_empty((*index.shape, x.shape[2]))
    _extension().unmerge(x, index.contiguous(), y, _stream(x))
    return y


def compose(index1: Tensor, index2: Tensor, num_groups: int) -> Tensor:
    out = torch.empty_like(index1, memory_format=torch.contiguous_format)
    _extension().compose(index1.contiguous(), index2.contiguous(), num_groups, out, _stream(index1))
    return out


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _items(t: Tensor | None) -> Tensor | None:
    """(B, rows, columns) with contiguous items, which may all be the same one."""
    if t is None or (t.stride(2) == 1 and t.stride(1) == t.shape[2]):
        return t
    return t.contiguous()


def _groups(
    index: Tensor, num_groups: int, order: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`order` and `offsets`; if they were not given, room for them and scratch to make them with."""
    if order is not None and offsets is not None:
        return order.contiguous(), offsets.contiguous(), None
    order, other = index.new_empty((2, *index.shape))
    return order, index.new_empty((index.shape[0], num_groups + 1)), other


def merge(
    x: Tensor,
    index: Tensor,
    num_groups: int,
    weight: Tensor | None,
    size: Tensor | None,
    positions: Tensor | None,
    fill: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, C = x.shape
    y = x.new_empty((B, num_groups, C))
    size_out, mass = (x.new_empty((B, num_groups), dtype=torch.float32) for _ in range(2))
    positions_out = size_out.new_empty((B, num_groups, 0 if positions is None else positions.shape[2]))
    index = index.contiguous()
    order, offsets, other = _groups(index, num_groups, order, offsets)
    _extension().merge(
        x, index, num_groups, _dense(weight), _dense(size), _items(positions), _items(fill), order, offsets, other,
        reduce, y, size_out, positions_out, mass, _stream(x),
    )  # fmt: skip
    return y, size_out, positions_out, mass


def merge_backward(
    grad_y: Tensor | None,
    grad_size: Tensor | None,
    grad_positions: Tensor | None,
    x: Tensor,
    index: Tensor,
    num_groups: int,
    weight: Tensor | None,
    size: Tensor | None,
    positions: Tensor | None,
    y: Tensor,
    positions_out: Tensor,
    mass: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    reduce: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_weight, need_size, need_positions = needs
    need_positions = need_positions and positions is not None
    B, N, _ = x.shape
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight, grad_size_in = (mass.new_empty((B, N) if need else 0) for need in (need_weight, need_size))
    grad_positions_in = mass.new_empty(positions.shape if need_positions and positions is not None else 0)

    through_y = grad_y is not None and reduce == "mean"
    centred = (need_weight or need_size) and (through_y or (grad_positions is not None and positions is not None))
    index, other = index.contiguous(), None
    if centred or (need_x and reduce in ("max", "first")):
        order, offsets, other = _groups(index, num_groups, order, offsets)
    else:
        order = offsets = None
    _extension().merge_backward(
        grad_y, _dense(grad_size), _items(grad_positions), x, index, num_groups, _dense(weight), _dense(size),
        _items(positions), y.contiguous(), mass, order, offsets, other, reduce,
        grad_x if need_x else None, grad_weight if need_weight else None, grad_size_in if need_size else None,
        grad_positions_in if need_positions else None,
        mass.new_empty((2 if reduce == "sum" else 1, B, N)) if centred else None, _stream(x),
    )  # fmt: skip
    return grad_x, grad_weight, grad_size_in, grad_positions_in


READ_AGAIN = 128
"""With more src tokens than this, the mean over the heads of a metric is taken by a launch of its own."""


def match(
    metric: Tensor, src: Tensor | None, dst: Tensor | None, r: int, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, D = metric.shape[0], metric.shape[-2], metric.shape[-1]
    index = metric.new_empty((B, N), dtype=torch.int32)
    score = metric.new_empty((B, N), dtype=torch.float32)
    order, offsets = torch.empty_like(index), index.new_empty((B, N - r + 1))
    scratch = index.new_empty(B * (N + 1))
    mean = None
    if metric.dim() == 4 and (N // 2 if src is None else src.shape[2]) > READ_AGAIN:
        mean = metric.new_empty((B, N, D))
    _extension().match(
        metric, _dense(src), _dense(dst), r, num_prefix, dispatch.tf32(),
        index, score, order, offsets, scratch, mean, _stream(metric),
    )  # fmt: skip
    return index, score, order, offsets


def assign(
    q: Tensor, meta: Tensor, mask: Tensor | None, similarity: str, temperature: float, soft: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (q.shape[0], q.shape[-2])
    index = q.new_empty(rows, dtype=torch.int32)
    score = q.new_empty(rows, dtype=torch.float32)
    lse, weight = (q.new_empty(rows if soft else 0, dtype=torch.float32) for _ in range(2))
    _extension().assign(
        q, meta, mask, similarity, temperature, dispatch.tf32(),
        index, score, lse if soft else None, weight if soft else None, _stream(q),
    )  # fmt: skip
    return index, score, lse, weight


def assign_backward(
    grad_score: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    meta: Tensor,
    index: Tensor,
    score: Tensor,
    lse: Tensor,
    similarity: str,
    temperature: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    need_q, need_meta = needs
    grad_q, grad_meta = q.new_empty(q.shape if need_q else 0), meta.new_empty(meta.shape if need_meta else 0)
    _extension().assign_backward(
        grad_score, grad_lse, q, meta, index.contiguous(), score.contiguous(),
        None if grad_lse is None else lse.contiguous(), similarity, temperature,
        dispatch.tf32(), grad_q if need_q else None, grad_meta if need_meta else None, _stream(q),
    )  # fmt: skip
    return grad_q, grad_meta


def assign_merge(
    x: Tensor,
    q: Tensor | None,
    meta: Tensor,
    mask: Tensor | None,
    size: Tensor | None,
    positions: Tensor | None,
    fill: Tensor | None,
    similarity: str,
    temperature: float,
    soft: bool,
) -> tuple[Tensor, ...]:
    q = x if q is None else q
    (B, N, C), K = x.shape, meta.shape[1]
    run = _extension()
    if N > run.ASSIGN_MERGE_TOKENS or K > run.ASSIGN_MERGE_GROUPS or q.dtype != x.dtype:
        index, score, lse, weight = assign(q, meta, mask, similarity, temperature, soft)
        merged = merge(x, index, K, weight if soft else None, size, positions, fill, None, None, "mean")
        return index, score, lse, weight, *merged
    index = x.new_empty((B, N), dtype=torch.int32)
    score = x.new_empty((B, N), dtype=torch.float32)
    lse, weight = (score.new_empty((B, N) if soft else 0) for _ in range(2))
    y = x.new_empty((B, K, C))
    size_out, mass = score.new_empty((B, K)), score.new_empty((B, K))
    positions_out = score.new_empty((B, K, 0 if positions is None else positions.shape[2]))
    run.assign_merge(
        x, q, meta, mask, _dense(size), _items(positions), _items(fill), similarity, temperature,
        dispatch.tf32(), index, score, lse if soft else None, weight if soft else None,
        y, size_out, positions_out, mass, _stream(x),
    )  # fmt: skip
    return index, score, lse, weight, y, size_out, positions_out, mass


def _alike(*tensors: Tensor | None) -> Any:
    """Features of one dtype as they are, of several as float32: a product has operands of one kind."""
    if len({t.dtype for t in tensors if t is not None}) == 1:
        return tensors
    return tuple(None if t is None else t.float() for t in tensors)


def soft_merge(
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    similarity: str,
    temperature: float,
    normalize: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, N, C), K = x.shape, meta.shape[1]
    dtype, (x, q, meta) = x.dtype, _alike(x, q, meta)
    P = 0 if positions is None else positions.shape[-1]
    y = x.new_empty((B, K, C))
    size_out = x.new_empty((B, K), dtype=torch.float32)
    positions_out = size_out.new_empty((B, K, P))
    over_meta = normalize == "meta"
    lse = size_out.new_empty((B, N if over_meta else K))
    _extension().soft_merge(
        x, q, meta, size, positions, mask, similarity, temperature, over_meta, dispatch.tf32(),
        y, size_out, None if positions is None else positions_out, lse, _stream(x),
    )  # fmt: skip
    return y.to(dtype), size_out, positions_out, lse


def soft_merge_backward(
    grad_y: Tensor | None,
    grad_size: Tensor | None,
    grad_positions: Tensor | None,
    x: Tensor,
    q: Tensor,
    meta: Tensor,
    size: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    y: Tensor,
    mass: Tensor,
    positions_out: Tensor,
    lse: Tensor,
    similarity: str,
    temperature: float,
    normalize: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_q, need_meta, need_size, need_positions = needs
    if positions is None:
        need_positions, grad_positions = False, None
    (B, N, _), K = x.shape, meta.shape[1]
    dtypes = x.dtype, q.dtype, meta.dtype
    x, q, meta, y, grad_y = _alike(x, q, meta, y, grad_y)
    over_meta = normalize == "meta"
    grad_x, grad_q, grad_meta = (
        t.new_empty(t.shape if needed else 0) for t, needed in ((x, need_x), (q, need_q), (meta, need_meta))
    )
    grad_positions_in = mass.new_empty(0 if positions is None or not need_positions else positions.shape)
    if (K if over_meta else N) == 1:  # a softmax over one thing is 1 whatever the metric
        grad_q.zero_()
        grad_meta.zero_()
        need_q = need_meta = False
    need_shift = need_q or need_meta or need_size
    need_mean = need_size or (over_meta and need_shift)
    grad_size_in = mass.new_empty((B, N) if need_mean else 0)
    _extension().soft_merge_backward(
        grad_y, grad_size, grad_positions, x, q, meta, size, positions, mask, y.contiguous(), mass.contiguous(),
        None if positions is None else positions_out.contiguous(), lse.contiguous(), similarity, temperature, over_meta,
        dispatch.tf32(), grad_x if need_x else None, grad_q if need_q else None,
        grad_meta if need_meta else None, grad_size_in if need_mean else None,
        grad_positions_in if need_positions else None, mass.new_empty((B, K)) if need_shift else None, _stream(x),
    )  # fmt: skip
    grad_x, grad_q, grad_meta = (t.to(dtype) for t, dtype in zip((grad_x, grad_q, grad_meta), dtypes, strict=True))
    return grad_x, grad_q, grad_meta, grad_size_in if need_size else mass.new_empty(0), grad_positions_in
