#!/usr/bin/env bash
# All that a GPU machine has to say about the package: the build, tests, `verify`, figures, sanitizers, the report.
#
#   benchmarks/gpu_check.sh [OUT [STEP...]]
#
# OUT (default gpu_check) receives a log of every step, the results as CSV files and summary.txt. A step that passed
# leaves OUT/STEP.done behind and is not run again; one that fails does not stop the others. STEP may be the beginning
# of several, as in tests or canonical. Needs Python with PyTorch, Triton and pytest, and no network; what else is
# absent is said and skipped. Exit code: 0, 1 if a step failed, 2 for input that cannot be used.
#
# Environment variables:
#   PYTHON: the interpreter (default python3).
#   STTM_GPU_CHECK_LIMIT: seconds a step may take (default 600).
#   STTM_GPU_CHECK_DEVICE: "cpu" tries this script without a GPU, on less of everything.
set -u

# SUITE_TEXT measures the workloads with this text in their name: in parts, none takes longer than a step may.
canonical=(canonical_{ViT-L,VideoMAE-B,VideoMAE-L,ViViT,TimeSformer,V-JEPA,STTM,SDXL,long})
scaling=(scaling_{windowed,global,clips,features,merged,meta})
models=(models_{ViT-L,DINOv2,VideoMAE-B,VideoMAE-L,ViViT,TimeSformer,V-JEPA})
effort=()
python=${PYTHON:-python3}
limit=${STTM_GPU_CHECK_LIMIT:-600}
device=${STTM_GPU_CHECK_DEVICE:-cuda}

refuse() {
  echo "gpu_check.sh: $1" >&2
  exit 2
}

has() {
  "$python" -c 'import sys, importlib.util as u; sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))' "$@"
}

# The GPU's architecture as setup.py would have it, 9.0a for 9.0.
architecture() {
  "$python" - <<'PY'
import setup
import torch

number = "{}{}".format(*torch.cuda.get_device_capability())
name = next((name for name in setup.DEFAULT_ARCHITECTURES if name.rstrip("af") == number), number)
print(f"{number[:-1]}.{name[len(number) - 1:]}")
PY
}

# The three kernels furthest from their floor: workload, tab, implementation.
furthest_from_floor() {
  "$python" - "$out/canonical.csv" <<'PY'
import sys
from pathlib import Path

from sttm_kernels.bench import compare, results

rows = [row for row in results.read(Path(sys.argv[1])) if row["impl"] in ("cuda", "triton") and compare.timed(row)]
worst = sorted(compare.latest(rows), key=lambda row: float(row["fraction_of_floor"]))
for workload, impl in list(dict.fromkeys((row["workload"], row["impl"]) for row in worst))[:3]:
    print(workload, impl, sep="\t")
PY
}

# Sets `command`, or `skip` to the reason why there is none.
plan() {
  command=() skip=""
  case $1 in
    build)
      local why
      if ! why=$("$python" -c 'import setup; setup.find_nvcc()' 2>&1); then
        skip=${why##*$'\n'}
      else
        [[ $device == cpu ]] || : "${TORCH_CUDA_ARCH_LIST:=$(architecture)}"
        command=(env STTM_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-8.0}"
          "$python" setup.py build_ext --inplace)
      fi
      ;;
    tests_*)
      if ! has pytest; then
        skip="pytest is not installed"
        return
      fi
      case $1-$device in
        tests_gpu-*) command=(-m gpu tests) ;;
        tests_cuda-cpu) command=(tests/test_cuda_build.py) ;;
        tests_triton-cpu) command=(tests/test_triton_launch.py) ;;
        tests_cuda-*) command=(-k cuda tests/kernels tests/test_cuda_*.py) ;;
        tests_triton-*) command=(-k triton tests/kernels tests/test_triton_*.py) ;;
      esac
      command=("$python" -m pytest "${command[@]}")
      ;;
    verify)
      command=("$python" -m sttm_kernels verify --device "$device")
      [[ $device != cpu ]] || command+=(--quick)
      ;;
    canonical_* | quick_* | scaling_* | models_*)
      if [[ $1 == models_* ]] && ! has timm transformers; then
        skip="timm and transformers are not both installed"
      else
        command=("$python" -m sttm_kernels bench --suite "${1%%_*}" --workload "${1#*_}" --device "$device"
          --out "$out/${1%%_*}.csv" "${effort[@]}")
      fi
      ;;
    memcheck | racecheck | initcheck | synccheck)
      if [[ $device == cpu ]]; then
        skip="there is no GPU"
      elif ! command -v compute-sanitizer >/dev/null; then
        skip="compute-sanitizer is not installed"
      else
        # Of PyTorch's own blocks only the ends are known; this allocator makes every tensor a block.
        command=(env PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync compute-sanitizer --tool "$1" --error-exitcode 99
          "$python" -m sttm_kernels verify --quick --device cuda --impl cuda triton --shapes 2x65x17x64x80)
      fi
      ;;
    ncu)
      if [[ $device == cpu ]]; then
        skip="there is no GPU"
      elif ! command -v ncu >/dev/null; then
        skip="ncu is not installed"
      elif [[ ! -s $out/canonical.csv ]]; then
        skip="there is no canonical.csv yet"
      else
        # shellcheck disable=SC2016 # expanded by the inner bash
        command=(bash -c 'while IFS=$'\''\t'\'' read -r workload impl; do
            ncu --launch-count 40 --clock-control none \
              --kernel-name "regex:assign|centre|clear|count|mean_over|merge|nearest|place|select|sort|start" \
              "$1" -m sttm_kernels bench --suite canonical --workload "$workload" --impl "$impl" --device cuda \
              --seconds 0.01 --no-compile --out "$2/ncu.unused" </dev/null || exit
          done <<<"$3"; rm -f "$2/ncu.unused"' ncu "$python" "$out" "$(furthest_from_floor)")
      fi
      ;;
    report)
      local found=("$out"/*.csv)
      if [[ ! -e ${found[0]} ]]; then
        skip="there are no results"
      elif ! has matplotlib; then
        skip="matplotlib is not installed"
      else
        command=("$python" -m sttm_kernels report "${found[@]}" --out "$out")
      fi
      ;;
  esac
}

say() {
  printf '%-23s%-56s%8s\n' "$@" | tee -a "$out/summary.txt"
}

check() {
  local step=$1 began=$SECONDS code
  if [[ -e $out/$step.done ]]; then
    say "$step" "passed earlier" "$(<"$out/$step.done")"
    return 0
  fi
  plan "$step"
  if [[ -n $skip ]]; then
    say "$step" "skipped: $skip" ""
    return 0
  fi
  timeout --kill-after=10 "$limit" "${command[@]}" >"$out/$step.log" 2>&1 </dev/null
  code=$?
  [[ $step == report ]] || rm -f "$out/report.done"
  case $code in
    0)
      echo $((SECONDS - began)) >"$out/$step.done"
      say "$step" passed $((SECONDS - began))
      return 0
      ;;
    124 | 137) say "$step" "FAILED: over $limit seconds, see $step.log" $((SECONDS - began)) ;;
    *) say "$step" "FAILED with $code, see $step.log" $((SECONDS - began)) ;;
  esac
  return 1
}

case $device in
  cuda) ;;
  cpu)
    canonical=(quick_{VideoMAE,window,latents,STTM})
    effort=(--seconds 0.02 --limit 0.3 --no-compile)
    ;;
  *) refuse "STTM_GPU_CHECK_DEVICE must be cuda or cpu, got $device" ;;
esac
[[ $limit =~ ^[1-9][0-9]*$ ]] || refuse "STTM_GPU_CHECK_LIMIT must be a number of seconds, got $limit"
out=${1:-gpu_check}
steps=(build tests_gpu tests_cuda tests_triton verify "${canonical[@]}" "${scaling[@]}" "${models[@]}"
  memcheck racecheck initcheck synccheck ncu report)
if [[ $# -gt 1 ]]; then
  chosen=()
  for name in "${@:2}"; do
    before=${#chosen[@]}
    for step in "${steps[@]}"; do
      [[ $step != "$name" && $step != "${name}_"* ]] || chosen+=("$step")
    done
    [[ ${#chosen[@]} -gt $before ]] || refuse "no step $name; there are: ${steps[*]}"
  done
  steps=("${chosen[@]}")
fi
if [[ $device == cpu ]]; then
  echo "On the CPU: this tries the script and says nothing about a GPU."
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  refuse "the PyTorch of $python finds no NVIDIA GPU; STTM_GPU_CHECK_DEVICE=cpu tries the script without one"
fi
mkdir -p "$out" 2>/dev/null || refuse "cannot write to $out"
out=$(cd "$out" && pwd)
[[ $python != */* || $python == /* ]] || python=$PWD/$python
cd "$(dirname "${BASH_SOURCE[0]}")/.." || refuse "there is no repository around this script"

: >"$out/summary.txt"
say step status seconds
failed=0
for step in "${steps[@]}"; do
  check "$step" || failed=1
done
exit "$failed"
