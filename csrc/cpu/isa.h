// The CPU inner loops, written once over the vocabulary of a `Simd` struct (simd_*.h). Each
// isa_<name>.cpp includes this file under its own target and namespace and exports one table.
//
// Noise is drawn in batches of 16 blocks, kLanes blocks at a time. Philox works on 64-bit lanes (a
// 32 x 32 -> 64 bit product per lane), so kLanes counters fill two registers: even elements in `a`,
// odd ones in `b`. Only the low words of the 64-bit lanes mean anything between rounds.
#pragma once

#include PERTURBED_SIMD

#include "cpu/kernels.h"
#include "noise/counters.h"
#include "noise/normal.h"

namespace perturbed::PERTURBED_ISA {

using F = Simd::F;
using U = Simd::U;
constexpr int kLanes = Simd::kLanes;
#define PT_INLINE static inline __attribute__((always_inline))
constexpr int kParts = kBatchBlocks / kLanes;  // register pairs per batch

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

PT_INLINE Counters load_prepared(const PreparedBatch& batch, int part) {
  const uint32_t* w = batch.words + 4 * kLanes * part;
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

// Words 0..3 of kLanes counters, element by element.
PT_INLINE void finish(const Counters& c, const Directions& d, const PhiloxLaunch& launch,
                      U (&w)[4]) {
  const U m0 = Simd::set1_u(kPhiloxM0), m1 = Simd::set1_u(kPhiloxM1);
  U xa = Simd::xor_u(Simd::high(c.p1a), d.ea), xb = Simd::xor_u(Simd::high(c.p1b), d.eb);
  U ya = Simd::xor_u(c.p0a, d.ga), yb = Simd::xor_u(c.p0b, d.gb);
  U c1a = c.p1a, c1b = c.p1b, c3a = d.ha, c3b = d.hb;
#pragma GCC unroll 7
  for (int round = 3; round < kPhiloxRounds; ++round) {
    const PhiloxKey key = round_key(launch.key, static_cast<uint32_t>(round));
    const U k0 = Simd::set1_u(key.k0), k1 = Simd::set1_u(key.k1);
    const U p0a = Simd::mul_wide(m0, xa), p1a = Simd::mul_wide(m1, ya);
    const U p0b = Simd::mul_wide(m0, xb), p1b = Simd::mul_wide(m1, yb);
    xa = Simd::xor3(Simd::high(p1a), c1a, k0);
    xb = Simd::xor3(Simd::high(p1b), c1b, k0);
    ya = Simd::xor3(Simd::high(p0a), c3a, k1);
    yb = Simd::xor3(Simd::high(p0b), c3b, k1);
    c1a = p1a, c1b = p1b, c3a = p0a, c3b = p0b;
  }
  w[0] = Simd::merge_low(xa, xb);
  w[1] = Simd::merge_low(c1a, c1b);
  w[2] = Simd::merge_low(ya, yb);
  w[3] = Simd::merge_low(c3a, c3b);
}

static void prepare_batches(const PhiloxLaunch& launch, U order, uint32_t first_block,
                            int64_t batches, PreparedBatch* out) {
  for (int64_t i = 0; i < batches; ++i) {
    for (int part = 0; part < kParts; ++part) {
      const uint32_t base = first_block + static_cast<uint32_t>(i * kBatchBlocks) +
                            static_cast<uint32_t>(part * kLanes);
      const Counters c = prepare(launch, Simd::add_u(order, Simd::set1_u(base)));
      uint32_t* w = out[i].words + 4 * kLanes * part;
      Simd::store_u(w, c.p0a);
      Simd::store_u(w + kLanes, c.p0b);
      Simd::store_u(w + 2 * kLanes, c.p1a);
      Simd::store_u(w + 3 * kLanes, c.p1b);
    }
  }
}

static void prepare_normal(const PhiloxLaunch& launch, uint32_t first_block, int64_t batches,
                           PreparedBatch* out) {
  prepare_batches(launch, Simd::block_order(), first_block, batches, out);
}

static void prepare_sign(const PhiloxLaunch& launch, uint32_t first_block, int64_t batches,
                         PreparedBatch* out) {
  prepare_batches(launch, Simd::iota(), first_block, batches, out);
}

// ---- normals -----------------------------------------------------------------------------------

// Twin of box_muller (noise/normal.h), operation by operation.
PT_INLINE void box_muller_lanes(U w0, U w1, F* z0, F* z1) {
  namespace c = box_muller_constants;
  const U one = Simd::set1_u(0x3f800000u);
  const U u = Simd::as_bits(Simd::sub(Simd::as_float(Simd::or_u(one, Simd::template shr<9>(w0))),
                                      Simd::set1(0.99999994f)));
  const U exponent =
      Simd::and_u(Simd::sub_u(u, Simd::set1_u(c::kTwoThirdsBits)), Simd::set1_u(c::kExponentMask));
  const F f = Simd::sub(Simd::as_float(Simd::sub_u(u, exponent)), Simd::set1(1.0f));
  F p = Simd::set1(c::kLog[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = Simd::fma(p, f, Simd::set1(c::kLog[i]));
  const F scaled = Simd::mul(Simd::from_int(exponent), Simd::set1(c::kExponentScale));
  const F r = Simd::sqrt(Simd::fma(p, f, scaled));

  const U fraction = Simd::and_or(Simd::template shr<8>(w1), Simd::set1_u(c::kAngleMask), one);
  const F x = Simd::sub(Simd::as_float(fraction), Simd::set1(1.5f));
  const F xx = Simd::mul(x, x);
  F s = Simd::set1(c::kSin[4]), k = Simd::set1(c::kCos[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) {
    s = Simd::fma(s, xx, Simd::set1(c::kSin[i]));
    k = Simd::fma(k, xx, Simd::set1(c::kCos[i]));
  }
  const F signed_r = Simd::as_float(Simd::xor_and(Simd::as_bits(r), w1, Simd::set1_u(0x80000000u)));
  *z0 = Simd::mul(signed_r, Simd::mul(s, x));
  *z1 = Simd::mul(signed_r, k);
}

// Column j of kLanes blocks in z[j].
PT_INLINE void draw_normals(const Counters& c, const Directions& d, const PhiloxLaunch& launch,
                            F (&z)[4]) {
  U w[4];
  finish(c, d, launch, w);
  box_muller_lanes(w[0], w[1], &z[0], &z[1]);
  box_muller_lanes(w[2], w[3], &z[2], &z[3]);
}

static void normals(const PhiloxLaunch& launch_in, const PreparedBatch* prepared, int64_t batches,
                    PhiloxDirection direction, float* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  for (int64_t i = 0; i < batches; ++i) {
    for (int part = 0; part < kParts; ++part) {
      F z[4];
      draw_normals(load_prepared(prepared[i], part), d, launch, z);
      Simd::interleave(z);
      for (int k = 0; k < 4; ++k) Simd::store(out + kLanes * k, z[k]);
      out += 4 * kLanes;
    }
  }
}

constexpr int kEstimateParts = 2 * kParts;  // an estimate covers two batches

static void normal_estimate(const PhiloxLaunch& launch_in, const PreparedBatch* prepared,
                            const PhiloxDirection* directions, const float* w, int64_t count,
                            float* out) {
  const PhiloxLaunch launch = launch_in;
  // Two register pairs at a time: as many independent chains as the registers of AVX-512 hold.
  for (int part = 0; part < kEstimateParts; part += 2) {
    const Counters c0 = load_prepared(prepared[part / kParts], part % kParts);
    const Counters c1 = load_prepared(prepared[(part + 1) / kParts], (part + 1) % kParts);
    F sum0[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    F sum1[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    for (int64_t i = 0; i < count; ++i) {
      const Directions d = broadcast(directions[i]);
      const F weight = Simd::set1(w[i]);
      F z0[4], z1[4];
      draw_normals(c0, d, launch, z0);
      draw_normals(c1, d, launch, z1);
      for (int j = 0; j < 4; ++j) {
        sum0[j] = Simd::fma(weight, z0[j], sum0[j]);
        sum1[j] = Simd::fma(weight, z1[j], sum1[j]);
      }
    }
    Simd::interleave(sum0);
    Simd::interleave(sum1);
    for (int k = 0; k < 4; ++k) {
      Simd::store(out + 4 * kLanes * part + kLanes * k, sum0[k]);
      Simd::store(out + 4 * kLanes * (part + 1) + kLanes * k, sum1[k]);
    }
  }
}

static void normal_estimate_double(const PhiloxLaunch& launch, const PreparedBatch* prepared,
                                   const PhiloxDirection* directions, const double* w,
                                   int64_t count, double* out) {
  constexpr int kElements = 2 * kBatchBlocks * 4;
  double sum[kElements] = {};
  float z[kElements];
  for (int64_t i = 0; i < count; ++i) {
    normals(launch, prepared, 2, directions[i], z);
    for (int k = 0; k < kElements; ++k) sum[k] += w[i] * z[k];
  }
  std::memcpy(out, sum, sizeof(sum));
}

// ---- signs -------------------------------------------------------------------------------------

static void sign_bits(const PhiloxLaunch& launch_in, const PreparedBatch* prepared, int64_t batches,
                      PhiloxDirection direction, int64_t stride, uint32_t* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  for (int64_t i = 0; i < batches; ++i) {
    for (int part = 0; part < kParts; ++part) {
      U w[4];
      finish(load_prepared(prepared[i], part), d, launch, w);
      for (int j = 0; j < 4; ++j) Simd::store_u(out + j * stride, w[j]);
      out += kLanes;
    }
  }
}

// The loop runs over directions here, so the counters' roles swap: one block for all elements,
// kLanes directions beside each other.
PT_INLINE Directions load_directions(DirectionArrays d, int64_t i) {
  const U e = Simd::load_u(d.e + i), g = Simd::load_u(d.g + i), h = Simd::load_u(d.h + i);
  return {e, Simd::high(e), g, Simd::high(g), h, Simd::high(h)};
}

PT_INLINE Counters broadcast_block(const PhiloxLaunch& launch, uint32_t block) {
  return prepare(launch, Simd::set1_u(block));
}

static void sign_estimate(const PhiloxLaunch& launch_in, uint32_t block, DirectionArrays directions,
                          const float* w, int64_t count, float* out) {
  constexpr int kVectors = kSignBlockCols / kLanes;
  const PhiloxLaunch launch = launch_in;
  const Counters c = broadcast_block(launch, block);
  F sum[kSignBlockRows][kVectors];
  for (auto& row : sum) {
    for (F& value : row) value = Simd::zero();
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    U words[4];
    finish(c, load_directions(directions, i), launch, words);
    alignas(64) uint32_t bits[4][kLanes];
    for (int j = 0; j < 4; ++j) Simd::store_u(bits[j], words[j]);
    const int here = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    for (int k = 0; k < here; ++k) {
      const F weight = Simd::set1(w[i + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kSignBlockRows; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum[j][v] = Simd::add_where(sum[j][v], weight, &bits[j][k], v);
        }
      }
    }
  }
  for (int j = 0; j < kSignBlockRows; ++j) {
    for (int v = 0; v < kVectors; ++v)
      Simd::store(out + kSignBlockCols * j + kLanes * v, sum[j][v]);
  }
}

static void sign_estimate_double(const PhiloxLaunch& launch, uint32_t block,
                                 DirectionArrays directions, const double* w, int64_t count,
                                 double* out) {
  double sum[kSignBlockRows * kSignBlockCols] = {};
  const Counters c = broadcast_block(launch, block);
  for (int64_t i = 0; i < count; i += kLanes) {
    U words[4];
    finish(c, load_directions(directions, i), launch, words);
    uint32_t bits[4][kLanes];
    for (int j = 0; j < 4; ++j) Simd::store_u(bits[j], words[j]);
    const int here = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    for (int k = 0; k < here; ++k) {
      for (int j = 0; j < kSignBlockRows; ++j) {
        for (int b = 0; b < kSignBlockCols; ++b) {
          sum[kSignBlockCols * j + b] += bits[j][k] >> b & 1u ? w[i + k] : 0.0;
        }
      }
    }
  }
  std::memcpy(out, sum, sizeof(sum));
}

// ---- dot products ------------------------------------------------------------------------------

template <int R>
static void dot_rows(const float* e, const float* x, int64_t x_stride, int64_t n, float* out) {
  constexpr int kChains = kRowPadding / kLanes < 4 ? kRowPadding / kLanes : 4;
  F sum[R][kChains];
  for (auto& row : sum) {
    for (F& value : row) value = Simd::zero();
  }
  for (int64_t i = 0; i < n; i += kLanes * kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const F noise = Simd::load(e + i + kLanes * c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sum[r][c] = Simd::fma(noise, Simd::load(x + r * x_stride + i + kLanes * c), sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    F total = sum[r][0];
    for (int c = 1; c < kChains; ++c) total = Simd::add(total, sum[r][c]);
    out[r] = Simd::sum(total);
  }
}

static void dot(const float* e, const float* x, int64_t x_stride, int64_t rows, int64_t n,
                float* out) {
  for (; rows >= 4; rows -= 4, x += 4 * x_stride, out += 4) dot_rows<4>(e, x, x_stride, n, out);
  if (rows == 3) dot_rows<3>(e, x, x_stride, n, out);
  if (rows == 2) dot_rows<2>(e, x, x_stride, n, out);
  if (rows == 1) dot_rows<1>(e, x, x_stride, n, out);
}

static void dot_double(const float* e, const double* x, int64_t x_stride, int64_t rows, int64_t n,
                       double* out) {
  constexpr int kChains = 8;
  for (int64_t r = 0; r < rows; ++r, x += x_stride) {
    double sum[kChains] = {};
    for (int64_t i = 0; i < n; i += kChains) {
      for (int c = 0; c < kChains; ++c) sum[c] += x[i + c] * e[i + c];
    }
    out[r] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }
}

template <int R>
static void bit_sum_rows(const uint32_t* bits, int64_t bits_stride, const float* x,
                         int64_t x_stride, int64_t n, float* out) {
  constexpr int kVectors = 32 / kLanes;
  F sum[R][4];
  for (auto& row : sum) {
    for (F& value : row) value = Simd::zero();
  }
  for (int64_t word = 0; word < n / 32; ++word) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F value = Simd::load(x + r * x_stride + 32 * word + kLanes * v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sum[r][j] = Simd::add_where(sum[r][j], value, bits + j * bits_stride + word, v);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 4; ++j) out[4 * r + j] = Simd::sum(sum[r][j]);
  }
}

static void bit_sum(const uint32_t* bits, int64_t bits_stride, const float* x, int64_t x_stride,
                    int64_t rows, int64_t n, float* out) {
  for (; rows >= 2; rows -= 2, x += 2 * x_stride, out += 8) {
    bit_sum_rows<2>(bits, bits_stride, x, x_stride, n, out);
  }
  if (rows == 1) bit_sum_rows<1>(bits, bits_stride, x, x_stride, n, out);
}

static void bit_sum_double(const uint32_t* bits, int64_t bits_stride, const double* x,
                           int64_t x_stride, int64_t rows, int64_t n, double* out) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride) {
    for (int j = 0; j < 4; ++j) {
      double sum[8] = {};
      for (int64_t i = 0; i < n; i += 8) {
        const uint32_t byte = bits[j * bits_stride + i / 32] >> (i % 32);
        for (int c = 0; c < 8; ++c) sum[c] += byte >> c & 1u ? x[i + c] : 0.0;
      }
      out[4 * r + j] =
          ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
  }
}

static constexpr CpuKernels table(const char* name) {
  return {name,
          prepare_normal,
          prepare_sign,
          normals,
          sign_bits,
          dot,
          dot_double,
          bit_sum,
          bit_sum_double,
          normal_estimate,
          normal_estimate_double,
          sign_estimate,
          sign_estimate_double};
}

}  // namespace perturbed::PERTURBED_ISA
