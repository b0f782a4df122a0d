"""Rows of what was learned, in a CSV file that grows by one whole row at a time."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sttm_kernels.console import InputError

FILE, CHOOSING = "evidence.csv", "evidence-choosing.csv"
"""Rows on the clips that are reported, and on those on which settings are chosen."""
COLUMNS = (
    "setting", "contender", "percent", "seed", "steps", "clips", "joint", "digit", "motion", "flops", "share", "knob",
    "seconds", "right", "device", "threads", "python", "torch", "numpy", "scikit-learn", "version", "commit", "command",
    "time",
)  # fmt: skip
"""What each means:

    setting: "applied" to the unmerged network as it was trained, "tuned" from it, or "trained" from scratch.
    contender, percent, seed, steps: of `contenders`; by how many percent operations were to be cut; of the training,
        and how many steps of it.
    clips, joint, digit, motion: how many clips were answered, and percent of them right: both answers, or one.
    flops, share: operations of one clip, merging included, and as a part of the unmerged network's.
    knob: the contender's setting. seconds: of training, on a machine that may have been busy with other things.
    right: which clips were answered right, a bit each, most significant first, in base64.
    command: what gives this row again. time: UTC.
"""


class Key(NamedTuple):
    """What a row is about; one row each."""

    setting: str
    contender: str
    percent: int
    seed: int
    steps: int


def key(row: Mapping[str, str]) -> Key:
    return Key(row["setting"], row["contender"], int(row["percent"]), int(row["seed"]), int(row["steps"]))


def packed(right: np.ndarray) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def right(row: Mapping[str, str]) -> np.ndarray:
    """Bool `(clips,)`."""
    bits = np.frombuffer(base64.b64decode(row["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=int(row["clips"])).astype(bool)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row; a file that does not exist is created."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> dict[Key, dict[str, str]]:
    """All rows of a file, none where there is none; the last of equal ones.

    Raises:
        InputError: it is not a file of these rows.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return {key(row): row for row in reader if row["time"]}
