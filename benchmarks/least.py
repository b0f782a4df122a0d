"""What rivals take at least: the operators of plain PyTorch that they call, and the bytes and products of each.

Traced on shapes alone. Eager, every operator that is no view reads its inputs and writes its results once; of what it
gathers from, only what is taken. Compiled, whatever stands between two products, sorts or scatters is one launch, which
reads and writes nothing but what comes from or goes to other launches: the best that a compiler can do which leaves
those to libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "bmm")
ALONE = (*PRODUCTS, "sort")
"""What is compiled into no other launch."""
ENDS = ("scatter", "scatter_add", "scatter_reduce", "index_add", "index_put", "_index_put_impl")
"""What must be done before its result is read."""
TAKES = ("gather", "index", "index_select")
EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


@dataclass
class Launch:
    """Bytes of parts of arrays by array and part, and operations of products."""

    reads: dict[int, dict[Any, int]] = field(default_factory=dict)
    writes: dict[int, dict[Any, int]] = field(default_factory=dict)
    flops: int = 0


@dataclass
class _Operator(Launch):
    name: str = ""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[_Operator] = []
        self.extents: dict[int, int] = {}
        self.kept: list[Any] = []  # else another array may have the same address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs, outputs = (
            [one for one in pytree.tree_leaves(tree) if isinstance(one, Tensor)] for tree in ((args, kwargs), result)
        )
        self.kept += [one.untyped_storage() for one in (*inputs, *outputs)]
        changes = func._schema.is_mutable
        mine = {_array(one) for one in inputs}
        if name in EMPTY or not outputs or (not changes and all(_array(one) in mine for one in outputs)):
            return result  # nothing is done, or it is a view
        found = _Operator(name=name)
        for n, one in enumerate(inputs):
            if changes and one is outputs[0] and n == 0:
                continue  # of what is changed in place only what is changed is touched
            taken = name in TAKES and n == 0
            self._touch(found.reads, one, _bytes(outputs[0]) if taken else _bytes(one))
        for one in outputs:
            self._touch(found.writes, one, min(_bytes(one), _bytes(inputs[-1])) if changes else _bytes(one))
        if name in PRODUCTS:
            found.flops = 2 * inputs[0].numel() * inputs[1].shape[-1]
        self.operators.append(found)
        return result

    def _touch(self, into: dict[int, dict[Any, int]], one: Tensor, size: int) -> None:
        self.extents[_array(one)] = one.untyped_storage().nbytes()
        _add(into, _array(one), {(one.storage_offset(), one.shape, one.stride()): size})


def _add(into: dict[int, dict[Any, int]], array: int, parts: dict[Any, int]) -> None:
    """Of what is read or written twice the more counts."""
    known = into.setdefault(array, {})
    known |= {part: max(size, known.get(part, 0)) for part, size in parts.items()}


def _array(one: Tensor) -> int:
    return one.untyped_storage()._cdata


def _bytes(one: Tensor) -> int:
    """Of distinct elements."""
    distinct = math.prod(n for n, stride in zip(one.shape, one.stride(), strict=True) if stride)
    return one.itemsize * (distinct if one.numel() else 0)


@dataclass(frozen=True)
class Trace:
    """The operators of one call."""

    operators: list[_Operator]
    extents: dict[int, int]
    results: set[int]

    def eager(self) -> list[tuple[int, int]]:
        """Bytes and operations of products of every launch."""
        return [self._sizes(one) for one in self.operators]

    def compiled(self) -> list[tuple[int, int]]:
        groups: dict[Any, Launch] = {}
        of: dict[int, dict[Any, None]] = {}  # the groups that wrote an array, in their order
        depths: dict[int, int] = {}
        for n, one in enumerate(self.operators):
            depth = max((depths.get(array, 0) for array in one.reads), default=0)
            key = (depth, n) if one.name in ALONE else (depth, None)
            group = groups.setdefault(key, Launch())
            group.flops += one.flops
            for array, parts in one.reads.items():
                if list(of.get(array, {})) != [key]:  # not only written here
                    _add(group.reads, array, parts)
            for array, parts in one.writes.items():
                of.setdefault(array, {})[key] = None
                _add(group.writes, array, parts)
                depths[array] = max(depths.get(array, 0), depth + (one.name.removesuffix("_") in (*ALONE, *ENDS)))
        read = {array for group in groups.values() for array in group.reads}
        for group in groups.values():
            group.writes = {array: parts for array, parts in group.writes.items() if array in read | self.results}
        return [self._sizes(group) for group in groups.values()]

    def _sizes(self, one: Launch) -> tuple[int, int]:
        touched = [*one.reads.items(), *one.writes.items()]
        return sum(min(self.extents[array], sum(parts.values())) for array, parts in touched), one.flops


def trace(run: Callable[[], Any]) -> Trace:
    """Of a call on tensors of a `FakeTensorMode`, in which it runs."""
    recorder = _Recorder()
    with recorder:
        result = run()
    results = {_array(one) for one in pytree.tree_leaves(result) if isinstance(one, Tensor)}
    recorder.kept.append(result)
    return Trace(recorder.operators, recorder.extents, results)
