"""A step of training on a CPU, forward, backward and update, with merging and without.

Run `python -m benchmarks.training_step_cpu`.

The small video Transformer of `sttm-kernels evidence`, merging at 62 % of the operations; contenders take turns, so
that their ratio stands when the machine's speed does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sttm_kernels.bench.timing import device_name, time_in_turns
from sttm_kernels.evidence import clips, contenders, jobs, train

CPU = torch.device("cpu")


def step(name: str, percent: int) -> tuple[Callable[[], None], float]:
    """One step of a contender, and its share of the operations."""
    knob = contenders.calibrated(name, percent)
    torch.manual_seed(0)
    network = contenders.network(name, knob)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    seen = clips.draw("train", 0, 0, train.BATCH, 1.0)

    def run() -> None:
        answers = network(seen.pixels, seen)
        assert answers.auxiliary is not None
        loss = F.cross_entropy(answers.digit, seen.digit) + F.cross_entropy(answers.motion, seen.motion)
        (loss + answers.auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, contenders.operations(name, knob) / contenders.operations("unmerged", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="spent on each contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("contenders", nargs="*", default=["sttm", "sttm-kmeans", "tome"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps = {name: step(name, jobs.GOAL) for name in given.contenders} | {"unmerged": step("unmerged", 0)}
    samples = time_in_turns({name: [run] for name, (run, _) in steps.items()}, CPU, seconds=given.seconds)
    whole = samples["unmerged"].p50
    print(f"{device_name(CPU)}, {given.threads} threads, torch {torch.__version__}, batch {train.BATCH}")
    print(f"{'contender':14} {'operations':>10} {'ms a step':>10} {'of unmerged':>12}")
    for name, (_, share) in steps.items():
        print(f"{name:14} {share:10.3f} {samples[name].p50 / 1e3:10.1f} {samples[name].p50 / whole:12.3f}")


if __name__ == "__main__":
    main()
