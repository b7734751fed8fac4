// The CPU inner loops for avx2. The target holds for this file only, so that one binary serves
// every processor; nothing but the table leaves it.
#pragma GCC target("avx2,fma")
#define PERTURBED_ISA avx2
#define PERTURBED_SIMD "cpu/simd_avx2.h"

#include "cpu/isa.h"

namespace perturbed {
const CpuKernels kAvx2Kernels = avx2::table("avx2");
}  // namespace perturbed
