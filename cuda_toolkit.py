"""The CUDA toolkit of NVIDIA's pip packages, for machines that have none of the system.

The packages of CUDA 13 share one folder, site-packages/nvidia/cu13, which is laid out as a toolkit
but for two names that a build asks for: lib64, and libcudart.so without its version, which the
linker looks for. A folder of links supplies them and serves as CUDA_HOME.

    pip install "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-cccl==13.0.*"    # they bring the rest
    python cuda_toolkit.py build/cuda-home    # makes and prints it; nothing without the packages

setup.py and tests/check_cuda.sh use it where nobody says CUDA_HOME and no nvcc is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

# A file of each package that a build needs, below nvidia/cu13.
PARTS = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "include/cuda_runtime.h",
    "nvidia-cuda-cccl": "include/cccl/nv/target",
}

SYSTEM = Path("/usr/local/cuda")


class IncompleteError(Exception):
    """nvcc is there, but not all that it needs; says what to install."""


def installed_elsewhere() -> bool:
    """Return whether there is a toolkit of the system, or one that the user has named."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # An image with the runtime alone has the folder, too.
    return bool(named or shutil.which("nvcc") or (SYSTEM / "bin" / "nvcc").exists())


def find_packages(major: int = 13, folders: Iterable[str] | None = None) -> Path | None:
    """Return the folder of the packages; None where nvcc is not among them.

    Args:
        major: of the CUDA version. Packages before 13 have another layout.
        folders: of the namespace ``nvidia``; default: those that Python would import.

    Raises:
        IncompleteError: nvcc without the rest.
    """
    if folders is None:
        spec = importlib.util.find_spec("nvidia")
        folders = (spec and spec.submodule_search_locations) or ()
    for folder in folders:
        packages = Path(folder) / f"cu{major}"
        if not (packages / PARTS["nvidia-cuda-nvcc"]).exists():
            continue
        missing = [name for name, file in PARTS.items() if not (packages / file).exists()]
        if missing:
            raise IncompleteError(
                f"{packages} has nvcc, but it needs more: pip install "
                + " ".join(f'"{name}=={major}.*"' for name in missing)
            )
        return packages
    return None


def make_home(packages: Path, home: Path) -> Path:
    """Make ``home`` a toolkit of links into the packages, anew, and return its absolute path."""
    home = home.absolute()
    if home.exists():
        shutil.rmtree(home)
    (home / "lib64").mkdir(parents=True)
    for part in ("bin", "include", "nvvm"):
        (home / part).symlink_to(packages / part)
    for library in (packages / "lib").glob("lib*"):
        plain = library.name.split(".so")[0] + (".so" if ".so" in library.name else "")
        for name in {library.name, plain}:
            (home / "lib64" / name).symlink_to(library)
    return home


def prepare(home: Path) -> Path | None:
    """Return a toolkit made of pip packages, where there is no other and they are installed.

    Raises:
        IncompleteError: nvcc without the rest.
    """
    packages = None if installed_elsewhere() else find_packages()
    return None if packages is None else make_home(packages, home)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python cuda_toolkit.py FOLDER")
    try:
        made = prepare(Path(sys.argv[1]))
    except IncompleteError as error:
        sys.exit(f"cuda_toolkit: {error}")
    if made is not None:
        print(made)
