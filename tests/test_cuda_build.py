"""setup.py: when it builds the CUDA extension, for what, and what it says when it cannot. And the built extension."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from arrays import OnCuda

from sttm_kernels import dispatch

if dispatch.on_host() or dispatch.interpreting():
    pytest.skip("needs neither", allow_module_level=True)
for package in ("setuptools", "pybind11", "ninja"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent
VARIABLES = ("STTM_BUILD_CPU", "STTM_BUILD_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX")


@pytest.fixture
def plan(monkeypatch):
    """setup.py as a module, in an environment that says nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("sttm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sttm_setup", module)
    spec.loader.exec_module(module)
    return module


def toolkit(folder: Path, version="13.0.88", known=(75, 80, 86, 89, 90, 100, 103, 120), fails=False) -> Path:
    """A CUDA_HOME whose nvcc answers questions and compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = "\\n".join(f"compute_{number}" for number in known)
    nvcc.write_text(
        "#!/bin/sh\n"
        + ("exit 1\n" if fails else "")
        + f'case "$1" in --version) echo "release {version[:4]}, V{version}";; --list-gpu-arch) printf "{listed}\\n";; '
        + '*) echo "nvcc: unsupported host compiler" >&2; exit 1;; esac\n'
    )
    nvcc.chmod(0o755)
    return folder


def test_default_architectures(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    nvcc, names, reason = plan.decision()
    assert (nvcc.version, reason) == ("13.0.88", None)
    assert names == ["80", "86", "89", "90a", "100", "120+PTX"]
    flags = plan.gencode(names)
    assert flags[3] == "-gencode=arch=compute_90a,code=sm_90a"
    assert flags[-2:] == ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"]


def test_an_older_nvcc_gets_what_it_knows(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "12.4.131", (50, 80, 86, 89, 90))))
    assert plan.decision()[1] == ["80", "86", "89", "90a", "90a+PTX"]
    assert plan.gencode(plan.decision()[1])[-2:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("8.0", ["80"]),
        ("8.0;9.0a+PTX", ["80", "90a+PTX"]),
        ("8.0 8.6+PTX", ["80", "86+PTX"]),
        ("12.0,10.3a", ["120", "103a"]),
    ],
)
def test_given_architectures(plan, tmp_path, monkeypatch, given, names):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert plan.decision()[1:] == (names, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Hopper", "such as 8.0;9.0a;12.0+PTX, got 'Hopper' in it"),
        ("7.5", "names 7.5; the kernels need 8.0 or higher"),
        ("8.0;15.0", "names 15.0, which nvcc 13.0.88 does not know"),
    ],
)
def test_architectures_that_will_not_do(plan, tmp_path, monkeypatch, given, message):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert message in plan.decision()[2]


def test_a_toolkit_that_is_too_old(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "11.8.89")))
    assert "is of CUDA 11.8.89; CUDA 12.0 is the oldest that will do" in plan.decision()[2]


def test_an_nvcc_that_does_not_run(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, fails=True)))
    assert "does not run" in plan.decision()[2]


def test_not_wanted(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    monkeypatch.setenv("STTM_BUILD_CUDA", "0")
    assert plan.decision() == (None, [], "STTM_BUILD_CUDA=0")
    monkeypatch.setenv("STTM_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="STTM_BUILD_CUDA must be auto, 0 or 1, got 'yes'"):
        plan.mode()


def test_the_ninja_file_names_every_source(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "with space")))
    monkeypatch.setenv("CXX", "g++-13")
    nvcc, names, _ = plan.decision()
    text = plan.ninja_file(nvcc, names, tmp_path / "build", tmp_path / "_C.so")
    for name in [*(path.name for path in (ROOT / "csrc" / "kernels").glob("*.cu")), plan.BINDINGS]:
        assert f"/{name}\n" in text
    assert "-ccbin g++-13" in text
    assert "-cudart static" in text
    assert f"'{tmp_path}/with space/bin/nvcc'" in text


def run_setup(tmp_path, *command, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), *command],
        cwd=ROOT, env={**environment, "STTM_BUILD_CPU": "0", **variables}, capture_output=True, text=True,
    )  # fmt: skip


def build(tmp_path, **variables):
    places = ("--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib"))
    return run_setup(tmp_path, "build", *places, **variables)


def written(tmp_path, kind="reason"):
    return json.loads((tmp_path / "lib" / "sttm_kernels" / "_build.json").read_text())[kind]


@pytest.mark.parametrize("broken", ["missing", "compiles nothing"])
def test_a_build_that_must_succeed_fails_with_one_message(tmp_path, broken):
    home = tmp_path / "cuda"
    if broken != "missing":
        toolkit(home)
    done = build(tmp_path, STTM_BUILD_CUDA="1", CUDA_HOME=str(home))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("STTM_BUILD_CUDA=1, but the CUDA kernels cannot be built: ")
    assert str(home) in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("broken", ["missing", "compiles nothing"])
def test_a_build_that_may_fail_leaves_word_why(tmp_path, broken):
    home = tmp_path / "cuda"
    if broken != "missing":
        toolkit(home)
    done = build(tmp_path, CUDA_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert str(home) in written(tmp_path)
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_a_build_without(tmp_path):
    done = build(tmp_path, STTM_BUILD_CUDA="0", CUDA_HOME=str(toolkit(tmp_path / "cuda")))
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == "STTM_BUILD_CUDA=0"


def test_a_source_distribution_holds_all_of_csrc(tmp_path):
    done = run_setup(tmp_path, "sdist", "--dist-dir", str(tmp_path), STTM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources
    assert {str(p.relative_to(ROOT)) for p in sources} <= names
    assert {"setup.py", "pyproject.toml", "tests/conftest.py"} <= names


def test_every_verb_is_bound():
    """Each binding is called by the module, and each kernel file has one."""
    listed = set(re.findall(r"sttm::bind_(\w+)\(m\);", (ROOT / "csrc" / "bindings" / "module.cpp").read_text()))
    assert listed == {p.stem.removesuffix("_backward") for p in (ROOT / "csrc" / "kernels").glob("*.cu")}
    assert listed < {p.stem for p in (ROOT / "csrc" / "bindings").glob("*.cpp")}


# The built extension


@pytest.fixture
def extension():
    if importlib.util.find_spec("sttm_kernels._C") is None:
        pytest.skip("the extension is not built")
    from sttm_kernels.impl import cuda

    return cuda._extension()


def test_the_extension_checks_its_arguments(extension):
    x, index, y = torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="x must be on a CUDA device, got DLPack device type 1"):
        extension.unmerge(x, index, y, 0)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16, got float64"):
        extension.unmerge(x.double(), index, y, 0)
    with pytest.raises(ValueError, match=r"y must have shape \(2, 5, 4\), got \(2, 5, 3\)"):
        extension.unmerge(OnCuda(x), OnCuda(index), OnCuda(y[..., :3].contiguous()), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_says_so(extension):
    x, index, y = torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 5, 4)
    shapes = re.escape("(x (2, 3, 4), index (2, 5), y (2, 5, 4))")
    with pytest.raises(RuntimeError, match=rf"the CUDA kernels of unmerge failed: .*(driver|device).* {shapes}"):
        extension.unmerge(OnCuda(x), OnCuda(index), OnCuda(y), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_a_problem(extension):
    assert re.search("driver|device", extension.problem())


def test_build_info(extension):
    info = extension.build_info()
    assert info["host"] is False
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert info["architectures"]
