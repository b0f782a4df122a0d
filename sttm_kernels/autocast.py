"""Autocast switched off: the verbs compute in the dtypes they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sttm_kernels import torch_private

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


@torch_private.constant_when_compiled
def _available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if _available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_given_dtypes(run: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """`run`, whose products autocast would round to half precision, without it. A tensor is among its arguments."""

    @functools.wraps(run)
    def without(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        device = next(arg.device for arg in args if isinstance(arg, Tensor)).type
        if not (_available(device) and torch.is_autocast_enabled(device)):
            return run(*args, **kwargs)
        with without_autocast(device):
            return run(*args, **kwargs)

    return without
