"""Ahead-of-time compilation of the kernels: `python -m benchmarks.codegen`; `cuda` needs no Triton."""
