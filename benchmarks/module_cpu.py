"""What `STTM` costs beside a block of the Transformer that it relieves, forward and backward on one core.

Run `python -m benchmarks.module_cpu`.

Contenders take turns. The block has norms before, fused attention and an MLP of four times the width, and gets the
tokens that STTM is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sttm_kernels as sttm
from sttm_kernels.bench.timing import device_name, time_in_turns

CPU = torch.device("cpu")
CLIPS = ((16, (8, 6, 6), 64, 16), (1, (8, 14, 14), 768, 64))
"""Batch, grid, channels, channels of a head."""


class Block(nn.Module):
    def __init__(self, dim: int, head: int) -> None:
        super().__init__()
        self.heads = dim // head
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def step(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    grad = torch.randn_like(run(x))

    def forward_and_backward() -> None:
        x.grad = None
        run(x).backward(grad)

    return forward_and_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each contender (%(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{device_name(CPU)}, 1 thread, torch {torch.__version__}, float32, spatial 0.75, temporal 0.7, windows of 2")
    print(f"{'tokens':22} {'':9} {'ms':>8} {'20th':>8} {'of the block':>13}")
    for batch, grid, dim, head in CLIPS:
        tokens = grid[0] * grid[1] * grid[2]
        x = torch.randn(batch, tokens, dim, requires_grad=True)
        calls = {"block": [step(Block(dim, head), x)]}
        for meta in ("kmeans", "pool", "distinct"):
            merger = sttm.STTM(dim, 0.75, 0.7, meta, temporal_window=2)
            calls[meta] = [step(lambda x, merger=merger, grid=grid: merger(x, grid).x, x)]
        samples = time_in_turns(calls, CPU, given.seconds)
        for name, sample in samples.items():
            times = f"{sample.p50 / 1e3:8.1f} {sample.p20 / 1e3:8.1f} {sample.p50 / samples['block'].p50:13.2f}"
            print(f"{f'{batch} x {tokens} x {dim}':22} {name:9} {times}", flush=True)


if __name__ == "__main__":
    main()
