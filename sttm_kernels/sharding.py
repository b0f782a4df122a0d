"""The verbs on DTensors: every rank runs its own part of the batch, or of the channels, and says nothing to the others.

No token knows of another item, so a batch that is sharded stays so. Channels that are only carried along (those of x
in `merge`, `unmerge` and their like) may be sharded too. Any other sharding, of tokens or of metric features, is
gathered first. Gradients go back the way they came, by DTensor's own conversions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

CARRIED = {
    "merge": ("x", "fill", "y"),
    "assign_merge": ("x", "fill", "y"),
    "soft_merge": ("x", "y"),
    "unmerge": ("x", "y"),
}
"""By operator: the inputs and results whose channels are only carried along."""
OVER_CHANNELS = ("weight", "size", "q", "meta")
"""Inputs whose gradients take all channels of x."""
PARTITION = ("src", "dst", "limit")
"""Inputs that are plain tensors, made on every rank."""


def on_every_rank(value: Tensor, beside: Any) -> DTensor:
    """A plain tensor that is alike on every rank, as a DTensor of the mesh of another."""
    mesh = beside.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def run(operator: Any, a: Any) -> Any:
    """The results of an operator on inputs of which one is a DTensor: DTensors, sharded as the first input is."""
    lead = next(arg for arg in a if isinstance(arg, DTensor))
    mesh, carried = lead.device_mesh, _carried(operator, a)
    places = [_place(lead, placement, bool(carried)) for placement in lead.placements]

    def placements(field: str, dims: int) -> list[Placement]:
        channels = Shard(dims - 1) if field in carried else Replicate()
        return [channels if place == "channels" else Shard(0) if place == "batch" else Replicate() for place in places]

    def local(field: str, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        if not isinstance(arg, DTensor):
            if field not in PARTITION:
                raise TypeError(f"{field} must be a DTensor as the other tensors are, got {type(arg).__name__}")
            arg = DTensor.from_local(arg, mesh, [Replicate()] * mesh.ndim, run_check=True)  # alike on every rank
            if arg.shape[0] == 1:  # for every item
                return arg.to_local()
        return arg.redistribute(mesh, placements(field, arg.dim())).to_local()

    found = operator(type(a)(*map(local, a._fields, a)))

    def of_all(field: str, result: Tensor | None) -> Tensor | None:
        if result is None or result.dim() < 2:
            return result
        shape, placed = list(result.shape), placements(field, result.dim())
        for placement in placed:
            if isinstance(placement, Shard):
                shape[placement.dim] = a.x.shape[-1] if placement.dim else lead.shape[0]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(result, mesh, placed, shape=torch.Size(shape), stride=stride)

    return type(found)(*map(of_all, found._fields, found))


def _carried(operator: Any, a: Any) -> tuple[str, ...]:
    given = a._asdict()
    if "q" in given and given["q"] is None:  # channels of x are metric features
        return ()
    inputs = [given[field] for field in OVER_CHANNELS if isinstance(given.get(field), Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return ()
    return CARRIED.get(operator.name, ())


def _place(lead: DTensor, placement: Placement, carries: bool) -> str | None:
    if type(placement) is not Shard:
        return None
    if placement.dim == 0:
        return "batch" if lead.shape[0] > 1 else None
    return "channels" if carries and placement.dim == lead.dim() - 1 else None
