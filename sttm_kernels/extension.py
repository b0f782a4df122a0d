"""The verbs by way of an extension of this package: the CUDA kernels and those of the CPU take the same arguments.

Every method has the arguments of its namesake in `reference.py`. Outputs and scratch are allocated here; the extension
checks them and launches.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sttm_kernels.plan import (
    MatchBounds,
    Merged,
    MergedGrads,
    MergedToo,
    MergePlan,
    OfAssign,
    OfMerge,
    OfSoftMerge,
    Packed,
    PlanGrads,
    Similarity,
    SoftMerged,
)

BINDINGS = Path(__file__).resolve().parent.parent / "csrc" / "bindings"
"""The sources of what the extensions are called with; there in a checkout, where they change under an extension."""
REBUILD = "python setup.py build_ext --inplace"


class StaleExtension(RuntimeError):
    """An extension was built from other sources than those beside it."""


def load(name: str, path: str | None) -> ModuleType:
    """The extension of this name, of this copy of the package; another build of it if the `path` of one is given.

    Raises:
        StaleExtension: its functions do not take what the sources beside the package say.
    """
    name = f"{__package__}.{name}"
    if not path:
        module = importlib.import_module(name)
    else:
        loader = ExtensionFileLoader(name, path)
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    for verb, wanted in signatures(BINDINGS).items():
        document = getattr(getattr(module, verb, None), "__doc__", None)
        if document is not None and (given := re.findall(r"[(,] ?(\w+): ", document.split("\n")[0])) != wanted:
            raise StaleExtension(
                f"{module.__file__} was built from other sources than {BINDINGS.parent}: its {verb} takes "
                f"({', '.join(given)}), not ({', '.join(wanted)}). Build it again: {REBUILD}"
            )
    return module


def signatures(bindings: Path) -> dict[str, list[str]]:
    """The arguments of the functions that these sources define; of none where there are no sources."""
    found = {}
    for source in bindings.glob("*.cpp"):
        for definition in source.read_text(encoding="utf-8").split('m.def("')[1:]:
            found[definition[: definition.index('"')]] = re.findall(r'py::arg\("(\w+)"\)', definition)
    return found


def why_not_built(name: str, note: str, kind: str) -> str | None:
    """Why the package lacks an extension, by the `note` that its build left; None if it is there."""
    if importlib.util.find_spec(f"{__package__}.{name}") is not None:
        return None
    path = Path(__file__).parent / "_build.json"
    why = json.loads(path.read_text()).get(note) if path.exists() else None
    why = why or "the package was not built, only imported"
    return f"sttm_kernels was installed without its {kind} kernels: {why}"


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _items(t: Tensor | None) -> Tensor | None:
    """(B, rows, columns) with contiguous items, which may all be the same one."""
    if t is None or (t.stride(2) == 1 and t.stride(1) == t.shape[2]):
        return t
    return t.contiguous()


def _sums(x: Tensor, num_groups: int, positions: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Room for sizes, positions and masses of groups."""
    size, mass = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    return size, None if positions is None else size.new_empty((*size.shape, positions.shape[2])), mass


def _given(positions: Tensor | None, size: Tensor) -> Tensor:
    """What the extension takes for positions out: (B, K, 0) if there are none."""
    return size.new_empty((*size.shape, 0)) if positions is None else positions


def _new_plan(q: Tensor, num_groups: int, weight: str) -> MergePlan:
    """Room for a plan of `assign`."""
    index = q.new_empty((q.shape[0], q.shape[-2]), dtype=torch.int32)
    score = torch.empty_like(index, dtype=torch.float32)
    lse, w = (torch.empty_like(score) if weight == "softmax" else None for _ in range(2))
    return MergePlan(index, num_groups, score, lse, w)


def _scratch(features: Tensor, floats: int) -> Tensor | None:
    """Room for partial sums over tokens; None if it takes none."""
    return features.new_empty(floats, dtype=torch.float32) if floats else None


def _alike(*tensors: Tensor | None) -> Any:
    """Features of one dtype as they are, of several as float32: a product has operands of one kind."""
    if len({t.dtype for t in tensors if t is not None}) == 1:
        return tensors
    return tuple(None if t is None else t.float() for t in tensors)


@dataclass(frozen=True)
class Verbs:
    """The verbs of one extension.

    Attributes:
        run: the extension.
        stream: where a launch that has this tensor among its arguments goes.
        tf32: whether float32 products may round to TF32.
        sort_room, match_room: how often N integers are the scratch that sorting the tokens of an item takes, and match.
        takes_mean: whether a metric that is no row of aligned memory for every token is first made one.
    """

    run: Callable[[], Any]
    stream: Callable[[Tensor], int]
    tf32: Callable[[], bool]
    sort_room: int
    match_room: int
    takes_mean: bool

    def _groups(self, plan: MergePlan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Its `order` and `offsets`; if it has none, room for them and scratch to make them with."""
        if plan.order is not None and plan.offsets is not None:
            return plan.order.contiguous(), plan.offsets.contiguous(), None
        B, N = plan.index.shape
        order, offsets = self._order(plan.index, plan.num_groups)
        return order, offsets, plan.index.new_empty((self.sort_room * B, N))

    def _order(self, index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Room for both."""
        return index.new_empty(index.shape), index.new_empty((index.shape[0], num_groups + 1))

    def unmerge(self, x: Tensor, plan: MergePlan) -> Tensor:
        y = x.new_empty((*plan.index.shape, x.shape[2]))
        self.run().unmerge(x, plan.index.contiguous(), y, self.stream(x))
        return y

    def compose(self, plan1: MergePlan, plan2: MergePlan) -> MergePlan:
        index1, index2 = plan1.index.contiguous(), plan2.index.contiguous()
        out = torch.empty_like(index1)
        self.run().compose(index1, index2, plan2.num_groups, out, self.stream(index1))
        return MergePlan(out, plan2.num_groups)

    def merge(
        self,
        x: Tensor,
        plan: MergePlan,
        size: Tensor | None,
        positions: Tensor | None,
        reduce: str,
        fill: Tensor | None,
    ) -> Merged:
        (B, _, C), K = x.shape, plan.num_groups
        order, offsets, scratch = self._groups(plan)
        made = (None, None) if scratch is None else (order, offsets)
        out = Merged(x.new_empty((B, K, C)), *_sums(x, K, positions), *made)
        self.run().merge(
            x, plan.index.contiguous(), K, _dense(plan.weight), _dense(size), _items(positions), _items(fill),
            order, offsets, scratch, reduce,
            out.x, out.size, _given(out.positions, out.size), out.mass, self.stream(x),
        )  # fmt: skip
        return out

    def merge_backward(
        self,
        grads: MergedGrads,
        x: Tensor,
        plan: MergePlan,
        size: Tensor | None,
        positions: Tensor | None,
        out: Merged,
        reduce: str,
        needs: OfMerge,
    ) -> OfMerge:
        index = plan.index.contiguous()
        found = OfMerge(
            x.new_empty(x.shape) if needs.x else None,
            out.mass.new_empty(index.shape) if needs.weight else None,
            out.mass.new_empty(index.shape) if needs.size else None,
            positions.new_empty(positions.shape) if needs.positions and positions is not None else None,
        )
        through_y = grads.x is not None and reduce == "mean"
        centred = (needs.weight or needs.size) and (
            through_y or (grads.positions is not None and positions is not None)
        )
        groups: tuple[Tensor | None, ...] = (None, None, None)
        if centred or (needs.x and reduce in ("max", "first")):
            groups = self._groups(plan)
        self.run().merge_backward(
            grads.x, _dense(grads.size), None if positions is None else _items(grads.positions), x, index,
            plan.num_groups, _dense(plan.weight), _dense(size), _items(positions), out.x.contiguous(), out.mass,
            *groups, reduce, *found,
            out.mass.new_empty((2 if reduce == "sum" else 1, *index.shape)) if centred else None, self.stream(x),
        )  # fmt: skip
        return found

    def _mean(self, metric: Tensor) -> Tensor | None:
        """Room for the mean over heads of a metric, or for a copy that can be read 16 bytes at a time."""
        *_, N, D = metric.shape
        plain = metric.dim() == 3 and metric.stride(2) == 1 and D % 8 == 0 and metric.data_ptr() % 16 == 0
        if not self.takes_mean or (plain and not metric.stride(0) % 8 and not metric.stride(1) % 8):
            return None
        return metric.new_empty((metric.shape[0], N, -(-D // 8) * 8))

    def match(
        self,
        metric: Tensor,
        r: int,
        num_prefix: int,
        src: Tensor | None,
        dst: Tensor | None,
        bounds: MatchBounds | None = None,
    ) -> MergePlan:
        B, N = metric.shape[0], metric.shape[-2]
        K, mask, limit, threshold = bounds or MatchBounds(N - r)
        index = metric.new_empty((B, N), dtype=torch.int32)
        score = metric.new_empty((B, N), dtype=torch.float32)
        order, offsets = (None, None) if mask is not None else (torch.empty_like(index), index.new_empty((B, K + 1)))
        scratch, mean = index.new_empty(B * (self.match_room * N + 1)), self._mean(metric)
        self.run().match(
            metric, _dense(src), _dense(dst), mask, _dense(limit), r, K, num_prefix, threshold, self.tf32(),
            index, score, order, offsets, scratch, mean, self.stream(metric),
        )  # fmt: skip
        return MergePlan(index, K, score, order=order, offsets=offsets)

    def match_packed(
        self,
        metric: Tensor,
        num_prefix: int,
        packed: Packed,
        src: Tensor | None = None,
        dst: Tensor | None = None,
    ) -> MergePlan:
        T, K = metric.shape[-2], packed.num_groups
        index = metric.new_empty((1, T), dtype=torch.int32)
        score = metric.new_empty((1, T), dtype=torch.float32)
        order, offsets, scratch = (
            torch.empty_like(index),
            index.new_empty((1, K + 1)),
            index.new_empty(self.match_room * T),
        )
        mean = self._mean(metric)
        self.run().match_packed(
            metric, _dense(packed.sequences), _dense(src), _dense(dst), packed.tiles, K, num_prefix, packed.threshold,
            self.tf32(), index, score, order, offsets, scratch, mean, self.stream(metric),
        )  # fmt: skip
        return MergePlan(index, K, score, order=order, offsets=offsets)

    def assign(
        self,
        q: Tensor,
        meta: Tensor,
        similarity: Similarity,
        weight: str,
        mask: Tensor | None,
        sequences: Tensor | None = None,
        left_out: int = 0,
    ) -> MergePlan:
        """In sequences of at most `left_out` tokens these have no group, and nothing else either."""
        K = meta.shape[1] if sequences is None else meta.shape[0] * meta.shape[1]
        plan = _new_plan(q, K, weight)
        self.run().assign(
            q, meta, mask, sequences, left_out, *similarity, self.tf32(),
            plan.index, plan.score, plan.lse, plan.weight, self.stream(q),
        )  # fmt: skip
        return plan

    def assign_earlier(self, q: Tensor, similarity: Similarity) -> Tensor:
        score = q.new_empty(q.shape[:2], dtype=torch.float32)
        self.run().assign_earlier(q, *similarity, self.tf32(), score, self.stream(q))
        return score

    def assign_backward(
        self,
        grads: PlanGrads,
        q: Tensor,
        meta: Tensor,
        similarity: Similarity,
        plan: MergePlan,
        needs: OfAssign,
        sequences: Tensor | None = None,
        merged: MergedToo | None = None,
    ) -> OfAssign:
        found = OfAssign(q.new_empty(q.shape) if needs.q else None, meta.new_empty(meta.shape) if needs.meta else None)
        run, soft = self.run(), grads.lse is not None or grads.weight is not None
        run.assign_backward(
            *grads, q, meta, plan.index.contiguous(), _dense(plan.score), _dense(plan.lse) if soft else None,
            _dense(plan.weight), *map(_dense, merged or (None,) * 3), sequences, *similarity, self.tf32(), *found,
            _scratch(q, run.assign_scratch(q, meta)) if soft and needs.meta else None, self.stream(q),
        )  # fmt: skip
        return found

    def assign_merge(
        self,
        x: Tensor,
        q: Tensor | None,
        meta: Tensor,
        similarity: Similarity,
        weight: str,
        mask: Tensor | None,
        size: Tensor | None,
        positions: Tensor | None,
        fill: Tensor | None,
        sequences: Tensor | None = None,
    ) -> tuple[Merged, MergePlan]:
        q = x if q is None else q
        (B, N, C), (S, K) = x.shape, meta.shape[:2]
        run = self.run()
        together = sequences is not None and S > 1  # one alone is an item
        longest = run.ASSIGN_MERGE_TOKENS if K <= run.ASSIGN_MERGE_GROUPS and q.dtype == x.dtype else 0
        if longest == 0 or N > longest:
            plan = self.assign(q, meta, similarity, weight, mask, sequences, longest if together else 0)
            out = self.merge(x, plan, size, positions, "mean", fill)
            if sequences is not None:
                out = out._replace(order=None, offsets=None)
            if longest == 0 or not together:
                return out, plan
        else:
            plan = _new_plan(q, S * K if together else K, weight)
            made = (None, None) if sequences is not None else self._order(plan.index, K)
            out = Merged(x.new_empty((B, plan.num_groups, C)), *_sums(x, plan.num_groups, positions), *made)
        run.assign_merge(
            x, q, meta, mask, _dense(size), _items(positions), _items(fill), sequences, *similarity, self.tf32(),
            plan.index, plan.score, plan.lse, plan.weight,
            out.x, out.size, _given(out.positions, out.size), out.mass, out.order, out.offsets, self.stream(x),
        )  # fmt: skip
        return out, plan

    def soft_merge(
        self,
        x: Tensor,
        q: Tensor,
        meta: Tensor,
        similarity: Similarity,
        normalize: str,
        size: Tensor | None,
        positions: Tensor | None,
        mask: Tensor | None,
        sequences: Tensor | None = None,
    ) -> SoftMerged:
        (items, N, C), (B, K) = x.shape, meta.shape[:2]
        dtype, (x, q, meta) = x.dtype, _alike(x, q, meta)
        over_meta = normalize == "meta"
        y, (size_out, positions_out, _) = x.new_empty((B, K, C)), _sums(meta, K, positions)
        lse = size_out.new_empty((items, N) if over_meta else (B, K))
        run, beside = self.run(), 2 + (0 if positions is None else positions.shape[2])
        scratch = _scratch(x, run.soft_merge_scratch(x, B, K, C, beside))
        run.soft_merge(
            x, q, meta, size, positions, mask, sequences, *similarity, over_meta, self.tf32(),
            y, size_out, positions_out, lse, scratch, self.stream(x),
        )  # fmt: skip
        return SoftMerged(y.to(dtype), size_out, positions_out, lse)

    def soft_merge_backward(
        self,
        grads: MergedGrads,
        x: Tensor,
        q: Tensor,
        meta: Tensor,
        similarity: Similarity,
        normalize: str,
        size: Tensor | None,
        positions: Tensor | None,
        mask: Tensor | None,
        out: SoftMerged,
        needs: OfSoftMerge,
        sequences: Tensor | None = None,
    ) -> OfSoftMerge:
        (items, N, _), (B, K) = x.shape, meta.shape[:2]
        dtypes = x.dtype, q.dtype, meta.dtype
        x, q, meta, y, grad_y = _alike(x, q, meta, out.x, grads.x)
        over_meta = normalize == "meta"
        grad_x, grad_q, grad_meta = (
            t.new_empty(t.shape) if need else None for t, need in zip((x, q, meta), needs, strict=False)
        )
        grad_positions = positions.new_empty(positions.shape) if needs.positions and positions is not None else None
        through_metric = needs.q or needs.meta
        if (K if over_meta else N) == 1:  # a softmax over one thing is 1 whatever the metric
            for constant in (grad_q, grad_meta):
                if constant is not None:
                    constant.zero_()
            through_metric = False
        need_shift = through_metric or needs.size
        grad_size = out.size.new_empty((items, N)) if needs.size or (over_meta and need_shift) else None
        run, to_meta = self.run(), through_metric and grad_meta is not None
        run.soft_merge_backward(
            grad_y, grads.size, None if positions is None else grads.positions, x, q, meta, size, positions, mask,
            sequences, y.contiguous(), out.size.contiguous(), _dense(out.positions), out.lse.contiguous(),
            *similarity, over_meta, self.tf32(), grad_x,
            grad_q if through_metric else None, grad_meta if through_metric else None, grad_size, grad_positions,
            out.size.new_empty((B, K)) if need_shift else None,
            _scratch(x, run.soft_merge_scratch(x, B, K, meta.shape[2], 1)) if to_meta else None,
            self.stream(x),
        )  # fmt: skip
        grad_x, grad_q, grad_meta = (
            None if t is None else t.to(dtype) for t, dtype in zip((grad_x, grad_q, grad_meta), dtypes, strict=True)
        )
        return OfSoftMerge(grad_x, grad_q, grad_meta, grad_size if needs.size else None, grad_positions)
