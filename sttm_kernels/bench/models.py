"""What merging inside a model saves, and how much of the saved arithmetic becomes saved time.

Run `python -m benchmarks.models [--family NAME ...] [--device cpu|cuda] [--batch B] [--out FILE]`.

Each family at its real size, with random weights: floating-point operations and tokens from a run on PyTorch's meta
device; time as the median of runs in which the model without merging (its own, fused attention) and the one with
merging take turns; peak memory of one forward above what was there before. The last column is the realised speed-up
over the reduction in floating-point operations: 1 says that all of it was realised.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.nn.flops import flops


@dataclass(frozen=True)
class Family:
    """A model of so many layers that merges r tokens (TimeSformer: places) in each."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    r: int
    on_cpu: bool = True


def _vision(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return build


def _video(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        head = "TimesformerForVideoClassification" if name == "Timesformer" else f"{name}Model"
        return getattr(transformers, head)(getattr(transformers, f"{name}Config")(**options))

    return build


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
FAMILIES = {
    "ViT-L/16 224": Family(_vision("vit_large_patch16_224"), (3, 224, 224), 8),
    "DINOv2-L/14 224": Family(_vision("vit_large_patch14_dinov2", img_size=224), (3, 224, 224), 8),
    "VideoMAE-B 16x224": Family(_video("VideoMAE"), (16, 3, 224, 224), 65),
    "VideoMAE-L 16x224": Family(_video("VideoMAE", **LARGE), (16, 3, 224, 224), 65),
    "ViViT-B 32x224": Family(_video("Vivit"), (32, 3, 224, 224), 130),
    "TimeSformer 8x224": Family(_video("Timesformer"), (8, 3, 224, 224), 8),
    "V-JEPA 2 L 16x256": Family(_video("VJEPA2", crop_size=256, frames_per_clip=16), (16, 3, 256, 256), 42),
    "V-JEPA 2 L 64x256": Family(
        _video("VJEPA2", crop_size=256, frames_per_clip=64), (64, 3, 256, 256), 170, on_cpu=False
    ),
}


class Encoder(nn.Module):
    """The model without what its outputs are wrapped in; V-JEPA 2 without its predictor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.options = {"skip_predictor": True} if hasattr(model, "predictor") else {}

    def forward(self, clip: Tensor) -> Tensor:
        out = self.model(clip, **self.options)
        return out if isinstance(out, Tensor) else out[0]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def turns(runs: Sequence[Callable[[], object]], device: torch.device, repetitions: int) -> list[float]:
    """Median seconds of each, after one run to warm up."""
    for run in runs:
        seconds_of(run, device)
    times = [[seconds_of(run, device) for run in runs] for _ in range(repetitions)]
    return [statistics.median(each) for each in zip(*times, strict=True)]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Of a GPU's memory, above what was there before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(name: str, device: torch.device, dtype: torch.dtype, batch: int, repetitions: int, compiled: bool) -> dict:
    family = FAMILIES[name]
    torch.manual_seed(0)
    plain = Encoder(family.build()).eval()
    merging = Encoder(family.build()).eval()
    merging.load_state_dict(plain.state_dict())
    sttm.apply(merging.model, r=family.r, trace=True)
    before, after = (flops(model, (1, *family.shape)) for model in (plain, merging))
    traced = sttm.trace(merging.model)
    tokens = [traced[0].index.shape[1], *(each.size.shape[1] for each in traced)]
    sttm.apply(merging.model, r=family.r)
    row = {
        "family": name, "r": family.r, "tokens": " ".join(map(str, tokens)), "GFLOP": before / 1e9,
        "GFLOP merged": after / 1e9, "FLOP reduction": before / after, "device": _name(device), "batch": batch,
        "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "compiled": compiled,
    }  # fmt: skip
    if device.type == "cpu" and not family.on_cpu:
        return row
    clip = torch.randn(batch, *family.shape).to(device, dtype)
    runs = []
    for model in (plain, merging):
        model.to(device, dtype)
        run = torch.compile(model) if compiled else model
        runs.append(lambda run=run: run(clip))
    with torch.inference_mode():
        times = turns(runs, device, repetitions)
        peaks = [peak_bytes(run, device) / 1e6 for run in runs] if device.type == "cuda" else None
    speedup = times[0] / times[1]
    row |= {"ms": 1e3 * times[0], "ms merged": 1e3 * times[1], "speed-up": speedup}
    row["realised"] = speedup / (before / after)
    return row if peaks is None else row | {"MB": peaks[0], "MB merged": peaks[1]}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "cpu"


def line(row: dict) -> str:
    tokens = row["tokens"].split()
    head = f"{row['family']:<19} {tokens[0]:>5} -> {tokens[-1]:<5}"
    head += f"{row['GFLOP']:>8.0f} -> {row['GFLOP merged']:<8.0f}{row['FLOP reduction']:>5.2f} x"
    if "ms" not in row:
        return f"{head}   not timed on a CPU"
    head += f"{row['ms']:>9.1f} -> {row['ms merged']:<9.1f}{row['speed-up']:>5.2f} x{row['realised']:>8.2f}"
    return f"{head}{row['MB']:>9.0f} -> {row['MB merged']:<6.0f}" if "MB" in row else head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=[*FAMILIES, []], default=list(FAMILIES), metavar="NAME",
                        help=f"of: {', '.join(FAMILIES)}")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--batch", type=int, help="default: 8 on a GPU, 1 on a CPU")
    parser.add_argument("--repetitions", type=int, help="default: 20 on a GPU, 3 on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="a CSV that rows are added to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    batch = arguments.batch or (8 if cuda else 1)
    repetitions = arguments.repetitions or (20 if cuda else 3)
    print(f"{_name(device)}, torch {torch.__version__}, {dtype}, batch {batch}, {arguments.threads} threads")
    print(f"{'':<20}{'tokens':^14}{'GFLOP':^20}{'':>7}{'ms':^22}{'speed-up':>6}{'realised':>9}{'peak MB':^18}")
    for name in arguments.family:
        row = measure(name, device, dtype, batch, repetitions, arguments.compile)
        print(line(row), flush=True)
        if arguments.out is not None:
            _append(arguments.out, row)


FIELDS = (
    "family", "device", "torch", "dtype", "threads", "batch", "compiled", "r", "tokens", "GFLOP", "GFLOP merged",
    "FLOP reduction", "ms", "ms merged", "speed-up", "realised", "MB", "MB merged",
)  # fmt: skip


def _append(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{v:.4g}" if isinstance(v := row.get(name, ""), float) else v for name in FIELDS})


if __name__ == "__main__":
    main()
