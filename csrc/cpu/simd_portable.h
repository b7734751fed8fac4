// 4 lanes of plain C++, for every processor. Slow and simple: the contract's operations one by one.
#pragma once

#include "noise/hd.h"

namespace perturbed::PERTURBED_ISA {

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kChains = 1;
  struct F {
    float v[4];
  };
  struct U {
    uint32_t v[4];
  };

  template <class R, class Op>
  static R each(Op op) {
    R r;
    for (int i = 0; i < 4; ++i) r.v[i] = op(i);
    return r;
  }

  static F load(const float* p) {
    return each<F>([&](int i) { return p[i]; });
  }
  template <int stride>
  static F load_strided(const float* p) {
    return each<F>([&](int i) { return p[i * stride]; });
  }
  static void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
  static U load_u(const uint32_t* p) {
    return each<U>([&](int i) { return p[i]; });
  }
  static void store_u(uint32_t* p, U a) { std::memcpy(p, a.v, sizeof(a.v)); }
  static F set1(float a) {
    return each<F>([&](int) { return a; });
  }
  static U set1_u(uint32_t a) {
    return each<U>([&](int) { return a; });
  }
  static F zero() { return set1(0.0f); }

  static F add(F a, F b) {
    return each<F>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each<F>([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each<F>([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F fma(F a, F b, F c) {
    return each<F>([&](int i) { return exact_fma(a.v[i], b.v[i], c.v[i]); });
  }
  static F sqrt(F a) {
    return each<F>([&](int i) { return exact_sqrt(a.v[i]); });
  }
  static F from_int(U a) {
    return each<F>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
  }
  static F as_float(U a) {
    return each<F>([&](int i) { return float_from_bits(a.v[i]); });
  }
  static U as_bits(F a) {
    return each<U>([&](int i) { return bits_from_float(a.v[i]); });
  }
  static float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

  static U add_u(U a, U b) {
    return each<U>([&](int i) { return a.v[i] + b.v[i]; });
  }
  static U sub_u(U a, U b) {
    return each<U>([&](int i) { return a.v[i] - b.v[i]; });
  }
  static U and_u(U a, U b) {
    return each<U>([&](int i) { return a.v[i] & b.v[i]; });
  }
  static U or_u(U a, U b) {
    return each<U>([&](int i) { return a.v[i] | b.v[i]; });
  }
  static U xor_u(U a, U b) {
    return each<U>([&](int i) { return a.v[i] ^ b.v[i]; });
  }
  static U xor3(U a, U b, U c) { return xor_u(xor_u(a, b), c); }
  static U xor_and(U a, U b, U c) { return xor_u(a, and_u(b, c)); }
  static U and_or(U a, U b, U c) { return or_u(and_u(a, b), c); }
  template <int k>
  static U shl(U a) {
    return each<U>([&](int i) { return a.v[i] << k; });
  }
  template <int k>
  static U shr(U a) {
    return each<U>([&](int i) { return a.v[i] >> k; });
  }
  // 64-bit lanes: elements (0, 1) and (2, 3), low word first.
  static U mul_wide(U a, U b) {
    const uint64_t p = static_cast<uint64_t>(a.v[0]) * b.v[0];
    const uint64_t q = static_cast<uint64_t>(a.v[2]) * b.v[2];
    return {{static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), static_cast<uint32_t>(q),
             static_cast<uint32_t>(q >> 32)}};
  }
  static U high(U a) { return {{a.v[1], 0, a.v[3], 0}}; }
  static U merge_low(U a, U b) { return {{a.v[0], b.v[0], a.v[2], b.v[2]}}; }

  static U block_order() { return {{0, 1, 2, 3}}; }
  static U iota() { return {{0, 1, 2, 3}}; }
  static void interleave(F (&z)[4]) {
    F t[4];
    for (int k = 0; k < 4; ++k) {
      for (int j = 0; j < 4; ++j) t[k].v[j] = z[j].v[k];
    }
    for (int k = 0; k < 4; ++k) z[k] = t[k];
  }

  // The 4 bits of part `part` (0 to 7) of a word.
  static F add_where(F acc, F x, const uint32_t* word, int part) {
    const uint32_t bits = *word >> (4 * part);
    return each<F>([&](int i) { return bits >> i & 1u ? acc.v[i] + x.v[i] : acc.v[i]; });
  }

  static F lookup16(const float* table, U index) {
    return each<F>([&](int i) { return table[index.v[i] & 15u]; });
  }
};

}  // namespace perturbed::PERTURBED_ISA
