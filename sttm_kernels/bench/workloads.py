"""The shapes that speed is shown on: one source for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One merge of one model: B items of N tokens of C channels.

    With r, `match` merges r tokens by the mean over `heads` of keys of C / heads features. With K, `assign` sends the
    tokens to K meta tokens of C features. `options` go to `match`.
    """

    name: str
    B: int
    N: int
    C: int
    heads: int = 1
    r: int = 0
    K: int = 0
    unmerge: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return self.K or self.N - self.r

    @property
    def D(self) -> int:
        return self.C if self.K else self.C // self.heads


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
    Workload(
        "SDXL-like", 2, 4096, 640, 10, r=2048, unmerge=True, options={"partition": "random2d", "grid": (1, 64, 64)}
    ),
    Workload("long video", 1, 131072, 1024, 16, r=65536, options={"grid": (512, 16, 16), "window": (4, 16, 16)}),
)

QUICK = (
    Workload("quick match", 2, 37, 32, 2, r=9, options={"num_prefix": 1}),
    Workload("quick window", 1, 32, 32, 2, r=16, options={"grid": (2, 4, 4), "window": (1, 4, 4)}),
    Workload("quick unmerge", 1, 16, 32, 2, r=8, unmerge=True, options={"partition": "random2d", "grid": (1, 4, 4)}),
    Workload("quick assign", 2, 24, 32, K=6),
)

SUITES = {"canonical": CANONICAL, "quick": QUICK}
