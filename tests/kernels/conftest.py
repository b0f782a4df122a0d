"""What the tests of the verbs share as fixtures: small blocks for the interpreter, and outputs amid poison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shares
import torch
from elsewhere import elsewhere
from torch import Tensor

from sttm_kernels import dispatch
from sttm_kernels.operator import OPERATORS
from sttm_kernels.testing import Guarded, guarded

HERE = Path(__file__).parent
_METRIC = {"BLOCK_OWN": 16, "BLOCK_OTHER": 16}
SMALL_BLOCKS = {
    "assign": {"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_D": 32},
    "assign_backward": {**_METRIC, "BLOCK_D": 64, "SLICE": 64},
    "assign_gather": {"BLOCK_N": 16, "BLOCK_D": 64},
    "assign_merge": {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "BLOCK_D": 16},
    "nearest": {"BLOCK_S": 16, "BLOCK_T": 16, "BLOCK_D": 16},
    "select": {"BLOCK": 64, "BLOCK_PAIRS": 16},
    "sort": {"BLOCK": 64, "BLOCK_PAIRS": 16},
    "count": {"BLOCK": 32, "BLOCK_PAIRS": 8},
    "place": {"BLOCK": 16},
    "mean_over_heads": {"BLOCK_N": 16, "BLOCK_D": 32},
    "merge": {"BLOCK_K": 4, "BLOCK_R": 8, "BLOCK_C": 16, "BLOCK_P": 4, "STEPS": 3, "UNROLL": 1},
    "merge_backward": {"BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_P": 4},
    "merge_max_backward": {"BLOCK_R": 4, "BLOCK_C": 16},
    "centre": {"BLOCK_K": 8, "BLOCK_R": 4},
    "unmerge": {"BLOCK_N": 16, "BLOCK_C": 16},
    "compose": {"BLOCK": 16},
    "soft_merge": {"BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_D": 32, "SLICE": 32},
    "soft_merge_grad_x": {**_METRIC, "BLOCK_D": 32, "SLICE": 32},
    "soft_merge_grad_metric": {**_METRIC, "BLOCK_D": 32, "SLICE": 32},
}
"""Of every Triton kernel, so that small tensors cross many tiles; more features than a SLICE do not stay on chip."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels_only: about memory that PyTorch's own operators look after")
    config.addinivalue_line("markers", "shipped_blocks: with the block sizes of Triton that users get")


def _cannot(item: pytest.Item) -> bool:
    """Whether the kernels of a case do not take its dtype, or plain PyTorch has nothing to show in it."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "backend" not in params or item.path.parent != HERE:
        return False
    if params["backend"].impl == "torch":
        return item.get_closest_marker("kernels_only") is not None
    return params.get("dtype") == torch.float64


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _cannot(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not _cannot(item)]


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest) -> None:
    """Skips, with the reason, where this build of an implementation lacks a verb."""
    if "backend" in request.fixturenames:
        for verb in dispatch.VERBS:
            request.getfixturevalue("backend").needs(verb)


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Some cases of impl="torch", chosen by their name (`--elsewhere-one-in 1`: all), are as on devices not here."""
    names, one_in = request.fixturenames, request.config.getoption("--elsewhere-one-in")
    plain = "backend" in names and request.getfixturevalue("backend").impl == "torch"
    chosen = plain and shares.hashed(f"elsewhere {request.node.nodeid}") % one_in == 0
    with elsewhere() if chosen else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if dispatch.interpreting() and not request.node.get_closest_marker("shipped_blocks"):
            from sttm_kernels.impl.triton import config

            stack.enter_context(np.errstate(all="ignore"))  # the interpreter's, of what is not a number
            for name, sizes in SMALL_BLOCKS.items():
                stack.enter_context(config.forced(name, **sizes))
        yield


@pytest.fixture
def outputs_amid_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Guarded]]:
    """Everything that Python code allocates without filling lies amid poison, which is looked at in the end."""
    made: list[Guarded] = []

    def amid_poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_meta:
                return tensor
            made.append(guarded(tensor))
            return made[-1].tensor

        return allocated

    monkeypatch.setattr(Tensor, "new_empty", amid_poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", amid_poison(torch.empty_like))
    yield made
    for one in made:
        one.check("output")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the gradient of `merge` is asked for, call by call: the arguments of its operator."""
    calls: list[Any] = []
    operator = OPERATORS["merge_backward"]
    run = operator.run

    def noted(implementation, a):
        calls.append(a)
        return run(implementation, a)

    monkeypatch.setattr(operator, "run", noted)
    return calls
