"""Builds the CUDA extension for the CPU: the same kernels and bindings, compiled by g++ against csrc/host.

`python tests/cuda_host.py --out DIR` prints the path of the module; STTM_CUDA_HOST=<that path> makes impl="cuda" run
CPU tensors through it. Objects are kept in DIR and compiled again only if what they are made of is newer.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SHARED = ("array", "module", "validate")  # sources of the bindings that every verb needs
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
    *("--one-in", os.environ.get("STTM_SANITIZED_ONE_IN", "16")),
)
"""Runs tests under sanitizers, which take ten times as long: of the cases of every test one in so many."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def flags(sanitize: bool, defines: Sequence[str] = (), csrc: Path = CSRC) -> list[str]:
    found = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DSTTM_HOST"]
    found += ["-O1", *SANITIZERS] if sanitize else ["-O2"]
    return [*found, f"-I{csrc / 'include'}", *(f"-D{define}" for define in defines)]


def build(
    out_dir: Path, sanitize: bool = True, defines: Sequence[str] = (), only: Sequence[str] = (), jobs: int = 1
) -> Path:
    """Compiles the module into `out_dir`; `only` names the verbs to leave in (one set per folder). Returns its path."""
    import pybind11

    out_dir.mkdir(parents=True, exist_ok=True)
    kernels, bindings = (sorted((CSRC / folder).glob("*.c*")) for folder in ("kernels", "bindings"))
    sources = [p for p in (*kernels, *bindings) if not only or p.stem.removesuffix("_backward") in (*only, *SHARED)]
    stubs = "".join(f"void bind_{p.stem}(pybind11::module_&) {{}}\n" for p in bindings if p not in sources)
    together = "".join(f'#include "{p}"\n' for p in bindings if p in sources) + f"namespace sttm {{\n{stubs}}}\n"
    sources = [p for p in sources if p not in bindings] + [_write(out_dir / "bindings.cpp", together)]
    objects = [out_dir / f"{source.name}.o" for source in sources]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command = [compiler(), *flags(sanitize, defines), *include, "-MMD", "-x", "c++", "-c"]
    with open(out_dir / "lock", "w") as lock, ThreadPoolExecutor(jobs) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stale = [(source, target) for source, target in zip(sources, objects, strict=True) if not _is_fresh(target)]

        def run(pair: tuple[Path, Path]) -> subprocess.CompletedProcess[bytes]:
            quick = ["-O0"] if pair[0].name == "bindings.cpp" else []  # which take no time when they run
            return subprocess.run([*command, *quick, str(pair[0]), "-o", str(pair[1])])

        for done in pool.map(run, stale):
            done.check_returncode()
        module = out_dir / "_C.so"
        if stale or not module.exists():
            sanitizers = SANITIZERS if sanitize else ()
            subprocess.run([compiler(), "-shared", *sanitizers, *map(str, objects), "-o", str(module)], check=True)
    return module


def build_program(source: Path, out: Path, csrc: Path = CSRC) -> None:
    """Compiles a program of one file, kernels included, with sanitizers; the headers are those of `csrc`."""
    command = [compiler(), *flags(True, csrc=csrc), "-x", "c++", str(source), "-o", str(out)]
    subprocess.run(command, check=True)


def _write(path: Path, text: str) -> Path:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def _is_fresh(target: Path) -> bool:
    """Whether an object is newer than all that it was made of, by the list that -MMD left beside it."""
    made_of = target.with_suffix(".d")
    if not (target.exists() and made_of.exists()):
        return False
    needed = made_of.read_text().partition(":")[2].replace("\\\n", " ").split()
    age = target.stat().st_mtime
    return all(os.path.exists(p) and os.path.getmtime(p) < age for p in needed)


def environment(module: Path, sanitize: bool = True) -> dict[str, str]:
    """The environment of a Python process that runs the module: the runtime of AddressSanitizer must come first."""
    found = {**os.environ, "STTM_CUDA_HOST": str(module), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    if sanitize:
        names = ("libasan.so", "libstdc++.so")  # the latter so that exceptions are caught by the runtime too
        run = [subprocess.run([compiler(), f"-print-file-name={n}"], capture_output=True, text=True) for n in names]
        found["LD_PRELOAD"] = " ".join(done.stdout.strip() for done in run)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CUDA extension for the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for objects and the module")
    parser.add_argument("--no-sanitize", action="store_true", help="optimized, without sanitizers")
    parser.add_argument("--only", default="", help="verbs, separated by commas")
    parser.add_argument("--define", action="append", default=[], help="NAME or NAME=VALUE")
    parser.add_argument("--jobs", type=int, default=1, help="how many files to compile at a time")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="then run this command with the module in place")
    given = parser.parse_args()
    only = [verb for verb in given.only.split(",") if verb]
    module = build(given.out, not given.no_sanitize, given.define, only, given.jobs)
    if given.run:
        return subprocess.run(given.run, env=environment(module, not given.no_sanitize)).returncode
    print(module)
    return 0


if __name__ == "__main__":
    sys.exit(main())
