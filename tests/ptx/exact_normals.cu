// A kernel that draws exact normals and stores them, compiled to PTX by tests/check_cuda.sh:
// exactly rounded instructions only. No operator uses it; the operators draw on the
// special-function units.
#include "cuda/dense_kernels.cuh"

namespace perturbed {

template __global__ void dense_materialise_normal_kernel<true, float>(DenseMaterialiseArgs);

}  // namespace perturbed
