#!/usr/bin/env bash
# Lint, types, the site, `verify` at one small shape, and tests, in a virtual environment of its own:
# scripts/test.sh [fast|triton|cuda|models|all].
#   fast    lint, types, the site, `verify`, and the verbs in plain PyTorch and in the CPU kernels
#   triton  the verbs through the Triton kernels, by their interpreter, which needs a process of its own; and their code
#   cuda    the verbs through the CUDA kernels, compiled for the CPU, and the CPU kernels, both under sanitizers; and the
#           registers of all CUDA kernels
#   models  every way in which models are run, in every family; all that is exported or compiled
#   all     one in eight of the cases of all of this, in the interpreter and under sanitizers one in 16; every other
#           test; the older of the two major versions of transformers, in a process of its own; and last the ratios to
#           rivals, with nothing beside them; what is run where nothing is named
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-all}
if [[ $# -gt 1 || ! $what =~ ^(fast|triton|cuda|models|all)$ ]]; then
  echo "usage: scripts/test.sh [fast|triton|cuda|models|all]" >&2
  exit 2
fi

bin=.venv-test/bin
unset PYTHONDONTWRITEBYTECODE  # else each of some hundred processes compiles PyTorch's sources again
# The tests compile the CUDA kernels, by nvcc where there is one and for the CPU. STTM_BUILD_CUDA=1 also builds the
# extension for a GPU, whose own tests are skipped without it.
export STTM_BUILD_CUDA="${STTM_BUILD_CUDA:-0}" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0}"
if [[ $what == all || ! -x $bin/pytest ]]; then
  python3 -m venv .venv-test
  install() {
    $bin/python -m pip install --quiet --no-compile "$@"
  }
  install --constraint constraints.txt --editable '.[test,hf]' requests
  # timm wants a torchvision, of which nothing compiled is used: without its dependencies, which pin another PyTorch.
  install --constraint constraints.txt --no-deps timm torchvision
  # The older transformers also needs the requests installed above.
  install --upgrade --no-deps --target .venv-test/transformers-4 \
    'transformers==4.57.6' 'huggingface_hub==0.36.2' 'tokenizers==0.22.2'
  # Aside, for that transformers does not load beside it; a folder loads without its dependencies, which check signatures.
  install --upgrade --no-deps --target .venv-test/kernels --constraint constraints.txt kernels
fi

tests() {
  $bin/python -m pytest --numprocesses 2 --dist worksteal "$@"
}

if [[ $what == fast || $what == all ]]; then
  $bin/ruff check .
  $bin/ruff format --check .
  $bin/mypy & types=$!
  NO_MKDOCS_2_WARNING=1 $bin/mkdocs build --strict --quiet
  $bin/sttm-kernels verify --quick --shapes 2x61x7x12x20
  wait $types
fi
case $what in
  fast) tests tests/kernels ;;
  triton)
    TRITON_INTERPRET=1 tests tests/kernels
    tests tests/test_triton_compile.py tests/test_triton_combinations.py
    ;;
  cuda) STTM_SANITIZED_ONE_IN=1 tests tests/test_cuda_host.py tests/test_cpu_sanitizers.py tests/test_cuda_compile.py ;;
  models) tests tests/test_{how_models_are_run,export,compile,integrations_*,cli_flops,examples}.py ;;
  all)
    tests --tables-one-in 8
    TRITON_INTERPRET=1 tests --one-in 16 tests/kernels
    PYTHONPATH=.venv-test/transformers-4 tests --tables-one-in 8 tests/test_integrations_hf.py
    $bin/python -m pytest benchmarks
    ;;
esac
