"""The two functions that ToMe's matchings return: reduce tokens along a plan, and copy them back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sttm_kernels import functional, ops, partition, validate
from sttm_kernels.plan import MergePlan

MODES = ("mean", "sum", "amax", "amin", "prod")
_REDUCTIONS = {"mean": "mean", "sum": "sum", "amax": "max"}


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """What a matching returns, twice, when nothing is to be merged."""
    return x


@dataclass(frozen=True)
class Merge:
    """`merge(x, mode="mean")` of the matchings: `(B, N, C)` to `(B, K, C)`, in x's dtype.

    Attributes:
        plan: the matching.
        dropped: how many tokens at the end are not part of it: `kth_bipartite_soft_matching` drops them.

    `mode` is that of `torch.scatter_reduce` with the dst token among what is reduced: "mean", "sum", "amax", "amin" or
    "prod". Differentiable with respect to x. Floating x; integers and bools go through `scatter_reduce`.
    """

    plan: MergePlan
    dropped: int = 0

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        validate.tensor("x", x)
        validate.one_of("mode", mode, MODES)
        x = self.kept(x)
        if mode in _REDUCTIONS and x.dtype in validate.FLOATS:
            return functional.merge(x, self.plan, reduce=_REDUCTIONS[mode]).x
        group = self.plan.index.long()[..., None].expand_as(x)
        out = x.new_zeros((x.shape[0], self.plan.num_groups, x.shape[2]))
        return out.scatter_reduce(1, group, x, mode, include_self=False)

    def kept(self, x: Tensor) -> Tensor:
        """x without the tokens that are dropped."""
        B, N = self.plan.index.shape
        validate.dims("x", x, "(B, N, C)", 3)
        validate.shape("x", x, "(B, N, C)", (B, N + self.dropped, x.shape[2]))
        return x[:, :N]


@dataclass(frozen=True)
class Unmerge:
    """`unmerge(x)` of the matchings: `(B, K, C)` back to `(B, N, C)`, every token its group's value."""

    plan: MergePlan

    def __call__(self, x: Tensor) -> Tensor:
        return functional.unmerge(x, self.plan)


def pair(plan: MergePlan, dropped: int = 0) -> tuple[Merge, Unmerge]:
    return Merge(plan, dropped), Unmerge(plan)


def match_lists(metric: Tensor, src: Tensor, dst: Tensor, r: int) -> MergePlan:
    """The plan that merges the best r of the tokens `src` into theirs of `dst`; other tokens stay.

    Args:
        metric: `(B, N, D)`.
        src, dst: int32 `(1 or B, 1, S)` and `(1 or B, 1, T)`, ascending token indices.
        r: at most S, and 0 if T is 0.
    """
    return ops.match(metric.detach(), r, 0, src, dst, "auto")


def match_split(metric: Tensor, is_dst: Tensor, num_dst: int, r: int) -> MergePlan:
    """`match_lists` with dst where `is_dst` `(1 or B, N)` says so, `num_dst` in every row, and src elsewhere.

    The count comes from the caller, so nothing is read back from a GPU.
    """
    return match_lists(metric, *partition.lists(is_dst, num_dst, 0), r)


def check_metric(metric: Tensor) -> None:
    validate.features("metric", metric, "(B, N, D)", 3)
