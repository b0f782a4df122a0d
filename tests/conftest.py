"""What every test shares: the implementations that can run here, poisoned allocations, one thread."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sttm_kernels import dispatch
from sttm_kernels.testing import poisoned_empty


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
        if dtype == torch.bfloat16 and self.impl == "triton" and dispatch.interpreting():
            pytest.skip("Triton's interpreter multiplies bfloat16 bit patterns in tl.dot")


BACKENDS = [("triton" if dispatch.interpreting() else "cuda" if dispatch.on_host() else "torch", "cpu")]
ON_HOST = dispatch.interpreting() or dispatch.on_host()
GPU_BACKENDS = [] if ON_HOST else [(impl, "cuda") for impl in ("torch", "triton", "cuda")]


@pytest.fixture(
    params=[
        *(pytest.param(Backend(*one), id="-".join(one)) for one in BACKENDS),
        *(pytest.param(Backend(*one), id="-".join(one), marks=pytest.mark.gpu) for one in GPU_BACKENDS),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: runs with torch.empty as it is, for tests that trace")
    torch.set_num_threads(1)  # tests are small: more threads wait for each other longer than they work


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


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
