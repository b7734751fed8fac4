"""Build of ``perturbed._C``: noise contract, operators and their CPU and CUDA kernels.

Environment:
    PERTURBED_CUDA=0/1    leave the CUDA kernels out / make a missing toolkit an error
    DEBUG=1               -O0 -g
    CUDA_HOME             the CUDA toolkit; else that of nvcc on PATH, /usr/local/cuda, or the one
                          that NVIDIA's pip packages make up (cuda_toolkit.py)
    TORCH_CUDA_ARCH_LIST  as everywhere in torch; a default is chosen when no GPU is visible

torch must be installed first and pip must not build in isolation, because an isolated build
compiles against a torch of its own:  pip install --no-build-isolation -e .
"""

import glob
import os
import sys
from pathlib import Path

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)  # which pip leaves out
import cuda_toolkit  # noqa: E402

try:
    import pybind11
    import torch

    # Ahead of cpp_extension, which looks for CUDA_HOME when it is imported.
    if torch.version.cuda is not None and os.environ.get("PERTURBED_CUDA") != "0":
        home = cuda_toolkit.prepare(Path(HERE, "build", "cuda-home"))
        if home is not None:
            os.environ["CUDA_HOME"] = str(home)
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except cuda_toolkit.IncompleteError as error:
    sys.exit(f"perturbed: {error}, or leave the CUDA kernels out by PERTURBED_CUDA=0")
except ImportError as error:
    sys.exit(
        f"perturbed: the build needs {error.name!r}.\n"
        "  pip install torch numpy pybind11 ninja 'setuptools>=77'\n"
        "  pip install --no-build-isolation -e ."
    )

# The binary contract is LibTorch's stable ABI as of torch 2.11: one build serves 2.11 and newer.
STABLE_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def use_cuda() -> bool:
    """Decide whether to build the CUDA kernels, and say so."""
    wish = os.environ.get("PERTURBED_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"perturbed: PERTURBED_CUDA must be 0 or 1, got {wish!r}")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is a CPU build")
    if CUDA_HOME is None:
        missing.append("no CUDA toolkit (nvcc): set CUDA_HOME or install the extra cuda-build")
    if wish == "1" and missing:
        sys.exit("perturbed: PERTURBED_CUDA=1, but " + " and ".join(missing))
    chosen = wish != "0" and not missing
    reason = "PERTURBED_CUDA=0" if wish == "0" else " and ".join(missing)
    print(f"perturbed: CUDA kernels {'on' if chosen else f'off ({reason})'}")
    return chosen


def default_archs() -> None:
    """Choose CUDA architectures where cpp_extension would fail for want of a visible GPU."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        # What this torch itself was built for (known without a GPU); +PTX serves newer cards.
        flags = torch._C._cuda_getArchFlags() or "sm_80 sm_90 sm_120"
        known = sorted({int(f[3:].rstrip("af")) for f in flags.split() if f.startswith("sm_")})
        archs = [f"{a // 10}.{a % 10}" for a in known if a >= 80]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"


cuda = use_cuda()
if cuda:
    default_archs()
debug = os.environ.get("DEBUG") == "1"
optimise = ["-O0", "-g"] if debug else ["-O3"]
# -ffp-contract=off: the noise is the same bits on every compiler; kernels spell out their fma.
# Errors name csrc/... and torch/include/..., wherever they were on the machine that compiled it.
packages = os.path.dirname(os.path.dirname(torch.__file__))
relative = [f"-fmacro-prefix-map={folder}/=" for folder in (HERE, packages)]
cxx_flags = [
    *optimise,
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    *relative,
    STABLE_TARGET,
]
nvcc_flags = ["-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", STABLE_TARGET]
nvcc_flags += [flag for folder in relative for flag in ("-Xcompiler", folder)]
sources = glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")
if cuda:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")  # empty: those of the visible GPUs
    cxx_flags += ["-DPERTURBED_WITH_CUDA", f'-DPERTURBED_CUDA_ARCHS="{archs}"']
    sources += glob.glob("csrc/cuda/*.cu")

setup(
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "perturbed._C",
            sorted(sources),
            include_dirs=[os.path.join(HERE, "csrc"), pybind11.get_include()],
            extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
            # Python's own flags have -g: 15 MB, with the paths of the machine that compiled it.
            # A build with CFLAGS of its own, as that with sanitizers, keeps it.
            extra_link_args=[] if debug or "CFLAGS" in os.environ else ["-Wl,--strip-debug"],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
