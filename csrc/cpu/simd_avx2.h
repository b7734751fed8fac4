// 8 lanes: AVX2 and FMA. Comments on the shared vocabulary are in simd_avx512.h.
#pragma once

#include <immintrin.h>

#include "noise/hd.h"

namespace perturbed::PERTURBED_ISA {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kChains = 2;  // parts drawn side by side: what the registers carry
  using F = __m256;
  using U = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  template <int stride>
  static F load_strided(const float* p) {
    return _mm256_i32gather_ps(p, _mm256_mullo_epi32(iota(), _mm256_set1_epi32(stride)), 4);
  }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static U load_u(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_u(uint32_t* p, U a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static F set1(float a) { return _mm256_set1_ps(a); }
  static U set1_u(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  static F zero() { return _mm256_setzero_ps(); }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F from_int(U a) { return _mm256_cvtepi32_ps(a); }
  static F as_float(U a) { return _mm256_castsi256_ps(a); }
  static U as_bits(F a) { return _mm256_castps_si256(a); }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  static U add_u(U a, U b) { return _mm256_add_epi32(a, b); }
  static U sub_u(U a, U b) { return _mm256_sub_epi32(a, b); }
  static U and_u(U a, U b) { return _mm256_and_si256(a, b); }
  static U or_u(U a, U b) { return _mm256_or_si256(a, b); }
  static U xor_u(U a, U b) { return _mm256_xor_si256(a, b); }
  static U xor3(U a, U b, U c) { return xor_u(xor_u(a, b), c); }
  static U xor_and(U a, U b, U c) { return xor_u(a, and_u(b, c)); }
  static U and_or(U a, U b, U c) { return or_u(and_u(a, b), c); }
  template <int k>
  static U shl(U a) {
    return _mm256_slli_epi32(a, k);
  }
  template <int k>
  static U shr(U a) {
    return _mm256_srli_epi32(a, k);
  }
  static U mul_wide(U a, U b) { return _mm256_mul_epu32(a, b); }
  static U high(U a) { return _mm256_srli_epi64(a, 32); }
  static U merge_low(U a, U b) {
    return _mm256_blend_epi32(a, _mm256_shuffle_epi32(b, 0xA0), 0xAA);
  }

  // Element e = 4 l + k belongs to block 2 k + l.
  static U block_order() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
  static U iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static void interleave(F (&z)[4]) {
    const F a = _mm256_unpacklo_ps(z[0], z[1]), b = _mm256_unpackhi_ps(z[0], z[1]);
    const F c = _mm256_unpacklo_ps(z[2], z[3]), d = _mm256_unpackhi_ps(z[2], z[3]);
    z[0] = _mm256_shuffle_ps(a, c, 0x44);
    z[1] = _mm256_shuffle_ps(a, c, 0xEE);
    z[2] = _mm256_shuffle_ps(b, d, 0x44);
    z[3] = _mm256_shuffle_ps(b, d, 0xEE);
  }

  // The 8 bits of part `part` (0 to 3) of a word.
  static F add_where(F acc, F x, const uint32_t* word, int part) {
    const U lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const U bits = _mm256_and_si256(set1_u(*word >> (8 * part)), lane);
    const F mask = as_float(_mm256_cmpeq_epi32(bits, lane));
    return _mm256_add_ps(acc, _mm256_and_ps(mask, x));
  }

  static F lookup16(const float* table, U index) {
    const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const F high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, as_float(shl<28>(index)));
  }
};

}  // namespace perturbed::PERTURBED_ISA
