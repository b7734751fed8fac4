// What host and device code of the noise contract share: one function qualifier and the few exactly
// rounded float operations. Every result here is a function of its inputs' bits alone, on any
// compiler: multiply-adds are explicit (hosts compile with -ffp-contract=off, and the device
// intrinsics are never contracted), and nothing calls a maths library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PT_HD __host__ __device__ __forceinline__
#else
// static: csrc/cpu compiles these once per instruction set, and a merged copy (COMDAT) could be one
// that the processor at hand cannot run.
#define PT_HD static inline
#endif

// The same for a member function, which cannot have internal linkage: it must not exist out of
// line.
#if defined(__CUDACC__)
#define PT_HD_MEMBER __host__ __device__ __forceinline__
#else
#define PT_HD_MEMBER __attribute__((always_inline)) inline
#endif

namespace perturbed {

PT_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

PT_HD uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// a * b + c, rounded once.
PT_HD float exact_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

PT_HD float exact_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PT_HD float exact_add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PT_HD float exact_sub(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

// The same in double.
PT_HD double exact_fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

PT_HD double exact_mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

PT_HD double exact_add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

PT_HD double exact_sub(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dsub_rn(a, b);
#else
  return a - b;
#endif
}

// Correctly rounded square root (IEEE 754), not the approximate device instruction.
PT_HD float exact_sqrt(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

template <class T>
PT_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace perturbed
