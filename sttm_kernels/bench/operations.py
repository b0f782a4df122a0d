"""The registry: what is measured on a workload, of which implementations and rivals, and how each result is checked.

Operations of one name do the same work and are timed in turns. Results of the package are checked in the dtype that is
timed, on the first item of the batch; those of a rival, which may round as it likes, on that item in float64. A rival
under `torch.compile` is not compiled a second time for that: its result must be finite, and count every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sttm_kernels import functional, reference
from sttm_kernels import partition as _partition
from sttm_kernels.bench import rivals
from sttm_kernels.bench.workloads import BACKWARD, Workload
from sttm_kernels.plan import MergePlan
from sttm_kernels.testing import (
    assert_assign_within_budget,
    assert_equal,
    assert_match_valid,
    assert_match_within_budget,
    assert_within_budget,
    assign_at,
)

Run = Callable[["Inputs"], Any]
LARGEST_MATRIX = 8 << 30
"""Bytes: choices are not checked against a larger float64 matrix of similarities."""


@dataclass
class Inputs:
    """One set of tensors of a workload, with the plan that leads from them."""

    x: Tensor
    metric: Tensor
    meta: Tensor | None
    grad: Tensor
    plan: MergePlan


@dataclass(frozen=True)
class Operation:
    """Something to time.

    Attributes:
        name, impl: what is done and by which implementation or rival.
        run: does it with one set of inputs.
        check: raises AssertionError if a result is wrong; `unchecked` for a yardstick that is no implementation.
        bytes_moved, flops: what must be read and written, each once, and computed.
        scratch: bytes of the matrix that it writes in between.
        exact: it is checked on the first item in float64, where only a formulation can be wrong.
    """

    name: str
    impl: str
    run: Run
    check: Callable[[Inputs, Any], None]
    bytes_moved: int
    flops: int
    scratch: int = 0
    exact: bool = False


def draw(work: Workload, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    x = normal(work.B, work.N, work.C)
    grad = normal(work.B, work.groups, work.C)
    if work.K:
        meta = x[:, :: max(1, work.N // work.K)][:, : work.K].contiguous()
        return Inputs(x, x, meta, grad, functional.assign(x, meta, weight="uniform", impl="torch"))
    metric = normal(work.B, work.heads, work.N, work.D)
    return Inputs(x, metric, None, grad, match(work, "torch", metric))


def input_bytes(work: Workload, dtype: torch.dtype) -> int:
    return work.B * work.N * (work.C + (0 if work.K else work.heads * work.D)) * dtype.itemsize


def exact(inputs: Inputs) -> Inputs:
    """The first item, in float64."""
    x, metric, grad = (t[:1].double() for t in (inputs.x, inputs.metric, inputs.grad))
    meta = None if inputs.meta is None else inputs.meta[:1].double()
    return Inputs(x, metric, meta, grad, _first(inputs.plan))


def _first(plan: MergePlan) -> MergePlan:
    """The plan of the first item."""
    return pytree.tree_map_only(Tensor, lambda value: value[:1], plan)


# What is run


def match(work: Workload, impl: str, metric: Tensor) -> MergePlan:
    options = dict(work.options)
    if options.get("partition") == "random2d":
        options["generator"] = torch.Generator(metric.device).manual_seed(0)
    return functional.match(metric, work.r, impl=impl, **options)


def _find(work: Workload, impl: str, inputs: Inputs) -> MergePlan:
    if inputs.meta is None:
        return match(work, impl, inputs.metric)
    return functional.assign(inputs.metric, inputs.meta, impl=impl)


def _nearest(impl: str, inputs: Inputs) -> Tensor:
    assert inputs.meta is not None
    return functional.assign(inputs.metric, inputs.meta, "l2", weight="uniform", impl=impl).index


def _merge(impl: str, inputs: Inputs) -> Tensor:
    return functional.merge(inputs.x, inputs.plan, impl=impl).x


def _find_and_merge(work: Workload, impl: str, inputs: Inputs) -> tuple[MergePlan, Tensor]:
    plan = _find(work, impl, inputs)
    return plan, functional.merge(inputs.x, plan, impl=impl).x


def _assign_merge(impl: str, inputs: Inputs) -> tuple[MergePlan, Tensor]:
    assert inputs.meta is not None
    out, plan = functional.assign_merge(inputs.x, None, inputs.meta, impl=impl)
    return plan, out.x


def _unmerge(impl: str, inputs: Inputs) -> Tensor:
    return functional.unmerge(inputs.grad, inputs.plan, impl=impl)


def _there_and_back(work: Workload, impl: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    plan = match(work, impl, inputs.metric)
    y = functional.merge(inputs.x, plan, impl=impl).x
    return y, functional.unmerge(y, plan, impl=impl)


def _soft_merge(impl: str, inputs: Inputs) -> Tensor:
    assert inputs.meta is not None
    return functional.soft_merge(inputs.x, inputs.metric, inputs.meta, impl=impl).x


def _gradient_of_x(run: Run, inputs: Inputs) -> Any:
    """What `run` returns, its last tensor replaced by the gradient of x through it."""
    x = inputs.x.detach().requires_grad_()
    with torch.enable_grad():
        result = run(replace(inputs, x=x, metric=x if inputs.metric is inputs.x else inputs.metric))
    y = result[-1] if isinstance(result, tuple) else result
    (grad,) = torch.autograd.grad(y, x, inputs.grad)
    return (*result[:-1], grad) if isinstance(result, tuple) else grad


def _rival_merge(merge: Callable[[Tensor, Tensor, int], Tensor], inputs: Inputs) -> Tensor:
    return merge(inputs.x, inputs.plan.index, inputs.plan.num_groups)


def _sides(inputs: Inputs) -> tuple[Tensor, Tensor]:
    if inputs.meta is not None:
        return inputs.metric, inputs.meta
    metric = inputs.metric.mean(1)
    return metric[:, ::2], metric[:, 1::2]


def _row_maximum(inputs: Inputs) -> Any:
    return rivals.product_and_row_maximum(*_sides(inputs))


def _product(inputs: Inputs) -> Tensor:
    q, m = _sides(inputs)
    return q @ m.mT


def _tome(work: Workload, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> tuple[Tensor, Tensor]:
    y, size = run(inputs.metric.mean(1), inputs.x, work.r)
    return size, y


def _tomesd(work: Workload, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Any:
    cells = rivals.tomesd_cells(work.options["grid"], torch.Generator(inputs.x.device).manual_seed(0))
    return run(inputs.metric.mean(1), inputs.x, *cells, work.r)


def _with_meta(run: Callable[[Tensor, Tensor], Any], inputs: Inputs) -> Any:
    assert inputs.meta is not None
    return run(inputs.x, inputs.meta)


# How it is checked


def _is_dst(work: Workload, device: torch.device) -> Tensor:
    options = work.options
    generator = torch.Generator(device).manual_seed(0)
    return _partition.destinations(
        options.get("partition", "alternate"), work.N, options.get("num_prefix", 0), options.get("grid"), (2, 2),
        generator, device,
    )  # fmt: skip


def check_plan(work: Workload, inputs: Inputs, plan: MergePlan) -> None:
    """The rules of the verb, and the score-gap rule where the matrix fits."""
    first = _first(plan)
    if inputs.meta is not None:
        assert_assign_within_budget(first, inputs.metric[:1], inputs.meta[:1])
        return
    prefix, grid, window = (work.options.get(name) for name in ("num_prefix", "grid", "window"))
    is_dst = _is_dst(work, inputs.x.device)
    block = None if window is None or grid is None else _partition.blocks(grid, window, inputs.x.device)
    if 4 * 8 * work.N**2 > LARGEST_MATRIX:
        assert_match_valid(first, work.r, prefix or 0, is_dst, block)
    else:
        assert_match_within_budget(first, inputs.metric[:1], work.r, prefix or 0, is_dst, block)


def check_nearest(inputs: Inputs, index: Tensor) -> None:
    """The score-gap rule for minus the squared distance."""
    assert inputs.meta is not None
    q, meta, settings = inputs.metric[:1], inputs.meta[:1], ("l2", 1.0, "uniform")
    assert_assign_within_budget(assign_at(index[:1].to(torch.int32), q, meta, *settings), q, meta, *settings)


def check_row_maximum(inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    q, m = (side[:1] for side in _sides(inputs))
    truth = reference.pairwise_similarity(q.double(), m.double(), reference.COSINE).max(-1).values
    plain = reference.pairwise_similarity(q.float(), m.float(), reference.COSINE).max(-1).values
    assert_within_budget("score", result[0][:1], truth, plain, q.shape[-1])


def _specified(
    name: str, actual: Tensor, inputs: Inputs, specification: Callable[[Tensor], Tensor], grad: bool
) -> None:
    """Holds `actual`, or the gradient of x if `grad`, against a specification that maps x to merged tokens."""

    def evaluated(x: Tensor) -> Tensor:
        if not grad:
            return specification(x)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = specification(x)
        return torch.autograd.grad(y, x, inputs.grad[:1].to(y.dtype))[0]

    x = inputs.x[:1]
    plain = evaluated(x.float() if x.dtype == torch.float64 else x)
    assert_within_budget(f"gradient of {name}" if grad else name, actual[:1], evaluated(x.double()), plain, x.shape[1])


def check_merge(grad: bool, inputs: Inputs, y: Tensor, plan: MergePlan | None = None) -> None:
    """Along the plan it was merged by."""
    first = _first(inputs.plan if plan is None else plan)
    _specified("x", y, inputs, lambda x: reference.merge(x, first).x, grad)


def check_both(work: Workload, grad: bool, inputs: Inputs, result: tuple[MergePlan, Tensor]) -> None:
    plan, y = result
    check_plan(work, inputs, plan)
    if not grad or inputs.meta is None:
        check_merge(grad, inputs, y, plan)
        return
    index, meta = plan.index[:1], inputs.meta[:1]  # the weights depend on x too

    def specification(x: Tensor) -> Tensor:
        return reference.merge(x, assign_at(index, x, meta.to(x.dtype))).x

    _specified("x", y, inputs, specification, grad)


def check_unmerged(inputs: Inputs, full: Tensor) -> None:
    assert_equal("x", full, reference.unmerge(inputs.grad, inputs.plan))


def check_there_and_back(work: Workload, inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    """The merged tokens, all of them and no others, come back."""
    y, full = result
    check_finite(inputs, result)
    if y.shape[1] != work.groups:
        raise AssertionError(f"x must have {work.groups} tokens, got {y.shape[1]}")
    assert_equal("tokens after unmerging", full[0, :, 0].unique(), y[0, :, 0].unique())


def check_soft_merge(grad: bool, inputs: Inputs, y: Tensor) -> None:
    assert inputs.meta is not None
    meta = inputs.meta[:1]
    _specified("x", y, inputs, lambda x: reference.soft_merge(x, x, meta.to(x.dtype)).x, grad)


def check_tome(work: Workload, forward: Run, grad: bool, inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    """The groups of the specification, in whatever order; and the gradient of x, for gradients in that order."""
    if 4 * 8 * work.N**2 > LARGEST_MATRIX:
        check_counted(work, inputs, result)
        return
    is_dst = _partition.destinations("alternate", work.N, 0, None, (2, 2), None, inputs.x.device)
    plan = reference.match(inputs.metric, work.r, 0, is_dst)
    truth = reference.merge(inputs.x, plan)
    size, y = forward(inputs)
    theirs, ours = (groups[0, :, 0].argsort() for groups in (y, truth.x))
    assert_equal("size", size[:, theirs, 0], truth.size[:, ours])
    values = torch.empty_like(y)
    values[:, ours] = (inputs.grad if grad else y)[:, theirs]
    inputs = replace(inputs, grad=values)
    _specified("x", result[-1] if grad else values, inputs, lambda x: reference.merge(x, plan).x, grad)


def check_counted(work: Workload, inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    """For what chooses differently by its rounding: finite, and all tokens counted."""
    check_finite(inputs, result)
    size = result[0]
    counted = size.double().sum(1).flatten()
    if not bool((counted == work.N).all()):
        raise AssertionError(f"sizes must add up to N = {work.N}, got {counted[0].item()}")


def check_finite(inputs: Inputs, result: Any) -> None:
    """Merged tokens or a gradient, the last of the tensors."""
    y = result[-1] if isinstance(result, tuple) else result
    if not bool(y.isfinite().all()):
        raise AssertionError(f"x must be finite, got {int((~y.isfinite()).sum())} elements that are not")


def unchecked(inputs: Inputs, result: Any) -> None:
    """For a product that is a yardstick and no implementation."""


def check_dense(work: Workload, grad: bool, inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    index, y = result
    assert inputs.meta is not None
    check_both(work, grad, inputs, (assign_at(index.to(torch.int32), inputs.x, inputs.meta), y))


# The registry


@dataclass(frozen=True)
class Rival:
    """What else does the work of an operation: `run`, the bytes of what it writes in between, and another check."""

    name: str
    run: Run
    scratch: int = 0
    check: Callable[[Inputs, Any], None] | None = None
    exact: bool = True


def operations(
    work: Workload, impls: Sequence[str], device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[Operation]:
    """Everything to measure on a workload; those of one name stand together, the package's first.

    `compiled` adds rivals under `torch.compile`.
    """
    torch.compiler.reset()  # else the shapes of earlier workloads use up its limit of recompilations
    found = _of_assign(work, impls, device, dtype) if work.K else _of_match(work, impls, dtype)
    return [
        operation
        for operation in found
        if (not work.only or operation.name in work.only) and (compiled or not operation.impl.endswith(" compiled"))
    ]


def _group(
    name: str,
    impls: Sequence[str],
    run: Callable[[str], Run],
    check: Callable[[Inputs, Any], None],
    bytes_moved: int,
    flops: int,
    others: Sequence[Rival] = (),
    grad: bool = False,
) -> Iterator[Operation]:
    """One operation; with `grad`, of what is run and the gradient of x through it."""

    def whole(run: Run) -> Run:
        return partial(_gradient_of_x, run) if grad else run

    name += BACKWARD * grad
    for impl in impls:
        yield Operation(name, impl, whole(run(impl)), check, bytes_moved, flops)
    for rival in others:
        yield Operation(
            name, rival.name, whole(rival.run), rival.check or check, bytes_moved, flops, rival.scratch, rival.exact
        )


def _of_match(work: Workload, impls: Sequence[str], dtype: torch.dtype) -> Iterator[Operation]:
    x, y, index, matrix = _extents(work, dtype)
    keys = dtype.itemsize * work.B * work.heads * work.N * work.D
    flops = 2 * work.pairs * work.D
    alternate = work.options.keys() <= {"num_prefix"}

    found = keys + 2 * index
    products = _products(matrix) if alternate else ()
    yield from _group("match", impls, partial(partial, _find, work), partial(check_plan, work), found, flops, products)
    yield from _of_merge(work, impls, dtype)

    eager: Run = partial(_tome, work, rivals.tome_match_merge)
    compiled: Run = partial(_tome, work, torch.compile(rivals.tome_match_merge, dynamic=False))
    for grad in (False, True):
        tome = (
            Rival("ToMe eager", eager, 3 * matrix, partial(check_tome, work, eager, grad)),
            Rival("ToMe compiled", compiled, 3 * matrix, partial(check_counted, work), exact=False),
        )
        moved = found + x + y + grad * (x + y + index)
        run, check = partial(partial, _find_and_merge, work), partial(check_both, work, grad)
        yield from _group("match + merge", impls, run, check, moved, flops, tome if alternate else (), grad)

    if work.unmerge:
        yield from _group("unmerge", impls, partial(partial, _unmerge), check_unmerged, x + y + index, 0)
        function = rivals.tomesd_match_merge_unmerge
        eager = partial(_tomesd, work, function)
        compiled = partial(_tomesd, work, torch.compile(function, dynamic=False))
        tomesd = Rival("tomesd eager", eager, 3 * matrix), Rival("tomesd compiled", compiled, 3 * matrix, exact=False)
        round_trip, check_trip = partial(partial, _there_and_back, work), partial(check_there_and_back, work)
        moved = found + 2 * (x + y) + index
        yield from _group("match + merge + unmerge", impls, round_trip, check_trip, moved, flops, tomesd)


def _of_assign(work: Workload, impls: Sequence[str], device: torch.device, dtype: torch.dtype) -> Iterator[Operation]:
    x, y, index, matrix = _extents(work, dtype)
    meta = dtype.itemsize * work.B * work.K * work.D
    flops = 2 * work.pairs * work.D

    found, check = x + meta + 4 * index, partial(check_plan, work)
    yield from _group("assign", impls, partial(partial, _find, work), check, found, flops, _products(matrix))
    packages = rivals.installed() if device.type == "cuda" else ()
    others = [Rival(name, partial(_with_meta, partial(rivals.nearest, name)), exact=False) for name in packages]
    moved = x + meta + index
    yield from _group("assign l2", impls, partial(partial, _nearest), check_nearest, moved, flops, others)
    yield from _of_merge(work, impls, dtype)

    both, dense_both = partial(check_both, work), partial(check_dense, work)
    for name, run, own_check, function, dense_check, read, products in (
        ("assign_merge", _assign_merge, both, rivals.dense_assign_merge, dense_both, found, 1),
        ("soft_merge", _soft_merge, check_soft_merge, rivals.dense_soft_merge, check_soft_merge, x + meta, 2),
    ):
        eager = partial(_with_meta, function)
        compiled = partial(_with_meta, torch.compile(function, dynamic=False))
        for grad in (False, True):
            dense = (
                Rival("dense eager", eager, 3 * matrix, partial(dense_check, grad)),
                Rival("dense compiled", compiled, 3 * matrix, check_finite, exact=False),
            )
            moved, done = read + y + grad * (x + y + meta), products * (1 + 2 * grad) * flops
            yield from _group(name, impls, partial(partial, run), partial(own_check, grad), moved, done, dense, grad)


def _of_merge(work: Workload, impls: Sequence[str], dtype: torch.dtype) -> Iterator[Operation]:
    x, y, index, _ = _extents(work, dtype)
    pairs = work.B * work.N * work.groups
    others = (
        Rival("one-hot bmm", partial(_rival_merge, rivals.one_hot_merge), (8 + dtype.itemsize) * pairs),  # of int64
        Rival("index_add", partial(_rival_merge, rivals.index_add_merge)),
        Rival("scatter_reduce", partial(_rival_merge, rivals.scatter_reduce_merge)),
    )
    for grad in (False, True):
        moved, flops, check = (
            (1 + grad) * (x + y + index),
            2 * (1 + grad) * work.B * work.N * work.C,
            partial(check_merge, grad),
        )
        yield from _group("merge", impls, partial(partial, _merge), check, moved, flops, others, grad)


def _extents(work: Workload, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Bytes of the tokens, the merged tokens, the index, and the matrix of similarities."""
    row = dtype.itemsize * work.C
    return work.B * work.N * row, work.B * work.groups * row, 4 * work.B * work.N, dtype.itemsize * work.pairs


def _products(matrix: int) -> tuple[Rival, ...]:
    return (
        Rival("product + row maximum", _row_maximum, 2 * matrix, check_row_maximum),
        Rival("product alone", _product, matrix, unchecked),
    )
