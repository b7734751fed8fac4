// Standard normals of the noise contract: Box and Muller (1958) on two words,
//
//   u = (2 (w0 >> 9) + 1) 2^-24 in (0, 1)     v = (w1 >> 9) 2^-23 in [0, 1) turns
//   z0 = sqrt(-2 ln u) cos(2 pi v)            z1 = sqrt(-2 ln u) sin(2 pi v)
//
// u and v are exact on every device. `box_muller` evaluates the formula with correctly rounded
// operations only, in a fixed order: it *defines* the CPU's normals bit by bit, and the SIMD twins
// in csrc/cpu/lanes.h repeat it operation by operation. Against the exact formula its error is
// at most 1.4e-6, and below 4e-7 for 99.9 % of words. `box_muller_fast` is the device form on the
// special-function units; it differs from box_muller by at most 4e-6 for 99.98 % of elements and
// 5e-4 always.
#pragma once

#include "noise/hd.h"
#include "noise/philox.h"

namespace perturbed {

struct NormalPair {
  float z0, z1;
};

PT_HD float uniform_open(uint32_t word) {
  return exact_sub(float_from_bits(0x3f800000u | word >> 9), 0.99999994f);  // 1 - 2^-24
}

namespace box_muller_constants {
// Coefficients from low to high. A struct, because device code may copy a constant but not index a
// host array.
template <int kTerms>
struct Polynomial {
  float c[kTerms];
  PT_HD_MEMBER constexpr float operator[](int i) const { return c[i]; }
};
// ln u = e ln 2 + ln(1 + f) with f in [-1/3, 1/3); kLog approximates -2 ln(1 + f) / f to 5.4e-8.
constexpr uint32_t kTwoThirdsBits = 0x3f2aaaabu;
constexpr uint32_t kExponentMask = 0xff800000u;
constexpr float kExponentScale =
    -1.6525916e-07f;  // -2 ln 2 / 2^23: the exponent arrives times 2^23
constexpr Polynomial<9> kLog = {{-2.0f, 0.999998629f, -0.666660786f, 0.500160575f, -0.400355816f,
                                 0.328255683f, -0.278069288f, 0.30806464f, -0.288698822f}};
// The angle is 2 pi v = pi (h + x + 1/2) with h the top bit and x in [-1/2, 1/2) the rest, so that
// cos = -(-1)^h sin(pi x) and sin = (-1)^h cos(pi x): kSin(x^2) x = -sin(pi x) to 7e-9 and
// kCos(x^2) = cos(pi x) to 5.3e-8.
constexpr Polynomial<5> kSin = {
    {-3.14159274f, 5.1677103f, -2.55007768f, 0.598292172f, -0.0776594058f}};
constexpr Polynomial<5> kCos = {{1.0f, -4.93479538f, 4.05845118f, -1.33209383f, 0.220080659f}};
constexpr uint32_t kAngleMask = 0x007ffffeu;  // of w1 >> 8: the 22 bits of (w1 >> 9) below h
}  // namespace box_muller_constants

PT_HD NormalPair box_muller(uint32_t w0, uint32_t w1) {
  namespace c = box_muller_constants;
  constexpr auto kLog = c::kLog;
  constexpr auto kSin = c::kSin, kCos = c::kCos;
  // r = sqrt(-2 ln u)
  const uint32_t u = bits_from_float(uniform_open(w0));
  const uint32_t exponent =
      (u - c::kTwoThirdsBits) & c::kExponentMask;  // e * 2^23, two's complement
  const float f = exact_sub(float_from_bits(u - exponent), 1.0f);
  float p = kLog[8];
  for (int i = 7; i >= 0; --i) p = exact_fma(p, f, kLog[i]);
  const float scaled =
      exact_mul(static_cast<float>(static_cast<int32_t>(exponent)), c::kExponentScale);
  const float r = exact_sqrt(exact_fma(p, f, scaled));

  const float x = exact_sub(float_from_bits((w1 >> 8 & c::kAngleMask) | 0x3f800000u), 1.5f);
  const float xx = exact_mul(x, x);
  float s = kSin[4];
  for (int i = 3; i >= 0; --i) s = exact_fma(s, xx, kSin[i]);
  float k = kCos[4];
  for (int i = 3; i >= 0; --i) k = exact_fma(k, xx, kCos[i]);
  const float signed_r = float_from_bits(bits_from_float(r) ^ (w1 & 0x80000000u));
  return {exact_mul(signed_r, exact_mul(s, x)), exact_mul(signed_r, k)};
}

// Device forms. tests/emulation compiles them on a host, with a model of the special-function
// units.
#if defined(__CUDACC__)
#define PT_DEVICE __device__ __forceinline__
__device__ __forceinline__ float mufu_lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float mufu_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float mufu_sin(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float mufu_cos(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#elif defined(PERTURBED_EMULATION)
#define PT_DEVICE inline
float mufu_lg2(float x);
float mufu_sqrt(float x);
float mufu_sin(float x);
float mufu_cos(float x);
#endif

#if defined(PT_DEVICE)
// MUFU form: lg2.approx, sqrt.approx, sin.approx and cos.approx, two instructions per factor.
PT_DEVICE NormalPair box_muller_fast(uint32_t w0, uint32_t w1) {
  // -2 ln 2 log2(u). lg2.approx may err by 2^-22 near 1, hence above zero for the largest u; the
  // magnitude keeps the root real and is a free operand modifier.
  const float square = __builtin_fabsf(-1.3862944f * mufu_lg2(uniform_open(w0)));
  const float r = mufu_sqrt(square);
  // v in turns as a float in [1, 2), minus 1.5: the same angle less half a turn, so both signs
  // flip.
  const float turns = float_from_bits(0x3f800000u | w1 >> 9) - 1.5f;
  const float radians = 6.2831855f * turns;
  return {-r * mufu_cos(radians), -r * mufu_sin(radians)};
}
#endif

// The four normals of one block.
struct NormalBlock {
  float z[4];
};

PT_HD NormalBlock normal_block(PhiloxWords words) {
  const NormalPair a = box_muller(words.w[0], words.w[1]);
  const NormalPair b = box_muller(words.w[2], words.w[3]);
  return {{a.z0, a.z1, b.z0, b.z1}};
}

#if defined(PT_DEVICE)
PT_DEVICE NormalBlock normal_block_fast(PhiloxWords words) {
  const NormalPair a = box_muller_fast(words.w[0], words.w[1]);
  const NormalPair b = box_muller_fast(words.w[2], words.w[3]);
  return {{a.z0, a.z1, b.z0, b.z1}};
}
#endif

}  // namespace perturbed
