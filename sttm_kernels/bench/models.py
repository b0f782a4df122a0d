"""What merging inside a model saves, and how much of the saved arithmetic becomes saved time.

Each family at its real size, with random weights: floating-point operations and tokens from a run on PyTorch's meta
device; time with the model without merging (its own, fused attention) and those with it taking turns; peak memory of
one forward above what was there before.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.bench import timing
from sttm_kernels.bench.runner import Row, Settings, now, why
from sttm_kernels.bench.timing import Ceilings
from sttm_kernels.console import why_not_imported
from sttm_kernels.nn.flops import flops


@dataclass(frozen=True)
class Family:
    """A model, the shape of a clip, and how many tokens (TimeSformer: places) to merge in each layer."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rates: tuple[int, ...]


def found_in(package: str, name: str) -> Any:
    """What `package`, timm or transformers, has by this name.

    Raises:
        ImportError: it is not installed, or cannot be loaded; the message says why.
    """
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"{package} cannot be imported: {why_not_imported(error)}") from error


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return found_in("timm", "create_model")(name, **options)

    return build


def _video(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        head = "TimesformerForVideoClassification" if name == "Timesformer" else f"{name}Model"
        return found_in("transformers", head)(found_in("transformers", f"{name}Config")(**options))

    return build


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
FAMILIES = {
    "ViT-L/16 224": Family(_vision("vit_large_patch16_224"), (3, 224, 224), (2, 4, 8)),
    "DINOv2-L/14 224": Family(_vision("vit_large_patch14_dinov2", img_size=224), (3, 224, 224), (2, 4, 8)),
    "VideoMAE-B 16x224": Family(_video("VideoMAE"), (16, 3, 224, 224), (33, 65, 98)),
    "VideoMAE-L 16x224": Family(_video("VideoMAE", **LARGE), (16, 3, 224, 224), (16, 33, 65)),
    "ViViT-B 32x224": Family(_video("Vivit"), (32, 3, 224, 224), (65, 130, 196)),
    "TimeSformer 8x224": Family(_video("Timesformer"), (8, 3, 224, 224), (4, 8, 12)),
    "V-JEPA 2 L 16x256": Family(_video("VJEPA2", crop_size=256, frames_per_clip=16), (16, 3, 256, 256), (21, 42, 63)),
    "V-JEPA 2 L 64x256": Family(_video("VJEPA2", crop_size=256, frames_per_clip=64), (64, 3, 256, 256), (85, 170, 255)),
}


class Encoder(nn.Module):
    """A model without what its outputs are wrapped in; V-JEPA 2 without its predictor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.options = {"skip_predictor": True} if hasattr(model, "predictor") else {}

    def forward(self, clip: Tensor) -> Tensor:
        out = self.model(clip, **self.options)
        return out if isinstance(out, Tensor) else out[0]


def measure(text: str, settings: Settings, limits: Ceilings, batch: int | None) -> Iterator[list[Row]]:
    """The rows of one family at a time: the forward of the model as it is, and merging at each rate.

    Args:
        text: only families with this in their name.
        batch: clips; default 8 on a GPU, 1 on a CPU.
    """
    batch = batch or (8 if settings.device.type == "cuda" else 1)
    for name, family in FAMILIES.items():
        if text not in name:
            continue
        everywhere = {"workload": name, "operation": "forward", "B": batch}
        try:
            yield [everywhere | row for row in _family(family, settings, limits, batch)]
        except (ImportError, RuntimeError, MemoryError) as error:
            missing = isinstance(error, ImportError)
            check = f"left out: {error}".splitlines()[0] if missing else why(error)
            yield [everywhere | {"impl": "unmerged", "time": now(), "check": check}]


def _family(family: Family, settings: Settings, limits: Ceilings, batch: int) -> list[Row]:
    torch.manual_seed(0)
    plain = Encoder(family.build()).eval()
    models = {r: _merging(plain, r) for r in family.rates}
    counted = {r: (_tokens(model, r, family.shape), flops(model, (1, *family.shape))) for r, model in models.items()}
    first = counted[family.rates[0]][0][0]
    counted[0] = [first, first], flops(plain, (1, *family.shape))
    models = {0: plain} | models
    expected = batch * counted[0][1] / limits.flop_rate

    rows: dict[str, Row] = {}
    calls: dict[str, list[timing.Call]] = {}
    clip = torch.randn(batch, *family.shape).to(settings.device, settings.dtype)
    plain.to(settings.device, settings.dtype)  # in place: the others share its parameters
    for compiled in (False, True)[: 1 + (settings.compiled and settings.device.type == "cuda")]:
        for r, model in models.items():
            tokens, clip_flops = counted[r]
            impl = ("merged" if r else "unmerged") + " compiled" * compiled
            rows[f"{impl} {r}"] = row = {
                "impl": impl, "N": tokens[0], "K": tokens[-1], "r": r, "tokens": " ".join(map(str, tokens)),
                "flops": batch * clip_flops, "floor_us": round(limits.floor(0, batch * clip_flops), 2),
            }  # fmt: skip
            if expected > settings.limit:
                row["check"] = (
                    f"left out: at least {expected:.0f} s without merging, over the limit of {settings.limit:g} s"
                )
                continue
            forward: Callable[[Tensor], Any] = torch.compile(model) if compiled else model
            calls[f"{impl} {r}"] = [partial(forward, clip)]
            with torch.inference_mode():
                finite = bool(forward(clip).isfinite().all())
            row["check"] = "passed" if finite else "failed: the output must be finite"
    with torch.inference_mode():
        samples = timing.time_in_turns(calls, settings.device, settings.seconds, least=3)
        for name, sample in samples.items():
            rows[name] |= {f"{part}_us": round(getattr(sample, part), 2) for part in ("p20", "p50", "p80")} | {
                "fraction_of_floor": float(f"{rows[name]['floor_us'] / sample.p50:.4g}"),
                "peak_bytes": timing.peak_bytes(calls[name][0], settings.device),
            }
    return [row | {"time": now()} for row in rows.values()]


def _merging(plain: Encoder, r: int) -> Encoder:
    """A copy that shares the parameters and merges."""
    model = copy.deepcopy(plain, memo={id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())})
    sttm.apply(model.model, r=r)
    return model


def _tokens(model: Encoder, r: int, shape: tuple[int, ...]) -> list[int]:
    """How many enter each layer that merges, and leave the last: counted, not run."""
    sttm.apply(model.model, r=r, trace=True)
    flops(model, (1, *shape))
    traced = sttm.trace(model.model)
    sttm.apply(model.model, r=r)
    return [traced[0].index.shape[1], *(layer.size.shape[1] for layer in traced)]
