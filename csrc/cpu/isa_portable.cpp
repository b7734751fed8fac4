// The CPU inner loops for any processor. The target holds for this file only, so that one binary
// serves every processor; nothing but the table leaves it.
#define PERTURBED_ISA portable
#define PERTURBED_SIMD "cpu/simd_portable.h"

#include "cpu/isa.h"

namespace perturbed {
const CpuKernels kPortableKernels = portable::table("portable");
}  // namespace perturbed
