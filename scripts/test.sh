#!/usr/bin/env bash
# Lint, types and every test, in a virtual environment of its own. Triton's interpreter needs a process of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 -m venv .venv-test
bin=.venv-test/bin
$bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'

$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/python -m pytest --numprocesses 2
TRITON_INTERPRET=1 $bin/python -m pytest --numprocesses 2 tests/test_triton_*.py
