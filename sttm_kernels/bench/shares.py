"""Which setting of ToMe and of STTM takes a share of a model's operations; counted on PyTorch's meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sttm_kernels as sttm
from sttm_kernels.bench.models import Encoder, found_in
from sttm_kernels.integrations.amounts import nearest
from sttm_kernels.nn.flops import flops

Shape = tuple[int, ...]
STEPS = 256
"""The keep of STTM's stages is chosen in steps of 1 / STEPS."""


@dataclass(frozen=True)
class Model:
    """A model of random weights and the shape of one input of it; `row`: of Qwen's vision models, whose tokens
    are those of all frames in one row."""

    build: Callable[[], nn.Module]
    shape: Shape
    row: bool = False


def _timm(name: str, size: int = 224) -> Model:
    def build() -> nn.Module:
        return found_in("timm", "create_model")(name)

    return Model(build, (3, size, size))


def _transformers(kind: str, shape: Shape, **options: Any) -> Model:
    def build() -> nn.Module:
        config = found_in("transformers", f"{kind.removesuffix('Model')}Config")(**options)
        return found_in("transformers", kind)(config)

    return Model(build, shape)


def _sizes(width: int, depth: int, heads: int, mlp: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp,
    }  # fmt: skip


def _qwen(kind: str, **vision: int) -> Model:
    """The vision model of the language model of 7B or 8B."""

    def build() -> nn.Module:
        config = found_in("transformers", f"{kind}Config")
        model = found_in("transformers", f"{kind}Model")
        return _tower(model(config(vision_config=vision, text_config={"num_hidden_layers": 1})))

    return Model(build, (64, 3, 448, 448), row=True)


def _tower(model: nn.Module) -> Any:
    from sttm_kernels.integrations import qwen

    return qwen.tower_of(model)


BASE, LARGE, HUGE = _sizes(768, 12, 12, 3072), _sizes(1024, 24, 16, 4096), _sizes(1280, 32, 16, 5120)
CLIP = 16, 3, 224, 224


def _vjepa2(frames: int, size: int, width: int, depth: int, heads: int, mlp_ratio: float = 4.0) -> Model:
    return _transformers(
        "VJEPA2Model", (frames, 3, size, size), hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        mlp_ratio=mlp_ratio, crop_size=size, frames_per_clip=frames,
    )  # fmt: skip


MODELS: dict[str, Model] = {
    "vit-b": _timm("vit_base_patch16_224"),
    "vit-l": _timm("vit_large_patch16_224"),
    "videomae-b": _transformers("VideoMAEModel", CLIP, **BASE),
    "videomae-l": _transformers("VideoMAEModel", CLIP, **LARGE),
    "videomae-h": _transformers("VideoMAEModel", CLIP, **HUGE),
    "vivit-b": _transformers("VivitModel", (32, 3, 224, 224)),
    "timesformer": _transformers("TimesformerModel", (8, 3, 224, 224)),
    "vjepa2-l": _vjepa2(64, 256, 1024, 24, 16),
    "vjepa2-h": _vjepa2(64, 256, 1280, 32, 16),
    "vjepa2-g": _vjepa2(64, 384, 1408, 40, 22, 48 / 11),
    "clip-b-16": _transformers("CLIPVisionModel", (3, 224, 224), patch_size=16, **BASE),
    "clip-l-14": _transformers("CLIPVisionModel", (3, 224, 224), patch_size=14, **LARGE),
    "siglip-b-16": _transformers("SiglipVisionModel", (3, 224, 224), patch_size=16, **BASE),
    "siglip-so400m": _transformers(
        "SiglipVisionModel", (3, 384, 384), patch_size=14, image_size=384, **_sizes(1152, 27, 16, 4304)
    ),
    "qwen2.5-vl-7b": _qwen(
        "Qwen2_5_VL", depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584
    ),
    "qwen3-vl-8b": _qwen(
        "Qwen3VL", depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096
    ),
}


def of_timm(name: str, shape: Shape | None = None) -> Model:
    """A model of timm's, at the size it is configured for unless `shape` says another."""
    import timm

    if shape is None:
        configured = timm.get_pretrained_cfg(name)
        assert configured is not None
        shape = tuple(configured.input_size)
    return Model(lambda: timm.create_model(name), shape)


def of_folder(folder: str, shape: Shape | None = None) -> Model:
    """The model that a config.json of transformers describes, at the size it says unless `shape` says another.

    Raises:
        ValueError: it says no size.
    """
    import transformers

    from sttm_kernels.integrations.huggingface import QWEN

    config = transformers.AutoConfig.from_pretrained(folder)
    size = getattr(config, "crop_size", None) or getattr(config, "image_size", None)
    frames = getattr(config, "frames_per_clip", None) or getattr(config, "num_frames", None)
    if shape is None:
        if size is None:
            raise ValueError(f"shape must be given, for {folder} says no size of images, got None")
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (*([frames] if frames else []), config.num_channels, height, width)
    if config.model_type in QWEN:
        return Model(lambda: _tower(transformers.AutoModel.from_config(config)), shape, row=True)
    return Model(lambda: transformers.AutoModel.from_config(config), shape)


@dataclass(frozen=True)
class Setting:
    """Arguments of `apply`, in words, and the operations of one input with them; None where it refuses."""

    says: str
    operations: int | None


def settings(model: Model, share: float, r: int | None = None, keep: float | None = None) -> Iterator[Setting]:
    """Of the model without merging, with ToMe in every layer, and with STTM at its usual layers; nearest to `share`,
    or with the `r` and the `keep` that are given.

    Images have no temporal stage. Where a method is refused, the reason stands in place of its setting.
    """
    with torch.device("meta"):
        plain = model.build().eval()
    if model.row:
        yield from _settings_of_row(plain, model.shape, share, r)
        return
    shape = (1, *model.shape)
    full = flops(Encoder(plain), shape)
    yield Setting("without merging", full)

    def merging(**options: Any) -> nn.Module:
        return sttm.apply(copy.deepcopy(plain), **options)

    def cost(**options: Any) -> int:
        return flops(Encoder(merging(**options)), shape)

    traced = merging(r=1, trace=True)
    flops(Encoder(traced), shape)
    layers = sttm.trace(traced)
    if r is None:
        r = -nearest(share * full, -layers[0].index.shape[1] // 2, 0, lambda minus_r: cost(r=-minus_r))
    yield Setting(f"ToMe, r = {r} in each of {len(layers)} layers", cost(r=r))

    image = len(model.shape) == 3
    stages = ("spatial_keep",) if image else ("spatial_keep", "temporal_keep")
    where: dict[str, Any] = {"layers": (len(layers) // 3, None)} if image else {}

    def keeping(keep: float) -> dict[str, Any]:
        return {"method": "sttm", **where, **dict.fromkeys(stages, keep)}

    try:
        if keep is None:
            keep = nearest(share * full, 1, STEPS, lambda step: cost(**keeping(step / STEPS))) / STEPS
        yield Setting(f"STTM, {' = '.join(stages)} = {keep:.3f}", cost(**keeping(keep)))
    except ValueError as error:
        yield Setting(f"STTM: {error}", None)


def _settings_of_row(plain: Any, shape: Shape, share: float, r: int | None) -> Iterator[Setting]:
    """Of a vision model of Qwen, which merges a share of the tokens of each window or frame."""
    from sttm_kernels.integrations import budget, qwen

    if len(shape) != 4:
        raise ValueError(f"shape must be (T, 3, H, W), got {shape}")
    frames, _, height, width = shape

    def cost(tower: nn.Module, frames: int = frames) -> int:
        return budget.operations(tower, lambda: qwen.clip(tower, frames, height, width))

    yield Setting("without merging", cost(plain))
    amount: float | None = r
    if amount is None:  # looked for in as few frames as there can be: each has the same share
        few = plain.config.temporal_patch_size
        tower = sttm.apply(copy.deepcopy(plain), r=0.5)
        found = budget.share_within(share, cost(plain, few), tower, lambda: qwen.clip(tower, few, height, width))
        amount = 0.0 if found is None else found.numerator / found.denominator
    merged = sttm.apply(copy.deepcopy(plain), r=amount, trace=True)
    counted = cost(merged)
    layers = len(sttm.trace(merged)) if amount else len(plain.blocks)
    yield Setting(f"ToMe, r = {amount:g} of each window or frame in each of {layers} layers", counted)
    try:
        sttm.apply(copy.deepcopy(plain), method="sttm")
    except ValueError as error:
        yield Setting(f"STTM: {error}", None)
