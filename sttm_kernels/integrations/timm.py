"""timm's VisionTransformer (ViT, DeiT, DeiT III, DINOv2, SigLIP), Eva (EVA02, rotary ViTs, DINOv3) and NaFlexVit.

They are known by their parts, so timm itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sttm_kernels.integrations.merging import (
    STATE,
    THREAD,
    Anatomy,
    Attends,
    Carries,
    Family,
    Layer,
    MergingModel,
    ShowsKeys,
    State,
    Swapped,
    Told,
    densely,
    own_layers,
    real_tokens,
    rows,
    told_to,
    unwrapped,
    with_padding,
)
from sttm_kernels.nn.attention import choose_method, proportional_attention, size_bias

COUNTING = ("augment", "flex")
"""Methods that need fused attention."""


class _Counting(TorchFunctionMode):
    """Makes the fused attention that is called inside proportional to counts."""

    def __init__(self, size: Tensor, method: str) -> None:
        super().__init__()
        self.size = size
        self.method = method

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        dropout = (kwargs or {}).get("dropout_p", 0.0)
        q, k, v = args[:3]
        return proportional_attention(q, k, v, self.size, method=self.method, dropout=dropout)


class FusedAttention(Attends):
    """timm's attention, which takes no counts but as a mask."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        told = THREAD.now.told
        if told is None or told.size is None or told.method not in COUNTING:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _Counting(told.size, told.method):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _parts(layer: Layer, method: str) -> list[tuple[nn.Module, type, Any]]:
    if method in COUNTING and not layer.attn.fused_attn:
        raise ValueError(
            f"prop_attn must be 'mask', 'auto' or 'off' where timm's attention is not fused, got {method!r}"
        )
    return [(unwrapped(layer.attn), FusedAttention, None), (layer.attn.k_norm, ShowsKeys, None)]


def _heads(layer: Layer) -> int:
    return layer.attn.num_heads


def _attention(layer: Layer, x: Tensor, told: Told, arguments: dict[str, Any]) -> Tensor:
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if arguments.pop("is_causal", False):
        raise ValueError("is_causal must be False in a model that merges tokens, got True")
    if told.ids is not None and "rope" in arguments:
        arguments["rope"] = rows(arguments["rope"], told.ids)
    if told.size is not None:
        arguments.pop("attn_mask", None)  # padding has a count of 0
        if not layer.attn.fused_attn:
            told.method = "mask"
        elif told.method == "auto":
            told.method = choose_method(x.device, x.dtype, layer.attn.head_dim)
        if told.method not in COUNTING:
            arguments["attn_mask"] = size_bias(told.size, x.dtype)
    return layer.attn(x, **arguments, **told_to(layer.attn))


def _scaled(layer: Layer, branch: int, x: Tensor) -> Tensor:
    """LayerScale, by either of the names it goes by, and drop path."""
    if hasattr(layer, f"ls{branch}"):
        x = getattr(layer, f"ls{branch}")(x)
    gamma = getattr(layer, f"gamma_{branch}", None)
    if gamma is not None:
        x = gamma * x
    return getattr(layer, f"drop_path{branch}")(x)


def _attend_pre(layer: Layer, x: Tensor, told: Told, arguments: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    return x + _scaled(layer, 1, _attention(layer, layer.norm1(x), told, arguments)), ()


def _feed_pre(layer: Layer, x: Tensor) -> Tensor:
    return x + _scaled(layer, 2, layer.mlp(layer.norm2(x)))


def _attend_post(layer: Layer, x: Tensor, told: Told, arguments: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    return x + _scaled(layer, 1, layer.norm1(_attention(layer, x, told, arguments))), ()


def _feed_post(layer: Layer, x: Tensor) -> Tensor:
    return x + _scaled(layer, 2, layer.norm2(layer.mlp(x)))


def _start(x: Tensor, arguments: dict[str, Any], state: State) -> State:
    mask = arguments.get("attn_mask")
    return state if mask is None else with_padding(x, real_tokens("attn_mask", mask), state)


PRE_NORM = Family(_parts, _heads, _attend_pre, _feed_pre, start=_start)
POST_NORM = Family(_parts, _heads, _attend_post, _feed_post, start=_start)


class PatchEmbed(Swapped):
    """Tells which grid the patches `(B, N, C)` or `(B, H, W, C)` of an image are."""

    def __call__(self, image: Tensor) -> Tensor:
        patches = super().__call__(image)  # type: ignore[misc]
        if patches.dim() == 4:
            height, width = patches.shape[1:3]
        else:
            size, pad = self.patch_size[1], self.dynamic_img_pad  # type: ignore[attr-defined]
            width = (image.shape[3] + (size - 1 if pad else 0)) // size
            height = patches.shape[1] // width
        setattr(patches, STATE, State(first_grid=(1, height, width)))
        return patches


class TimmModel(MergingModel):
    """What a model of timm does otherwise when its layers merge."""

    def _pos_embed(self, x: Tensor) -> Any:
        """timm's; the tokens are in the state of the patches, unless some were dropped."""
        out = super()._pos_embed(x)  # type: ignore[misc]
        state = getattr(x, STATE, None)
        if state is not None:
            setattr(out[0] if isinstance(out, tuple) else out, STATE, state)
        return out

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        return self._ended(super().forward_features, *args, **kwargs)  # type: ignore[misc]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's, with every layer's tokens copied back to all places."""
        with densely():
            return super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("remove(model) before layers are pruned, then apply again: the last layer ends the merging")


def anatomy(model: Layer) -> Anatomy | None:
    """What the model is made of, or None if it is not built like timm's; `ValueError` if it is but cannot be merged."""
    blocks, prefix = getattr(model, "blocks", None), getattr(model, "num_prefix_tokens", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not isinstance(prefix, int) or not len(blocks):
        return None
    patch_embed = getattr(model, "patch_embed", None)
    if patch_embed is None and not hasattr(model, "_forward_embeds"):
        raise ValueError(f"model must have a patch_embed, or be a NaFlexVit, {type(model).__name__} is neither")
    layers = own_layers(list(blocks))
    for number, layer in enumerate(layers):
        for path in ("norm1", "attn.k_norm", "drop_path1", "norm2", "mlp", "drop_path2"):
            try:
                layer.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"model must have blocks with a {path}, block {number} of {type(model).__name__}, "
                    f"a {type(layer).__name__}, has none"
                ) from None
    rope = getattr(model, "rope", None)
    arguments, tokens = {}, 16
    if rope is not None:
        table = rope.get_embed(shape=(4, 4))
        if getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False):
            table = table[0]
        arguments["rope"] = table[..., :tokens, :]
        tokens = min(tokens, table.shape[-2])
    gridded: list[tuple[nn.Module, type, Any]] = []
    if patch_embed is not None and hasattr(patch_embed, "dynamic_img_pad"):
        gridded.append((patch_embed, PatchEmbed, None))
    if patch_embed is not None and isinstance(getattr(model, "norm_pre", None), nn.Module):
        gridded.append((model.norm_pre, Carries, None))
    image, project = getattr(patch_embed, "img_size", None), getattr(patch_embed, "proj", None)
    channels = getattr(project, "in_channels", None)
    return Anatomy(
        layers=layers,
        families=(PRE_NORM, POST_NORM),
        num_prefix=prefix,
        dim=model.embed_dim,
        rotary=rope is not None,
        num_tokens=prefix + tokens,
        arguments=arguments,
        example=None if image is None or channels is None else ("x", (1, channels, *image)),
        gridded=gridded,
        mixin=TimmModel,
    )
