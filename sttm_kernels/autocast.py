"""Autocast switched off: the verbs compute in the dtypes they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def in_given_dtypes(run: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """`run`, whose products autocast would round to half precision, without it. A tensor is among its arguments."""

    @functools.wraps(run)
    def without(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Result:
        device = next(arg.device for arg in args if isinstance(arg, Tensor)).type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return run(*args, **kwargs)
        with without_autocast(device):
            return run(*args, **kwargs)

    return without
