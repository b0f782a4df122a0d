"""Token merging for video Transformers: find groups of similar tokens, reduce along them, copy back."""

from sttm_kernels.functional import assign, assign_merge, compose, match, merge, soft_merge, unmerge
from sttm_kernels.integrations import apply, remove, restore, trace
from sttm_kernels.nn.compression import compress
from sttm_kernels.nn.sttm import STTM
from sttm_kernels.plan import MergedTokens, MergePlan

__version__ = "0.1.0"

__all__ = [
    "STTM",
    "MergePlan",
    "MergedTokens",
    "apply",
    "assign",
    "assign_merge",
    "compose",
    "compress",
    "match",
    "merge",
    "remove",
    "restore",
    "soft_merge",
    "trace",
    "unmerge",
]
