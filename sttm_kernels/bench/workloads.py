"""The shapes that speed is shown on: one source for every benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

BACKWARD = " forward + backward"
"""What is added to the name of an operation that is measured with the gradient of x through it."""


@dataclass(frozen=True)
class Workload:
    """One merge of one model: B items of N tokens of C channels.

    With r, `match` merges r tokens by the mean over `heads` of keys of D features. With K, `assign` sends the tokens to
    K meta tokens of C features. `options` go to `match`. `only` names the operations to measure, all if empty; `axis`
    is what grows from one workload of this name to the next, if anything does.
    """

    name: str
    B: int
    N: int
    C: int
    heads: int = 1
    r: int = 0
    K: int = 0
    features: int = 0
    unmerge: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    axis: str = ""

    @property
    def groups(self) -> int:
        return self.K or self.N - self.r

    @property
    def D(self) -> int:
        return self.C if self.K else self.features or self.C // self.heads

    @property
    def pairs(self) -> int:
        """How many (token, meta token) or (src, dst) pairs are compared."""
        if self.K:
            return self.B * self.N * self.K
        if "window" in self.options:
            return self.B * self.N * math.prod(self.options["window"]) // 4
        if self.options.get("partition") == "random2d":
            return 3 * self.B * (self.N // 4) ** 2
        return self.B * (self.N - self.options.get("num_prefix", 0)) ** 2 // 4


SDXL = {"partition": "random2d", "grid": (1, 64, 64)}

CANONICAL = (
    Workload("ViT-L/16 224", 64, 197, 1024, 16, r=8, options={"num_prefix": 1}),
    *(Workload("VideoMAE-B 16x224", 8, 1568, 768, 12, r=r) for r in (784, 392, 196, 65)),
    *(Workload("VideoMAE-L 16x224", 32, 1568, 1024, 16, r=r) for r in (784, 392, 196, 65)),
    Workload("ViViT-B 32x224", 8, 3137, 768, 12, r=1568, options={"num_prefix": 1}),
    Workload("TimeSformer per frame", 64, 196, 768, 12, r=98),
    Workload("V-JEPA 2 L 64x256", 4, 8192, 1024, 16, r=4096),
    Workload("V-JEPA 2 g 64x384", 2, 18432, 1408, 22, r=9216),
    *(Workload("STTM spatial", 256, 196, 1024, K=K) for K in (16, 49, 98)),
    *(Workload("STTM temporal", 32, 1568, 1024, K=K) for K in (64, 392)),
    Workload("SDXL-like", 2, 4096, 640, 10, r=2048, unmerge=True, options=SDXL),
    Workload("long video", 1, 131072, 1024, 16, r=65536, options={"grid": (512, 16, 16), "window": (4, 16, 16)}),
)

QUICK = (
    Workload("VideoMAE-B 16x224", 8, 1568, 768, 12, r=784),
    Workload("window 16x224", 4, 1568, 768, 12, r=784, options={"grid": (8, 14, 14), "window": (1, 14, 14)}),
    Workload("latents 512", 2, 4096, 320, 8, r=2048, unmerge=True, options=SDXL),
    Workload("STTM spatial", 64, 196, 768, K=49),
)

SMOKE = (
    Workload("smoke match", 2, 37, 32, 2, r=9, options={"num_prefix": 1}),
    Workload("smoke window", 1, 32, 32, 2, r=16, options={"grid": (2, 4, 4), "window": (1, 4, 4)}),
    Workload("smoke unmerge", 1, 16, 32, 2, r=8, unmerge=True, options={"partition": "random2d", "grid": (1, 4, 4)}),
    Workload("smoke assign", 2, 24, 32, K=6),
)
"""Too small to say anything of speed: they show that everything runs, on Triton's interpreter too."""

MATCHING = ("match", "merge", "match + merge")
ASSIGNING = (
    "assign",
    "merge",
    *(name + passes for name in ("assign_merge", "soft_merge") for passes in ("", BACKWARD)),
)
SCALING = (
    *(
        Workload("windowed", 1, 256 * T, 64, r=128 * T, options={"grid": (T, 16, 16), "window": (1, 16, 16)},
                 only=MATCHING, axis="N")
        for T in (1, 4, 16, 64, 256, 512, 4096)
    ),
    *(Workload("global", 1, N, 64, r=N // 2, only=MATCHING, axis="N") for N in (196, 784, 3136, 12544, 50176, 131072)),
    *(Workload("clips", B, 784, 384, 6, r=392, only=MATCHING, axis="B") for B in (1, 2, 4, 8, 16, 32, 64)),
    *(Workload("features", 4, 1568, 256, r=784, features=D, only=("match",), axis="D") for D in (16, 32, 64, 128, 256)),
    *(Workload("merged away", 4, 1568, 384, 6, r=r, only=MATCHING, axis="r") for r in (49, 98, 196, 392, 784)),
    *(Workload("meta tokens", 4, 1568, 256, K=K, only=ASSIGNING, axis="K") for K in (8, 16, 32, 64, 128, 256, 512)),
)  # fmt: skip

SUITES = {"canonical": CANONICAL, "quick": QUICK, "scaling": SCALING, "smoke": SMOKE}
