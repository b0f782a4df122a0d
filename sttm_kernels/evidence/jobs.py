"""Which rows there are to be, goals first, and how one of them comes about."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sttm_kernels
from sttm_kernels.bench.runner import commit
from sttm_kernels.bench.timing import device_name
from sttm_kernels.evidence import contenders, rows, train
from sttm_kernels.evidence.contenders import ALL, CONTENDERS, RATES
from sttm_kernels.evidence.network import Network
from sttm_kernels.evidence.rows import Key

APPLIED, TUNED, TRAINED = SETTINGS = ("applied", "tuned", "trained")
GOAL = 38
"""The percent that the goals are about."""
CHOSEN_BELOW = 50
"""The percent at which settings are looked at beside it: there they differ more."""
JUDGED = ("sttm-motion", "tome", "sttm")
"""What the goals compare, beside the unmerged network, with several seeds."""
FLOORS = ("random-drop", "even-frames", "sttm-moments", "tome-once", "sttm-kmeans", "sttm-farthest")
"""What else they compare, and what could be the default generator, when the others have their seeds."""
QUICK = ("unmerged", "sttm-motion", "tome")
QUICK_STEPS = 400
CHOOSING_SEEDS = 3
"""What trains a motion map is chosen by training it, with so many seeds."""
CONTROLS = ("shuffled", "one-frame")
"""What shows that the task cannot be done by appearance."""


def goals(seeds: int, steps: int) -> Iterator[Key]:
    """Those on which the goals are judged, seed after seed."""
    for seed in range(seeds):
        yield Key(TRAINED, "unmerged", 0, seed, steps)
        yield from (Key(TRAINED, name, GOAL, seed, steps) for name in JUDGED)
    for seed in range(seeds):
        yield from (Key(TRAINED, name, GOAL, seed, steps) for name in FLOORS)


def quick(steps: int) -> Iterator[Key]:
    for name in QUICK:
        yield Key(TRAINED, name, 0 if name == "unmerged" else GOAL, 0, steps)


def table(seeds: int, steps: int) -> Iterator[Key]:
    """All, in the order in which they are worth having."""
    others = [name for name, contender in CONTENDERS.items() if name not in ("unmerged", *CONTROLS)]
    whole = list(goals(seeds, steps))
    yield from whole[: 1 + len(JUDGED)]
    for percent in (GOAL, *(rate for rate in RATES if rate != GOAL)):
        yield from (Key(APPLIED, name, percent, 0, steps) for name in others if not CONTENDERS[name].trained)
    yield from whole[1 + len(JUDGED) :]
    yield from (Key(TRAINED, name, 0, 0, steps) for name in CONTROLS)
    yield from (Key(TRAINED, name, GOAL, 0, steps) for name in others if name not in JUDGED + FLOORS)
    for percent in (rate for rate in RATES if rate != GOAL):
        yield from (Key(TUNED, name, percent, 0, steps) for name in others if not CONTENDERS[name].trained)


def choices(steps: int) -> Iterator[Key]:
    """Settings of ToMe and STTM, for the clips on which they are chosen."""
    yield Key(TRAINED, "unmerged", 0, 0, steps)
    for percent in (GOAL, CHOSEN_BELOW):
        for name in ALL:
            if name.startswith(("tome", "sttm")) and not ALL[name].trained:
                yield Key(APPLIED, name, percent, 0, steps)
    motions = [name for name in ALL if name.startswith("sttm-motion")]
    for seed in range(CHOOSING_SEEDS):
        yield from (Key(TRAINED, name, GOAL, seed, steps) for name in ("sttm", *motions))


def command(key: Key, split: str) -> str:
    """What gives this row again."""
    return (
        "sttm-kernels evidence"
        + " --choose" * (split == "choose")
        + (
            f" --setting {key.setting} --only {key.contender} --percent {key.percent}"
            f" --seed {key.seed} --steps {key.steps}"
        )
    )


def run(key: Key, models: Path, log: train.Log, split: str = "report") -> dict[str, Any]:
    """The row of a key, on clips of a split. Trained networks are kept in `models`, and taken from there again."""
    knob = contenders.calibrated(key.contender, key.percent)
    if key.setting == TRAINED:
        network, seconds = trained(key, models, log)
    else:
        base, _ = trained(Key(TRAINED, "unmerged", 0, key.seed, key.steps), models, log)
        torch.manual_seed(key.seed)
        network, seconds = contenders.network(key.contender, knob), 0.0
        take(network, base)
    if key.setting == TUNED:
        seconds = train.train(network, key.seed, train.TUNING_STEPS, log, tuning=True)
    right = train.evaluate(network, split)
    flops = contenders.operations(key.contender, knob)
    return {
        **key._asdict(),
        "clips": train.EVALUATED,
        **{name: f"{100 * getattr(right, name).double().mean().item():.2f}" for name in ("joint", "digit", "motion")},
        "flops": flops,
        "share": f"{flops / contenders.operations('unmerged', 0):.4f}",
        "knob": knob,
        "seconds": round(seconds),
        "right": rows.packed(right.joint.numpy()),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": version("scikit-learn"),
        "version": sttm_kernels.__version__,
        "commit": commit(),
        "command": command(key, split),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def trained(key: Key, models: Path, log: train.Log) -> tuple[Network, float]:
    """The network, and the seconds that its training took."""
    knob = contenders.calibrated(key.contender, key.percent)
    torch.manual_seed(key.seed)
    network = contenders.network(key.contender, knob)
    path = models / f"{key.contender}-{key.percent}-{key.steps}-steps-seed-{key.seed}.pt"
    if path.exists():
        kept = torch.load(path)
        network.load_state_dict(kept["network"])
        return network.eval(), kept["seconds"]
    seconds = train.train(network, key.seed, key.steps, log)
    models.mkdir(parents=True, exist_ok=True)
    torch.save({"network": network.state_dict(), "seconds": seconds}, path)
    return network, seconds


def take(network: Network, base: Network) -> None:
    """Gives a network the parameters of the unmerged one, and the positions of the frames that it looks at; its merger
    keeps its own, seeded, ones."""
    state, positions = base.state_dict(), "backbone.positions.features"
    of_frames = state[positions].unflatten(1, (len(base.frames), -1))
    state[positions] = of_frames[:, network.frames].flatten(1, 2)
    missing = network.load_state_dict(state, strict=False)
    wrong = [name for name in missing.missing_keys if not name.startswith("backbone.merges.")]
    if wrong or missing.unexpected_keys:
        raise ValueError(f"network must be the unmerged one and mergers, got {wrong + missing.unexpected_keys}")
