#!/usr/bin/env bash
# Builds the source distribution and the wheel, looks into both, installs the wheel into a clean
# environment and uses it there, from another folder. Objects that are already compiled are reused.
#
#   tests/check_wheel.sh               PYTHON=...  the interpreter that builds (default .venv, python3)
#   TORCH=2.11.0 tests/check_wheel.sh  compiles all of it again, from the source distribution, and
#                                      uses the wheel with another torch, downloaded (several GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(realpath -s "${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || command -v python3)}")
out=$PWD/build/check-wheel
rm -rf "$out/dist" "$out/sdist" "$out/env" build/lib* build/bdist*  # a wheel takes all of build/lib
mkdir -p "$out"

# ---- build -----------------------------------------------------------------------------------------

# Without formats named, the wheel is made from the source distribution.
formats=(--sdist --wheel)
if [[ -n ${TORCH:-} ]]; then formats=(); fi
"$python" -m build --no-isolation --outdir "$out/dist" "${formats[@]}" . >"$out/build.log" 2>&1 ||
  { tail -n 40 "$out/build.log"; exit 1; }
sdist=$(ls "$out"/dist/*.tar.gz) wheel=$(ls "$out"/dist/*.whl)

# ---- what is in them -------------------------------------------------------------------------------

"$python" tests/wheel/contents.py "$sdist" "$wheel"
mkdir "$out/sdist" && tar --extract --strip-components=1 -C "$out/sdist" --file "$sdist"
(cd "$out/sdist" && PERTURBED_CUDA=0 "$python" setup.py --version >/dev/null)

# ---- a clean environment ---------------------------------------------------------------------------

if [[ -n ${TORCH:-} ]]; then
  env=$out/torch-$TORCH
  [[ -x $env/bin/python ]] || "$python" -m venv "$env"
  # `===` matches the text of the version: the index's own build, and none ending in +cpu.
  "$env/bin/pip" install --quiet "torch===$TORCH" numpy
else
  env=$out/env
  "$python" -m venv "$env"
  # The builder's torch, from behind: what the environment itself has goes first.
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/builder.pth"
fi
"$env/bin/pip" install --quiet --no-deps --no-index --force-reinstall "$wheel"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp tests/wheel/{smoke,typed}.py "$work"
cd "$work"
unset PYTHONPATH
"$env/bin/python" -m perturbed
"$env/bin/python" smoke.py "$env"

# Types, as a user's mypy sees them; the script says which lines must be errors.
"$python" -m mypy --python-executable "$env/bin/python" --cache-dir "$out/mypy" \
  --warn-unused-ignores typed.py
echo "check-wheel: $(basename "$wheel") works with torch $("$env/bin/python" -c 'import torch
print(torch.__version__)')"
