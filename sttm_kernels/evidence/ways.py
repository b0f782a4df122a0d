"""The ways to spend fewer operations, each with one knob, for tokens of any grid in a network of any depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from torch import nn

from sttm_kernels.evidence import mergers
from sttm_kernels.nn import DPCKNN, STTM
from sttm_kernels.nn.sttm import Grid

Settings = dict[str, Any]
SHARES = ((3, 1), (1, 1), (1, 3), (1, 1, 1))
"""How what merges may be split over blocks."""


@dataclass(frozen=True)
class Contender:
    """A way to spend fewer operations.

    Attributes:
        says: what it is, in a few words.
        knobs: its settings from the cheapest to the dearest; a single one is not turned.
        settings: for one of them, `merge` and `merge_place` of `VideoTransformer`, `frames` to look at, or arguments of
            a network of one's own.
        trained: whether it can only be trained, not applied to a trained network.
    """

    says: str
    knobs: Sequence[int]
    settings: Callable[[int], Settings]
    trained: bool = False


@dataclass(frozen=True)
class Place:
    """Where tokens merge.

    Attributes:
        grid: (T, H, W) of the tokens.
        dim: their width.
        depth: how many blocks there are.
        after: the block that whatever merges once merges after.
        window: frames that STTM's temporal stage looks at together, unless a contender says otherwise.
    """

    grid: Grid
    dim: int
    depth: int
    after: int
    window: int = 2

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def in_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    def once(self, make: Callable[[int], nn.Module], keep: int) -> Settings:
        return {"merge": {self.after: make(keep)}}

    def matched_once(self, keep: int, place: str = "after", **settings: Any) -> Settings:
        matching = mergers.Matching(self.tokens - keep, again=True, **settings)
        return {"merge": {self.after: matching}, "merge_place": place}

    def matched_in_every_block(self, minus_r: int, place: str = "inside") -> Settings:
        merge = {block: mergers.Matching(-minus_r) for block in range(1, self.depth + 1)}
        return {"merge": merge, "merge_place": place}

    def matched_in_shares(self, shares: Sequence[int], keep: int) -> Settings:
        left = [self.tokens, *_left(self.tokens, keep, shares)]
        rs = (before - then for before, then in pairwise(left))
        return {"merge": {self.after + i: mergers.Matching(r, again=True) for i, r in enumerate(rs) if r}}

    def sttm_in_shares(self, shares: Sequence[int], keep: int) -> Settings:
        """Both stages first, then the spatial one of what is left of each window."""
        first, *later = _left(self.window * self.in_frame, keep, shares)
        again = [STTM(self.dim, left, None, meta="distinct", motion=False) for left in later]
        return {"merge": {**self.sttm(first)["merge"], **{self.after + i: sttm for i, sttm in enumerate(again, 1)}}}

    def even_frames(self, count: int) -> Settings:
        return {"frames": tuple((2 * i + 1) * self.grid[0] // (2 * count) for i in range(count))}

    def soft(self, keep: int) -> Settings:
        in_frame = self._in_frame(keep, self.window)
        return {"merge": {self.after: mergers.SoftMerging(in_frame, keep, self.window)}}

    def sttm(
        self,
        keep: int,
        window: int | None = None,
        spatial: bool = True,
        temporal: bool = True,
        part: float = 0.5,
        place: str = "after",
        make: Callable[..., STTM] = STTM,
        **settings: Any,
    ) -> Settings:
        """`keep` tokens of a window are left, or of a frame without the temporal stage."""
        window = window or self.window
        in_frame = self._in_frame(keep, window, part) if temporal else keep
        sttm = make(
            self.dim,
            in_frame if spatial else None,
            keep if temporal else None,
            **{"meta": "distinct", "motion": False, **settings},
            temporal_window=window if temporal else None,
        )
        return {"merge": {self.after: sttm}, "merge_place": place}

    def _in_frame(self, keep: int, window: int, part: float = 0.5) -> int:
        """What the spatial stage leaves of a frame where `keep` of a window are left; `part` is how much of the merging
        it does, 0.5 where both stages take the same share."""
        return max(-(-keep // window), round(self.in_frame * (keep / (window * self.in_frame)) ** part))


def _left(tokens: int, keep: int, shares: Sequence[int]) -> list[int]:
    """How many tokens are left after each of several merges, which take away these shares of what merges."""
    return [tokens - (tokens - keep) * merged // sum(shares) for merged in accumulate(shares)]


def contenders(place: Place) -> dict[str, Contender]:
    """What is compared, by name."""
    frames, tokens, window = place.grid[0], place.tokens, place.window
    each, of_window = range(1, tokens + 1), range(1, window * place.in_frame + 1)

    def once(says: str, make: Callable[[int], nn.Module]) -> Contender:
        return Contender(says, each, partial(place.once, make))

    def matched(says: str, **settings: Any) -> Contender:
        return Contender(says, each, partial(place.matched_once, **settings))

    def sttm(says: str, knobs: Sequence[int] = of_window, **settings: Any) -> Contender:
        return Contender(f"STTM, {says}", knobs, partial(place.sttm, **settings))

    return {
        "random-drop": once("tokens dropped at random", mergers.RandomDrop),
        "even-frames": Contender("frames dropped evenly", range(1, frames + 1), place.even_frames),
        "norm-pruning": once("tokens of smallest norm dropped", mergers.NormPruning),
        "average-pooling": once("means over cells of the grid", mergers.AveragePooling),
        "random-merging": once("tokens merged at random", mergers.RandomMerging),
        "tome": Contender("ToMe in every block, by keys", range(-tokens // 2, 1), place.matched_in_every_block),
        "tome-once": matched(f"ToMe after block {place.after}, by x"),
        "tome-once-keys": matched(f"ToMe in block {place.after}, by keys", place="inside"),
        "tome-windowed": matched(
            f"ToMe after block {place.after}, by x, first within two frames", window=(window, *place.grid[1:])
        ),
        "sttm": sttm("distinct"),
        "sttm-motion": sttm("distinct, motion", motion=True),
        "sttm-moments": sttm("distinct, motion with second moments", motion=True, second_moment=True),
        "sttm-spatial": sttm("distinct, spatial stage alone", range(1, place.in_frame + 1), temporal=False),
        "sttm-temporal": sttm("distinct, temporal stage alone", spatial=False),
        "sttm-uniform": sttm("distinct, members weighted alike", weight="uniform"),
        "sttm-soft": Contender("both stages by soft assignment", of_window, place.soft),
        "sttm-whole-clip": sttm("distinct, temporal stage over the whole clip", each, window=frames),
        **{
            f"sttm-{meta}": sttm(meta, meta=meta)
            for meta in ("pool", "kmeans", "farthest", "topk", "learned", "dpc_knn")
        },
    }


def variants(place: Place) -> dict[str, Contender]:
    """Settings of ToMe and STTM that are looked at on the clips for choosing, never on those that are reported."""
    of_window = range(1, place.window * place.in_frame + 1)
    every_block = partial(place.matched_in_every_block, place="after")
    placed = partial(mergers.PlacedMotion, grid=place.grid)
    return {
        **{
            f"{method}-{'-'.join(map(str, shares))}": Contender(
                f"{says}, after block {place.after} and those behind it in shares of {':'.join(map(str, shares))}",
                knobs,
                partial(settings, shares),
            )
            for shares in SHARES
            for method, says, knobs, settings in (
                ("tome", "ToMe by x", range(1, place.tokens + 1), place.matched_in_shares),
                ("sttm", "STTM, distinct", of_window, place.sttm_in_shares),
            )
        },
        "tome-x": Contender("ToMe after every block, by x", range(-place.tokens // 2, 1), every_block),
        **{
            f"sttm-{name}": Contender(f"STTM, distinct, {says}", of_window, partial(place.sttm, **settings))
            for name, says, settings in (
                ("cold", "temperature 0.02", {"temperature": 0.02}),
                ("warm", "temperature 0.5", {"temperature": 0.5}),
                ("l2", "by squared distance", {"similarity": "l2", "weight": "uniform"}),
                ("keys", f"in block {place.after}, by keys", {"place": "inside"}),
                ("more-in-space", "most of the merging in space", {"part": 0.8}),
                ("more-in-time", "most of the merging in time", {"part": 0.2}),
                ("near", "near counts as alike within frames", {"meta": mergers.Near(0.15, 0.0)}),
                ("near-in-time", "near counts as alike in both stages", {"meta": mergers.Near(0.15, 0.15)}),
            )
        },
        **{
            f"sttm-motion-{name}": Contender(
                f"STTM, distinct, motion of {says}",
                of_window,
                partial(place.sttm, motion=True, **settings),
                trained=True,
            )
            for name, says, settings in (
                ("placed", "centred positions of unit variance", {"make": placed}),
                ("spread", "second moments alone", {"make": partial(placed, means=False), "second_moment": True}),
                ("both", "centred positions and second moments", {"make": placed, "second_moment": True}),
            )
        },
        "sttm-window-4": Contender(
            "STTM, distinct, windows of 4 frames", range(1, 4 * place.in_frame + 1), partial(place.sttm, window=4)
        ),
        "sttm-dpc_knn-l2": Contender(
            "STTM, dpc_knn with rows of any norm", of_window, partial(place.sttm, meta=DPCKNN(similarity="l2"))
        ),
    }
