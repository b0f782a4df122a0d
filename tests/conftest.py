"""What every test shares: the implementations that can run here, poisoned allocations, one thread.

On the CPU that is plain PyTorch; with TRITON_INTERPRET=1 the Triton kernels through their interpreter, and with
STTM_CUDA_HOST=<module> the CUDA kernels compiled for the CPU. Only a machine with a GPU has cases for one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import shares
import torch

from sttm_kernels import crossover, dispatch
from sttm_kernels.testing import poisoned_empty

os.environ[crossover.FOLDER] = os.devnull  # no table of whoever runs the tests


@dataclass(frozen=True)
class Backend:
    """An implementation on a device. Tests that take the fixture `backend` run once for each."""

    impl: str
    device: str

    def needs(self, verb: str, dtype: torch.dtype = torch.float32) -> None:
        """Skips the test, with the reason, if this implementation cannot run `verb` in `dtype`."""
        reason = dispatch.why_not(verb, self.impl, self.device, dtype)
        if reason is not None:
            pytest.skip(reason)


def backends() -> list[Backend]:
    """On the CPU by the environment, else two; with a GPU and no kernels of its own on the CPU, three on that too."""
    if dispatch.interpreting():
        return [Backend("triton", "cpu")]
    if dispatch.on_host():
        return [Backend("cuda", "cpu")]
    on_gpu = [Backend(impl, "cuda") for impl in ("torch", "triton", "cuda")]
    on_cpu = [Backend(impl, "cpu") for impl in ("torch", "cpu")]
    return [*on_cpu, *(on_gpu if torch.cuda.is_available() else [])]


def _as_param(backend: Backend) -> Any:
    marks = [pytest.mark.gpu] if backend.device == "cuda" else []
    return pytest.param(backend, id=f"{backend.impl}-{backend.device}", marks=marks)


@pytest.fixture(params=[_as_param(one) for one in backends()])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="of the cases of every test run one in so many, by its name")
    parser.addoption("--tables-one-in", type=int, default=1, help="likewise, of the tests that are marked as tables")
    parser.addoption(
        "--elsewhere-one-in", type=int, default=8,
        help='likewise, of the cases of impl="torch" in tests/kernels those that forbid what only a CPU has',
    )  # fmt: skip
    parser.addoption("--batches", type=int, help="random batches of packed sequences, for each verb")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: minutes; begun first, so that no process waits for it at the end")
    config.addinivalue_line("markers", "table: every cell of a large table, of which a run may take a share")
    config.addinivalue_line("markers", "unpoisoned: runs with torch.empty as it is, for tests that trace")
    if dispatch.interpreting() and importlib.util.find_spec("triton") is not None:
        from launches import Compiled

        config.pluginmanager.register(Compiled())
    torch.set_num_threads(1)  # tests are small: more threads wait for each other longer than they work


def pytest_report_header() -> str:
    found = ", ".join(f"{one.impl} on {one.device}" for one in backends())
    return f"implementations: {found}" + ("" if torch.cuda.is_available() else "; no GPU, cases for one are left out")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if torch.cuda.is_available() or not item.get_closest_marker("gpu")]
    chosen = set(shares.chosen(here, config.getoption("--one-in"), config.getoption("--tables-one-in")))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted((item for item in items if item in chosen), key=lambda item: not item.get_closest_marker("long"))


def _declare_torchvision_operators() -> torch.library.Library | None:
    """timm imports torchvision, whose compiled operators may be built for another PyTorch; they are not called, but
    these must exist before its import."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for compiled in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(compiled)
            return None
    except OSError:
        pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _declare_torchvision_operators()  # declared for as long as this lives


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("unpoisoned"):
        yield
    else:
        with poisoned_empty():
            yield
