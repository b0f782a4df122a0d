"""The calls whose kernels are compiled ahead of time: the shapes that models use, by verb."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.codegen.combinations import products
from benchmarks.codegen.recording import KINDS, Specialization, recorded, recorded_everywhere
from sttm_kernels.impl.triton.assign import assign, assign_backward
from sttm_kernels.impl.triton.assign_merge import assign_merge
from sttm_kernels.impl.triton.config import ARCHITECTURES
from sttm_kernels.impl.triton.match import match
from sttm_kernels.impl.triton.merge import merge, merge_backward
from sttm_kernels.impl.triton.similarity import precision
from sttm_kernels.impl.triton.soft_merge import soft_merge, soft_merge_backward
from sttm_kernels.impl.triton.unmerge import compose, unmerge
from sttm_kernels.plan import MergedGrads, MergedToo, MergePlan, OfAssign, OfMerge, OfSoftMerge, PlanGrads, Similarity


def _assign() -> list[Specialization]:
    """Every way the kernels of this file are compiled for the shapes that models use."""
    found = []
    for dtype, tf32 in KINDS:
        for D, H in ((64, 1), (64, 16), (88, 1), (1408, 1)):
            found += recorded_everywhere(
                f"assign D={D} H={H}", partial(_assign_example, dtype, D, H), dtype, tf32, _ASSIGN_DOTS
            )
    return found


_ASSIGN_DOTS = ("assign_kernel", "assign_backward_kernel")


def _assign_example(dtype: torch.dtype, D: int, H: int) -> None:
    q = torch.empty((2, H, 197, D) if H > 1 else (2, 197, D), dtype=dtype, device="meta")
    meta = torch.empty((2, 49, D), dtype=dtype, device="meta")
    mask = torch.empty((2, 197), dtype=torch.bool, device="meta")
    for similarity in ("cosine", "l2", "dot") if D == 64 and H == 1 else ("cosine",):
        for weight in ("softmax", "uniform"):
            plan = assign(q, meta, Similarity(similarity, 0.1), weight, mask if weight == "softmax" else None)
            grads, given = PlanGrads(plan.score, plan.lse, plan.weight), (q, meta, Similarity(similarity, 0.1), plan)
            assign_backward(grads, *given, OfAssign(True, True))
            if H == 1:  # as `assign_merge` of features that are the metric
                merged = MergedToo(torch.empty_like(meta), None, meta.new_empty((2, 49), dtype=torch.float32))
                assign_backward(grads, *given, OfAssign(True, True), merged=merged)


def _soft_merge() -> list[Specialization]:
    """Every way the kernels of this file are compiled for the shapes that models use."""
    found = []
    for dtype, tf32 in KINDS:
        for C, D in ((768, 64), (1024, 1024), (1408, 88)):
            found += recorded_everywhere(
                f"soft_merge C={C} D={D}", partial(_soft_merge_example, dtype, C, D), dtype, tf32, _SOFT_MERGE_DOTS
            )
    return found


_SOFT_MERGE_DOTS = ("assign_kernel", "soft_merge_kernel", "soft_merge_grad_x_kernel", "soft_merge_grad_metric_kernel")


def _soft_merge_example(dtype: torch.dtype, C: int, D: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    B, N, K, P = 2, 197, 49, 3
    x, q, meta = empty(B, N, C, dtype=dtype), empty(B, N, D, dtype=dtype), empty(B, K, D, dtype=dtype)
    size, positions, mask = empty(B, N), empty(B, N, P), empty(B, N, dtype=torch.bool)
    for normalize in ("meta", "tokens"):
        out = soft_merge(x, q, meta, Similarity("cosine", 0.1), normalize, size, positions, mask)
        grads, needs = MergedGrads(out.x, out.size, out.positions), OfSoftMerge(*(True,) * 5)
        soft_merge_backward(grads, x, q, meta, Similarity("cosine", 0.1), normalize, size, positions, mask, out, needs)


def _match() -> list[Specialization]:
    """Every way the kernels of this file are compiled for the shapes that models use."""
    found = []
    for arch in ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dots = () if precision(dtype) == "ieee" else ("nearest_kernel",)
            for D in (64, 80, 88, 128, 1024):
                found += recorded(
                    f"match {dtype} D={D}".replace("torch.", ""),
                    partial(_match_example, dtype, D),
                    arch,
                    dots,
                )
    return found


def _match_example(dtype: torch.dtype, D: int) -> None:
    lists = [torch.empty((1, 4, count), dtype=torch.int32, device="meta") for count in (32, 17)]
    match(torch.empty((2, 197, D), dtype=dtype, device="meta"), 8, 1, None, None)
    match(torch.empty((2, 197, D), dtype=dtype, device="meta"), 8, 1, lists[0], lists[1])
    if D == 64:
        match(torch.empty((2, 16, 197, D), dtype=dtype, device="meta"), 8, 1, None, None)
        match(torch.empty((2, 16, 784, D), dtype=dtype, device="meta"), 391, 1, None, None)  # every src merges
        match(torch.empty((2, 8192, D), dtype=dtype, device="meta"), 8, 1, None, None)


def _merge() -> list[Specialization]:
    """Every way the kernels of this file are compiled for the shapes that models use."""
    found = []
    for arch in ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for C in (768, 1408):
                found += recorded(
                    f"merge {dtype} C={C}".replace("torch.", ""),
                    partial(_merge_example, dtype, C),
                    arch,
                )
    return found


def _merge_example(dtype: torch.dtype, C: int) -> None:
    x = torch.empty((2, 1568, C), dtype=dtype, device="meta")
    index = torch.empty((2, 1568), dtype=torch.int32, device="meta")
    weight = torch.empty((2, 1568), dtype=torch.float32, device="meta")
    positions = torch.empty((2, 1568, 3), dtype=torch.float32, device="meta")
    for reduce in ("mean", "sum", "max", "first") if C == 768 else ("mean",):
        for K in (784, 64):
            fill = x.new_empty(2, K, C) if reduce == "mean" else None
            order, offsets = index, index.new_empty(2, K + 1)
            for w, size, p in ((weight, weight, positions), (None, None, None)):
                ordered = MergePlan(index, K, weight=w, order=order, offsets=offsets)
                out = merge(x, ordered, size, p, reduce, fill)
                merge(x, MergePlan(index, K, weight=w), size, p, reduce, fill)
                grads = MergedGrads(out.x, out.size, out.positions)
                needs = OfMerge(True, w is not None, size is not None, p is not None)
                merge_backward(grads, x, ordered, size, p, out, reduce, needs)


def _unmerge() -> list[Specialization]:
    """Every way the kernels of this file are compiled for the shapes that models use."""
    found = []
    for arch in ARCHITECTURES:
        index = torch.empty((2, 1568), dtype=torch.int32, device="meta")
        found += recorded("compose", partial(compose, MergePlan(index, 784), MergePlan(index[:, :784], 392)), arch)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for C in (640, 1408):
                x = torch.empty((2, 784, C), dtype=dtype, device="meta")
                name = f"unmerge {dtype} C={C}".replace("torch.", "")
                found += recorded(name, partial(unmerge, x, MergePlan(index, 784)), arch)
    return found


def _assign_merge() -> list[Specialization]:
    """What the ahead-of-time tests compile: the canonical frames, and the other branches in one dtype."""
    found = []
    with products("tf32"):
        for arch in ARCHITECTURES:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for N, K in ((196, 98), (196, 49), (196, 16), (49, 25)):
                    found += _assign_merge_example(arch, dtype, N, K)
            found += _assign_merge_example(arch, torch.bfloat16, 196, 98, extras=True)
    return found


def _assign_merge_example(arch: int, dtype: torch.dtype, N: int, K: int, extras: bool = False) -> list[Specialization]:
    """x of 1024 channels as its own metric, with positions; or, with extras, a mean over heads and everything else."""
    x = torch.empty(2, N, 1024, dtype=dtype, device="meta")
    q = x.new_empty(2, 16, N, 64) if extras else None
    m = x.new_empty(2, K, 64 if extras else 1024)
    positions = torch.empty(N, 3, device="meta").expand(2, N, 3)
    mask = x.new_empty(2, N, dtype=torch.bool) if extras else None
    size = torch.empty(2, N, device="meta") if extras else None
    fill = x.new_empty(2, K, 1024) if extras else None
    similarity = Similarity("l2" if extras else "cosine")
    return recorded(
        f"assign_merge {'extras ' * extras}{str(dtype).removeprefix('torch.')}",
        lambda: assign_merge(x, q, m, similarity, "softmax", mask, size, positions, fill),
        arch,
        ("assign_merge_kernel",),
    )


SPECIALIZATIONS: dict[str, Callable[[], list[Specialization]]] = {
    "assign": _assign,
    "soft_merge": _soft_merge,
    "match": _match,
    "merge": _merge,
    "unmerge": _unmerge,
    "assign_merge": _assign_merge,
}
