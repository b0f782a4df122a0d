"""What the tests of the verbs share: lists of cases, inputs by name, and every output and gradient of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sttm_kernels import dispatch
from sttm_kernels.checks import draw as draw
from sttm_kernels.testing import DTYPES, LAYOUTS, RAGGED_SHAPES, Guarded, Shape, guarded
from sttm_kernels.validate import NORMALIZATIONS, REDUCTIONS, SIMILARITIES, WEIGHTS

SMALL = dispatch.interpreting()
"""Whether kernels run an instruction at a time: then their blocks are small, and so are the tests."""

SHAPES = RAGGED_SHAPES
if SMALL:
    SHAPES = (
        Shape(1, 1, 1, 3, 1),
        Shape(2, 2, 1, 64, 3),
        Shape(3, 17, 5, 3, 20),
        Shape(1, 16, 33, 20, 16),
        Shape(1, 31, 15, 80, 33),
        Shape(1, 33, 16, 33, 65),
        Shape(2, 15, 17, 64, 17),
    )

NOT_NUMBERS = (torch.nan, torch.inf, -torch.inf, 1e30)


def each(name: str, values: Any, **ids: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, values, **ids)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def each_with_dtype(name: str, values: Any, ids: Callable[[Any], str] = str) -> pytest.MarkDecorator:
    """Every value in every dtype; through the interpreter every value once, the dtypes of kernels in turn."""
    pairs = [(value, dtype) for value in values for dtype in DTYPES]
    if SMALL:
        pairs = [(value, DTYPES[at % 3]) for at, value in enumerate(values)]
    return each((name, "dtype"), pairs, ids=[f"{ids(value)}-{short(dtype)}" for value, dtype in pairs])


each_dtype = each("dtype", DTYPES, ids=short)
each_width = each("dtype", (torch.float32, torch.float16), ids=short)
each_shape = each("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_layout = each_with_dtype("layout", LAYOUTS)
each_similarity = each("similarity", SIMILARITIES)
each_weight = each("weight", WEIGHTS)
each_reduction = each("reduce", REDUCTIONS)
SOME_DTYPES_AND_REDUCTIONS = (
    (torch.float32, "mean"),
    (torch.float32, "max"),
    (torch.float16, "mean"),
    (torch.float16, "first"),
    (torch.bfloat16, "sum"),
    (torch.bfloat16, "max"),
)
each_dtype_and_reduction = each(
    ("dtype", "reduce"),
    [(dtype, reduce) for dtype in DTYPES for reduce in REDUCTIONS] if not SMALL else SOME_DTYPES_AND_REDUCTIONS,
    ids=lambda value: value if isinstance(value, str) else short(value),
)
each_normalize = each("normalize", NORMALIZATIONS)
kernels_only = pytest.mark.kernels_only


def temperature_of(similarity: str, D: int, cosine: float = 0.2) -> float:
    """What keeps similarities of order one, as a user would: dot and l2 grow with D."""
    return {"cosine": cosine, "dot": D**0.5, "l2": float(D)}[similarity]


def only(inputs: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: inputs[name] for name in names}


def spoiled(values: Tensor, value: float | None, share: float, seed: int = 2) -> Tensor:
    """A share of the elements replaced by `value`; by every kind of what breaks arithmetic if it is None."""
    draw = torch.Generator().manual_seed(seed)
    bad = torch.rand(values.shape, generator=draw) < share
    kinds = torch.tensor([*NOT_NUMBERS, 1e38, -1e38, 1e-45] if value is None else [value])
    return torch.where(bad, kinds[torch.randint(len(kinds), bad.shape, generator=draw)], values.cpu()).to(values)


@contextlib.contextmanager
def unwritten(inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Copies amid poison; neither the inputs nor what lies around them may be written within it."""
    held: dict[str, Guarded] = {name: guarded(value) for name, value in inputs.items()}
    yield {name: one.tensor for name, one in held.items()}
    for name, one in held.items():
        one.check(name)


def run(call: Callable[..., Mapping[str, Tensor]], inputs: Mapping[str, Tensor], *wanted: str) -> dict[str, Tensor]:
    """Outputs of `call(**inputs)` and the gradients of `wanted` inputs (of all that have any), by name."""
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point() and (not wanted or name in wanted))
        for name, value in inputs.items()
    }
    outputs = call(**leaves)
    found = {name: value.detach() for name, value in outputs.items()}
    roots = [value for value in outputs.values() if value.requires_grad]
    if roots:
        loss = sum((value.float() * value.float().cos().detach()).sum() for value in roots)
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
        found |= {f"gradient of {name}": g for name, g in zip(asked, grads, strict=True) if g is not None}
    return found
