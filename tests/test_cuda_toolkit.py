"""The toolkit of NVIDIA's pip packages: found where there is no other, whole or refused by name."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load():
    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "cuda_toolkit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """The module, as on a machine without CUDA."""
    module = load()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "SYSTEM", tmp_path / "none")
    return module


@pytest.fixture
def packages(toolkit, tmp_path, monkeypatch):
    """The folder as pip installs the five packages, reduced to a file of each and two libraries."""
    site = tmp_path / "site"
    folder = site / "nvidia" / "cu13"
    for file in (*toolkit.PARTS.values(), "lib/libcudart.so.13", "lib/libcudadevrt.a"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    others = [path for path in sys.path if not Path(path, "nvidia").exists()]
    monkeypatch.setattr(sys, "path", [str(site), *others])
    for name in [n for n in sys.modules if n.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_packages_become_a_toolkit(toolkit, packages, tmp_path):
    home = toolkit.prepare(tmp_path / "home")
    assert home == tmp_path / "home"
    assert (home / "bin" / "nvcc").read_text() == "bin/nvcc"
    assert (home / "nvvm" / "bin" / "cicc").exists()
    assert (home / "include" / "cuda_runtime.h").exists()
    # The linker asks for -lcudart in lib64, without a version.
    for name in ("libcudart.so", "libcudart.so.13"):
        assert (home / "lib64" / name).read_text() == "lib/libcudart.so.13"
    assert (home / "lib64" / "libcudadevrt.a").exists()
    assert toolkit.prepare(tmp_path / "home") == home  # again: links are made anew
    assert (packages / "bin" / "nvcc").exists()


@pytest.mark.parametrize("part", ["nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl"])
def test_a_package_that_is_missing_is_named(toolkit, packages, tmp_path, part):
    (packages / toolkit.PARTS[part]).unlink()
    with pytest.raises(toolkit.IncompleteError, match=f'pip install "{part}==13'):
        toolkit.prepare(tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_without_nvcc_there_is_nothing(toolkit, packages, tmp_path):
    (packages / "bin" / "nvcc").unlink()  # a CUDA build of torch brings the rest
    assert toolkit.prepare(tmp_path / "home") is None
    assert toolkit.find_packages(major=12) is None


@pytest.mark.parametrize("where", ["CUDA_HOME", "CUDA_PATH", "PATH", "SYSTEM"])
def test_a_toolkit_that_is_there_goes_first(toolkit, packages, tmp_path, monkeypatch, where):
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "cuda" / "bin" / "nvcc").chmod(0o755)
    if where == "SYSTEM":
        monkeypatch.setattr(toolkit, "SYSTEM", tmp_path / "cuda")
    else:
        monkeypatch.setenv(where, str(tmp_path / "cuda" / ("bin" if where == "PATH" else "")))
    assert toolkit.prepare(tmp_path / "home") is None


def test_a_folder_of_the_runtime_alone_is_no_toolkit(toolkit, packages, tmp_path, monkeypatch):
    (tmp_path / "cuda" / "lib64").mkdir(parents=True)
    monkeypatch.setattr(toolkit, "SYSTEM", tmp_path / "cuda")
    assert toolkit.prepare(tmp_path / "home") is not None


PROGRAM = """
#include <cuda_runtime.h>
#include <cuda/std/limits>
#include <cuda_bf16.h>
__global__ void fill(float* x) { x[threadIdx.x] = cuda::std::numeric_limits<float>::max(); }
int main() { int devices = 0; return cudaGetDeviceCount(&devices) == cudaErrorInvalidValue; }
"""


@pytest.mark.slow
def test_real_packages_compile_and_link(tmp_path):
    """nvcc, its compiler, headers and the runtime, found by the links alone."""
    module = load()
    packages = module.find_packages()
    if packages is None:
        pytest.skip("needs pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-cccl==13.0.*")
    home = module.make_home(packages, tmp_path / "home")
    compilers = os.path.dirname(shutil.which("g++"))
    environment = {"PATH": f"{compilers}:/usr/bin:/bin", "HOME": str(tmp_path)}
    (tmp_path / "program.cu").write_text(PROGRAM)
    commands = [
        [home / "bin" / "nvcc", "-arch=sm_80", "-c", "program.cu", "-o", "program.o"],
        ["g++", "program.o", "-o", "program", f"-L{home}/lib64", "-lcudart"],
    ]
    for command in commands:
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    environment["LD_LIBRARY_PATH"] = str(home / "lib64")
    assert subprocess.run([tmp_path / "program"], env=environment, check=False).returncode == 0
