"""What is shipped: a source distribution that builds a wheel, and what is in that."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
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
import importlib.util, json, sys
from pathlib import Path
import torch
import sttm_kernels

def load(folder):
    variant = Path(folder, "build/torch-universal")
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if sys.argv[1] == "kernels":
        from kernels import get_local_kernel
        from kernels._rust import Build
        assert Build.open(Path(folder)).general
        return get_local_kernel(Path(folder))
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package

x = torch.randn(2, 9, 4, requires_grad=True)
expected = sttm_kernels.merge(x, sttm_kernels.match(x, 3, impl="torch"), impl="torch").x
(wanted,) = torch.autograd.grad(expected.sum(), x)
versions, programs = set(), []
for folder in sys.argv[2:]:
    package = load(folder)
    versions.add(package.__version__)
    plan = package.match(x, 3)
    assert type(plan) is package.MergePlan is not sttm_kernels.MergePlan
    merged = package.merge(x, plan).x
    assert torch.equal(merged, expected)
    assert torch.equal(torch.autograd.grad(merged.sum(), x)[0], wanted)
    program = torch.export.export(package.STTM(4), (x, (1, 3, 3)))
    torch.export.save(program, folder + ".pt2")
    programs.append((package, folder + ".pt2"))
    assert f"torch.ops.{package.__name__}." in program.graph_module.print_readable(print_output=False)
    assert not package.functional.dispatch.why_not("merge", "torch", "cpu")
    assert "not built" in package.functional.dispatch.why_not("merge", "cpu", "cpu")  # that beside it may be
    inside = [each for name, each in sys.modules.items() if name.startswith(package.__name__ + ".")]
    assert len(inside) > 20
    assert [each.__file__ for each in inside if not each.__file__.startswith(folder)] == []
assert versions == {"1", "2"}
for package, path in programs:
    assert type(torch.export.load(path).module()(x, (1, 3, 3))) is package.MergedTokens
"""


def test_laid_out_for_a_hub_several_versions_load_beside_an_installation(tmp_path: Path) -> None:
    """By the package kernels where `scripts/test.sh` put it aside, else in its way."""
    aside = Path(sys.prefix, "kernels")
    loader = "kernels" if aside.is_dir() else "importlib"
    spec = importlib.util.spec_from_file_location("hub", ROOT / "scripts/hub.py")
    assert spec is not None
    assert spec.loader is not None
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    tree, folders = tmp_path / "tree", [tmp_path / version for version in ("1", "2")]
    for folder in folders:
        shutil.copytree(ROOT / "sttm_kernels", tree / "sttm_kernels", dirs_exist_ok=True)
        shutil.copy(ROOT / "LICENSE", tree)
        about = tree / "sttm_kernels/__init__.py"
        about.write_text(re.sub(r"__version__ = .*", f'__version__ = "{folder.name}"', about.read_text()))
        hub.ROOT = tree
        hub.lay_out(folder)
    command = [sys.executable, "-P", "-c", LOAD, loader, *map(str, folders)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{aside}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
