// 16 lanes: AVX-512 F, DQ, BW and VL.
#pragma once

// GCC 12 warns about the deliberately undefined pass-through operands in its own intrinsics header.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include "noise/hd.h"

namespace perturbed::PERTURBED_ISA {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kChains = 2;  // parts drawn side by side: what the registers carry
  using F = __m512;                  // 16 floats
  using U = __m512i;                 // 16 words, or 8 words in the low halves of 64-bit lanes

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  template <int stride>
  static F load_strided(const float* p) {
    return _mm512_i32gather_ps(_mm512_mullo_epi32(iota(), _mm512_set1_epi32(stride)), p, 4);
  }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static U load_u(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_u(uint32_t* p, U a) { _mm512_storeu_si512(p, a); }
  static F set1(float a) { return _mm512_set1_ps(a); }
  static U set1_u(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static F zero() { return _mm512_setzero_ps(); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F from_int(U a) { return _mm512_cvtepi32_ps(a); }
  static F as_float(U a) { return _mm512_castsi512_ps(a); }
  static U as_bits(F a) { return _mm512_castps_si512(a); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }

  static U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
  static U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
  static U and_u(U a, U b) { return _mm512_and_si512(a, b); }
  static U or_u(U a, U b) { return _mm512_or_si512(a, b); }
  static U xor_u(U a, U b) { return _mm512_xor_si512(a, b); }
  static U xor3(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  // a ^ (b & c)
  static U xor_and(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x78); }
  // (a & b) | c
  static U and_or(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0xEA); }
  template <int k>
  static U shl(U a) {
    return _mm512_slli_epi32(a, k);
  }
  template <int k>
  static U shr(U a) {
    return _mm512_srli_epi32(a, k);
  }
  // Low words of the 64-bit lanes multiplied to 64 bits; high words of the lanes moved down.
  static U mul_wide(U a, U b) { return _mm512_mul_epu32(a, b); }
  static U high(U a) { return _mm512_srli_epi64(a, 32); }
  // Low words of a to the even, of b to the odd elements.
  static U merge_low(U a, U b) {
    return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, static_cast<_MM_PERM_ENUM>(0xA0));
  }

  // Element e = 4 l + k of an input vector belongs to block 4 k + l; out k holds blocks 4 k .. 4 k
  // + 3 column by column.
  static U block_order() {
    return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  }
  static U iota() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static void interleave(F (&z)[4]) {
    const F a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
    const F c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
    z[0] = _mm512_shuffle_ps(a, c, 0x44);
    z[1] = _mm512_shuffle_ps(a, c, 0xEE);
    z[2] = _mm512_shuffle_ps(b, d, 0x44);
    z[3] = _mm512_shuffle_ps(b, d, 0xEE);
  }

  // acc + (bit ? x : 0) for the 16 bits of part `part` (0 or 1) of a word.
  static F add_where(F acc, F x, const uint32_t* word, int part) {
    const __mmask16 mask = static_cast<__mmask16>(*word >> (16 * part));
    return _mm512_mask_add_ps(acc, mask, acc, x);
  }

  // The entries of a table of 16 that the low four bits of each element choose.
  static F lookup16(const float* table, U index) {
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
  }
};

}  // namespace perturbed::PERTURBED_ISA
