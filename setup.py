"""Builds the CUDA extension `sttm_kernels._C` where there is an nvcc; needs no GPU and no PyTorch.

Environment variables:
    STTM_BUILD_CUDA: "auto" (default) builds it if nvcc is found, and installs without it, saying why in
        `sttm-kernels info`, if not; "1" fails if it cannot be built; "0" installs without it.
    CUDA_HOME: the toolkit; else that of the nvcc on PATH, else /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST: as for PyTorch, such as "8.0;9.0a+PTX". Default: DEFAULT_ARCHITECTURES as far as nvcc knows
        them, and PTX of the last of them, for GPUs yet to come.
    MAX_JOBS: how many files are compiled at a time; default: the number of cores.
    CXX: the C++ compiler, also that behind nvcc.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
OLDEST_NVCC = (12, 0)
OLDEST_ARCHITECTURE = 80


class CannotBuild(Exception):
    """Why the extension cannot be built here; the message is for the person who installs."""


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str  # as in 13.0.88
    architectures: tuple[str, ...]  # without their letters


def mode() -> str:
    found = os.environ.get("STTM_BUILD_CUDA", "auto").strip() or "auto"
    if found not in ("auto", "0", "1"):
        raise SystemExit(f"STTM_BUILD_CUDA must be auto, 0 or 1, got {found!r}")
    return found


def find_nvcc() -> Nvcc:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if not path.exists():
            raise CannotBuild(f"CUDA_HOME is {home}, but there is no {path}")
    else:
        path = Path(on_path) if on_path else Path("/usr/local/cuda/bin/nvcc")
        if not path.exists():
            raise CannotBuild("there is no nvcc: none on PATH, none in /usr/local/cuda/bin, and CUDA_HOME is not set")
    version = re.search(r"V(\d+\.\d+\.\d+)", _output(path, "--version"))
    if version is None:
        raise CannotBuild(f"{path} --version names no version")
    if tuple(int(part) for part in version[1].split(".")[:2]) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise CannotBuild(f"{path} is of CUDA {version[1]}; CUDA {oldest} is the oldest that will do")
    known = re.findall(r"compute_(\d+)", _output(path, "--list-gpu-arch"))
    return Nvcc(path, version[1], tuple(dict.fromkeys(known)))


def _output(path: Path, option: str) -> str:
    try:
        return subprocess.run([path, option], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{path} does not run: {error}") from error


def architectures(nvcc: Nvcc) -> list[str]:
    """As in ["80", "90a", "120+PTX"]."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not given:
        found = [name for name in DEFAULT_ARCHITECTURES if name.rstrip("af") in nvcc.architectures]
        if not found:
            raise CannotBuild(f"{nvcc.path} knows none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}")
        last = found[-1]
        return [*found, f"{last}+PTX"] if last[-1].isalpha() else [*found[:-1], f"{last}+PTX"]
    found = []
    for name in given:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be a list such as 8.0;9.0a;12.0+PTX, got {name!r} in it")
        number = parts[1] + parts[2]
        if int(number) < OLDEST_ARCHITECTURE:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST names {name}; the kernels need 8.0 or higher")
        if number not in nvcc.architectures:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST names {name}, which nvcc {nvcc.version} does not know")
        found.append(f"{number}{parts[3]}{parts[4] or ''}")
    return list(dict.fromkeys(found))


def gencode(names: list[str]) -> list[str]:
    flags = []
    for name in names:
        number, plus, _ = name.partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if plus:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


@cache
def decision() -> tuple[Nvcc | None, list[str], str | None]:
    """The compiler and architectures to build with, or None and the reason why nothing is built."""
    if mode() == "0":
        return None, [], "STTM_BUILD_CUDA=0"
    try:
        nvcc = find_nvcc()
        return nvcc, architectures(nvcc), None
    except CannotBuild as error:
        return None, [], str(error)


def ninja_file(nvcc: Nvcc, names: list[str], build: Path, target: Path) -> str:
    import pybind11

    cxx = os.environ.get("CXX")
    nvcc_ = [str(nvcc.path), *(["-ccbin", cxx] if cxx else [])]  # compiles the C++ too: it knows its toolkit's headers
    include = [CSRC / "include", build, pybind11.get_include(), sysconfig.get_paths()["include"]]
    compile_ = [*nvcc_, "-std=c++17", "-O2", "-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-I{path}" for path in include)]
    depend = "-MD -MF $out.d -c $in -o $out"
    lines = [
        "ninja_required_version = 1.5",
        "rule cuda",
        f"  command = {shlex.join([*compile_, *gencode(names)])} {depend}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cpp",
        f"  command = {shlex.join(compile_)} {depend}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*nvcc_, '-shared', '-cudart', 'static'])} $in -o $out",
    ]
    objects = []
    for source in [*sorted((CSRC / "kernels").glob("*.cu")), *sorted((CSRC / "bindings").glob("*.cpp"))]:
        objects.append(build / f"{source.name}.o")
        rule = "cuda" if source.suffix == ".cu" else "cpp"
        lines.append(f"build {_escape(objects[-1])}: {rule} {_escape(source)}")
    lines += [f"build {_escape(target)}: link {' '.join(map(_escape, objects))}", ""]
    return "\n".join(lines)


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def compile_extension(nvcc: Nvcc, names: list[str], build: Path, target: Path) -> None:
    import ninja

    build.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {"STTM_NVCC_VERSION": nvcc.version, "STTM_ARCHITECTURES": " ".join(names)}
    header = "".join(f'#define {name} "{value}"\n' for name, value in about.items())
    texts = {"sttm_build_info.hpp": header, "build.ninja": ninja_file(nvcc, names, build, target)}
    for name, text in texts.items():
        if not (build / name).exists() or (build / name).read_text() != text:
            (build / name).write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    try:
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "-j", jobs], check=True)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{nvcc.path} failed; what it said is in the log of this build (pip -v shows it)") from error


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc, names, reason = decision()
        try:
            if nvcc is None:
                raise CannotBuild(reason)
            build = Path(self.build_temp).resolve() / "sttm"
            compile_extension(nvcc, names, build, Path(self.get_ext_fullpath(ext.name)).resolve())
        except CannotBuild as error:
            if mode() == "1":
                raise SystemExit(f"STTM_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}") from None
            print(f"sttm_kernels is installed without its CUDA kernels: {error}")
            note(self, str(error))
        else:
            note(self, None)


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        if not self.distribution.has_ext_modules():
            note(self, decision()[2])


def note(command: build_ext | build_py, reason: str | None) -> None:
    """Leaves word in the package of why the extension is not there, for `sttm-kernels info`."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    package = (ROOT if in_place else Path(command.build_lib)) / "sttm_kernels"
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps({"reason": reason}) + "\n")


if __name__ == "__main__":
    wanted = mode() == "1" or decision()[0] is not None
    setup(
        ext_modules=[Extension("sttm_kernels._C", sources=[])] if wanted else [],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
    )
