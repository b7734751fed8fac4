#!/usr/bin/env bash
# Runs the tests of the operators on an extension built with AddressSanitizer and
# UndefinedBehaviorSanitizer and with the assertions of libstdc++, once for each instruction set of
# this processor, and the emulated CUDA kernels under the same two. Ends at the first finding.
#
#   tests/check_sanitizers.sh [TESTS]  PYTHON=...  the interpreter that has torch (default .venv, python3)
#
# Builds into build/sanitizers and leaves the extension of the working tree alone. Needs gcc. Takes
# long: all kernels are compiled anew, and some thousand tests run once for each instruction set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
python=$(command -v "$python")
out=$PWD/build/sanitizers
mkdir -p "$out"
if [[ $# -eq 0 ]]; then
  set -- tests/test_ops_*.py tests/test_noise*.py tests/test_nn_linear.py tests/test_nn_conv.py
fi

# Python has no sanitizer: its run-time library comes first by LD_PRELOAD, with the C++ library whose
# exceptions it watches.
gcc=${CC:-gcc}
preload="$("$gcc" -print-file-name=libasan.so) $("$gcc" -print-file-name=libstdc++.so.6)"
if [[ $preload != /* ]]; then
  echo "check-sanitizers: skipped, $gcc has no libasan.so"
  exit 0
fi

# -fno-sanitize-recover: undefined behaviour ends the process instead of leaving a line in a log.
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
PERTURBED_CUDA=0 CC=$gcc CFLAGS="$flags -D_GLIBCXX_ASSERTIONS" \
  LDFLAGS="-fsanitize=address,undefined" "$python" setup.py -q build --build-base "$out" \
  --build-lib "$out/lib" >"$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }

# detect_leaks=0: Python and torch hold memory until the process ends, and what the kernels allocate
# are std::vectors; test_growth.py watches for memory that piles up.
# allocator_may_return_null=1: tests ask for more memory than there is, and for the error then.
# -P leaves the working tree, whose extension is the ordinary one, out of the path.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONPATH=$out/lib
sanitized=(env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
  UBSAN_OPTIONS=print_stacktrace=1 "$python" -P)
"${sanitized[@]}" -c "
import perturbed
assert perturbed._C.__file__.startswith('$out/lib'), perturbed._C.__file__"
for name in $("$python" -c 'import perturbed; print(*perturbed._C.cpu_capabilities())'); do
  echo "check-sanitizers: $name"
  PERTURBED_CPU=$name "${sanitized[@]}" -m pytest -q -x -p no:cacheprovider -m "not slow" "$@"
done

echo "check-sanitizers: emulated CUDA kernels"
"$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda_emulation.py -k sanitizers
echo "check-sanitizers: nothing found"
