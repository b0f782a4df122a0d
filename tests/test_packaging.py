"""What is shipped: a source distribution that builds a wheel, and what is in that."""

from __future__ import annotations

import email
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
