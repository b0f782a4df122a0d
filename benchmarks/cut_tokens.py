"""What fewer tokens are worth at most: merging beside tokens that are only cut off, for which nothing is computed.

Run `python -m benchmarks.cut_tokens`.

Both leave the same number of tokens to every layer of a timm model, so their difference is what merging costs, and what
cutting falls short of the reduction in operations is what products of fewer tokens lose on this device. Contenders take
turns.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.bench.models import FAMILIES
from sttm_kernels.bench.timing import device_name, time_in_turns
from sttm_kernels.nn.flops import flops

CPU = torch.device("cpu")


class Cut(nn.Module):
    """A block of timm's vision Transformer, without the last r tokens behind its attention."""

    def __init__(self, block: nn.Module, r: int) -> None:
        super().__init__()
        self.block = block
        self.r = r

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x[:, : x.shape[1] - min(self.r, (x.shape[1] - 1) // 2)].contiguous()
        return x + block.ls2(block.mlp(block.norm2(x)))


def cut(model: nn.Module, r: int) -> nn.Module:
    model = copy.deepcopy(model)
    model.blocks = nn.Sequential(*(Cut(block, r) for block in model.blocks))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="spent on each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8])
    parser.add_argument("models", nargs="*", default=["ViT-L/16 224", "DINOv2-L/14 224"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{device_name(CPU)}, {given.threads} threads, torch {torch.__version__}, float32, batch 1")
    print(f"{'model':16} {'':9} {'r':>3} {'ms':>8} {'reduction':>10} {'speed-up':>9} {'realised':>9}")
    for name in given.models:
        family = FAMILIES[name]
        torch.manual_seed(0)
        plain = family.build().eval()
        clip = torch.randn(1, *family.shape)
        models = {("unmerged", 0): plain}
        for r in given.r:
            models["merged", r] = sttm.apply(copy.deepcopy(plain), r=r)
            models["cut", r] = cut(plain, r)
        with torch.inference_mode():
            samples = time_in_turns({key: [partial(model, clip)] for key, model in models.items()}, CPU, given.seconds)
        operations = {key: flops(model, clip.shape) for key, model in models.items() if key[0] != "cut"}
        for (what, r), sample in samples.items():
            reduction = operations["unmerged", 0] / operations["merged" if r else "unmerged", r]
            faster = samples["unmerged", 0].p50 / sample.p50
            times = f"{sample.p50 / 1e3:8.0f} {reduction:10.2f} {faster:9.2f} {faster / reduction:9.2f}"
            print(f"{name:16} {what:9} {r:3} {times}", flush=True)


if __name__ == "__main__":
    main()
