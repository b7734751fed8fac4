#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: build, CUDA tests, memory checker, bench. Each
# part runs whatever came of the one before, and failures are named again at the end.
#
#   tests/gpu.sh              PYTHON=...  interpreter with torch (2.11 or newer, CUDA 13), numpy,
#                             pybind11, ninja, setuptools, pytest and tabulate; default: python3
#   OUT=dir tests/gpu.sh      where logs and results go; default: build/gpu
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu: $PYTHON has no torch that sees a CUDA device" >&2
  exit 1
fi
export PERTURBED_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
if [[ -z ${CUDA_HOME:-} && -x /usr/local/cuda/bin/nvcc ]]; then export CUDA_HOME=/usr/local/cuda; fi

failed=()
# part NAME SECONDS COMMAND...: runs it, keeps its log, and shows the end of it if it fails.
part() {
  local name=$1 limit=$2 log=$OUT/$1.log start=$SECONDS rc=0
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 || rc=$?
  echo "gpu: $name: $([[ $rc == 0 ]] && echo passed || echo "FAILED ($rc)") in $((SECONDS - start)) s"
  if ((rc)); then
    failed+=("$name")
    tail -n "${TAIL:-60}" "$log"
  else
    tail -n 3 "$log"
  fi
  return "$rc"
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader || true
if ! part build 240 "$PYTHON" setup.py build_ext --inplace; then
  echo "gpu: nothing can run without the extension" >&2
  exit 1
fi
part report 60 "$PYTHON" -m perturbed
[[ ${failed[*]:-} == *report* ]] || cat "$OUT/report.log"
part tests 200 "$PYTHON" -m pytest -q -m cuda --junitxml="$OUT/tests.xml"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [[ -x $sanitizer ]]; then
  part memcheck 90 "$sanitizer" --error-exitcode 9 "$PYTHON" -m pytest -q -x tests/test_cuda.py \
    -k "test_linear_matches_the_cpu and float32 or test_estimate_matches_the_cpu and float32"
else
  echo "gpu: memcheck: left out, there is no compute-sanitizer"
fi
# Not the suites that start a process for every row. Its files hold what was measured when it ends.
part bench 240 "$PYTHON" -m bench network eggroll update conv nesgpu linear --device cuda --save "$OUT/bench"
cat "$OUT/bench.md" || true

if ((${#failed[@]})); then
  echo "gpu: failed: ${failed[*]}" >&2
  exit 1
fi
echo "gpu: everything passed; logs are in $OUT"
