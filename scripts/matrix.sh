#!/usr/bin/env bash
# Tries versions of Python, PyTorch, Triton, transformers, timm and NumPy, one row after the other, each in a virtual
# environment of its own: scripts/matrix.sh [ROW...], as in scripts/matrix.sh torch-2.9 python-3.12; by default all.
#
# MATRIX_DIR (default .matrix) holds the environments and what each row printed; table.md there is the table. A row runs
# the tests of MATRIX_TESTS (default: the verbs, compile and export, the models of timm and transformers). A Python for
# which there is no interpreter on PATH is left out and said to be.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${MATRIX_DIR:-.matrix}
tests=${MATRIX_TESTS:-tests/test_reference.py tests/kernels tests/test_compile.py tests/test_export.py
  tests/test_integrations_timm.py tests/test_integrations_hf.py}
# Row, Python, and what is pinned beside the versions of constraints.txt; "newest" pins nothing.
rows='
torch-2.9 python3.11 torch==2.9.1 triton==3.5.1
torch-2.11 python3.11 torch==2.11.0 triton==3.6.0
newest python3.11 newest
transformers-4 python3.11 transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
python-3.10 python3.10 newest
python-3.12 python3.12 newest
python-3.13 python3.13 newest
python-3.14 python3.14 newest
'

try() {
  local row=$1 python=$2 bin=$folder/$1/bin pins constraints=$folder/$1.txt
  shift 2
  "$python" -m venv "$folder/$row" || return
  pins=$(printf '%s\n' "$@" | sed 's/==.*//' | paste -sd'|')
  if [[ $1 == newest ]]; then
    : >"$constraints"
  else
    { grep -vE "^($pins)==" constraints.txt | grep -v '^torchvision=='; printf '%s\n' "$@"; } >"$constraints"
  fi
  "$bin/python" -m pip install --quiet --no-compile --constraint "$constraints" --editable '.[test,hf]' requests &&
    "$bin/python" -m pip install --quiet --no-compile --constraint "$constraints" --no-deps timm torchvision &&
    "$bin/python" -m pytest -q $tests
}

mkdir -p "$folder"
export STTM_BUILD_CUDA=0
{
  echo '| row | Python | torch | Triton | transformers | timm | NumPy | result |'
  echo '| --- | ------ | ----- | ------ | ------------ | ---- | ----- | ------ |'
} >"$folder/table.md"
failed=0
while read -r row python pins; do
  [[ -z $row || ($# -gt 0 && " $* " != *" $row "*) ]] && continue
  if ! "$python" --version >/dev/null 2>&1; then
    echo "| $row | no $python here | | | | | | not tried |" >>"$folder/table.md"
    continue
  fi
  # shellcheck disable=SC2086
  try "$row" "$python" $pins </dev/null >"$folder/$row.log" 2>&1 || failed=1
  versions=$("$folder/$row/bin/python" - <<'END'
import platform
from importlib.metadata import PackageNotFoundError, version

def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"

print(" | ".join([platform.python_version(), *map(of, ("torch", "triton", "transformers", "timm", "numpy"))]))
END
  )
  echo "| $row | $versions | $(tail -n 1 "$folder/$row.log" | tr -d '=|') |" >>"$folder/table.md"
done <<<"$rows"
cat "$folder/table.md"
exit $failed
