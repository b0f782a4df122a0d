#!/usr/bin/env bash
# Lint, types and every test, in a virtual environment of its own. Triton's interpreter needs a process of its own, and
# so does the older of the two major versions of transformers. Last the ratios to rivals, with nothing beside them.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-test
bin=.venv-test/bin
# One architecture is enough to import the CUDA kernels and to check their arguments; the tests compile for others.
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0}"
$bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,hf]' requests
# timm wants a torchvision, of which nothing compiled is used: without its dependencies, which pin another PyTorch.
$bin/python -m pip install --quiet --constraint constraints.txt --no-deps timm torchvision
# The older transformers also needs the requests installed above.
$bin/python -m pip install --quiet --upgrade --no-deps --target .venv-test/transformers-4 \
  'transformers==4.57.6' 'huggingface_hub==0.36.2' 'tokenizers==0.22.2'

$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/python -m pytest --numprocesses 2 --dist worksteal
TRITON_INTERPRET=1 $bin/python -m pytest --numprocesses 2 --dist worksteal tests/test_triton_*.py
PYTHONPATH=.venv-test/transformers-4 $bin/python -m pytest tests/test_integrations_hf.py
$bin/python -m pytest benchmarks
