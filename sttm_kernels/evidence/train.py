"""Training of one network, and what it gets right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sttm_kernels.evidence import clips
from sttm_kernels.evidence.network import Network

BATCH = 16
STEPS, TUNING_STEPS = 1200, 200
RATE, TUNING_RATE = 4e-3, 5e-4
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.05, 1.0
WARM_UP = 100
CLEAR = 0.3
"""The first part of training, in which clutter grows from none to all."""
EVALUATED = 2048
"""Clips that a row is measured on."""

Log = Callable[[str], None]


def train(network: Network, seed: int, steps: int, log: Log, tuning: bool = False) -> float:
    """Trains in place; returns the seconds it took. The same seed, steps and number of threads give the same bits.

    `tuning` starts from a trained network: a lower rate, a shorter warm-up, and all clutter from the start.
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    rate, warm_up = (TUNING_RATE, min(WARM_UP, steps // 5)) if tuning else (RATE, WARM_UP)
    optimizer = torch.optim.AdamW(_groups(network), lr=rate, betas=BETAS)
    network.train()
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * progress))
        clutter = 1.0 if tuning else min(1.0, progress / CLEAR)
        seen = clips.draw("train", seed + 1000 * tuning, step, BATCH, clutter)
        answers = network(seen.pixels, seen)
        assert answers.auxiliary is not None
        loss = F.cross_entropy(answers.digit, seen.digit) + F.cross_entropy(answers.motion, seen.motion)
        (loss + answers.auxiliary).backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            log(f"step {step + 1} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s")
    network.eval()
    return time.perf_counter() - began


def _groups(network: nn.Module) -> list[dict[str, object]]:
    """Matrices are decayed, vectors are not."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Right:
    """Which clips were answered right: bool `(clips,)`."""

    digit: Tensor
    motion: Tensor

    @property
    def joint(self) -> Tensor:
        return self.digit & self.motion


@torch.inference_mode()
def evaluate(network: Network, split: str = "report", batch: int = 64) -> Right:
    """On EVALUATED clips, the same for every network; what a network draws at random follows from the clips too."""
    network.eval()
    digit, motion = [], []
    for index in range(0, EVALUATED, batch):
        seen = clips.draw(split, 0, index, min(batch, EVALUATED - index))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            answers = network(seen.pixels)
        digit.append(answers.digit.argmax(-1) == seen.digit)
        motion.append(answers.motion.argmax(-1) == seen.motion)
    return Right(torch.cat(digit), torch.cat(motion))
