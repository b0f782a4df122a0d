"""impl="cuda": the verbs in CUDA C++, by way of the extension `sttm_kernels._C`.

The extension launches on the current stream and waits for nothing.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sttm_kernels import dispatch, extension
from sttm_kernels.torch_private import raw_stream, tf32


@cache
def _reason() -> str | None:
    """Why the extension cannot be loaded; None if it can."""
    host = os.environ.get("STTM_CUDA_HOST")
    if not host and (reason := extension.why_not_built("_C", "reason", "CUDA")) is not None:
        return reason
    try:
        _extension()
    except ImportError as error:
        return f"sttm_kernels._C cannot be loaded: {error}"
    return None


def build_info() -> dict[str, Any]:
    """What `sttm-kernels info` shows of the extension: how it was built, or the "reason" why it is not there."""
    try:
        reason = _reason()
    except extension.StaleExtension as error:
        reason = str(error)
    return {"reason": reason} if reason is not None else {"reason": None, **_extension().build_info()}


@cache
def _extension() -> Any:
    return extension.load("_C", os.environ.get("STTM_CUDA_HOST"))


def why_not(verb: str, device: torch.device | str) -> str | None:
    """The reason why these kernels cannot run `verb` on this device; None if they can."""
    reason = _reason()
    if reason is None and verb not in globals():
        reason = f"there is no CUDA kernel for {verb}"
    if reason is None:
        with contextlib.nullcontext() if dispatch.on_host() else torch.cuda.device(device):
            problem = _extension().problem()
        reason = problem and f"{problem}; the extension was built for {' '.join(build_info()['architectures'])}"
    return reason


def _stream(t: Tensor) -> int:
    """The current stream of the device of `t`."""
    return raw_stream(t.device.index) if t.is_cuda else 0


SORT_ROOM, MATCH_ROOM = 2, 8  # kSortRoom and kMatchRoom of csrc/include/sttm/arguments.hpp

SEQUENCES = frozenset({"match", "assign", "assign_merge", "soft_merge"})
"""Verbs that take all sequences of a packed batch together."""
LISTS = True
"""Whether `match_packed` takes lists of src and dst."""

_verbs = extension.Verbs(_extension, _stream, tf32, SORT_ROOM, MATCH_ROOM, True)
assign, assign_earlier, assign_backward = _verbs.assign, _verbs.assign_earlier, _verbs.assign_backward
match, match_packed = _verbs.match, _verbs.match_packed
merge, merge_backward, assign_merge = _verbs.merge, _verbs.merge_backward, _verbs.assign_merge
unmerge, compose = _verbs.unmerge, _verbs.compose
soft_merge, soft_merge_backward = _verbs.soft_merge, _verbs.soft_merge_backward
