"""The loops of the CUDA kernels that multiply on tensor cores or read memory, in the machine code, without a GPU.

    python -m benchmarks.codegen.loops --verb match        # for sm_90a, see --help

A line for each loop: registers and spilled bytes of its kernel; how many instructions are between the branch back and
its target, how many of them are HMMA or load 16 bytes from global memory, and instructions for 32 HMMA, or else for
each such load. A loop around another counts what is in the inner one once, and both sides of a branch.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.codegen import cuda


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen.loops", description=__doc__)
    parser.add_argument("--verb", nargs="+", default=cuda.VERBS, choices=cuda.VERBS)
    parser.add_argument("--arch", default=cuda.ARCHITECTURES[-1], help="as nvcc names it (%(default)s)")
    chosen = parser.parse_args(argv)
    print(f"{'kernel':56} {'regs':>5} {'spills':>6} {'loop':>6} {'HMMA':>6} {'LDG.128':>7} {'each':>6}")
    for verb in chosen.verb:
        for report in cuda.build(verb, chosen.arch):
            for length, products, loads in report.loops:
                each = 32 * length / products if products else length / loads
                numbers = f"{report.registers:5} {report.spills:6} {length:6} {products:6} {loads:7} {each:6.1f}"
                print(f"{report.name:56} {numbers}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
