// Which inner loops run: the widest that this processor has, unless PERTURBED_CPU or a test says
// otherwise.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace perturbed {

namespace {

const CpuKernels* const kWidestFirst[] = {&kAvx512Kernels, &kAvx2Kernels, &kPortableKernels};

const CpuKernels* find(const char* name) {
  for (const CpuKernels* table : kWidestFirst) {
    if (std::strcmp(table->name, name) == 0 && cpu_supports(name)) return table;
  }
  return nullptr;
}

const CpuKernels* choose() {
  if (const char* wish = std::getenv("PERTURBED_CPU")) {
    if (const CpuKernels* table = find(wish)) return table;
  }
  for (const CpuKernels* table : kWidestFirst) {
    if (cpu_supports(table->name)) return table;
  }
  return &kPortableKernels;
}

std::atomic<const CpuKernels*>& active() {
  static std::atomic<const CpuKernels*> table{choose()};
  return table;
}

}  // namespace

bool cpu_supports(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(name, "portable") == 0;
}

const CpuKernels& kernels() { return *active().load(std::memory_order_relaxed); }

bool set_cpu_capability(const char* name) {
  const CpuKernels* table = find(name);
  if (table == nullptr) return false;
  active().store(table, std::memory_order_relaxed);
  return true;
}

}  // namespace perturbed
