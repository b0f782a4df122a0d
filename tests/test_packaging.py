"""What is shipped: a source distribution that builds a wheel, and what is in that."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def build(kind: str, where: Path, folder: Path) -> Path:
    """What a front end like `python -m build` does, without an environment of its own; no kernels are compiled."""
    environment = os.environ | {"STTM_BUILD_CPU": "0", "STTM_BUILD_CUDA": "0"}
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Of an unpacked source distribution, which is of a copy of the tree: building leaves files there."""
    folder = tmp_path_factory.mktemp("packaging")
    places = {name: folder / name for name in ("tree", "sdist", "unpacked", "wheel")}
    for place in places.values():
        place.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "sttm_kernels", "tests"):
        (places["tree"] / name).symlink_to(ROOT / name)
    with tarfile.open(build("sdist", places["tree"], places["sdist"])) as archive:
        archive.extractall(places["unpacked"], filter="data")
    (source,) = places["unpacked"].iterdir()
    return zipfile.ZipFile(build("wheel", source, places["wheel"]))


def test_a_wheel_from_the_source_distribution_holds_the_package_alone(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sttm_kernels").rglob("*.py")}
    headers = {
        f"sttm_kernels/include/{path.relative_to(ROOT / 'csrc/include')}"
        for path in (ROOT / "csrc/include").rglob("*.*")
    }
    assert headers
    assert names == modules | headers | {"sttm_kernels/py.typed", "sttm_kernels/_build.json"}


def test_its_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "BSD-3-Clause"
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(each.split(">")[0].split(";")[0].strip() for each in needed) == ["numpy", "torch", "triton"]
    assert {"demo", "onnx", "hf", "timm", "bench", "test"} <= set(metadata.get_all("Provides-Extra", []))


LOAD = """
import importlib.util, sys
sys.modules["sttm_kernels._cpu"] = sys.modules["sttm_kernels._C"] = None  # those of an installation
if sys.argv[2] == "kernels":
    from pathlib import Path
    from kernels import get_local_kernel
    from kernels._rust import Build
    folder = Path(sys.argv[1])
    assert Build.open(folder).general
    package = get_local_kernel(folder)
else:
    spec = importlib.util.spec_from_file_location("another", sys.argv[1] + "/build/torch-universal/__init__.py")
    package = sys.modules["another"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
import torch
assert package.__file__.startswith(sys.argv[1])
x = torch.randn(2, 9, 4, requires_grad=True)
package.merge(x, package.match(x, 3)).x.sum().backward()
assert x.grad.gt(0).all()
modules = [each for name, each in sys.modules.items() if each and name.startswith("sttm_kernels.")]
assert modules
assert [each.__file__ for each in modules if not each.__file__.startswith(sys.argv[1])] == []
"""


@pytest.mark.parametrize("loader", ["importlib", "kernels"])
def test_laid_out_for_a_hub_it_loads_under_another_name(tmp_path: Path, loader: str) -> None:
    if loader == "kernels" and not any(importlib.metadata.distributions(name="kernels")):
        pytest.skip("needs the package kernels")  # tests/kernels can be imported, too
    spec = importlib.util.spec_from_file_location("hub", ROOT / "scripts/hub.py")
    assert spec is not None
    assert spec.loader is not None
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    hub.lay_out(tmp_path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", LOAD, str(tmp_path), loader]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
