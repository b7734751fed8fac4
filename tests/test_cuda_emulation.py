"""The CUDA kernels' own source, run thread by thread on the host (tests/emulation).

Results, barriers, shuffles, bounds and independence of the order of threads are checked on every
machine; what a GPU alone can show is in test_cuda.py. docs/gpu-status.md keeps the two apart.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Driver (tests/emulation/<driver>.cpp) and a group of its checks.
GROUPS = [
    ("dense_kernels", "emulator"),
    ("dense_kernels", "materialise"),
    ("dense_kernels", "linear-normal"),
    ("dense_kernels", "linear-sign"),
    ("dense_kernels", "estimate-normal"),
    ("dense_kernels", "estimate-sign"),
    ("lookup_kernels", "normal"),
    ("lookup_kernels", "sign"),
    ("factor_kernels", "low-rank-normal"),
    ("factor_kernels", "low-rank-sign"),
    ("factor_kernels", "sparse-normal"),
    ("factor_kernels", "sparse-sign"),
    ("factor_kernels", "sparse-estimate-normal"),
    ("factor_kernels", "sparse-estimate-sign"),
    ("selection_kernels", "selections"),
    ("selection_kernels", "select"),
    ("selection_kernels", "select-add"),
    ("selection_kernels", "selection-sum"),
    ("permuted_kernels", "estimate"),
    ("sign_flip_kernels", "flip"),
    ("sign_flip_kernels", "flip-add"),
    ("swarm_kernels", "move-float"),
    ("swarm_kernels", "move-double"),
    ("swarm_kernels", "uniforms"),
]
DRIVERS = sorted({driver for driver, _ in GROUPS})
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]


def build(folder: Path, driver: str, *flags: str) -> Path:
    """Compile a driver into ``folder``, once for all its groups."""
    program = folder / driver
    if program.exists():
        return program
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler!r}")
    source = ROOT / "tests/emulation" / f"{driver}.cpp"
    # The flags of setup.py that noise depends on; -Werror because the kernels are built by nvcc,
    # whose host compiler would not show these warnings.
    command = [compiler, "-std=c++20", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra"]
    command += ["-Werror", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, group: str) -> None:
    done = subprocess.run([program, group], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{group}: " in done.stdout
    assert ", 0 failures" in done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulation-sanitized")


@pytest.mark.parametrize(("driver", "group"), GROUPS)
def test_kernels_match_plain_loops(plain, driver, group):
    run(build(plain, driver), group)


@pytest.mark.slow
@pytest.mark.parametrize(("driver", "group"), GROUPS)
def test_kernels_are_clean_under_the_sanitizers(sanitized, driver, group):
    run(build(sanitized, driver, *SANITIZERS), group)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_wrong_group_is_an_error(plain, driver):
    assert subprocess.run([build(plain, driver), "nonsense"], capture_output=True).returncode == 2


def test_every_driver_is_run():
    found = {path.stem for path in (ROOT / "tests/emulation").glob("*.cpp")}
    assert found == set(DRIVERS)
