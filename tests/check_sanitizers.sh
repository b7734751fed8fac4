#!/usr/bin/env bash
# Runs the tests of the operators on an extension built with AddressSanitizer and
# UndefinedBehaviorSanitizer and with the assertions of libstdc++, once for each instruction set of
# this processor, and the emulated CUDA kernels under the same two. Ends at the first finding.
#
#   tests/check_sanitizers.sh [TESTS]  PYTHON=...     the interpreter that has torch (default .venv, python3)
#                                      SANITIZE_ALL=1  all tests on every instruction set, layers too
#
# By default the widest instruction set runs the tests of the operators, and the others the small
# files among them. Builds into build/sanitizers and leaves the extension of the working tree alone.
# Needs gcc.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
python=$(command -v "$python")
out=$PWD/build/sanitizers
mkdir -p "$out"
quick=("$@")
if [[ $# -eq 0 ]]; then
  set -- tests/test_ops_*.py
  quick=(tests/test_ops_{conv,lookup,rows_cpu,sign_flip,swarm}.py tests/test_ops_*_rules.py)
  if [[ ${SANITIZE_ALL:-} == 1 ]]; then
    set -- "$@" tests/test_noise*.py tests/test_nn_linear.py tests/test_nn_conv.py
    quick=("$@")
  fi
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
# From portable to the widest.
read -ra names < <("${sanitized[@]}" -c 'import perturbed; print(*perturbed._C.cpu_capabilities())')
for name in "${names[@]}"; do
  tests=("${quick[@]}")
  [[ $name == "${names[-1]}" ]] && tests=("$@")
  echo "check-sanitizers: $name, ${#tests[@]} files"
  PERTURBED_CPU=$name "${sanitized[@]}" -m pytest -q -x -p no:cacheprovider -m "not slow" "${tests[@]}"
done

echo "check-sanitizers: emulated CUDA kernels"
"$python" -m pytest -q -x -p no:cacheprovider tests/test_cuda_emulation.py -k sanitizers
echo "check-sanitizers: nothing found"
