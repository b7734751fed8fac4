#!/usr/bin/env bash
# Compiles every csrc/cuda/*.cu for sm_80, sm_90 and sm_120 and fails on register spills and on stack
# frames above a budget; then checks that exact normals compile to exactly rounded instructions.
# Needs nvcc and any build of torch (its headers); neither a GPU nor a CUDA build of torch.
#
#   tests/check_cuda.sh            PYTHON=...  the interpreter that has torch (default .venv, python3)
#   V=1 tests/check_cuda.sh        registers and stack of every kernel
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ARCHS=(80 90 120)
STACK_BUDGET=0  # bytes of local memory a kernel may use

find_nvcc() {
  local candidate
  for candidate in "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "$(command -v nvcc || true)" \
    /usr/local/cuda/bin/nvcc /usr/local/cuda-*/bin/nvcc; do
    if [[ -n "$candidate" && -x "$candidate" ]]; then
      echo "$candidate"
      return
    fi
  done
}

python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
nvcc=$(find_nvcc)
if [[ -z "$nvcc" ]]; then
  home=$("$python" cuda_toolkit.py build/cuda-home)
  nvcc=${home:+$home/bin/nvcc}
fi
if [[ -z "$nvcc" ]]; then
  echo "check-cuda: skipped, there is no nvcc (looked at CUDA_HOME, PATH, /usr/local/cuda* and" \
    "NVIDIA's pip packages)"
  exit 0
fi
# nvcc must not see torch's headers as the project's own: their warnings are not ours.
torch_flags=$("$python" -c 'from torch.utils.cpp_extension import include_paths as p
print(*("-isystem " + path for path in p()))')
out=build/check-cuda
mkdir -p "$out"

# As setup.py compiles; test_build.py holds the two to one stable target.
flags=(-std=c++20 -O3 -Icsrc --expt-relaxed-constexpr --compiler-options -fPIC -DUSE_CUDA
  -DTORCH_TARGET_VERSION=0x020b000000000000)
ptxas=(-Xptxas "-v,-warn-spills")

failed=0
for source in csrc/cuda/*.cu; do
  log=$out/$(basename "$source" .cu).log
  gencode=()
  for arch in "${ARCHS[@]}"; do gencode+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
  # shellcheck disable=SC2086  # torch_flags is a list
  if ! "$nvcc" "${flags[@]}" "${ptxas[@]}" "${gencode[@]}" $torch_flags \
    --threads "${NVCC_THREADS:-2}" -c "$source" -o "$out/$(basename "$source" .cu).o" \
    >"$log" 2>&1; then
    grep -v '^ptxas info' "$log" || true
    echo "check-cuda: $source does not compile" >&2
    exit 1
  fi
  "$python" tests/read_ptxas.py "$source" "$log" "$STACK_BUDGET" ${V:+--verbose} || failed=1
done

ptx=$out/exact_normals.ptx
"$nvcc" "${flags[@]}" -ptx -arch=compute_80 tests/ptx/exact_normals.cu -o "$ptx"
if ! grep -q 'fma\.rn\.f32' "$ptx"; then
  echo "check-cuda: $ptx holds no fma.rn.f32: it is not the kernel it should be" >&2
  failed=1
fi
# Exact noise is fma.rn, mul.rn, add.rn, sub.rn and sqrt.rn; contraction or fast maths shows here.
if grep -nE '\.(approx|ftz)|\b(fma|mul|add|sub|sqrt|div)\.f32|fma\.r[^n]' "$ptx"; then
  echo "check-cuda: exact normals use the instructions above, which are not correctly rounded" >&2
  failed=1
fi

if ((failed)); then exit 1; fi
echo "check-cuda: $(ls csrc/cuda/*.cu | wc -l) file(s) compile for ${ARCHS[*]/#/sm_} without spills;" \
  "exact normals are correctly rounded"
