"""Builds `sttm_kernels._cpu`, kernels for CPUs, with a C++ compiler, and `sttm_kernels._C`, those for GPUs, with nvcc.

Needs no GPU and no PyTorch.

Environment variables:
    STTM_BUILD_CPU: "auto" (default) builds the former if there is a compiler, and installs without it, saying why in
        `sttm-kernels info`, if not; "1" fails if it cannot be built; "0" installs without it.
    STTM_BUILD_CUDA: likewise for the latter, if nvcc is found.
    CUDA_HOME: the toolkit; else that of the nvcc on PATH, else /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST: as for PyTorch, such as "8.0;9.0a+PTX". Default: DEFAULT_ARCHITECTURES as far as nvcc knows
        them, and PTX of the last of them, for GPUs yet to come.
    MAX_JOBS: how many files are compiled at a time; default: the number of cores.
    CXX: the C++ compiler, also that behind nvcc.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
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
COMPILERS = ("c++", "g++", "clang++")
BINDINGS = "bindings.cpp"
"""Of a build, the source that includes those of the bindings."""
CPU_MODULE = CSRC / "cpu" / "module.cpp"
CPU_OPTIMIZATION, ONCE_OPTIMIZATION = "-O2", "-O1"
"""Of what is compiled for every instruction set, and of the rest."""
CPU_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-DSTTM_CPU"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
)
GCC_FLAGS = ("-fira-loop-pressure",)
"""Without it GCC keeps sums of the products of AVX-512 on the stack, and what is not of the loop in registers."""
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    }
}
"""Per machine, those that csrc/cpu/launch.cpp chooses from; on others, the baseline alone."""


class CannotBuild(Exception):
    """Why the extension cannot be built here; the message is for the person who installs."""


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str  # as in 13.0.88
    architectures: tuple[str, ...]  # without their letters


def mode(variable: str = "STTM_BUILD_CUDA") -> str:
    found = os.environ.get(variable, "auto").strip() or "auto"
    if found not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, got {found!r}")
    return found


def find_compiler() -> list[str]:
    """The command of the C++ compiler."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given and shutil.which(given[0]) is None:
        raise CannotBuild(f"CXX is {os.environ['CXX']}, but there is no such program")
    found = given or [path for path in map(shutil.which, COMPILERS) if path is not None][:1]
    if not found:
        raise CannotBuild(f"there is no C++ compiler: CXX is not set, and none of {', '.join(COMPILERS)} is on PATH")
    return found


@cache
def cpu_decision() -> tuple[list[str], str | None]:
    """The compiler to build the CPU kernels with, or none and the reason why they are not built."""
    if mode("STTM_BUILD_CPU") == "0":
        return [], "STTM_BUILD_CPU=0"
    try:
        return find_compiler(), None
    except CannotBuild as error:
        return [], str(error)


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
    for source in [*sorted((CSRC / "kernels").glob("*.cu")), build / BINDINGS]:
        objects.append(build / f"{source.name}.o")
        rule = "cuda" if source.suffix == ".cu" else "cpp"
        lines.append(f"build {_escape(objects[-1])}: {rule} {_escape(source)}")
    lines += [f"build {_escape(target)}: link {' '.join(map(_escape, objects))}", ""]
    return "\n".join(lines)


def cpu_ninja_file(compiler: list[str], build: Path, target: Path) -> str:
    import pybind11

    include = [CSRC / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    own = GCC_FLAGS if "Free Software Foundation" in version else ()
    compile_ = [*compiler, *CPU_FLAGS, *own, *(f"-I{path}" for path in include)]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    once = {build / BINDINGS, *(CSRC / "cpu" / f"{name}.cpp" for name in ("launch", "pool"))}
    sets = INSTRUCTION_SETS.get(platform.machine().replace("AMD64", "x86_64"), {"baseline": ()})
    rules = {"once": (ONCE_OPTIMIZATION,), **{name: (CPU_OPTIMIZATION, *flags) for name, flags in sets.items()}}
    lines = ["ninja_required_version = 1.5"]
    for name, flags in rules.items():
        isa = [] if name == "once" else [f"-DSTTM_ISA={name}"]
        lines += [
            f"rule {name}",
            f"  command = {shlex.join([*compile_, *flags, *isa])} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines += ["rule link", f"  command = {shlex.join([*compiler, '-shared', '-pthread', *undefined])} $in -o $out"]
    objects = []
    for source in [*sorted(once), *sorted(set((CSRC / "cpu").glob("*.cpp")) - once - {CPU_MODULE})]:
        for rule in ["once"] if source in once else sets:
            objects.append(build / f"{rule}.{source.name}.o")
            lines.append(f"build {_escape(objects[-1])}: {rule} {_escape(source)}")
    lines += [f"build {_escape(target)}: link {' '.join(map(_escape, objects))}", ""]
    return "\n".join(lines)


def compile_cpu(compiler: list[str], build: Path, target: Path) -> None:
    sources = set((CSRC / "bindings").glob("*.cpp")) - {CSRC / "bindings" / "module.cpp"} | {CPU_MODULE}
    texts = {BINDINGS: together(sources), "build.ninja": cpu_ninja_file(compiler, build, target)}
    run_ninja(texts, build, target, compiler[0])


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def compile_extension(nvcc: Nvcc, names: list[str], build: Path, target: Path) -> None:
    about = {"STTM_NVCC_VERSION": nvcc.version, "STTM_ARCHITECTURES": " ".join(names)}
    header = "".join(f'#define {name} "{value}"\n' for name, value in about.items())
    bindings = together((CSRC / "bindings").glob("*.cpp"))
    texts = {"sttm_build_info.hpp": header, BINDINGS: bindings, "build.ninja": ninja_file(nvcc, names, build, target)}
    run_ninja(texts, build, target, str(nvcc.path))


def together(sources: Iterable[Path]) -> str:
    """A source of several: what they include takes longer to compile than they do."""
    return "".join(f'#include "{source}"\n' for source in sorted(sources))


def run_ninja(texts: dict[str, str], build: Path, target: Path, compiler: str) -> None:
    """Writes the files of a build and builds."""
    import ninja

    build.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (build / name).exists() or (build / name).read_text() != text:
            (build / name).write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    try:
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "-j", jobs], check=True)
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{compiler} failed; what it said is in the log of this build (pip -v shows it)") from error


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "sttm"
        if ext.name == CPU.name:
            self.attempt("cpu_reason", "STTM_BUILD_CPU", "CPU", lambda: build_cpu(build / "cpu", target))
        else:
            self.attempt("reason", "STTM_BUILD_CUDA", "CUDA", lambda: build_cuda(build, target))

    def attempt(self, key: str, variable: str, kind: str, run: Callable[[], None]) -> None:
        try:
            run()
        except CannotBuild as error:
            if mode(variable) == "1":
                raise SystemExit(f"{variable}=1, but the {kind} kernels cannot be built: {error}") from None
            print(f"sttm_kernels is installed without its {kind} kernels: {error}")
            note(self, **{key: str(error)})
        else:
            note(self, **{key: None})


def build_cpu(build: Path, target: Path) -> None:
    compiler, reason = cpu_decision()
    if reason is not None:
        raise CannotBuild(reason)
    compile_cpu(compiler, build, target)


def build_cuda(build: Path, target: Path) -> None:
    nvcc, names, reason = decision()
    if nvcc is None:
        raise CannotBuild(reason)
    compile_extension(nvcc, names, build, target)


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        note(self)
        if not self.editable_mode:
            headers = Path(self.build_lib) / "sttm_kernels" / "include"
            shutil.copytree(CSRC / "include", headers, dirs_exist_ok=True)


_reasons: dict[str, str | None] = {}


def note(command: build_ext | build_py, **reasons: str | None) -> None:
    """Leaves word in the package of why an extension is not there, for `sttm-kernels info`."""
    _reasons.update(reasons)
    found = {"reason": decision()[2], "cpu_reason": cpu_decision()[1], **_reasons}
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    package = (ROOT if in_place else Path(command.build_lib)) / "sttm_kernels"
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(found) + "\n")


CPU, CUDA = (
    Extension("sttm_kernels._cpu", sources=[], optional=True),
    Extension("sttm_kernels._C", sources=[], optional=True),
)

if __name__ == "__main__":
    wanted = [(CPU, mode("STTM_BUILD_CPU") == "1" or cpu_decision()[1] is None)]
    wanted += [(CUDA, mode() == "1" or decision()[0] is not None)]
    setup(
        ext_modules=[extension for extension, want in wanted if want],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
    )
