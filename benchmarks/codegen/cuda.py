"""What nvcc makes of every CUDA kernel, without a GPU: registers, shared memory, spills, instructions.

`python -m benchmarks.codegen --impl cuda` prints the table. Its columns are those of the Triton kernels, except that
shared memory is what is known at compile time and spills are bytes, as ptxas counts them. Instructions are read with
`cuobjdump`, that of the toolkit or that inside Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
VERBS = tuple(path.stem for path in sorted((CSRC / "kernels").glob("*.cu")))
ARCHITECTURES = ("80", "90a")
COLUMNS = ("regs", "shared", "spills", "HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDG", "128-bit")
DOTS = COLUMNS[3:6]
PRODUCTS = (
    "assign_kernel", "assign_backward_kernel", "nearest_kernel", "nearest_any_kernel", "soft_merge_kernel",
    "soft_merge_grad_x_kernel", "soft_merge_grad_metric_kernel", "assign_merge_kernel",
)  # fmt: skip
"""Kernels that multiply matrices: on tensor cores, but for exact float32."""


@dataclass
class Report:
    """The machine code of one kernel on one architecture."""

    name: str
    arch: str
    registers: int
    shared: int
    spills: int
    instructions: Counter[str] = field(default_factory=Counter)
    loops: list[tuple[int, int, int]] = field(default_factory=list)
    """Of every loop with tensor cores or several loads of 16 bytes: its instructions, HMMA and such loads among them,
    those of inner loops once."""

    @property
    def row(self) -> tuple[int, ...]:
        return self.registers, self.shared, self.spills, *(self.instructions[name] for name in COLUMNS[3:])


def nvcc() -> str | None:
    """The compiler that `setup.py` would take, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and os.path.exists(place)), None)


def build(verb: str, arch: str) -> list[Report]:
    """Compiles `csrc/kernels/<verb>.cu` for one architecture; a report per kernel.

    Raises:
        RuntimeError: there is no nvcc, or it fails; the message is its output.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{verb}.cubin"
        source = [str(CSRC / "kernels" / f"{verb}.cu"), f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        command = [compiler, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", *source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed: {done.stderr}")
        found = {report.name: report for report in _resources(done.stderr, arch)}
        for name, instructions, loops in _instructions(cubin):
            if name in found:
                found[name].instructions, found[name].loops = instructions, loops
    for report, name in zip(found.values(), _readable(found), strict=True):
        report.name = name
    return list(found.values())


def _resources(log: str, arch: str) -> Iterable[Report]:
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spills = [int(count) for count in re.findall(r"(\d+) bytes spill", part)]
        if registers is None:
            raise RuntimeError(f"ptxas printed no register count: {part}")
        yield Report(name, arch, int(registers[1]), int(shared[1]) if shared else 0, sum(spills))


def _instructions(cubin: str) -> Iterable[tuple[str, Counter[str], list[tuple[int, int, int]]]]:
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        tool = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if tool is None:
        return
    code = subprocess.run([tool, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    for part in code.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)", body, re.MULTILINE)
        opcodes = [opcode for _, opcode, _ in lines]
        counts = Counter(opcode.split(".")[0] for opcode in opcodes)
        counts["128-bit"] = sum(opcode.startswith("LDG.") and ".128" in opcode for opcode in opcodes)
        yield name.strip(), counts, _loops(lines)


def _loops(lines: list[tuple[str, str, str]]) -> list[tuple[int, int, int]]:
    """Of (address, opcode, operands): what lies between a branch that goes back and where it goes."""
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    found = []
    for i, (_, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        first = at.get(int(target[1], 16), i) if target else i
        body = [one for _, one, _ in lines[first : i + 1]]
        products = sum(one.startswith("HMMA") for one in body)
        loads = sum(one.startswith("LDG.") and ".128" in one for one in body)
        if first < i and (products or loads > 1):
            found.append((len(body), products, loads))
    return found


def _readable(names: Iterable[str]) -> list[str]:
    tool = shutil.which("c++filt")
    names = list(names)
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"^void |sttm::|\(.*", "", line) for line in done.stdout.splitlines()]


def expects_product(name: str) -> bool:
    """Whether a kernel, such as `assign_kernel<float, true>`, is meant to use tensor cores."""
    kernel, _, arguments = name.partition("<")
    return kernel in PRODUCTS and not arguments.startswith("float, true")


def faults(report: Report) -> list[str]:
    """What is wrong with the code of a kernel; empty if nothing is."""
    found = []
    if report.spills:
        found.append(f"{report.spills} bytes spilled")
    elif report.instructions["STL"] + report.instructions["LDL"]:
        found.append("an array of a thread in memory")
    if report.instructions and expects_product(report.name) and not sum(report.instructions[op] for op in DOTS):
        found.append("no tensor-core instruction")
    return found
