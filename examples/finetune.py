"""Fine-tunes VideoMAE while it merges tokens: autocast, activation checkpointing, gradients through every merge.

python examples/finetune.py --steps 5
"""

from __future__ import annotations

import torch
from clips import arguments, clip, videomae

import sttm_kernels as sttm


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    model = videomae(options.model, options.device).train()
    sttm.apply(model, r=options.r)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    frames = torch.cat((clip(model), clip(model).flip(1)))  # a clip and the same clip backwards
    labels = torch.tensor([0, 1], device=frames.device)
    for step in range(options.steps):
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            loss = model(frames, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    sttm.remove(model)  # the weights are those of a plain VideoMAE


if __name__ == "__main__":
    main()
