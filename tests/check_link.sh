#!/usr/bin/env bash
# Builds the CUDA extension against a CUDA build of torch, links, imports and runs the default tests;
# needs nvcc but no GPU (tests marked cuda then skip). Not in CI: the environment that it makes in
# build/check-link takes some 6 GB of disk, most of it downloaded.
#
#   tests/check_link.sh                    the oldest torch that we support
#   TORCH=2.13.0 tests/check_link.sh       another one
#   ARGS="-k build" tests/check_link.sh    handed on to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=${TORCH:-2.11.0}
GB_NEEDED=12
home=$PWD/build/check-link/torch-$TORCH
env=$home/env
tree=$home/tree
mkdir -p "$home"

if [[ ! -x $env/bin/python ]]; then
  free=$(df --output=avail -BG "$home" | tail -1 | tr -dc '0-9')
  if ((free < GB_NEEDED)); then
    echo "check-link: $home needs $GB_NEEDED GB of disk, $free GB are free" >&2
    exit 1
  fi
  "${PYTHON:-python3}" -m venv "$env"
fi
# `===` matches the text of the version: the index's own CUDA build, and no build ending in +cpu.
"$env/bin/pip" install --quiet "torch===$TORCH"
# Pinned as everywhere, but for torch itself.
grep -v '^torch==' requirements.txt >"$home/requirements.txt"
"$env/bin/pip" install --quiet -r "$home/requirements.txt"

# A copy, because an extension built in place would replace the one of the main environment.
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from - --ignore-failed-read | tar --extract -C "$tree"
cd "$tree"
export PERTURBED_CUDA=1 CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} "$env/bin/python" setup.py build_ext --inplace
"$env/bin/python" -m perturbed
# The module must carry the operators' CUDA kernels, not only their names.
"$env/bin/python" - <<'PY'
import torch
import perturbed

names = ["dense_linear_", "dense_linear", "dense_estimate_", "dense_materialise"]
for name in names:
    key = torch._C._dispatch_has_kernel_for_dispatch_key(f"perturbed::{name}", "CUDA")
    assert key, f"perturbed::{name} has no CUDA kernel"
print(f"check-link: torch {torch.__version__}, {len(names)} operators have CUDA kernels")
PY
# shellcheck disable=SC2086  # ARGS is a list
"$env/bin/python" -m pytest -q -m "not slow" ${ARGS:-}
