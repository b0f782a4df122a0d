"""The figures of the package and of its rivals, one row each: `python -m benchmarks.run --suite canonical --out x.csv`.

For every workload and operation: a check of the results, then the time of one call (p20, p50, p80, inputs rotating
through more memory than the cache holds), peak memory, the floor max(bytes / bandwidth, flops / rate) with both
ceilings measured in the same run, and the fraction of it that was reached. Each input counts as read once and each
output as written once. What a check refuses or a device cannot hold has no time but a reason in its row.

    python -m benchmarks.run --suite quick --out quick.csv --device cpu                               # anywhere
    TRITON_INTERPRET=1 python -m benchmarks.run --suite quick --out q.csv --device cpu --impl triton  # no GPU: no speed
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.timing import CACHE_BYTES, Ceilings, ceilings, time_calls
from benchmarks.workloads import SUITES, Workload
from sttm_kernels import MergePlan, __version__, dispatch, functional, reference
from sttm_kernels import partition as _partition
from sttm_kernels.testing import (
    assert_assign_within_budget,
    assert_match_valid,
    assert_match_within_budget,
    assert_within_budget,
)

LARGEST_MATRIX = 8 << 30
"""Bytes: rivals that would write a larger N x K matrix are left out, and choices are not checked against one."""

COLUMNS = (
    "workload", "operation", "impl", "dtype", "B", "N", "C", "heads", "D", "r", "K", "p20_us", "p50_us", "p80_us",
    "peak_bytes", "bytes", "flops", "floor_us", "fraction_of_floor", "bandwidth", "flop_rate", "check", "device",
    "torch", "triton", "cuda", "version", "commit", "time",
)  # fmt: skip


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
    """Something to time: `run` on one set of inputs, `check` on its result, and what it must move and compute."""

    name: str
    impl: str
    run: Callable[[Inputs], Any]
    check: Callable[[Inputs, Any], None]
    bytes_moved: int
    flops: int


# Inputs


def draw(work: Workload, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    x = normal(work.B, work.N, work.C)
    grad = normal(work.B, work.groups, work.C)
    if work.K:
        meta = x[:, :: max(1, work.N // work.K)][:, : work.K].contiguous()
        return Inputs(x, x, meta, grad, functional.assign(x, meta, impl="torch"))
    metric = normal(work.B, work.heads, work.N, work.D)
    return Inputs(x, metric, None, grad, match(work, metric, "torch"))


def input_bytes(work: Workload, dtype: torch.dtype) -> int:
    return work.B * work.N * work.C * dtype.itemsize * (1 if work.K else 2)


def match(work: Workload, metric: Tensor, impl: str) -> MergePlan:
    options = dict(work.options)
    if options.get("partition") == "random2d":
        options["generator"] = torch.Generator(metric.device).manual_seed(0)
    return functional.match(metric, work.r, impl=impl, **options)


# Checks


def check_plan(work: Workload, inputs: Inputs, plan: MergePlan) -> None:
    """Of the first item: the rules of the verb, and the score-gap rule where the matrix fits."""
    first = MergePlan(
        plan.index[:1],
        plan.num_groups,
        *(
            None if value is None else value[:1]
            for value in (plan.score, plan.lse, plan.weight, plan.order, plan.offsets)
        ),
    )
    if inputs.meta is not None:
        assert_assign_within_budget(first, inputs.metric[:1], inputs.meta[:1])
        return
    options = work.options
    prefix, grid, window = options.get("num_prefix", 0), options.get("grid"), options.get("window")
    device = inputs.x.device
    generator = torch.Generator(device).manual_seed(0)
    partition = options.get("partition", "alternate")
    is_dst = _partition.destinations(partition, work.N, prefix, grid, (2, 2), generator, device)
    block = None if window is None or grid is None else _partition.blocks(grid, window, device)
    if 4 * 8 * work.N**2 > LARGEST_MATRIX:
        assert_match_valid(first, work.r, prefix, is_dst, block)
    else:
        assert_match_within_budget(first, inputs.metric[:1], work.r, prefix, is_dst, block)


def check_merge(inputs: Inputs, plan: MergePlan, y: Tensor) -> None:
    """Of the first item, along the plan it was merged by."""
    weight = None if plan.weight is None else plan.weight[:1]
    first = MergePlan(plan.index[:1], plan.num_groups, weight=weight)
    truth = reference.merge(inputs.x[:1].double(), first).x
    assert_within_budget("x", y[:1], truth, reference.merge(inputs.x[:1], first).x, inputs.x.shape[1])


def check_grad(inputs: Inputs, plan: MergePlan, grad: Tensor) -> None:
    """The gradient of x through a uniformly weighted merge, of the first item."""
    first = MergePlan(plan.index[:1], plan.num_groups)

    def of(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = reference.merge(x, first).x
        return torch.autograd.grad(y, x, inputs.grad[:1].to(x.dtype))[0]

    assert_within_budget("gradient of x", grad[:1], of(inputs.x[:1].double()), of(inputs.x[:1]), inputs.x.shape[1])


def check_shape(work: Workload, inputs: Inputs, result: tuple[Tensor, Tensor]) -> None:
    """For a rival whose choices differ in rounding: as many groups, all tokens counted, finite."""
    y, size = result
    if y.shape != (work.B, work.groups, work.C) or not bool(y.isfinite().all()):
        raise AssertionError(f"x must be finite of shape {(work.B, work.groups, work.C)}, got {tuple(y.shape)}")
    counted = size.double().sum(1).flatten()
    if not bool((counted == work.N).all()):
        raise AssertionError(f"sizes must add up to N = {work.N}, got {counted[0].item()}")


def unchecked(inputs: Inputs, result: Any) -> None:
    """For products that are a yardstick and not an implementation."""


# Operations


def operations(work: Workload, impls: list[str], dtype: torch.dtype, compiled: bool) -> Iterator[Operation]:
    item = dtype.itemsize
    B, N, C, K, D = work.B, work.N, work.C, work.groups, work.D
    index, x, y = 4 * B * N, item * B * N * C, item * B * K * C
    if work.K:
        metric, plan_bytes = x + item * B * K * D, index + 3 * 4 * B * N
        pairs = B * N * K
    else:
        metric, plan_bytes = x, 2 * index
        pairs = B * window_pairs(work)
    flops = 2 * pairs * D
    both = metric + plan_bytes + y + (0 if work.K else x)
    find = "assign" if work.K else "match"
    for impl in impls:
        yield Operation(find, impl, partial(_find, work, impl), partial(check_plan, work), metric + plan_bytes, flops)
        yield Operation("merge", impl, partial(_merge, impl), _check_merged, x + y + index, 2 * B * N * C)
        yield Operation(f"{find} + merge", impl, partial(_both, work, impl), partial(_check_both, work), both, flops)
        yield Operation(
            "merge forward + backward", impl, partial(_step, impl), _check_step, 2 * (x + y) + 2 * index, 4 * B * N * C
        )
        if work.unmerge:
            yield Operation("unmerge", impl, partial(_unmerge, impl), _check_unmerged, x + y + index, 0)
        if work.K:
            fused = partial(_fused, impl)
            yield Operation("assign_merge", impl, fused, partial(_check_both, work), both, flops)
    matrix = item * B * N * K
    if matrix <= LARGEST_MATRIX:
        one_hot = partial(_rival_merge, rivals.one_hot_merge)
        yield Operation("merge", "one-hot bmm", one_hot, unchecked, x + y + index, 2 * B * N * C)
    yield Operation("merge", "index_add", partial(_rival_merge, rivals.index_add_merge), unchecked, x + y + index, 0)
    if work.options.keys() <= {"num_prefix"} and matrix <= LARGEST_MATRIX:
        yield Operation(find, "product + row maximum", _row_maximum, unchecked, metric + plan_bytes, flops)
        yield Operation(find, "product alone", _product, unchecked, metric + plan_bytes, flops)
        if not work.K:
            check, eager = partial(check_shape, work), rivals.tome_match_merge
            yield Operation("match + merge", "ToMe eager", partial(_tome, work, eager), check, both, flops)
            if compiled:
                torch.compiler.reset()  # else the shapes of earlier workloads use up its limit of recompilations
                compiled_tome = torch.compile(eager, dynamic=False)
                yield Operation(
                    "match + merge", "ToMe compiled", partial(_tome, work, compiled_tome), check, both, flops
                )


def window_pairs(work: Workload) -> int:
    """How many (src, dst) pairs one item compares."""
    if "window" in work.options:
        inside = math.prod(work.options["window"])
        return work.N * inside // 4
    if work.options.get("partition") == "random2d":
        return 3 * (work.N // 4) ** 2
    return (work.N - work.options.get("num_prefix", 0)) ** 2 // 4


def _find(work: Workload, impl: str, inputs: Inputs) -> MergePlan:
    if inputs.meta is not None:
        return functional.assign(inputs.metric, inputs.meta, impl=impl)
    return match(work, inputs.metric, impl)


def _merge(impl: str, inputs: Inputs) -> Tensor:
    return functional.merge(inputs.x, inputs.plan, impl=impl).x


def _check_merged(inputs: Inputs, y: Tensor) -> None:
    check_merge(inputs, inputs.plan, y)


def _both(work: Workload, impl: str, inputs: Inputs) -> tuple[MergePlan, Tensor]:
    plan = _find(work, impl, inputs)
    return plan, functional.merge(inputs.x, plan, impl=impl).x


def _fused(impl: str, inputs: Inputs) -> tuple[MergePlan, Tensor]:
    assert inputs.meta is not None
    out, plan = functional.assign_merge(inputs.x, None, inputs.meta, impl=impl)
    return plan, out.x


def _check_both(work: Workload, inputs: Inputs, result: tuple[MergePlan, Tensor]) -> None:
    check_plan(work, inputs, result[0])
    check_merge(inputs, *result)


def _step(impl: str, inputs: Inputs) -> Tensor:
    plan = MergePlan(inputs.plan.index, inputs.plan.num_groups, order=inputs.plan.order, offsets=inputs.plan.offsets)
    x = inputs.x.detach().requires_grad_()
    with torch.enable_grad():
        y = functional.merge(x, plan, impl=impl).x
    return torch.autograd.grad(y, x, inputs.grad)[0]


def _check_step(inputs: Inputs, grad: Tensor) -> None:
    check_grad(inputs, inputs.plan, grad)


def _unmerge(impl: str, inputs: Inputs) -> Tensor:
    return functional.unmerge(inputs.grad, inputs.plan, impl=impl)


def _check_unmerged(inputs: Inputs, full: Tensor) -> None:
    if not torch.equal(full, reference.unmerge(inputs.grad, inputs.plan)):
        raise AssertionError("unmerge must copy every group to its tokens")


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
    return run(inputs.metric.mean(1), inputs.x, work.r)


# Rows


def measure(
    operation: Operation, sets: list[Inputs], device: torch.device, seconds: float, limits: Ceilings
) -> dict[str, Any]:
    """Checks the operation and times it; "check" is "passed", or why there is no time."""
    floor = limits.floor(operation.bytes_moved, operation.flops)
    row: dict[str, Any] = {
        "operation": operation.name,
        "impl": operation.impl,
        "bytes": operation.bytes_moved,
        "flops": operation.flops,
        "floor_us": round(floor, 2),
    }
    try:
        with torch.no_grad():
            operation.check(sets[0], operation.run(sets[0]))
            sample = time_calls([partial(operation.run, inputs) for inputs in sets], device, seconds)
    except (AssertionError, RuntimeError) as error:
        return row | {"check": f"{type(error).__name__}: {error}".splitlines()[0]}
    times = {f"{name}_us": round(getattr(sample, name), 2) for name in ("p20", "p50", "p80")}
    passed = "none" if operation.check is unchecked else "passed"
    return row | times | {
        "peak_bytes": sample.peak_bytes, "fraction_of_floor": round(floor / sample.p50, 4), "check": passed,
    }  # fmt: skip


def surroundings(device: torch.device, limits: Ceilings) -> dict[str, Any]:
    """What every row says about where it came from."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    interpreter = " (Triton's interpreter)" if dispatch.interpreting() else ""
    return {
        "device": (torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()) + interpreter,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "version": __version__,
        "commit": commit,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "bandwidth": f"{limits.bandwidth:.4g}",
        "flop_rate": f"{limits.flop_rate:.4g}",
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--out", required=True, help="CSV file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", nargs="+", help="default: triton and torch on a GPU, torch on a CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--workload", default="", help="only those whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on timing each operation (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out rivals under torch.compile")
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    impls = args.impl or (["triton", "torch"] if device.type == "cuda" else ["torch"])
    limits = ceilings(device, dtype, args.seconds)
    everywhere = surroundings(device, limits) | {"dtype": str(dtype).removeprefix("torch.")}
    print(
        f"{everywhere['device']}: copy {limits.bandwidth / 1e9:.0f} GB/s, product {limits.flop_rate / 1e12:.2f} TFLOP/s"
    )
    failed = 0
    with open(args.out, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for work in SUITES[args.suite]:
            if args.workload not in work.name:
                continue
            rotations = max(2, min(64, math.ceil(CACHE_BYTES[device.type] / input_bytes(work, dtype))))
            sets = [draw(work, device, dtype, seed) for seed in range(rotations)]
            shape = {name: getattr(work, name) for name in ("B", "N", "C", "heads", "D", "r")} | {"K": work.groups}
            print(f"{work.name}, B={work.B} N={work.N} C={work.C} K={work.groups}")
            for operation in operations(work, impls, dtype, not args.no_compile):
                row = measure(operation, sets, device, args.seconds, limits)
                failed += row["check"] not in ("passed", "none")
                table.writerow({"workload": work.name, **shape, **everywhere, **row})
                file.flush()
                time = f"{row['p50_us']:12.1f} us {row['fraction_of_floor']:8.3f}" if "p50_us" in row else row["check"]
                print(f"  {operation.name:26} {operation.impl:22} {time}", flush=True)
    print(f"{args.out}: {failed} operations failed" if failed else args.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
