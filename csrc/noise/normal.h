// Standard normals of the noise contract: Box and Muller (1958) on two words,
//
//   u = (2 (w0 >> 9) + 1) 2^-24 in (0, 1)     v = (w1 >> 9) 2^-23 in [0, 1) turns
//   z0 = sqrt(-2 ln u) cos(2 pi v)            z1 = sqrt(-2 ln u) sin(2 pi v)
//
// u and v are exact on every device. `box_muller` evaluates the formula with correctly rounded
// operations only, in a fixed order: it *defines* the CPU's normals bit by bit, and the SIMD twins in
// csrc/cpu/noise_simd.h repeat it operation by operation. Against the exact formula its error is at
// most 6e-7. `box_muller_fast` is the device form on the special-function units; it differs from
// box_muller by at most 4e-6 for 99.98 % of elements and 5e-4 always.
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
// ln u = e ln 2 + ln(1 + f) with f in [-1/3, 1/3); kLog approximates -2 ln(1 + f) / f to 5.4e-8.
constexpr uint32_t kTwoThirdsBits = 0x3f2aaaabu;
constexpr uint32_t kExponentMask = 0xff800000u;
constexpr float kExponentScale = -1.6525916e-07f;  // -2 ln 2 / 2^23: the exponent arrives times 2^23
constexpr float kLog[9] = {-2.0f,         0.999998629f, -0.666660786f, 0.500160575f, -0.400355816f,
                           0.328255683f, -0.278069288f, 0.30806464f,   -0.288698822f};
// x in turns, |x| <= 1/8: sin(2 pi x) = x kSin(x^2) to 2.5e-9, cos(2 pi x) = kCos(x^2) to 3.3e-8.
constexpr float kSin[4] = {6.28318548f, -41.3416634f, 81.5925522f, -75.4020691f};
constexpr float kCos[4] = {1.0f, -19.7391682f, 64.9232254f, -83.6659241f};
constexpr uint32_t kAngleMask = 0xfffff800u;              // the 21 bits of (w1 >> 9) below a quarter
constexpr float kAngleScale = 5.820766091346741e-11f;     // 2^-34: the angle arrives times 2^34
}  // namespace box_muller_constants

PT_HD NormalPair box_muller(uint32_t w0, uint32_t w1) {
  namespace c = box_muller_constants;
  // r = sqrt(-2 ln u)
  const uint32_t u = bits_from_float(uniform_open(w0));
  const uint32_t exponent = (u - c::kTwoThirdsBits) & c::kExponentMask;  // e * 2^23, two's complement
  const float f = exact_sub(float_from_bits(u - exponent), 1.0f);
  float p = c::kLog[8];
  for (int i = 7; i >= 0; --i) p = exact_fma(p, f, c::kLog[i]);
  const float scaled = exact_mul(static_cast<float>(static_cast<int32_t>(exponent)), c::kExponentScale);
  const float r = exact_sqrt(exact_fma(p, f, scaled));

  // Reduce v to the nearest quarter turn: v = quarter / 4 + x.
  const float x = exact_mul(static_cast<float>(static_cast<int32_t>((w1 << 2) & c::kAngleMask)),
                            c::kAngleScale);
  const uint32_t quarter = w1 + 0x20000000u;  // its top two bits count quarters
  const float xx = exact_mul(x, x);
  float s = exact_fma(c::kSin[3], xx, c::kSin[2]);
  s = exact_fma(s, xx, c::kSin[1]);
  s = exact_fma(s, xx, c::kSin[0]);
  s = exact_mul(s, x);
  float k = exact_fma(c::kCos[3], xx, c::kCos[2]);
  k = exact_fma(k, xx, c::kCos[1]);
  k = exact_fma(k, xx, c::kCos[0]);
  const bool odd = (quarter & 0x40000000u) != 0;
  const uint32_t cosine = bits_from_float(odd ? s : k) ^ ((quarter + 0x40000000u) & 0x80000000u);
  const uint32_t sine = bits_from_float(odd ? k : s) ^ (quarter & 0x80000000u);
  return {exact_mul(r, float_from_bits(cosine)), exact_mul(r, float_from_bits(sine))};
}

#if defined(__CUDACC__)
// MUFU form: lg2.approx, sqrt.approx, sin.approx and cos.approx, two instructions per factor.
__device__ __forceinline__ NormalPair box_muller_fast(uint32_t w0, uint32_t w1) {
  float log2u, r, s, c;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2u) : "f"(uniform_open(w0)));
  const float square = -1.3862944f * log2u;  // -2 ln 2
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(square));
  // v in turns as a float in [1, 2), minus 1.5: the same angle less half a turn, so both signs flip.
  const float turns = float_from_bits(0x3f800000u | w1 >> 9) - 1.5f;
  const float radians = 6.2831855f * turns;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(radians));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(radians));
  return {-r * c, -r * s};
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

#if defined(__CUDACC__)
__device__ __forceinline__ NormalBlock normal_block_fast(PhiloxWords words) {
  const NormalPair a = box_muller_fast(words.w[0], words.w[1]);
  const NormalPair b = box_muller_fast(words.w[2], words.w[3]);
  return {{a.z0, a.z1, b.z0, b.z1}};
}
#endif

}  // namespace perturbed
