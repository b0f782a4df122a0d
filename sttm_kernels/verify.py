"""Every verb of an implementation that can run here, held against the float64 specification.

A row is a verb, an implementation and a dtype, or a property. Values, choices and gradients count against the error
budget of `sttm_kernels.testing`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils import _pytree as pytree

from sttm_kernels import dispatch, functional, validate
from sttm_kernels.checks import (
    check_assign,
    check_assign_merge,
    check_compose,
    check_match,
    check_merge,
    check_soft_merge,
    check_unmerge,
    draw,
    fields,
    make_mask,
)
from sttm_kernels.plan import MergePlan
from sttm_kernels.testing import Comparison, Shape, assert_equal, assert_index_in_range, make_index, observed

SMALL_SHAPE = Shape(3, 65, 17, 64, 80)
"""Where properties are checked."""
SMALL = "x".join(map(str, SMALL_SHAPE))

Case = tuple[str, Callable[[], Any]]


@dataclass
class Row:
    """A row, and what became of its cases.

    Attributes:
        verb, impl, check: what was checked; `check` is a dtype or a property.
        verdict: "pass", "FAIL" or "skipped".
        cases: how many were run.
        error, budget, ratio: of the comparison that came closest to its budget, or went beyond it; None if the row
            compares nothing under a budget.
        worst: the case of that comparison.
        message: why it failed or was skipped.
    """

    verb: str
    impl: str
    check: str
    verdict: str = "pass"
    cases: int = 0
    error: float | None = None
    budget: float | None = None
    ratio: float | None = None
    worst: str = ""
    message: str = ""


def rows_of(
    verb: str, impl: str, device: torch.device, shapes: tuple[Shape, ...], dtypes: tuple[torch.dtype, ...], seed: int
) -> Iterator[tuple[Row, Iterable[Case]]]:
    """The rows of a verb of an implementation, each with its cases: none if it cannot run."""
    reason = dispatch.why_not(verb, impl, device)
    if reason is not None:
        yield Row(verb, impl, "", "skipped", message=reason), []
        return
    for dtype in dtypes if verb != "compose" else dtypes[:1]:
        row = Row(verb, impl, str(dtype).removeprefix("torch."))
        reason = dispatch.why_not(verb, impl, device, dtype)
        if reason is None and dtype == torch.bfloat16 and impl == "triton" and dispatch.interpreting():
            reason = "Triton's interpreter multiplies bfloat16 bit patterns"
        if reason is not None:
            row.verdict, row.message = "skipped", reason
            yield row, []
        else:
            yield row, _at_all(shapes, verb, impl, dtype, device, seed)
    call = partial(_call, verb, impl, device, seed)
    yield Row(verb, impl, "same bits"), [(SMALL, partial(_same_bits, call, impl, device))]
    yield Row(verb, impl, "not finite"), [(f"{bad}", partial(_not_finite, call, bad)) for bad in ("nan", "inf")]
    if impl == "torch" and verb not in ("match", "compose"):
        yield Row(verb, impl, "gradcheck"), [("1x5x3x4x6 float64", partial(_gradcheck, call))]
    yield Row(verb, impl, "compile"), [("fullgraph, aot_eager", partial(_compiles, call))]
    if device.type == "cuda":
        yield Row(verb, impl, "CUDA graph"), [(SMALL, partial(_replays, call))]


def _at_all(shapes: tuple[Shape, ...], *settings: Any) -> Iterator[Case]:
    for shape in shapes:
        yield from _accuracy(shape, *settings)


def _accuracy(
    shape: Shape, verb: str, impl: str, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[Case]:
    """Values, choices and gradients at one shape, with and without what is optional: masks, sizes, empty groups."""
    B, N, K, D, C = shape
    x, q, meta, size, weight, positions, fill, mask = draw(shape, dtype, device, seed=seed).values()
    temperature = {"cosine": 0.5, "dot": D**0.5, "l2": float(D)}
    at = "x".join(map(str, shape))
    if verb == "assign":
        for kind in validate.SIMILARITIES:
            yield f"{at} {kind}", partial(check_assign, impl, q, meta, kind, temperature[kind], "softmax", mask)
        yield f"{at} uniform", partial(check_assign, impl, q, meta, weight="uniform")
        heads = draw(shape, dtype, device, heads=2, seed=seed)["q"]
        yield f"{at} 2 heads", partial(check_assign, impl, heads, meta, "dot", temperature["dot"])
    elif verb == "match":
        for r in sorted({0, 1, N // 4, N // 2}):
            yield f"{at} r={r}", partial(check_match, impl, q, r, min(1, N - 1))
        if N > 8:
            grid = (1, 2, (N - 1) // 2)
            cut = q[:, : 1 + 2 * grid[2]]
            yield f"{at} window", partial(check_match, impl, cut, N // 4, 1, "alternate", grid, (1, 2, 4))
            yield f"{at} protect", partial(check_match, impl, q, N // 4, 1, protect=make_mask(1, N, "cpu", seed)[0])
    elif verb == "merge":
        index = make_index(B, N, K, device, seed)
        for reduce in validate.REDUCTIONS:
            yield f"{at} {reduce}", partial(check_merge, impl, x, index, K, size, weight, positions, fill, reduce)
        empty = make_index(B, N, K, device, seed, kind="even")
        yield f"{at} empty groups", partial(check_merge, impl, x, empty, K)
    elif verb == "assign_merge":
        extras = {"size": size, "positions": positions, "fill": fill, "mask": mask}
        for kind in validate.SIMILARITIES:
            settings = (kind, temperature[kind], "softmax", extras)
            yield f"{at} {kind}", partial(check_assign_merge, impl, x, q, meta, *settings)
        if C > 1:  # a sum that cancels has no budget, and the gradient of the cosine of one feature is one
            yield f"{at} of x", partial(check_assign_merge, impl, x, None, fill, "cosine", 1.0, "uniform")
    elif verb == "unmerge":
        yield at, partial(check_unmerge, impl, fill, make_index(B, N, K, device, seed))
    elif verb == "compose":
        first, second = make_index(B, N, K, device, seed), make_index(B, K, D, device, seed + 1)
        yield at, partial(check_compose, impl, first, second, D)
    else:
        for normalize in validate.NORMALIZATIONS:
            for kind in validate.SIMILARITIES:
                given = (size, positions, mask) if N > 1 else ()  # of one token sums cancel too: of x alone exactly
                check = partial(check_soft_merge, impl, x, q, meta, kind, temperature[kind], normalize, *given)
                yield f"{at} {kind}, {normalize}", check


def _call(
    verb: str,
    impl: str,
    device: torch.device,
    seed: int,
    shape: Shape = SMALL_SHAPE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Callable[..., Any], list[Tensor]]:
    """A verb as a function of its tensors, and tensors for it, the features first."""
    B, N, K, _, _ = shape
    given = draw(shape, dtype, device, seed=seed)
    x, q, meta, y, size = (given[name] for name in ("x", "q", "meta", "fill", "size"))
    size, index = size.to(dtype), make_index(B, N, K, device, seed)
    run: Callable[..., Any]
    if verb == "assign":
        return lambda q, meta: functional.assign(q, meta, impl=impl), [q, meta]
    if verb == "match":
        return lambda q: functional.match(q, N // 4, 1, impl=impl), [q]
    if verb == "merge":
        return lambda x, size, index: functional.merge(x, MergePlan(index, K), size, impl=impl), [x, size, index]
    if verb == "assign_merge":
        run = lambda x, q, meta: functional.assign_merge(x, q, meta, impl=impl)  # noqa: E731
        return run, [x, q, meta]
    if verb == "unmerge":
        return lambda y, index: functional.unmerge(y, MergePlan(index, K), impl=impl), [y, index]
    if verb == "compose":
        onward = make_index(B, K, 5, device, seed + 5)
        return lambda a, b: functional.compose(MergePlan(a, K), MergePlan(b, 5), impl=impl), [index, onward]
    return lambda x, q, meta: functional.soft_merge(x, q, meta, impl=impl), [x, q, meta]


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _equal(name: str, found: Any, expected: Any) -> None:
    for at, (one, other) in enumerate(zip(_tensors(found), _tensors(expected), strict=True)):
        assert_equal(f"{name}, output {at}, ", one, other)


def _same_bits(call: Callable[[], Any], impl: str, device: torch.device) -> None:
    """In every run, and for an item whatever else is in the batch."""
    run, inputs = call()
    expected = _tensors(run(*inputs))
    _equal("a second run", run(*inputs), expected)
    if impl == "torch" and device.type == "cuda":
        return  # cuBLAS may take another kernel for another batch
    for b in range(len(inputs[0])):
        _equal(f"item {b} alone", run(*(t[b : b + 1] for t in inputs)), [t[b : b + 1] for t in expected])


def _not_finite(call: Callable[[], Any], bad: str) -> None:
    """Tokens 3 and 4 of the first item are not numbers: other items keep theirs, and every index stays in range."""
    run, inputs = call()
    expected = _tensors(run(*inputs))
    if inputs[0].is_floating_point():
        inputs[0] = inputs[0].clone()
        inputs[0][0, 3:5] = float(bad)
    result = run(*inputs)
    _equal("other items", [t[1:] for t in _tensors(result)], [t[1:] for t in expected])
    for plan in result if isinstance(result, tuple) else (result,):
        if isinstance(plan, MergePlan):
            assert_index_in_range("index", plan.index, plan.num_groups)


def _gradcheck(call: Callable[..., Any]) -> None:
    run, inputs = call(shape=Shape(1, 5, 3, 4, 6), dtype=torch.float64)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = run(*tensors)
        if isinstance(result, Tensor):
            return (result,)
        parts = result if isinstance(result, tuple) else (result,)
        return tuple(t for part in parts for t in fields(part).values())

    try:
        gradcheck(outputs, leaves)
    except RuntimeError as error:
        raise AssertionError(f"gradcheck: {error}") from None


def _compiles(call: Callable[[], Any]) -> None:
    run, inputs = call()
    torch.compiler.reset()
    _equal("compiled", torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs))


def _replays(call: Callable[[], Any]) -> None:
    run, inputs = call()
    with torch.no_grad():
        expected = run(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(*inputs)
        graph.replay()
        torch.cuda.synchronize()
        _equal("replayed", found, expected)


def checked(row: Row, cases: Iterable[Case]) -> Row:
    """Runs the cases of a row until one fails."""
    for name, check in cases:
        row.cases += 1
        seen: list[Comparison] = []
        try:
            with observed(seen.append):
                check()
        except torch.OutOfMemoryError:
            row.verdict, row.message = "skipped", f"{name}: out of memory"
            return row
        except Exception as error:
            wrong = isinstance(error, AssertionError)
            row.verdict, row.message = "FAIL", f"{name}: {'' if wrong else f'{type(error).__name__}: '}{error}"
        for one in seen:
            ratio = one.error / one.budget if one.budget > 0 else float(one.error > 0)
            if row.ratio is None or not ratio <= row.ratio:
                row.error, row.budget, row.ratio, row.worst = one.error, one.budget, ratio, f"{name}, {one.name}"
        if row.verdict == "FAIL":
            return row
    return row


@contextlib.contextmanager
def planted(verb: str) -> Iterator[None]:
    """Within it the last element of the first result of `verb` is wrong, whatever implementation runs."""
    if not verb:
        yield
        return
    kernel = dispatch.kernel

    def spoiled(name: str, impl: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        run = kernel(name, impl, device, dtype)
        if name != verb:
            return run

        def wrong(*args: Any) -> Any:
            result = run(*args)
            first = _tensors(result)[0]
            if first.numel():
                first.view(-1)[-1] += 1
            return result

        return wrong

    with mock.patch.object(dispatch, "kernel", spoiled):
        yield
