"""impl="cpu": the verbs in C++ with vector instructions, by way of the extension `sttm_kernels._cpu`.

As many threads work as PyTorch may use; the same bits for every number of them.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from sttm_kernels import extension


@cache
def _extension() -> Any:
    return extension.load("_cpu", os.environ.get("STTM_CPU_MODULE"))


@cache
def _reason() -> str | None:
    """Why the kernels cannot run; None if they can."""
    other = os.environ.get("STTM_CPU_MODULE")
    if not other and (reason := extension.why_not_built("_cpu", "cpu_reason", "CPU")) is not None:
        return reason
    try:
        _extension().build_info()
    except ImportError as error:
        return f"sttm_kernels._cpu cannot be loaded: {error}"
    except extension.StaleExtension:  # not to go without it unseen
        raise
    except RuntimeError as error:
        return str(error)
    return None


def build_info() -> dict[str, Any]:
    """What `sttm-kernels info` shows: the compiler and the instruction set, or the "reason" why there is nothing."""
    try:
        reason = _reason()
    except extension.StaleExtension as error:
        reason = str(error)
    return {"reason": reason} if reason is not None else {"reason": None, **_extension().build_info()}


def why_not(verb: str, device: torch.device | str) -> str | None:
    """The reason why these kernels cannot run `verb`; None if they can."""
    if verb not in globals():
        return f"there is no CPU kernel for {verb}"
    return _reason()


SEQUENCES = frozenset({"match", "assign", "assign_merge", "soft_merge"})
"""Verbs that take all sequences of a packed batch together."""
LISTS = True
"""Whether `match_packed` takes lists of src and dst."""

_verbs = extension.Verbs(_extension, lambda _: torch.get_num_threads(), lambda: False, 1, 1, False)
assign, assign_earlier, assign_backward = _verbs.assign, _verbs.assign_earlier, _verbs.assign_backward
match, match_packed = _verbs.match, _verbs.match_packed
merge, merge_backward, assign_merge = _verbs.merge, _verbs.merge_backward, _verbs.assign_merge
unmerge, compose = _verbs.unmerge, _verbs.compose
soft_merge, soft_merge_backward = _verbs.soft_merge, _verbs.soft_merge_backward
