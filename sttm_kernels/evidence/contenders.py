"""Every contender, its one knob turned until the whole network takes the operations that are wanted."""

from __future__ import annotations

from functools import cache

from sttm_kernels.evidence import ways
from sttm_kernels.evidence.clips import FRAMES, SIZE
from sttm_kernels.evidence.network import DEPTH, DIM, HEADS, PATCH, Network
from sttm_kernels.evidence.ways import Contender
from sttm_kernels.integrations.amounts import nearest
from sttm_kernels.nn.flops import flops

PLACE = ways.Place((FRAMES, SIZE // PATCH, SIZE // PATCH), DIM, DEPTH, after=1)
RATES = (25, 38, 50, 60)
"""By how many percent operations are cut; stem and block 1 alone are a third of all."""
_FIXED = (0,)

CONTENDERS: dict[str, Contender] = {
    "unmerged": Contender("no merging", _FIXED, lambda _: {}),
    "one-frame": Contender("one frame alone", _FIXED, lambda _: {"frames": (FRAMES // 2,)}, trained=True),
    "shuffled": Contender("frames in another order in every clip", _FIXED, lambda _: {"shuffle": True}, trained=True),
    "smaller": Contender(
        "no merging, a narrower network", range(HEADS, DIM + 1, HEADS), lambda dim: {"dim": dim}, trained=True
    ),
    **ways.contenders(PLACE),
}

ALL = CONTENDERS | ways.variants(PLACE)


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
