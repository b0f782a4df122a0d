"""The vision models of Qwen2.5-VL and Qwen3-VL of transformers: the patches of all images and frames in one row.

Attention is within a frame, or in most layers of Qwen2.5-VL within a window of one. Tokens merge within the smaller of
these pieces, so that both stay pieces of the row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sttm_kernels.functional import compose, match, merge, unmerge
from sttm_kernels.integrations.amounts import of_tokens
from sttm_kernels.integrations.merging import (
    STATE,
    THREAD,
    Attends,
    Behind,
    Family,
    Layer,
    MergingModel,
    State,
    Step,
    Swapped,
    Told,
    left_for,
    must_reach,
    runs_again,
    told_to,
    unwrapped,
)
from sttm_kernels.integrations.selfcheck import dtype_of
from sttm_kernels.nn.attention import proportional_attention
from sttm_kernels.plan import MergePlan

PIECES = "sttm_pieces"
"""The argument of layers that holds how many tokens each of the pieces has, and each frame, before any merged."""
Lengths = tuple[int, ...]


class PackedTower(MergingModel):
    """The vision model: it tells its layers what pieces the row is made of. It finds the extent of a window, in tokens
    of the language model, in `_sttm`; None if it has none."""

    _sttm: int | None

    def __call__(self, hidden_states: Tensor, grid_thw: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, PackedTower):  # it was compiled, and then merging was removed
            return self(hidden_states, grid_thw, *args, **kwargs)
        pieces = pieces_of(grid_thw, self._sttm, self.config.spatial_merge_size)  # type: ignore[attr-defined]
        return super().__call__(hidden_states, grid_thw, *args, **{PIECES: pieces}, **kwargs)


def pieces_of(grid_thw: Tensor, window: int | None, unit: int) -> tuple[Lengths, Lengths]:
    """The tokens of each window and of each frame, in the order of the row; each window holds up to window x window
    units of unit x unit tokens."""
    windows: list[int] = []
    frames: list[int] = []
    for t, h, w in grid_thw.tolist():
        rows, columns = h // unit, w // unit
        extent = max(rows, columns) if window is None else window
        own = [
            min(extent, rows - y) * min(extent, columns - x) * unit**2
            for y in range(0, rows, extent)
            for x in range(0, columns, extent)
        ]
        windows += own * t
        frames += [h * w] * t
    return tuple(windows), tuple(frames)


class Tap(Swapped):
    """A module that reads tokens between layers, such as DeepStack's: it sees every token."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state: State | None = getattr(x, STATE, None)
        if state is None and not torch.compiler.is_compiling():
            state = left_for(x)
        if state is not None and state.index is not None:
            x = unmerge(x[None], MergePlan(state.index, x.shape[0]))[0]
        elif THREAD.now.merged_after is not None:
            raise RuntimeError(
                f"what reads the tokens that layer {THREAD.now.merged_after} left must get what it returned: something "
                "outside of the layers replaced that tensor"
            )
        return super().__call__(x, *args, **kwargs)  # type: ignore[misc]


@dataclass(frozen=True)
class FromLibrary:
    """The eager attention and the rotation of the library of a module."""

    eager: Callable[..., Any]
    rotate: Callable[..., tuple[Tensor, Tensor]]


class PackedAttention(Attends):
    """Attention that tells its keys, before their rotation, and takes counts; the same bits as its own without."""

    _sttm: FromLibrary

    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        lengths: Lengths | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`lengths` are of the sequences, if they are not those of cu_seqlens for some tokens have merged."""
        told = THREAD.now.told
        own = {"cu_seqlens": cu_seqlens, "position_embeddings": position_embeddings, **kwargs}
        own |= {} if max_seqlen is None else {"max_seqlen": max_seqlen}
        if told is None:
            if runs_again():
                raise RuntimeError(
                    "attention runs again in a backward without its layer, which tells it the token counts: checkpoint "
                    "whole layers, or attention by checkpoint_wrapper(attention)"
                )
            return super().forward(hidden_states, **own)  # type: ignore[misc]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        told.keys = k.transpose(0, 1)[None]
        name = self.config._attn_implementation
        if lengths is None and name is not None and "flash" in name:  # it takes cu_seqlens
            return super().forward(hidden_states, **own)  # type: ignore[misc]
        q, k, v = (each.transpose(0, 1) for each in (*self._sttm.rotate(q, k, *position_embeddings), v))
        dropout = self.attention_dropout if self.training else 0.0
        if lengths is not None:
            out = proportional_attention(q, k, v, told.size_of_row, self.scaling, told.method, dropout, lengths=lengths)
            out = out.transpose(0, 1)
        else:
            attend = self._sttm.eager if name in (None, "eager") else AttentionInterface()[name]
            same = {"attention_mask": None, "scaling": self.scaling, "dropout": dropout, "is_causal": False}
            pieces = zip(*(each[None].split(cu_seqlens.diff().tolist(), 2) for each in (q, k, v)), strict=True)
            out = torch.cat([attend(self, *piece, **same, **kwargs)[0] for piece in pieces], 1)
        return self.proj(out.reshape(hidden_states.shape[0], -1))


def _of_library(module: Layer, name: str) -> Any:
    modules = [sys.modules[each.__module__] for each in type(module).__mro__]
    return next(getattr(each, name) for each in modules if hasattr(each, name))


def _parts(layer: Layer, method: str) -> list[tuple[nn.Module, type, Any]]:
    attention = unwrapped(layer.attn)
    names = ("eager_attention_forward", "apply_rotary_pos_emb_vision")
    return [(attention, PackedAttention, FromLibrary(*(_of_library(attention, name) for name in names)))]


def _heads(layer: Layer) -> int:
    return layer.attn.num_heads


def _attend(layer: Layer, x: Tensor, told: Told, arguments: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    given = {name: value for name, value in arguments.items() if value is not None}
    pieces = given.pop(PIECES, None)
    given.pop("rotary_pos_emb", None)  # of transformers 4, which does not look at it
    row = x.flatten(0, 1)
    if told.ids is not None:
        places = told.ids.flatten()
        given["position_embeddings"] = tuple(table[places] for table in given["position_embeddings"])
        # Layers are tried out with a batch of sequences.
        here = (x.shape[1],) * x.shape[0] if told.lengths is None else told.lengths
        given["lengths"] = here if pieces is None else _sequences(here, pieces, len(given["cu_seqlens"]) - 1)
    out = layer.attn(layer.norm1(row), **given, **told_to(layer.attn))
    return (row + out).view_as(x), ()


def _sequences(here: Lengths, pieces: tuple[Lengths, Lengths], count: int) -> Lengths:
    """How many tokens each of `count` sequences has now, of which each piece has `here`."""
    windows, frames = pieces
    if count == len(windows):
        return here
    if count != len(frames):
        raise RuntimeError(f"cu_seqlens must be of {len(windows)} windows or {len(frames)} frames, got {count}")
    so_far = dict(zip(accumulate(windows), accumulate(here), strict=True))
    ends = [so_far[end] for end in accumulate(frames)]
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))


def _feed(layer: Layer, x: Tensor) -> Tensor:
    row = x.flatten(0, 1)
    return row + layer.mlp(layer.norm2(row))


def _start(x: Tensor, arguments: dict[str, Any], state: State) -> State:
    if PIECES not in arguments:
        raise RuntimeError("layers must be called by the vision model, which tells them of its frames and windows")
    return replace(state, lengths=arguments[PIECES][0])


def _merge(layer: Layer, x: Tensor, keys: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
    """Merges tokens of each piece; x `(1, T, C)`, keys `(1, H, T, D)`."""
    lengths = state.lengths
    assert lengths is not None
    found = match(keys[0], [of_tokens(step.r, length) for length in lengths], lengths=lengths)
    assert found.merged_lengths is not None
    must_reach(step, max(found.merged_lengths))
    plan = replace(found, lengths=None, merged_lengths=None)
    out = merge(x, plan, state.size)
    index = plan.index if state.index is None else compose(MergePlan(state.index, x.shape[1]), plan).index
    ids = _places(plan, state.ids, lengths)
    return out.x, replace(state, size=out.size, index=index, ids=ids, lengths=found.merged_lengths)


def _places(plan: MergePlan, ids: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """The place of every group: that of the token others merged into, of odd position in its piece."""
    group, device = plan.index.long(), plan.index.device
    token = torch.arange(group.shape[1], device=device)
    ends = torch.tensor(lengths, device=device)
    first = (ends.cumsum(0) - ends).repeat_interleave(ends, output_size=group.shape[1])
    ids = token[None] if ids is None else ids
    places = ids.new_zeros(1, plan.num_groups + 1).scatter(1, group, ids)
    receives = (token - first) % 2 == 1
    return places.scatter(1, torch.where(receives, group, plan.num_groups), ids)[:, : plan.num_groups]


PACKED = Family(_parts, _heads, _attend, _feed, _merge, _start, packed=True)


def trial(dim: int, heads: int) -> dict[str, Any]:
    """What a layer is tried out with, two sequences of 16 tokens."""
    angles = torch.linspace(0, 8, 32 * (dim // heads), device="cpu").view(32, -1)
    cu_seqlens = torch.tensor([0, 16, 32], dtype=torch.int32, device="cpu")
    return {"cu_seqlens": cu_seqlens, "position_embeddings": (angles.cos(), angles.sin())}


def clip(tower: Layer, frames: int, height: int, width: int) -> dict[str, Any]:
    """What a vision model is called with for a clip of this size in pixels, on the meta device, and what it would work
    out from the values of the grid."""
    config = tower.config
    size, unit = config.patch_size, config.patch_size * config.spatial_merge_size
    if frames % config.temporal_patch_size or height % unit or width % unit:
        raise ValueError(
            f"shape must be of multiples of {config.temporal_patch_size} frames and of {unit} pixels, got "
            f"{(frames, height, width)}"
        )
    grid = torch.tensor([[frames // config.temporal_patch_size, height // size, width // size]], device="cpu")
    patches = int(grid.prod())

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(patches, columns, dtype=dtype, device="meta")

    dtype = dtype_of(tower)
    values = config.in_channels * config.temporal_patch_size * size**2
    given = {"hidden_states": empty(values, dtype), "grid_thw": grid, "position_ids": empty(2, torch.long)}
    if hasattr(tower, "deepstack_merger_list"):
        given |= {"interp_indices": empty(4, torch.long), "interp_weights": empty(4, dtype)}
    return given


CONFIGURED = 448, 448
"""Height and width of the image that `flops` is of, for the configs of these models say no size. Clips of it have the
same share: frames attend alone."""

REFUSED = {
    "method": "its tokens are those of several images, of which each frame attends alone",
    "window": "its tokens merge within its own windows and frames already",
    "protect": "its tokens are those of several images",
}


def _configured(config: Any) -> tuple[int, int, int]:
    """About `CONFIGURED`, in whole patches."""
    unit = config.patch_size * config.spatial_merge_size
    height, width = (max(size // unit, 1) * unit for size in CONFIGURED)
    return config.temporal_patch_size, height, width


def tower_of(model: Layer) -> Layer:
    """The vision model, inside of a video-language model or alone."""
    body = model if hasattr(model, "visual") else getattr(model, "model", model)
    return getattr(body, "visual", model)


def anatomy(tower: Layer) -> dict[str, Any]:
    """What is special about a vision model, as arguments of `Anatomy`."""
    config = tower.config
    window = None
    if hasattr(tower, "window_size"):
        window = tower.window_size // tower.spatial_merge_size // tower.patch_size
    swaps: list[tuple[nn.Module, type, Any]] = [(tower, PackedTower, window)]
    swaps += [(each, Tap, None) for each in getattr(tower, "deepstack_merger_list", ())]
    swaps.append((tower.merger, Behind, None))
    return {
        "families": (PACKED,),
        "num_prefix": 0,
        "rotary": True,
        "num_tokens": 16,
        "arguments": trial(config.hidden_size, config.num_heads),
        "example": partial(clip, tower, *_configured(config)),
        "body": tower,
        "gridded": (),
        "refused": REFUSED,
        "mixin": None,
        "swaps": swaps,
    }
