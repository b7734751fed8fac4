// The CPU inner loops for avx512. The target holds for this file only, so that one binary serves
// every processor; nothing but the table leaves it.
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define PERTURBED_ISA avx512
#define PERTURBED_SIMD "cpu/simd_avx512.h"

#include "cpu/isa.h"

namespace perturbed {
const CpuKernels kAvx512Kernels = avx512::table("avx512");
}  // namespace perturbed
