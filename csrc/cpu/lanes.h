// Drawing noise in vector registers, written once over the vocabulary of a `Simd` struct
// (simd_*.h).
//
// Noise is drawn in batches of 16 blocks, kLanes blocks (a part) at a time. Philox works on 64-bit
// lanes (a 32 x 32 -> 64 bit product per lane), so kLanes counters fill two registers: even
// elements in `a`, odd ones in `b`. Only the low words of the 64-bit lanes mean anything between
// rounds.
#pragma once

#include PERTURBED_SIMD

// Arrays of registers stay in registers only if every loop over them is unrolled in its caller.
#define PT_INLINE static inline __attribute__((always_inline))
#define PT_UNROLL _Pragma("GCC unroll 16")

#include "cpu/kernels.h"
#include "noise/counters.h"
#include "noise/normal.h"

namespace perturbed::PERTURBED_ISA {

using F = Simd::F;
using U = Simd::U;
constexpr int kLanes = Simd::kLanes;
constexpr int kParts = kBatchBlocks / kLanes;  // register pairs per batch
constexpr int kChains = Simd::kChains;         // register pairs drawn side by side

// ---- Philox ------------------------------------------------------------------------------------

// What rounds 4 to 10 start from, for kLanes (block, direction) pairs: twice a PhiloxBlock.
struct Counters {
  U p0a, p0b, p1a, p1b;
};

PT_INLINE Counters prepare(const PhiloxLaunch& launch, U c1) {
  const U m0 = Simd::set1_u(kPhiloxM0), m1 = Simd::set1_u(kPhiloxM1);
  const U x = Simd::xor_u(c1, Simd::set1_u(launch.x1)), y = Simd::set1_u(launch.y2);
  Counters c;
  c.p0a = Simd::mul_wide(m0, x);
  c.p0b = Simd::mul_wide(m0, Simd::high(x));
  c.p1a = Simd::mul_wide(m1, Simd::xor_u(Simd::high(c.p0a), y));
  c.p1b = Simd::mul_wide(m1, Simd::xor_u(Simd::high(c.p0b), y));
  return c;
}

// The ith kLanes counters of prepared batches.
PT_INLINE Counters load_part(const PreparedBatch* batches, int64_t i) {
  const uint32_t* w = batches[i / kParts].words + 4 * kLanes * (i % kParts);
  return {Simd::load_u(w), Simd::load_u(w + kLanes), Simd::load_u(w + 2 * kLanes),
          Simd::load_u(w + 3 * kLanes)};
}

// Directions of the counters: one for all (`e`, `g`, `h` broadcast), or one per element.
struct Directions {
  U ea, eb, ga, gb, ha, hb;
};

PT_INLINE Directions broadcast(PhiloxDirection d) {
  const U e = Simd::set1_u(d.e), g = Simd::set1_u(d.g), h = Simd::set1_u(d.h);
  return {e, e, g, g, h, h};
}

// Words 0..3 of N * kLanes counters, element by element. N independent chains, written side by side
// because neither the compiler nor the processor's window interleaves them far enough by itself.
template <int N>
PT_INLINE void finish(const Counters (&c)[N], const Directions& d, const PhiloxLaunch& launch,
                      U (&w)[4][N]) {
  const U m0 = Simd::set1_u(kPhiloxM0), m1 = Simd::set1_u(kPhiloxM1);
  U x[2 * N], y[2 * N], c1[2 * N], c3[2 * N];
  PT_UNROLL for (int n = 0; n < N; ++n) {
    x[2 * n] = Simd::xor_u(Simd::high(c[n].p1a), d.ea);
    x[2 * n + 1] = Simd::xor_u(Simd::high(c[n].p1b), d.eb);
    y[2 * n] = Simd::xor_u(c[n].p0a, d.ga);
    y[2 * n + 1] = Simd::xor_u(c[n].p0b, d.gb);
    c1[2 * n] = c[n].p1a, c1[2 * n + 1] = c[n].p1b;
    c3[2 * n] = d.ha, c3[2 * n + 1] = d.hb;
  }
  PT_UNROLL for (int round = 3; round < kPhiloxRounds; ++round) {
    const PhiloxKey key = round_key(launch.key, static_cast<uint32_t>(round));
    const U k0 = Simd::set1_u(key.k0), k1 = Simd::set1_u(key.k1);
    PT_UNROLL for (int i = 0; i < 2 * N; ++i) {
      const U p0 = Simd::mul_wide(m0, x[i]), p1 = Simd::mul_wide(m1, y[i]);
      x[i] = Simd::xor3(Simd::high(p1), c1[i], k0);
      y[i] = Simd::xor3(Simd::high(p0), c3[i], k1);
      c1[i] = p1, c3[i] = p0;
    }
  }
  PT_UNROLL for (int n = 0; n < N; ++n) {
    w[0][n] = Simd::merge_low(x[2 * n], x[2 * n + 1]);
    w[1][n] = Simd::merge_low(c1[2 * n], c1[2 * n + 1]);
    w[2][n] = Simd::merge_low(y[2 * n], y[2 * n + 1]);
    w[3][n] = Simd::merge_low(c3[2 * n], c3[2 * n + 1]);
  }
}

// ---- normals -----------------------------------------------------------------------------------

// Box and Muller's radius and direction for N vectors of word pairs, twins of box_muller
// (noise/normal.h) operation by operation: z0 = radius * c, z1 = radius * s.
template <int N>
struct Polar {
  F radius[N], c[N], s[N];
};

template <int N>
PT_INLINE Polar<N> polar(const U (&w0)[N], const U (&w1)[N]) {
  namespace k = box_muller_constants;
  const U one = Simd::set1_u(0x3f800000u), sign = Simd::set1_u(0x80000000u);
  U exponent[N];
  F f[N], p[N], x[N], xx[N];
  Polar<N> out;
  PT_UNROLL for (int i = 0; i < N; ++i) {
    const U u = Simd::as_bits(Simd::sub(
        Simd::as_float(Simd::or_u(one, Simd::template shr<9>(w0[i]))), Simd::set1(0.99999994f)));
    exponent[i] = Simd::and_u(Simd::sub_u(u, Simd::set1_u(k::kTwoThirdsBits)),
                              Simd::set1_u(k::kExponentMask));
    f[i] = Simd::sub(Simd::as_float(Simd::sub_u(u, exponent[i])), Simd::set1(1.0f));
    p[i] = Simd::set1(k::kLog[8]);
  }
  PT_UNROLL for (int degree = 7; degree >= 0; --degree) {
    PT_UNROLL for (int i = 0; i < N; ++i) p[i] = Simd::fma(p[i], f[i], Simd::set1(k::kLog[degree]));
  }
  PT_UNROLL for (int i = 0; i < N; ++i) {
    const F scaled = Simd::mul(Simd::from_int(exponent[i]), Simd::set1(k::kExponentScale));
    const F r = Simd::sqrt(Simd::fma(p[i], f[i], scaled));
    out.radius[i] = Simd::as_float(Simd::xor_and(Simd::as_bits(r), w1[i], sign));
  }
  PT_UNROLL for (int i = 0; i < N; ++i) {
    const U fraction = Simd::and_or(Simd::template shr<8>(w1[i]), Simd::set1_u(k::kAngleMask), one);
    x[i] = Simd::sub(Simd::as_float(fraction), Simd::set1(1.5f));
    xx[i] = Simd::mul(x[i], x[i]);
    out.c[i] = Simd::set1(k::kSin[4]);
    out.s[i] = Simd::set1(k::kCos[4]);
  }
  PT_UNROLL for (int degree = 3; degree >= 0; --degree) {
    PT_UNROLL for (int i = 0; i < N; ++i) {
      out.c[i] = Simd::fma(out.c[i], xx[i], Simd::set1(k::kSin[degree]));
      out.s[i] = Simd::fma(out.s[i], xx[i], Simd::set1(k::kCos[degree]));
    }
  }
  PT_UNROLL for (int i = 0; i < N; ++i) out.c[i] = Simd::mul(out.c[i], x[i]);
  return out;
}

// Column j of the nth kLanes blocks in z[n][j].
template <int N>
PT_INLINE void draw_normals(const Counters (&c)[N], const Directions& d, const PhiloxLaunch& launch,
                            F (&z)[N][4]) {
  U w[4][N];
  finish(c, d, launch, w);
  PT_UNROLL for (int pair = 0; pair < 4; pair += 2) {
    const Polar<N> p = polar(w[pair], w[pair + 1]);
    PT_UNROLL for (int n = 0; n < N; ++n) {
      z[n][pair] = Simd::mul(p.radius[n], p.c[n]);
      z[n][pair + 1] = Simd::mul(p.radius[n], p.s[n]);
    }
  }
}

// sum[n][j] += weight * z[n][j], the weight folded into the radius.
template <int N>
PT_INLINE void add_normals(const Counters (&c)[N], const Directions& d, const PhiloxLaunch& launch,
                           F weight, F (&sum)[N][4]) {
  U w[4][N];
  finish(c, d, launch, w);
  PT_UNROLL for (int pair = 0; pair < 4; pair += 2) {
    const Polar<N> p = polar(w[pair], w[pair + 1]);
    PT_UNROLL for (int n = 0; n < N; ++n) {
      const F radius = Simd::mul(weight, p.radius[n]);
      sum[n][pair] = Simd::fma(radius, p.c[n], sum[n][pair]);
      sum[n][pair + 1] = Simd::fma(radius, p.s[n], sum[n][pair + 1]);
    }
  }
}

}  // namespace perturbed::PERTURBED_ISA
