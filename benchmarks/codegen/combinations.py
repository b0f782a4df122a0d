"""Every combination of present and absent optional arguments of every operator, from the operators' schemas.

Nothing here knows the functions below the operators. A combination is what is passed for each argument by name: for a
tensor whether it is there, for a setting its value, None for one that the extents decide.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttm_kernels import ops as ops  # registers the operators
from sttm_kernels.operator import NAMESPACE, OPERATORS
from sttm_kernels.sequences import TILE


class Extents(NamedTuple):
    """Batch items, tokens (a multiple of 4, and one), channels, features of the metric, positions, heads."""

    B: int
    N: int
    C: int
    D: int
    P: int
    H: int

    @property
    def K(self) -> int:
        """Groups: as many as `match` makes if half of the tokens after the first one merge."""
        return (self.N + 1) // 2


KINDS = ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "tf32"), (torch.float16, "tf32"))
"""What kernels are compiled for: dtypes, and how products of float32 are rounded."""
ALONG = {"positions_out": "positions", "offsets": "order", "dst": "src", "mass": "grad_merged"}
"""Optional tensors that are there when another is."""
SETTINGS = {
    "similarity": ("cosine", "l2", "dot"),
    "reduce": ("mean", "sum", "max", "first"),
    "normalize": ("meta", "tokens"),
    "weight": ("softmax", "uniform"),
    "temperature": (0.5,),
    "num_prefix": (1,),
    "threshold": (None, 0.5),
}
Combination = dict[str, Any]


@contextlib.contextmanager
def products(rounding: str) -> Iterator[None]:
    """Within it float32 products are "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = rounding
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def operators(implementation: Any) -> list[str]:
    """The operators for which an implementation has a function."""
    return [name for name in sorted(OPERATORS) if hasattr(implementation, name)]


def _overload(op: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), op).default


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _choices(op: str, argument: Any, results: int) -> tuple[Any, ...]:
    """What is passed for an argument, the usual value first: settings, and for tensors whether they are there."""
    if argument.name == "sequences" and str(argument.type) == "Optional[Tensor]":
        return (None,)
    if _is_tensor(argument):
        return (True, False) if str(argument.type) == "Optional[Tensor]" and argument.name not in ALONG else (True,)
    if str(argument.type) == "List[bool]":
        return [True] * results, *([i == at for i in range(results)] for at in range(results))
    return SETTINGS.get(argument.name, (None,))


def combinations(op: str, full: bool = True) -> Iterator[Combination]:
    """Every combination of optional tensors with the usual settings; with each other value of a setting the ends.

    The ends: all there, none, one, all but one. Unless `full`, only all and none with the usual settings.
    """
    schema = _overload(op)._schema
    options = {argument.name: _choices(op, argument, len(schema.returns)) for argument in schema.arguments}
    optional = [name for name, values in options.items() if values == (True, False)]
    usual = {name: values[0] for name, values in options.items()}
    others = [
        {**usual, name: value} for name, values in options.items() if name not in optional for value in values[1:]
    ]
    for setting in [usual, *others] if full else [usual]:
        for there in itertools.product((True, False), repeat=len(optional)):
            few = min(sum(there), len(there) - sum(there))
            if few == 0 or (full and (setting is usual or few == 1)):
                chosen = {**setting, **dict(zip(optional, there, strict=True))}
                yield chosen | {name: chosen[leader] for name, leader in ALONG.items() if leader in chosen}


def _tensor(op: str, name: str, dtype: torch.dtype, chosen: Combination, sizes: Extents) -> Tensor:
    """An argument of an operator, by its name."""
    B, N, C, D, P, H = sizes
    K = sizes.K
    features = {
        "x": (B, K, C) if op == "unmerge" else (B, N, C),
        "q": (B, N, D) if op in ("assign_merge", "assign_earlier") else (B, H, N, D),
        "meta": (B, K, D if chosen.get("q") else C),
        "metric": (1 if op == "match_packed" else B, H, N, D),
        "fill": (B, K, C),
        "y": (B, K, C),
        "grad_y": (B, K, C),
        "grad_merged": (B, K, D),
    }
    floats = {
        "size": (B, N), "weight": (B, N), "score": (B, N), "grad_score": (B, N), "grad_lse": (B, N),
        "grad_weight": (B, N),
        "lse": (B, K if chosen.get("normalize") == "tokens" else N),
        "positions": (B, N, P), "grad_size": (B, K), "mass": (B, K), "grad_positions": (B, K, P),
        "positions_out": (B, K, P),
    }  # fmt: skip
    if name in features:
        return torch.rand(features[name]).to(dtype)
    if name in floats:
        return 1 + torch.rand(floats[name])
    if name == "mask":
        return (torch.arange(N) % 5 != 3).repeat(B, 1)
    index, halves = torch.arange(N) % K, torch.arange(1, N).reshape(1, 2, 2, -1)
    integers = {
        "index": index.repeat(B, 1),
        "index1": index.repeat(B, 1),
        "index2": torch.zeros(B, K),
        "order": index.argsort(stable=True).repeat(B, 1),
        "offsets": torch.nn.functional.pad(index.bincount().cumsum(0), (1, 0)).repeat(B, 1),
        "src": halves[:, :, 0],
        "dst": halves[:, :, 1],
        "limit": torch.ones(B),
        "sequences": torch.tensor([[0, N, 0, K, N - K, 0]]),
    }
    return integers[name].to(torch.int32).contiguous()


def call(op: str, impl: str, dtype: torch.dtype, chosen: Combination, sizes: Extents, device: str = "cpu") -> Any:
    """What an operator makes of tensors of these extents and of small numbers, all the same in every call."""
    worked_out = {"impl": impl, "num_groups": sizes.K, "r": sizes.K - 1, "tiles": -(-sizes.N // TILE), "pairs": 1}
    given = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for argument in _overload(op)._schema.arguments:
            value = chosen[argument.name]
            if _is_tensor(argument):
                value = _tensor(op, argument.name, dtype, chosen, sizes).to(device) if value else None
            given.append(worked_out.get(argument.name) if value is None else value)
    return _overload(op)(*given)
