"""What the compilers make of every kernel, without a GPU: registers, shared memory, spills, instructions.

    python -m benchmarks.codegen                          # every Triton kernel, dtype and configuration
    python -m benchmarks.codegen --impl triton cuda       # and every CUDA kernel, if there is an nvcc
    python -m benchmarks.codegen --arch 90 --verb merge   # some of them
    python -m benchmarks.codegen --covering               # of Triton's, the part that the tests compile
    python -m benchmarks.codegen.forms                    # how many forms optional arguments make, compiling nothing

Triton kernels are compiled as `launch` would compile them, and the machine code is read with the `cuobjdump` that ships
inside Triton. The columns: registers per thread, bytes of shared memory per program (of a CUDA kernel, those known at
compile time), spill instructions (STL + LDL; of a CUDA kernel, spilled bytes), matrix products (HMMA by mma.sync on any
architecture, HGMMA on sm_90, UTCHMMA on sm_100), asynchronous copies (LDGSTS, UTMALDG), and global loads with those of
128 bits among them.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from benchmarks.codegen import cuda
from benchmarks.codegen.cases import SPECIALIZATIONS
from benchmarks.codegen.recording import Specialization
from sttm_kernels.impl.triton.config import ARCHITECTURES, SHARED_MEMORY

MODULES = tuple(SPECIALIZATIONS)
DOTS = cuda.DOTS
COLUMNS = cuda.COLUMNS


@dataclass(frozen=True)
class Report:
    """The machine code of one specialization on one architecture."""

    registers: int
    shared: int
    instructions: Counter[str]
    wide_loads: int

    @property
    def spills(self) -> int:
        return self.instructions["STL"] + self.instructions["LDL"]

    @property
    def products(self) -> int:
        return sum(self.instructions[op] for op in DOTS)


def specializations(archs: tuple[int, ...], verbs: tuple[str, ...] = MODULES) -> list[tuple[int, Specialization]]:
    """Every different (architecture, specialization) that the package ships, in a fixed order."""
    found: dict[Any, tuple[int, Specialization]] = {}
    for verb in verbs:
        for one in SPECIALIZATIONS[verb]():
            for arch in sorted(set(archs).intersection(one.archs)):
                found.setdefault((arch, *_key(one)), (arch, one))
    return list(found.values())


def _key(one: Specialization) -> tuple[Any, ...]:
    fixed = tuple(sorted((name, repr(value)) for name, value in one.constexprs.items()))
    types = tuple(one.signature.items())
    return one.kernel.__name__, types, fixed, one.divisible, *one.options.values()


def covering(
    work: list[tuple[int, Specialization]], shows: Callable[[int, Specialization], set[Any]] | None = None
) -> list[tuple[int, Specialization]]:
    """A small part of `work` that shows all that `work` shows, by default each kernel on each architecture, in each of
    its dtypes and block configurations, with each value of its other compile-time settings.

    Greedy: the specialization that shows most that was not seen comes next.
    """
    shown = [(shows or _shows)(*item) for item in work]
    unseen = set().union(*shown)
    chosen = []
    while unseen:
        at = max(range(len(work)), key=lambda i: len(shown[i] & unseen))
        unseen -= shown[at]
        chosen.append(at)
    return [work[at] for at in sorted(chosen)]


def pairs(arch: int, one: Specialization) -> set[Any]:
    """Every two of a kernel's parameters as they are: their types, or that they are absent, or their values."""
    known = [*one.signature.items(), *((name, repr(value)) for name, value in one.constexprs.items())]
    return {(one.kernel.__name__, *two) for two in itertools.combinations(known, 2)}


def _shows(arch: int, one: Specialization) -> set[Any]:
    kernel = one.kernel.__name__
    blocks = tuple(item for item in one.constexprs.items() if item[0].startswith("BLOCK_"))
    settings = {(kernel, name, repr(v)) for name, v in one.constexprs.items() if not name.startswith("BLOCK_")}
    dtype = next((kind for kind in one.signature.values() if kind in ("*fp32", "*bf16", "*fp16")), None)
    return {(kernel, arch), (kernel, dtype), (kernel, blocks, *one.options.values()), *settings}


def describe(arch: int, one: Specialization) -> str:
    """Architecture, case, settings, blocks."""
    words = [f"sm_{arch}", one.name]
    for name, value in one.constexprs.items():
        if name.startswith("BLOCK_"):
            words.append(f"{name.removeprefix('BLOCK_').lower()}{value}")
        elif isinstance(value, str):
            words.append(value)
        elif value is True:
            words.append(name.lower())
    return " ".join([*words, f"w{one.options['num_warps']}", f"s{one.options['num_stages']}"])


def source(one: Specialization) -> ASTSource:
    """What the compiler takes."""
    places = {name: at for at, name in enumerate(one.signature)}
    return ASTSource(
        fn=one.kernel,
        signature=dict(one.signature),
        constexprs={(places[name],): value for name, value in one.constexprs.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in sorted(one.divisible)},
    )


def build(arch: int, one: Specialization) -> Report:
    """Compiles `one` for `arch` and reads the machine code."""
    kernel = triton.compile(source(one), target=GPUTarget("cuda", arch, 32), options=dict(one.options))
    return _read(kernel.asm["cubin"], kernel.metadata.shared)


def front_end(arch: int, one: Specialization) -> None:
    """Compiles `one` as far as Triton's own intermediate representation: in milliseconds, whatever its blocks.

    Raises:
        Exception: the compiler's own, where it refuses.
    """
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(one.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source(one).make_ir(target, options, functions, modules, context)


def _read(cubin: bytes, shared: int) -> Report:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage}")
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    counts = Counter(opcode.split(".")[0] for opcode in opcodes)
    wide = sum(opcode.startswith("LDG.") and ".128" in opcode for opcode in opcodes)
    return Report(int(registers[1]), shared, counts, wide)


def faults(arch: int, one: Specialization, report: Report) -> list[str]:
    """What is wrong with the code of a specialization; empty if nothing is."""
    found = []
    if report.shared > 1024 * SHARED_MEMORY[arch]:
        found.append(f"{report.shared} bytes of shared memory, sm_{arch} has {1024 * SHARED_MEMORY[arch]}")
    if report.spills:
        found.append(f"{report.spills} spill instructions")
    if one.expect_dot and not report.products:
        found.append("no tensor-core instruction")
    return found


def row(report: Report) -> tuple[int, ...]:
    counted = (report.instructions[name] for name in COLUMNS[3:-1])
    return report.registers, report.shared, report.spills, *counted, report.wide_loads


_work: list[tuple[int, Specialization]] = []


def _build_at(at: int) -> Report | str:
    """Builds `_work[at]`, which the worker inherits: kernels cannot be pickled."""
    try:
        return build(*_work[at])
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


Row = tuple[str, tuple[int, ...], list[str]]
"""The name of a kernel, its numbers in the order of COLUMNS, and its faults."""


def _triton_rows(archs: tuple[int, ...], verbs: tuple[str, ...], only_covering: bool, jobs: int) -> Iterator[Row]:
    _work[:] = specializations(archs, verbs)
    if only_covering:
        _work[:] = covering(_work)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for item, result in zip(_work, pool.imap(_build_at, range(len(_work))), strict=True):
            if isinstance(result, str):
                yield describe(*item), (), [result]
            else:
                yield describe(*item), row(result), faults(*item, result)


def _cuda_rows(archs: tuple[int, ...], verbs: tuple[str, ...], jobs: int) -> Iterator[Row]:
    if cuda.nvcc() is None:
        raise SystemExit("there is no nvcc: set CUDA_HOME, or ask for --impl triton")
    known = {int(name.rstrip("a")): name for name in cuda.ARCHITECTURES}
    work = [(verb, known.get(arch, str(arch))) for verb in verbs for arch in archs]
    with ThreadPoolExecutor(jobs) as pool:
        for reports in pool.map(lambda item: cuda.build(*item), work):
            for report in reports:
                yield f"sm_{report.arch} cuda {report.name}", report.row, cuda.faults(report)


def main(argv: list[str] | None = None) -> int:
    verbs = tuple(dict.fromkeys((*MODULES, *cuda.VERBS)))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--impl", nargs="+", default=("triton",), choices=("triton", "cuda"))
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--verb", nargs="+", default=verbs, choices=verbs)
    parser.add_argument("--covering", action="store_true", help="of Triton's, only the part that the tests compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (%(default)s)")
    chosen = parser.parse_args(argv)
    archs = tuple(chosen.arch)

    rows: list[Iterator[Row]] = []
    if "triton" in chosen.impl:
        of_triton = tuple(verb for verb in chosen.verb if verb in MODULES)
        rows.append(_triton_rows(archs, of_triton, chosen.covering, chosen.jobs))
    if "cuda" in chosen.impl:
        of_cuda = tuple(verb for verb in chosen.verb if verb in cuda.VERBS)
        rows.append(_cuda_rows(archs, of_cuda, chosen.jobs))
    width = 88
    print(" ".join([f"{'kernel':{width}}", *(f"{name:>7}" for name in COLUMNS)]))
    failed = total = 0
    for name, numbers, wrong in (one for part in rows for one in part):
        total += 1
        failed += bool(wrong)
        marks = [f"<- {text}" for text in wrong]
        print(" ".join([f"{name:{width}}", *(f"{value:7}" for value in numbers), *marks]), flush=True)
    print(f"{failed} of {total} at fault" if failed else f"{total} without faults")
    return 1 if failed else 0
