"""Vision Transformers of Hugging Face's transformers, 4.57 and 5.

Those whose attention calls the attention interface are one `Family`, which knows the parts of a layer by their names;
TimeSformer, which has an attention of its own, is another.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from sttm_kernels.functional import compose, merge
from sttm_kernels.integrations import qwen
from sttm_kernels.integrations.merging import (
    STATE,
    THREAD,
    Anatomy,
    Attends,
    Carries,
    Family,
    Grid,
    Layer,
    MergingModel,
    State,
    Step,
    Swapped,
    Told,
    find_pairs,
    merge_tokens,
    own_layers,
    real_tokens,
    rows,
    runs_again,
    told_to,
    unwrapped,
    with_padding,
)
from sttm_kernels.nn.attention import proportional_attention
from sttm_kernels.operator import NAMESPACE
from sttm_kernels.plan import MergePlan

IMPLEMENTATION = NAMESPACE
"""The name of `_attention` among the attention implementations of transformers."""


# Attention through the interface of transformers


def _attention(
    module: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rotation: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Proportional attention; the model's own while nothing is merged, to the bit.

    Queries and keys are rotated here by `rotation`, (cos, sin), if `_attend` kept that from the module.
    """
    told = THREAD.now.told
    if told is None and runs_again():
        raise RuntimeError(
            "attention runs again in a backward without its layer, which tells it the token counts: checkpoint whole "
            "layers, or attention by checkpoint_wrapper(attention)"
        )
    if told is not None:
        told.keys = next((before for rotated, before in told.rotations if rotated is key), key)
    if rotation is not None:
        query, key = module._sttm.rotate(query, key, *rotation)
    if told is not None and told.size is not None:
        if attention_mask is not None:
            raise ValueError("attention must add no bias of its own in a model that merges tokens, got one")
        out = proportional_attention(query, key, value, told.size, scaling, told.method, dropout)
        return out.transpose(1, 2).contiguous(), None
    name = module._sttm.config._attn_implementation
    own = module._sttm.eager if name in (None, "eager") else AttentionInterface()[name]
    return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)


@dataclass(frozen=True)
class Own:
    """The config that a module had, the eager attention and the rotation of its library, the names of what it takes."""

    config: Any
    eager: Callable[..., Any]
    rotate: Callable[..., tuple[Tensor, Tensor]] | None
    names: tuple[str, ...]


class Interface(Attends):
    """A module that calls the attention interface."""

    _sttm: Own
    config: Any

    def _restored(self) -> None:
        self.config = self._sttm.config


class RotaryInterface(Interface):
    """One that rotates queries and keys. Keys to match by are those before: what a token shows, not where it is."""

    def apply_rotary_embeddings(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rotated = super().apply_rotary_embeddings(x, *args, **kwargs)  # type: ignore[misc]
        if THREAD.now.told is not None:
            THREAD.now.told.rotations.append((rotated, x))
        return rotated


def _first(module: Layer, names: tuple[str, ...]) -> Any:
    """What a module has by the first of the names that it has; libraries of models name their parts differently."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


ATTENTION = ("attention", "self_attn")
HEADS = ("num_attention_heads", "num_heads")
NORM1 = ("layernorm_before", "norm1", "layer_norm1")
NORM2 = ("layernorm_after", "norm2", "layer_norm2")


def _outer(layer: Layer) -> Layer:
    """The module that the layer calls to attend."""
    return unwrapped(_first(layer, ATTENTION))


def _inner(layer: Layer) -> Layer:
    """The module that calls the attention interface."""
    outer = _outer(layer)
    return unwrapped(getattr(outer, "attention", outer))


def _parts(layer: Layer, method: str) -> list[tuple[nn.Module, type, Any]]:
    inner = _inner(layer)
    names = tuple(inspect.signature(type(inner).forward).parameters)
    modules = [sys.modules[each.__module__] for each in type(inner).__mro__]
    library = next((each for each in modules if hasattr(each, "eager_attention_forward")), None)
    if library is None:
        raise ValueError(f"model must attend through the interface of transformers, a {type(inner).__name__} does not")
    own = Own(inner.config, library.eager_attention_forward, getattr(library, "apply_rotary_pos_emb", None), names)
    # A config of its own: the model's, which is saved and may be shared, stays as it is.
    inner.config = copy.copy(inner.config)
    inner.config._attn_implementation = IMPLEMENTATION
    mixin = RotaryInterface if hasattr(inner, "apply_rotary_embeddings") else Interface
    outer = [] if _outer(layer) is inner else [(_outer(layer), Attends, None)]
    return [*outer, (inner, mixin, own)]


def _heads(layer: Layer) -> int:
    return _first(_inner(layer), HEADS)


def _valid(arguments: dict[str, Any]) -> Tensor | None:
    """`(B or 1, N)`: which tokens the attention mask of the layer lets be attended to."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask must be a torch.Tensor in a model that merges tokens, got {type(mask).__name__}"
        )
    return mask > 0 if mask.dim() == 2 else real_tokens("attention_mask", mask)


def _attend(layer: Layer, x: Tensor, told: Told, arguments: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in ("head_mask", "causal_attention_mask"):
        if name in given:
            raise ValueError(f"{name} must be None in a model that merges tokens, got {type(given[name]).__name__}")
    if told.size is not None:
        given.pop("attention_mask", None)  # padding has a count of 0
    if hasattr(_inner(layer), "apply_rotary_embeddings"):
        given = {name: given[name] for name in _inner(layer)._sttm.names if name in given}
        if told.ids is not None:
            given["position_mask"] = told.ids
    if "position_embeddings" in given:
        tables = given["position_embeddings"]
        if told.ids is not None:
            tables = tuple(rows(table, told.ids) for table in tables)
        # The module rotates by tables of no rows, which is not at all, so that `_attention` sees keys as they were.
        given |= {"position_embeddings": tuple(table[..., :0, :] for table in tables), "rotation": tables}
    attention = _first(layer, ATTENTION)
    out = attention(_first(layer, NORM1)(x), **given, **told_to(attention))
    out, rest = (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, ())
    return _branch(layer, 1, out) + x, rest


def _feed(layer: Layer, x: Tensor) -> Tensor:
    normed = _first(layer, NORM2)(x)
    if hasattr(layer, "mlp"):
        return _branch(layer, 2, layer.mlp(normed)) + x
    return layer.output(layer.intermediate(normed), x)


def _branch(layer: Layer, number: int, x: Tensor) -> Tensor:
    """What attention (1) or MLP (2) gave, after LayerScale, dropout and stochastic depth where a layer has them."""
    if hasattr(layer, f"lambda_{number}"):  # InternVL, whose dropout is that of its MLP
        return getattr(layer, f"lambda_{number}") * (layer.dropout(x) if number == 2 else x)
    if hasattr(layer, f"layer_scale{number}"):
        x = getattr(layer, f"layer_scale{number}")(x)
    for name in ("drop_path", "dropout"):
        if hasattr(layer, name):
            return getattr(layer, name)(x)
    return x


def _start(x: Tensor, arguments: dict[str, Any], state: State) -> State:
    valid = _valid(arguments)
    return state if valid is None else with_padding(x, valid, state)


INTERFACE = Family(_parts, _heads, _attend, _feed, start=_start)


# TimeSformer, which has an attention of its own


class TimesformerAttention(Swapped):
    """TimeSformer's attention, which tells its keys and takes counts; the same bits as its own while it has none."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        told = THREAD.now.told
        if told is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        told.keys = k
        if told.size is None:
            out = self.attn_drop((q @ k.mT * self.scale).softmax(-1)) @ v
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            out = proportional_attention(q, k, v, told.size, self.scale, told.method, dropout)
        return (out.transpose(1, 2).flatten(2),)


def _parts_timesformer(layer: Layer, method: str) -> list[tuple[nn.Module, type, Any]]:
    outer = unwrapped(layer.attention)
    return [(outer, Attends, None), (unwrapped(outer.attention), TimesformerAttention, None)]


def _heads_timesformer(layer: Layer) -> int:
    return layer.attention.attention.num_heads


def _attend_timesformer(
    layer: Layer, x: Tensor, told: Told, arguments: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...]]:
    if arguments.get("output_attentions"):
        raise ValueError("output_attentions must be False in a TimeSformer that merges tokens, got True")
    if layer.attention_type == "divided_space_time":
        return _attend_divided(layer, x, told), ()
    out = layer.attention(layer.layernorm_before(x), **told_to(layer.attention))
    return x + layer.drop_path(out[0]), ()


def _attend_divided(layer: Layer, x: Tensor, told: Told) -> Tensor:
    """Attention over time within a tube, then over space within a frame.

    x is `(B, 1 + P * T, C)`: the class token, then tube after tube, a tube being the T tokens of one place. Merging
    joins whole tubes, so this holds for any number P of them. All tokens of a tube have the same count, which attention
    over time does not see.
    """
    T = layer.config.num_frames
    B, _, C = x.shape
    first, tubes = x[:, :1], x[:, 1:]
    P = tubes.shape[1] // T
    over_time = layer.temporal_attention(layer.temporal_layernorm(tubes.reshape(B * P, T, C)))[0]
    over_time = layer.drop_path(over_time).reshape(B, P * T, C)
    tubes = tubes + layer.temporal_dense(over_time)

    frames = tubes.reshape(B, P, T, C).transpose(1, 2).reshape(B * T, P, C)
    frames = torch.cat((first.repeat(1, T, 1).reshape(B * T, 1, C), frames), 1)
    if told.size is not None:
        told.size = torch.cat((told.size[:, :1], told.size[:, 1::T]), 1).repeat_interleave(T, 0)
    out = layer.drop_path(layer.attention(layer.layernorm_before(frames), **told_to(layer.attention))[0])
    class_out = out[:, 0].reshape(B, T, C).mean(1, True)
    out = out[:, 1:].reshape(B, T, P, C).transpose(1, 2).reshape(B, P * T, C)
    return torch.cat((first, tubes), 1) + torch.cat((class_out, out), 1)


def _feed_timesformer(layer: Layer, x: Tensor) -> Tensor:
    return x + layer.drop_path(layer.output(layer.intermediate(layer.layernorm_after(x))))


def _merge_timesformer(layer: Layer, x: Tensor, keys: Tensor, step: Step, state: State) -> tuple[Tensor, State]:
    """Merges r tubes, by their keys in all frames; x as in `_attend_divided`, keys `(B * T, H, 1 + P, D)`."""
    if layer.attention_type != "divided_space_time":
        return merge_tokens(layer, x, keys, step, state)
    T = layer.config.num_frames
    B, N, C = x.shape
    metric = keys[:, :, 1:].unflatten(0, (B, T)).permute(0, 2, 3, 1, 4).flatten(3)
    plan = find_pairs(metric, step, 0)
    tubes = merge(x[:, 1:].reshape(B, (N - 1) // T, T * C), plan, None if state.size is None else state.size[:, 1::T])

    one = torch.ones_like(tubes.size[:, :1])
    size = torch.cat((one, tubes.size.repeat_interleave(T, 1)), 1)
    frame = torch.arange(T, dtype=torch.int32, device=x.device)
    index = (1 + T * plan.index[..., None] + frame).flatten(1)
    index = torch.cat((torch.zeros_like(index[:, :1]), index), 1)
    if state.index is not None:
        index = compose(MergePlan(state.index, x.shape[1]), MergePlan(index, size.shape[1])).index
    return torch.cat((x[:, :1], tubes.x.reshape(B, T * plan.num_groups, C)), 1), replace(state, size=size, index=index)


TIMESFORMER = Family(_parts_timesformer, _heads_timesformer, _attend_timesformer, _feed_timesformer, _merge_timesformer)


class Embeddings(Swapped):
    """Tells which grid the tokens of a clip `(B, T, C, H, W)` or an image `(B, C, H, W)` are.

    It finds the (t, y, x) of a patch and the number of tokens before the grid in `_sttm`. Nothing is told where some of
    the tokens are left out.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]
        x = out[0] if isinstance(out, tuple) else out
        pixels = args[0] if args else next(iter(kwargs.values()))
        (t, height, width), num_prefix = self._sttm
        frames = pixels.shape[1] if pixels.dim() == 5 else 1
        # V-JEPA 2 repeats frames that are fewer than a patch has.
        grid = (frames // t if frames >= t else frames, pixels.shape[-2] // height, pixels.shape[-1] // width)
        if x.shape[1] == num_prefix + math.prod(grid):
            setattr(x, STATE, State(first_grid=grid))
        return out


def _pair(extent: Any) -> tuple[int, int]:
    return (extent, extent) if isinstance(extent, int) else (extent[0], extent[1])


def _example(model: Layer) -> tuple[str, tuple[int, ...]] | None:
    """The name and shape of one image or clip of the size the config says, if it says one."""
    config = model.config
    extent = getattr(config, "crop_size", None) or getattr(config, "image_size", None)
    if extent is None:
        return None
    size = _pair(extent)
    channels = config.num_channels if hasattr(config, "num_channels") else config.in_chans
    frames = [getattr(config, name) for name in ("num_frames", "frames_per_clip") if hasattr(config, name)]
    return getattr(model, "main_input_name", "pixel_values"), (1, *frames, channels, *size)


def _patch(config: Any) -> Grid:
    """(t, y, x) of a patch."""
    tubelet = getattr(config, "tubelet_size", 1)
    return (tubelet, *_pair(config.patch_size)) if isinstance(tubelet, int) else tuple(tubelet)


def _videomae(config: Any) -> dict[str, Any]:
    if config.use_mean_pooling:
        return {"num_prefix": 0}
    reason = "its head reads the first token of the grid, which stays alone"
    return {"num_prefix": 1, "refused": {"method": reason, "window": reason}}


def _timesformer(config: Any) -> dict[str, Any]:
    if config.attention_type != "divided_space_time":
        reason = "the grid of its tokens is not known"
        return {"refused": {"method": reason, "window": reason}}
    reason = "divided attention needs the same tokens in every frame, which only merging whole tubes leaves"
    return {
        "num_tokens": 1 + config.num_frames * (config.image_size // config.patch_size),
        "unit": config.num_frames,
        "refused": {"method": reason, "window": reason},
    }


def _dinov3(config: Any) -> dict[str, Any]:
    angles = torch.linspace(0, 8, 16 * (config.hidden_size // config.num_attention_heads), device="cpu").view(16, -1)
    return {
        "num_prefix": 1 + config.num_register_tokens,
        "rotary": True,
        "arguments": {"position_embeddings": (angles.cos(), angles.sin())},
    }


KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vit": lambda config: {"num_prefix": 1},
    "deit": lambda config: {"num_prefix": 2},
    "videomae": _videomae,
    "vivit": lambda config: {"num_prefix": 1},
    "clip_vision_model": lambda config: {"num_prefix": 1},
    "siglip_vision_model": lambda config: {"num_prefix": 0},
    "siglip2_vision_model": lambda config: {"num_prefix": 0, "gridded": ()},  # images of several sizes in one batch
    "dinov2": lambda config: {"num_prefix": 1},
    "dinov2_with_registers": lambda config: {"num_prefix": 1 + config.num_register_tokens},
    "dinov3_vit": _dinov3,
    "internvl_vision": lambda config: {"num_prefix": 1},
    "vjepa2": lambda config: {"num_prefix": 0, "rotary": True},
    "timesformer": lambda config: {"num_prefix": 1, "families": (TIMESFORMER,), **_timesformer(config)},
}
"""What is special about each `config.model_type`, as arguments of `Anatomy`."""

QWEN = ("qwen2_5_vl", "qwen2_5_vl_vision", "qwen3_vl", "qwen3_vl_vision")
"""Kinds of vision models of packed tokens, and of the video-language models that hold them: `qwen` knows both."""
TOWERS = ("llava_onevision", "internvl")
"""Kinds of video-language models whose `vision_tower` is one of `KINDS`."""

LAYERS = ("layers", "layer", "encoder.layers", "encoder.layer")
EMBEDDINGS = ("embeddings", "encoder.embeddings")
BETWEEN = ("pre_layrnorm",)
"""The norm between embeddings and layers."""


def _part(model: Layer, paths: tuple[str, ...]) -> nn.Module | None:
    """What is at the first of the paths there is in the body of a model or, where that is no more than the layers, in
    the model itself."""
    body: Layer = getattr(model, "base_model", model)
    roots: tuple[Layer, ...] = (getattr(body, "vision_model", body), model)
    for root in roots:
        for path in paths:
            with suppress(AttributeError):
                return root.get_submodule(path)
    return None


def _kind(model: Layer) -> str | None:
    """`config.model_type` of what is of transformers; models inside of models are not always a `PreTrainedModel`."""
    if isinstance(model, PreTrainedModel) or type(model).__module__.startswith("transformers."):
        return getattr(getattr(model, "config", None), "model_type", None)
    return None


def anatomy(model: Layer) -> Anatomy | None:
    """What the model is made of, or None if it is not of transformers; `ValueError` if it is but cannot be merged."""
    kind = _kind(model)
    if kind is None:
        return None
    name, config = type(model).__name__, model.config
    if kind in QWEN:
        return _packed(model)
    if kind in TOWERS:
        return _inside(model)
    if kind not in KINDS:
        message = f"model must be one of {(*KINDS, *QWEN, *TOWERS)} of transformers, got {name} of {kind!r}"
        inside = next((path for path, module in model.named_modules() if path and _kind(module) in KINDS), None)
        raise ValueError(message + (f"; inside of it, model.{inside} is one: apply to that" if inside else ""))
    if kind == "videomae" and hasattr(model, "decoder"):
        raise ValueError(f"model must not be {name}: its decoder is to fill in tokens at their own places")
    if hasattr(model, "out_features") and list(model.out_features) != list(model.stage_names[-1:]):
        raise ValueError(
            f"model must have out_features={model.stage_names[-1:]}, for only the last layer puts tokens back at all "
            f"places, {name} has {model.out_features}"
        )
    layers = _part(model, LAYERS)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"model must have its layers at one of {LAYERS}, {name} has none there")
    special = KINDS[kind](config)
    embeddings, between = _part(model, EMBEDDINGS), _part(model, BETWEEN)
    gridded: list[tuple[nn.Module, type, Any]] = []
    if embeddings is not None:
        gridded.append((embeddings, Embeddings, (_patch(config), special["num_prefix"])))
    if between is not None:
        gridded.append((between, Carries, None))
    common = {
        "families": (INTERFACE,),
        "dim": config.hidden_size,
        "rotary": False,
        "num_tokens": special["num_prefix"] + 16,
        "example": _example(model),
        "gridded": gridded,
        "mixin": MergingModel,
    }
    return Anatomy(layers=own_layers(list(layers)), **{**common, **special})


def _packed(model: Layer) -> Anatomy:
    """That of a vision model of `qwen`, alone or inside of a video-language model."""
    tower = qwen.tower_of(model)
    if not isinstance(getattr(tower, "blocks", None), nn.ModuleList):
        raise ValueError(f"model must have a vision model, {type(model).__name__} has none")
    special = qwen.anatomy(tower)
    if tower is not model:
        special["mixin"] = MergingModel
    return Anatomy(layers=own_layers(list(tower.blocks)), dim=tower.config.hidden_size, **special)


def _inside(model: Layer) -> Anatomy:
    """That of the vision tower of a video-language model."""
    name, layer = type(model).__name__, getattr(model.config, "vision_feature_layer", -1)
    if layer != -1:
        raise ValueError(
            f"model must have vision_feature_layer=-1, for only the last layer puts tokens back at all places, {name} "
            f"has {layer}"
        )
    body = model if hasattr(model, "vision_tower") else model.model
    found = anatomy(body.vision_tower)
    if found is None or found.mixin is None:
        raise ValueError(
            f"model must have a vision tower of transformers, {name} has {type(body.vision_tower).__name__}"
        )
    return replace(found, body=body.vision_tower, swaps=[*found.swaps, (body.vision_tower, found.mixin, None)])
