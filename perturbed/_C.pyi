"""The extension module (csrc/module.cpp): importing it registers the operators."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    noise_contract: int
    compiler: str
    torch_target: int  # [major][minor][patch][5 bytes of ABI tag]
    cuda: bool
    cuda_archs: str  # as TORCH_CUDA_ARCH_LIST
    optimised: bool

def splitmix64(seed: int) -> int: ...

# Keys are 64 bits, as the signed integer of a key tensor or as an unsigned one. [N, 4] -> [N, 4]
def philox(counters: NDArray[np.uint32], key: int) -> NDArray[np.uint32]: ...

# [count, 4], through the active CPU kernels.
def words(
    key: int, generation: int, stream: int, direction: int, first_block: int, count: int
) -> NDArray[np.uint32]: ...
def normals(
    key: int, generation: int, stream: int, direction: int, first_block: int, count: int
) -> NDArray[np.float32]: ...

# [N, 2] -> [N, 2], by the scalar definition in csrc/noise/normal.h.
def box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]: ...
def cpu_capabilities() -> list[str]: ...
def cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> None: ...
def build_info() -> BuildInfo: ...
