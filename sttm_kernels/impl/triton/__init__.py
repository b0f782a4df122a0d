"""impl="triton": the verbs fused in Triton, for any NVIDIA GPU from sm_80 up, and GPUs of AMD and Intel; no compiler.

Every function has the arguments of its namesake in `reference.py`.
"""

from __future__ import annotations

import torch
import triton

from sttm_kernels.impl.triton.assign import assign as assign
from sttm_kernels.impl.triton.assign import assign_backward as assign_backward
from sttm_kernels.impl.triton.assign import assign_earlier as assign_earlier
from sttm_kernels.impl.triton.assign_merge import assign_merge as assign_merge
from sttm_kernels.impl.triton.match import match as match
from sttm_kernels.impl.triton.match import match_packed as match_packed
from sttm_kernels.impl.triton.merge import merge as merge
from sttm_kernels.impl.triton.merge import merge_backward as merge_backward
from sttm_kernels.impl.triton.soft_merge import soft_merge as soft_merge
from sttm_kernels.impl.triton.soft_merge import soft_merge_backward as soft_merge_backward
from sttm_kernels.impl.triton.unmerge import compose as compose
from sttm_kernels.impl.triton.unmerge import unmerge as unmerge

MIN_TRITON = (3, 5)
SEQUENCES = frozenset({"match", "assign", "assign_merge", "soft_merge"})
"""Verbs that take all sequences of a packed batch together."""
LISTS = True
"""Whether `match_packed` takes lists of src and dst."""


def why_not(verb: str, device: torch.device | str) -> str | None:
    """The reason why these kernels cannot run `verb` on this device; None if they can."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"the triton kernels need triton {MIN_TRITON[0]}.{MIN_TRITON[1]}, found {triton.__version__}"
    return None
