"""Clips per second of VideoMAE for several numbers of merged tokens.

python examples/throughput.py --batch 8 --r 0 32 65 100
"""

from __future__ import annotations

import time

import torch
from clips import arguments, clip, videomae

import sttm_kernels as sttm


def seconds_per_batch(model: torch.nn.Module, batch: torch.Tensor, repetitions: int) -> float:
    model(batch)
    if batch.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        model(batch)
    if batch.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repetitions


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], r=[0, 32, 65, 100])
    parser.add_argument("--batch", type=int, default=8 if torch.cuda.is_available() else 1)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    model = videomae(options.model, options.device)
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    batch = clip(model).expand(options.batch, -1, -1, -1, -1).to(dtype)
    model.to(dtype)

    with torch.inference_mode():
        first = seconds_per_batch(model, batch, options.repetitions)
        for r in options.r:
            seconds = seconds_per_batch(sttm.apply(model, r=r), batch, options.repetitions)
            print(f"r = {r:<5}{options.batch / seconds:>9.2f} clips/s{first / seconds:>7.2f} x the unmerged model")


if __name__ == "__main__":
    main()
