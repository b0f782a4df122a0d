"""Every contender, each with one knob, which is turned until the whole network takes the operations that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import nn

from sttm_kernels.evidence import mergers
from sttm_kernels.evidence.clips import FRAMES, SIZE
from sttm_kernels.evidence.network import DEPTH, DIM, HEADS, PATCH, Network
from sttm_kernels.integrations.amounts import nearest
from sttm_kernels.nn import DPCKNN, STTM
from sttm_kernels.nn.flops import flops

SIDE = SIZE // PATCH
TOKENS = FRAMES * SIDE * SIDE
WINDOW = 2
"""Frames that STTM's temporal stage looks at together, unless a contender says otherwise."""
AFTER = 1
"""The block that whatever merges once merges after."""
RATES = (25, 38, 50, 60)
"""By how many percent operations are cut; stem and block 1 alone are a third of all."""


@dataclass(frozen=True)
class Contender:
    """A way to spend fewer operations.

    Attributes:
        says: what it is, in a few words.
        knobs: its settings from the cheapest to the dearest; a single one is not turned.
        settings: arguments of `Network` for a setting.
        trained: whether it can only be trained, not applied to a trained network.
    """

    says: str
    knobs: Sequence[int]
    settings: Callable[[int], dict[str, Any]]
    trained: bool = False


def network(contender: str, knob: int) -> Network:
    return Network(**ALL[contender].settings(knob))


@cache
def operations(contender: str, knob: int) -> int:
    """Of one clip, merging included."""
    return flops(network(contender, knob).eval(), (1, FRAMES, SIZE, SIZE))


def calibrated(contender: str, percent: int) -> int:
    """The setting whose operations come nearest to `percent` below those of the unmerged network."""
    knobs = ALL[contender].knobs
    wanted = operations("unmerged", 0) * (100 - percent) / 100
    return knobs[nearest(wanted, 0, len(knobs) - 1, lambda i: operations(contender, knobs[i]))]


def _once(make: Callable[[int], nn.Module], keep: int) -> dict[str, Any]:
    return {"merge": {AFTER: make(keep)}}


def _matched_once(keep: int, place: str = "after", **settings: Any) -> dict[str, Any]:
    matching = mergers.Matching(TOKENS - keep, again=True, **settings)
    return {"merge": {AFTER: matching}, "merge_place": place}


def _matched_in_every_block(minus_r: int, place: str = "inside") -> dict[str, Any]:
    merge = {block: mergers.Matching(-minus_r) for block in range(1, DEPTH + 1)}
    return {"merge": merge, "merge_place": place}


def _even_frames(count: int) -> dict[str, Any]:
    return {"frames": tuple((2 * i + 1) * FRAMES // (2 * count) for i in range(count))}


def _in_frame(keep: int, window: int, part: float = 0.5) -> int:
    """What the spatial stage leaves of a frame where `keep` of a window are left; `part` is how much of the merging it
    does, 0.5 where both stages take the same share."""
    return max(-(-keep // window), round(SIDE * SIDE * (keep / (window * SIDE * SIDE)) ** part))


def _soft(keep: int) -> dict[str, Any]:
    return {"merge": {AFTER: mergers.SoftMerging(_in_frame(keep, WINDOW), keep, WINDOW)}}


def _sttm(
    keep: int,
    window: int = WINDOW,
    spatial: bool = True,
    temporal: bool = True,
    part: float = 0.5,
    place: str = "after",
    **settings: Any,
) -> dict[str, Any]:
    """`keep` tokens of a window are left, or of a frame without the temporal stage."""
    in_frame = _in_frame(keep, window, part) if temporal else keep
    sttm = STTM(
        DIM,
        in_frame if spatial else None,
        keep if temporal else None,
        **{"meta": "distinct", "motion": False, **settings},
        temporal_window=window if temporal else None,
    )
    return {"merge": {AFTER: sttm}, "merge_place": place}


_KEEP = range(1, TOKENS + 1)
_KEEP_OF_WINDOW = range(1, WINDOW * SIDE * SIDE + 1)
_FIXED = (0,)

CONTENDERS: dict[str, Contender] = {
    "unmerged": Contender("no merging", _FIXED, lambda _: {}),
    "one-frame": Contender("one frame alone", _FIXED, lambda _: {"frames": (FRAMES // 2,)}, trained=True),
    "shuffled": Contender("frames in another order in every clip", _FIXED, lambda _: {"shuffle": True}, trained=True),
    "smaller": Contender(
        "no merging, a narrower network", range(HEADS, DIM + 1, HEADS), lambda dim: {"dim": dim}, trained=True
    ),
    "random-drop": Contender("tokens dropped at random", _KEEP, partial(_once, mergers.RandomDrop)),
    "even-frames": Contender("frames dropped evenly", range(1, FRAMES + 1), _even_frames),
    "norm-pruning": Contender("tokens of smallest norm dropped", _KEEP, partial(_once, mergers.NormPruning)),
    "average-pooling": Contender("means over cells of the grid", _KEEP, partial(_once, mergers.AveragePooling)),
    "random-merging": Contender("tokens merged at random", _KEEP, partial(_once, mergers.RandomMerging)),
    "tome": Contender("ToMe in every block, by keys", range(-TOKENS // 2, 1), _matched_in_every_block),
    "tome-once": Contender("ToMe after block 1, by x", _KEEP, _matched_once),
    "tome-once-keys": Contender("ToMe in block 1, by keys", _KEEP, partial(_matched_once, place="inside")),
    "tome-windowed": Contender(
        "ToMe after block 1, by x, first within two frames", _KEEP, partial(_matched_once, window=(WINDOW, SIDE, SIDE))
    ),
    "sttm": Contender("STTM, distinct", _KEEP_OF_WINDOW, _sttm),
    "sttm-motion": Contender("STTM, distinct, motion", _KEEP_OF_WINDOW, partial(_sttm, motion=True)),
    "sttm-moments": Contender(
        "STTM, distinct, motion with second moments",
        _KEEP_OF_WINDOW,
        partial(_sttm, motion=True, second_moment=True),
    ),
    "sttm-spatial": Contender(
        "STTM, distinct, spatial stage alone", range(1, SIDE * SIDE + 1), partial(_sttm, temporal=False)
    ),
    "sttm-temporal": Contender("STTM, distinct, temporal stage alone", _KEEP_OF_WINDOW, partial(_sttm, spatial=False)),
    "sttm-uniform": Contender(
        "STTM, distinct, members weighted alike", _KEEP_OF_WINDOW, partial(_sttm, weight="uniform")
    ),
    "sttm-soft": Contender("both stages by soft assignment", _KEEP_OF_WINDOW, _soft),
    "sttm-whole-clip": Contender(
        "STTM, distinct, temporal stage over the whole clip", _KEEP, partial(_sttm, window=FRAMES)
    ),
    **{
        f"sttm-{meta}": Contender(f"STTM, {meta}", _KEEP_OF_WINDOW, partial(_sttm, meta=meta))
        for meta in ("pool", "kmeans", "farthest", "topk", "learned", "dpc_knn")
    },
}

VARIANTS: dict[str, Contender] = {
    "tome-x": Contender(
        "ToMe after every block, by x", range(-TOKENS // 2, 1), partial(_matched_in_every_block, place="after")
    ),
    **{
        f"sttm-{name}": Contender(f"STTM, distinct, {says}", _KEEP_OF_WINDOW, partial(_sttm, **settings))
        for name, says, settings in (
            ("cold", "temperature 0.02", {"temperature": 0.02}),
            ("warm", "temperature 0.5", {"temperature": 0.5}),
            ("l2", "by squared distance", {"similarity": "l2", "weight": "uniform"}),
            ("keys", "in block 1, by keys", {"place": "inside"}),
            ("more-in-space", "most of the merging in space", {"part": 0.8}),
            ("more-in-time", "most of the merging in time", {"part": 0.2}),
        )
    },
    "sttm-window-4": Contender(
        "STTM, distinct, windows of 4 frames", range(1, 4 * SIDE * SIDE + 1), partial(_sttm, window=4)
    ),
    "sttm-dpc_knn-l2": Contender(
        "STTM, dpc_knn with rows of any norm", _KEEP_OF_WINDOW, partial(_sttm, meta=DPCKNN(similarity="l2"))
    ),
}
"""Settings of ToMe and STTM that are looked at on the clips for choosing, never on those that are reported."""

ALL = CONTENDERS | VARIANTS
