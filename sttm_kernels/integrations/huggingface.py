"""Hugging Face's ViT, VideoMAE, ViViT, V-JEPA 2 and TimeSformer, of transformers 4.57 and 5."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from sttm_kernels.functional import compose, match, merge
from sttm_kernels.integrations.merging import (
    Anatomy,
    Call,
    Family,
    Grid,
    KeyHook,
    Layer,
    State,
    Step,
    merge_tokens,
    remove_key_hooks,
)
from sttm_kernels.nn.attention import proportional_attention
from sttm_kernels.plan import MergePlan

IMPLEMENTATION = "sttm_kernels"
"""The name of `_attention` among the attention implementations of transformers."""


# Attention through the interface of transformers: ViT, VideoMAE, ViViT, V-JEPA 2


def _attention(
    module: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Proportional attention; the model's own while nothing is merged, to the bit."""
    call: InterfaceCall = module._sttm
    if call.keys is None:
        call.keys = key
    if call.size is not None:
        out = proportional_attention(query, key, value, call.size, scaling, call.method, dropout)
        return out.transpose(1, 2).contiguous(), None
    name = call.config._attn_implementation
    own = call.eager if name in (None, "eager") else AttentionInterface()[name]
    return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)


class InterfaceCall(Call):
    """A `Call` that knows the config and the eager attention the module had."""

    def __init__(self, method: str, num_heads: int, config: Any, eager: Callable[..., Any]) -> None:
        super().__init__(method, num_heads)
        self.config = config
        self.eager = eager


def _inner(layer: Layer) -> Layer:
    """The module that calls the attention interface."""
    return getattr(layer.attention, "attention", layer.attention)


def _install(layer: Layer, method: str) -> Call:
    inner = _inner(layer)
    eager = sys.modules[type(inner).__module__].eager_attention_forward
    call = InterfaceCall(method, inner.num_attention_heads, inner.config, eager)
    # A config of its own: the model's, which is saved and may be shared, stays as it is.
    inner.config = copy.copy(inner.config)
    inner.config._attn_implementation = IMPLEMENTATION
    inner._sttm = call
    if hasattr(inner, "apply_rotary_embeddings"):
        # Keys to match by are those before rotation: what a token shows, not where it is.
        inner.key.register_forward_hook(KeyHook(call, "flat"))
    return call


def _uninstall(layer: Layer) -> None:
    inner = _inner(layer)
    remove_key_hooks(inner)
    inner.config = inner._sttm.config
    del inner._sttm


def _valid(arguments: dict[str, Any]) -> Tensor | None:
    """`(B or 1, N)`: which tokens the attention mask of the layer lets be attended to."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        raise ValueError(
            "attention_mask must say which tokens are padding, (B, N) or (B, 1, N, N), in a model that merges tokens, "
            f"got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    valid = mask if mask.dim() == 2 else mask[:, 0, 0]
    if mask.dim() == 4 and not torch.compiler.is_compiling() and bool((mask != mask[:, :, :1]).any()):
        raise ValueError("attention_mask must be the same for every query in a model that merges tokens")
    if valid.dtype == torch.bool:
        return valid
    return valid >= 0 if mask.dim() == 4 else valid > 0  # added to the logits, or 1 for a token


def _attend(
    layer: Layer, x: Tensor, call: Call, size: Tensor | None, ids: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...]]:
    given = {name: value for name, value in arguments.items() if value is not None}
    if "head_mask" in given:
        raise ValueError("head_mask must be None in a model that merges tokens")
    if size is not None:
        given.pop("attention_mask", None)  # padding has a count of 0
    if hasattr(_inner(layer), "apply_rotary_embeddings"):
        given = {name: given[name] for name in ("position_mask", "output_attentions") if name in given}
        if ids is not None:
            given["position_mask"] = ids
    call.size = size
    norm = layer.layernorm_before if hasattr(layer, "layernorm_before") else layer.norm1
    out = layer.attention(norm(x), **given)
    out, rest = (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, ())
    return _drop(layer, out) + x, rest


def _feed(layer: Layer, x: Tensor) -> Tensor:
    norm = layer.layernorm_after if hasattr(layer, "layernorm_after") else layer.norm2
    if hasattr(layer, "mlp"):
        return _drop(layer, layer.mlp(norm(x))) + x
    return layer.output(layer.intermediate(norm(x)), x)


def _drop(layer: Layer, x: Tensor) -> Tensor:
    for name in ("drop_path", "dropout"):
        if hasattr(layer, name):
            return getattr(layer, name)(x)
    return x


INTERFACE = Family(_install, _uninstall, _attend, _feed, counts=_valid)


# TimeSformer, which has an attention of its own


def _install_timesformer(layer: Layer, method: str) -> Call:
    inner = layer.attention.attention
    call = Call(method, inner.num_heads)
    inner.qkv.register_forward_hook(KeyHook(call, "qkv"))
    return call


def _own_attention(attention: Layer, x: Tensor, size: Tensor | None, method: str) -> tuple[Tensor, ...]:
    """TimeSformer's attention with counts, as the tuple that it returns."""
    if size is None:
        return attention(x)
    inner = attention.attention
    q, k, v = inner.qkv(x).unflatten(-1, (3, inner.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = inner.attn_drop.p if inner.training else 0.0
    out = proportional_attention(q, k, v, size, inner.scale, method, dropout)
    return (attention.output(out.transpose(1, 2).flatten(2)),)


def _attend_timesformer(
    layer: Layer, x: Tensor, call: Call, size: Tensor | None, ids: Tensor | None, arguments: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...]]:
    if arguments.get("output_attentions"):
        raise ValueError("output_attentions must be False in a TimeSformer that merges tokens, got True")
    if layer.attention_type == "divided_space_time":
        return _attend_divided(layer, x, call, size), ()
    return x + layer.drop_path(_own_attention(layer.attention, layer.layernorm_before(x), size, call.method)[0]), ()


def _attend_divided(layer: Layer, x: Tensor, call: Call, size: Tensor | None) -> Tensor:
    """Attention over time within a tube, then over space within a frame.

    x is `(B, 1 + P * T, C)`: the class token, then tube after tube, a tube being the T tokens of one place. Merging
    joins whole tubes, so this holds for any number P of them. All tokens of a tube have the same count, which attention
    over time does not see.
    """
    T = layer.config.num_frames
    B, _, C = x.shape
    first, tubes = x[:, :1], x[:, 1:]
    over_time = layer.temporal_attention(layer.temporal_layernorm(tubes.reshape(-1, T, C)))[0]
    over_time = layer.drop_path(over_time).reshape(B, -1, C)
    tubes = tubes + layer.temporal_dense(over_time)

    frames = tubes.reshape(B, -1, T, C).transpose(1, 2).reshape(B * T, -1, C)
    frames = torch.cat((first.repeat(1, T, 1).reshape(B * T, 1, C), frames), 1)
    in_frame = None
    if size is not None:
        in_frame = torch.cat((size[:, :1], size[:, 1::T]), 1).repeat_interleave(T, 0)
    out = layer.drop_path(_own_attention(layer.attention, layer.layernorm_before(frames), in_frame, call.method)[0])
    class_out = out[:, 0].reshape(B, T, C).mean(1, True)
    out = out[:, 1:].reshape(B, T, -1, C).transpose(1, 2).reshape(B, -1, C)
    return torch.cat((first, tubes), 1) + torch.cat((class_out, out), 1)


def _feed_timesformer(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))


def _merge_timesformer(layer: Layer, x: Tensor, keys: Tensor, step: Step, state: State | None) -> tuple[Tensor, State]:
    """Merges r tubes, by their keys in all frames; x as in `_attend_divided`, keys `(B * T, H, 1 + P, D)`."""
    if layer.attention_type != "divided_space_time":
        return merge_tokens(layer, x, keys, step, state)
    T = layer.config.num_frames
    B, C = x.shape[0], x.shape[2]
    metric = keys[:, :, 1:].unflatten(0, (B, T)).permute(0, 2, 3, 1, 4).flatten(3)
    plan = match(metric, step.r)
    tubes = merge(x[:, 1:].reshape(B, -1, T * C), plan, None if state is None else state.size[:, 1::T])

    one = torch.ones_like(tubes.size[:, :1])
    size = torch.cat((one, tubes.size.repeat_interleave(T, 1)), 1)
    frame = torch.arange(T, dtype=torch.int32, device=x.device)
    index = (1 + T * plan.index[..., None] + frame).flatten(1)
    index = torch.cat((torch.zeros_like(index[:, :1]), index), 1)
    if state is not None:
        index = compose(MergePlan(state.index, x.shape[1]), MergePlan(index, size.shape[1])).index
    return torch.cat((x[:, :1], tubes.x.reshape(B, -1, C)), 1), State(size, index)


TIMESFORMER = Family(_install_timesformer, remove_key_hooks, _attend_timesformer, _feed_timesformer, _merge_timesformer)


def _pair(extent: Any) -> tuple[int, int]:
    return (extent, extent) if isinstance(extent, int) else (extent[0], extent[1])


def _grid(config: Any) -> Grid:
    """(T, H, W) of a clip of the size the config says."""
    (height, width), tubelet = _pair(getattr(config, "crop_size", None) or config.image_size), config.tubelet_size
    frames = config.frames_per_clip if hasattr(config, "frames_per_clip") else config.num_frames
    t, y, x = tubelet if not isinstance(tubelet, int) else (tubelet, *_pair(config.patch_size))
    return frames // t, height // y, width // x


def _image_grid(config: Any) -> Grid:
    (height, width), (y, x) = _pair(config.image_size), _pair(config.patch_size)
    return 1, height // y, width // x


def _timesformer(config: Any) -> dict[str, Any]:
    if config.attention_type != "divided_space_time":
        return {"grid": None, "refused": {"method": "the grid of its tokens is not known"}}
    reason = "divided attention needs the same tokens in every frame, which only merging whole tubes leaves"
    return {
        "grid": None,
        "num_tokens": 1 + config.num_frames * (config.image_size // config.patch_size),
        "unit": config.num_frames,
        "refused": {"method": reason, "window": reason},
    }


KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vit": lambda config: {"num_prefix": 1, "grid": _image_grid(config)},
    "videomae": lambda config: {"num_prefix": 0, "grid": _grid(config)},
    "vivit": lambda config: {"num_prefix": 1, "grid": _grid(config)},
    "vjepa2": lambda config: {"num_prefix": 0, "grid": _grid(config), "rotary": True},
    "timesformer": lambda config: {"num_prefix": 1, "families": (TIMESFORMER,), **_timesformer(config)},
}
"""What is special about each `config.model_type`, as arguments of `Anatomy`."""

LAYERS = ("layers", "encoder.layers", "encoder.layer")


def anatomy(model: Layer) -> Anatomy | None:
    """What the model is made of, or None if it is not of transformers; `ValueError` if it is but cannot be merged."""
    if not isinstance(model, PreTrainedModel):
        return None
    name, config = type(model).__name__, model.config
    if config.model_type not in KINDS:
        raise ValueError(f"model must be one of {tuple(KINDS)} of transformers, got {name} of {config.model_type!r}")
    if config.model_type == "videomae" and hasattr(model, "decoder"):
        raise ValueError(f"model must not be {name}: its decoder is to fill in tokens at their own places")
    layers = None
    for path in LAYERS:
        with suppress(AttributeError):
            layers = model.base_model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"model must have its layers at one of {LAYERS}, {name} has none there")
    special = KINDS[config.model_type](config)
    common = {
        "families": (INTERFACE,),
        "dim": config.hidden_size,
        "rotary": False,
        "num_tokens": special["num_prefix"] + 16,
    }
    return Anatomy(layers=list(layers), **{**common, **special})
