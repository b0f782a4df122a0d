"""In how many forms operators reach the kernels: `python -m benchmarks.codegen.forms` prints the table, and with
`--compile` takes every form for Triton through the front end of its compiler, of which the tests take a part.

A form is what chooses the code. Of a Triton kernel: the types of its arguments and its constants, absent arguments
among them. Of the CUDA extension, whose kernels are compiled when it is built: which function is called, with arrays of
which types, absent ones among them, and with which settings. Nothing is launched.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.codegen.combinations import KINDS, Extents, call, combinations, operators, products
from sttm_kernels import dispatch
from sttm_kernels.impl import cuda

EXTENTS = Extents(B=2, N=49, C=48, D=32, P=3, H=2)
MANY = EXTENTS._replace(N=301)
"""More tokens than `assign_merge` takes in one launch."""
FULL = (torch.bfloat16, 90)
"""Where every combination is compiled by Triton; in other dtypes and for other architectures the ends."""


@contextlib.contextmanager
def as_if_there_were_a_gpu() -> Iterator[None]:
    """Within it tensors on the CPU go to any implementation."""
    with mock.patch.object(dispatch, "why_not", return_value=None):
        dispatch.kernel.cache_clear()
        try:
            yield
        finally:
            dispatch.kernel.cache_clear()


def of_triton(op: str) -> list[tuple[int, Any]]:
    """Every different (architecture, specialization) that calls of an operator launch."""
    from benchmarks.codegen.recording import recorded
    from sttm_kernels.impl.triton.config import ARCHITECTURES

    found: dict[Any, tuple[int, Any]] = {}
    everywhere = sorted(itertools.product(KINDS, ARCHITECTURES), key=lambda one: (one[0][0], one[1]) != FULL)
    with as_if_there_were_a_gpu():
        for (dtype, rounding), arch in everywhere:
            with products(rounding):
                for chosen, sizes in itertools.product(combinations(op, (dtype, arch) == FULL), (EXTENTS, MANY)):
                    for one in recorded(op, partial(call, op, "triton", dtype, chosen, sizes), arch):
                        key = one.kernel.__name__, tuple(one.signature.items()), repr(sorted(one.constexprs.items()))
                        found.setdefault(key, (arch, one))
    return list(found.values())


class Seen:
    """In place of the CUDA extension: the forms of the calls of its functions, which `then` takes."""

    ASSIGN_MERGE_TOKENS = ASSIGN_MERGE_GROUPS = EXTENTS.N

    def __init__(self, then: Any = None):
        self.forms: set[tuple[Any, ...]] = set()
        self._then = then

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            if args:
                self.forms.add((name, *map(_kind, args)))
            return None if self._then is None else getattr(self._then, name)(*args)

        return called


def _kind(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype
    return type(arg) if type(arg) in (int, float) else arg


def of_cuda(op: str) -> set[tuple[Any, ...]]:
    """Every different call of the extension that calls of an operator make."""
    seen = Seen()
    with as_if_there_were_a_gpu(), mock.patch.object(cuda, "_extension", return_value=seen):
        for dtype, rounding in KINDS:
            with products(rounding):
                for chosen in combinations(op):
                    call(op, "cuda", dtype, chosen, EXTENTS)
    return seen.forms


def main(argv: list[str] | None = None) -> None:
    from sttm_kernels.impl import triton

    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen.forms", description="Counts forms.")
    parser.add_argument("--compile", action="store_true", help="take every form for Triton through its front end")
    if parser.parse_args(argv).compile:
        from benchmarks.codegen.table import front_end

        for item in itertools.chain.from_iterable(map(of_triton, operators(triton))):
            front_end(*item)
    columns = {"triton": (triton, of_triton), "cuda": (cuda, of_cuda)}
    names = sorted({op for implementation, _ in columns.values() for op in operators(implementation)})
    print(f"{'operator':20}" + "".join(f"{name:>8}" for name in columns))
    totals = dict.fromkeys(columns, 0)
    for op in names:
        counts = {n: len(forms(op)) if op in operators(one) else 0 for n, (one, forms) in columns.items()}
        totals = {name: totals[name] + counts[name] for name in columns}
        print(f"{op:20}" + "".join(f"{count:8}" for count in counts.values()))
    print(f"{'all':20}" + "".join(f"{count:8}" for count in totals.values()))


if __name__ == "__main__":
    main()
