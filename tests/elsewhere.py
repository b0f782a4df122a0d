"""impl="torch" as on a device that is not here, as MPS or XPU.

Nothing may look at data or need float64, tiles are those of a GPU, and every call is made again on the device "meta",
which has no data and mixes with no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sttm_kernels import dispatch
from sttm_kernels.impl import eager

META = torch.device("meta")
LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
WAITS = ("match_packed",)
"""Says so in its docstring."""


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _looks(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator of PyTorch looks at data to know its result or the shape of it."""
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is torch.ops.aten.index.Tensor:
        return any(t.dtype == torch.bool for t in _tensors(args[1]))
    return any(tag in func.tags for tag in LOOKS)


def _has_float64(tree: Any) -> bool:
    return any(t.dtype == torch.float64 for t in _tensors(tree))


class _Forbidding(TorchDispatchMode):
    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not _looks(func, args, kwargs or {}), f"{func} looks at data, for which a GPU is waited for"
        found = func(*args, **(kwargs or {}))
        assert self.float64 or not _has_float64(found), f"{func} needs float64, which MPS does not have"
        return found


def strict(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation of the operator `name` that forbids what only a CPU has."""

    def forbidding(*args: Any, **named: Any) -> Any:
        with _Forbidding(_has_float64((args, named))):
            found = run(*args, **named)
        args, named = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(META), (args, named))
        there = run(*args, **named)
        assert _tensors(found), name
        assert [(t.device, t.shape, t.dtype) for t in _tensors(there)] == [
            (META, t.shape, t.dtype) for t in _tensors(found)
        ], name
        return found

    return forbidding


@contextlib.contextmanager
def elsewhere(called: list[str] | None = None) -> Iterator[None]:
    """Within it, impl="torch" has nothing of a CPU; the names of the operators that were called join `called`."""
    tile_shape, kernel = eager._tile_shape, dispatch.kernel

    def chosen(name: str, impl: str, *where: Any) -> Callable[..., Any]:
        run = kernel(name, impl, *where)
        if impl != "torch" or name in WAITS:
            return run
        if called is not None:
            called.append(name)
        return strict(name, run)

    with (
        mock.patch.object(eager, "_tile_shape", lambda *extents: tile_shape(*extents[:3], META)),
        mock.patch.object(dispatch, "kernel", chosen),
    ):
        yield
