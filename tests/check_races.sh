#!/usr/bin/env bash
# Looks for data races in the CPU kernels: the tests about threads on an extension built with
# ThreadSanitizer, whose parallel loops run on threads that it knows (sanitizers/parallel_for.cpp).
# First on loops that do race, which it must find.
#
#   tests/check_races.sh [TESTS]  PYTHON=...  the interpreter that has torch (default .venv, python3)
#
# Builds into build/races, without optimisation, and leaves the extension of the working tree alone.
# Needs gcc.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
python=$(command -v "$python")
out=$PWD/build/races
mkdir -p "$out"
if [[ $# -eq 0 ]]; then
  set -- tests/test_ops_*.py
fi

gcc=${CC:-gcc}
preload="$("$gcc" -print-file-name=libtsan.so) $("$gcc" -print-file-name=libstdc++.so.6)"
if [[ $preload != /* ]]; then
  echo "check-races: skipped, $gcc has no libtsan.so"
  exit 0
fi

DEBUG=1 PERTURBED_CUDA=0 CC=$gcc CFLAGS="-fsanitize=thread -fno-omit-frame-pointer" \
  LDFLAGS="-fsanitize=thread" "$python" setup.py -q build --build-base "$out" \
  --build-lib "$out/lib" >"$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }
rm -f "$out"/report.*
for variant in clean race; do
  "$gcc" -O1 -g -std=c++20 -fsanitize=thread -fPIC -shared $([[ $variant == race ]] && echo -DRACE) \
    -o "$out/lib$variant.so" tests/sanitizers/parallel_for.cpp -lstdc++
done

# One thread of OpenMP, for torch's own operators, which nothing here watches. -P leaves the working
# tree, whose extension is the ordinary one, out of the path.
export OMP_NUM_THREADS=1 PYTHONPATH=$out/lib
watched() {  # VARIANT ARGUMENTS: pytest's tests about threads; a race ends it with 66 and a report
  LD_PRELOAD="$preload $out/lib$1.so" TSAN_OPTIONS="halt_on_error=1 exitcode=66 log_path=$out/report" \
    "$python" -P -m pytest -q -x -p no:cacheprovider -m "not slow" -k thread "${@:2}"
}

status=0
watched race tests/test_ops_conv.py >"$out/race.log" 2>&1 || status=$?
if [[ $status -ne 66 ]]; then
  echo "check-races: loops that race were not found, see $out/race.log"
  exit 1
fi
rm -f "$out"/report.*
status=0
watched clean "$@" || status=$?
if [[ $status -ne 0 ]]; then
  cat "$out"/report.* 2>/dev/null || true
  exit "$status"
fi
echo "check-races: nothing found"
