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
#define PT_UNROLL _Pragma("GCC unroll 16")
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

static void prepare_linear(const PhiloxLaunch& launch, uint32_t first_block, int64_t batches,
                           PreparedBatch* out) {
  prepare_batches(launch, Simd::iota(), first_block, batches, out);
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

static void normals(const PhiloxLaunch& launch_in, const PreparedBatch* prepared, int64_t batches,
                    PhiloxDirection direction, float* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  const int64_t parts = batches * kParts;
  int64_t i = 0;
  for (; i + kChains <= parts; i += kChains) {
    Counters c[kChains];
    PT_UNROLL for (int n = 0; n < kChains; ++n) c[n] = load_part(prepared, i + n);
    F z[kChains][4];
    draw_normals(c, d, launch, z);
    PT_UNROLL for (int n = 0; n < kChains; ++n) {
      Simd::interleave(z[n]);
      PT_UNROLL for (int k = 0; k < 4; ++k) Simd::store(out + kLanes * (4 * (i + n) + k), z[n][k]);
    }
  }
  for (; i < parts; ++i) {
    const Counters c[1] = {load_part(prepared, i)};
    F z[1][4];
    draw_normals(c, d, launch, z);
    Simd::interleave(z[0]);
    PT_UNROLL for (int k = 0; k < 4; ++k) Simd::store(out + kLanes * (4 * i + k), z[0][k]);
  }
}

// The products of one row of E_d, never stored, with R rows of x in draw order.
template <int R>
static void normal_dot_rows(const PhiloxLaunch& launch_in, const PreparedBatch* prepared,
                            int64_t batches, PhiloxDirection direction, const float* x,
                            int64_t x_stride, float* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  F sum[R][2];
  for (auto& row : sum) row[0] = row[1] = Simd::zero();
  const auto multiply = [&](int64_t i, const F(&z)[4]) {
    const float* at = x + i / kParts * kBatchBlocks * 4 + i % kParts * kLanes;
    PT_UNROLL for (int r = 0; r < R; ++r) {
      PT_UNROLL for (int j = 0; j < 4; ++j) {
        const F value = Simd::load(at + r * x_stride + j * kBatchBlocks);
        sum[r][j % 2] = Simd::fma(z[j], value, sum[r][j % 2]);
      }
    }
  };
  const int64_t parts = batches * kParts;
  int64_t i = 0;
  for (; i + kChains <= parts; i += kChains) {
    Counters c[kChains];
    PT_UNROLL for (int n = 0; n < kChains; ++n) c[n] = load_part(prepared, i + n);
    F z[kChains][4];
    draw_normals(c, d, launch, z);
    PT_UNROLL for (int n = 0; n < kChains; ++n) multiply(i + n, z[n]);
  }
  for (; i < parts; ++i) {
    const Counters c[1] = {load_part(prepared, i)};
    F z[1][4];
    draw_normals(c, d, launch, z);
    multiply(i, z[0]);
  }
  for (int r = 0; r < R; ++r) out[r] = Simd::sum(Simd::add(sum[r][0], sum[r][1]));
}

static void normal_dot(const PhiloxLaunch& launch, const PreparedBatch* prepared, int64_t batches,
                       PhiloxDirection direction, const float* x, int64_t x_stride, int64_t rows,
                       float* out) {
  switch (rows) {
    case 1:
      return normal_dot_rows<1>(launch, prepared, batches, direction, x, x_stride, out);
    case 2:
      return normal_dot_rows<2>(launch, prepared, batches, direction, x, x_stride, out);
    case 3:
      return normal_dot_rows<3>(launch, prepared, batches, direction, x, x_stride, out);
    default:
      return normal_dot_rows<4>(launch, prepared, batches, direction, x, x_stride, out);
  }
}

constexpr int kEstimateParts = 2 * kParts;  // an estimate covers two batches

static void normal_estimate(const PhiloxLaunch& launch_in, const PreparedBatch* prepared,
                            const PhiloxDirection* directions, const float* w, int64_t count,
                            float* out) {
  const PhiloxLaunch launch = launch_in;
  for (int part = 0; part < kEstimateParts; part += kChains) {
    Counters c[kChains];
    F sum[kChains][4];
    PT_UNROLL for (int n = 0; n < kChains; ++n) {
      c[n] = load_part(prepared, part + n);
      PT_UNROLL for (int j = 0; j < 4; ++j) sum[n][j] = Simd::zero();
    }
    for (int64_t i = 0; i < count; ++i) {
      add_normals(c, broadcast(directions[i]), launch, Simd::set1(w[i]), sum);
    }
    PT_UNROLL for (int n = 0; n < kChains; ++n) {
      Simd::interleave(sum[n]);
      PT_UNROLL for (int k = 0; k < 4; ++k) {
        Simd::store(out + kLanes * (4 * (part + n) + k), sum[n][k]);
      }
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
      const Counters c[1] = {load_part(prepared, i * kParts + part)};
      U w[4][1];
      finish(c, d, launch, w);
      for (int j = 0; j < 4; ++j) Simd::store_u(out + j * stride, w[j][0]);
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
  const Counters c[1] = {broadcast_block(launch, block)};
  F sum[kSignBlockRows][kVectors];
  for (auto& row : sum) {
    for (F& value : row) value = Simd::zero();
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    U words[4][1];
    finish(c, load_directions(directions, i), launch, words);
    alignas(64) uint32_t bits[4][kLanes];
    for (int j = 0; j < 4; ++j) Simd::store_u(bits[j], words[j][0]);
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
  const Counters c[1] = {broadcast_block(launch, block)};
  for (int64_t i = 0; i < count; i += kLanes) {
    U words[4][1];
    finish(c, load_directions(directions, i), launch, words);
    uint32_t bits[4][kLanes];
    for (int j = 0; j < 4; ++j) Simd::store_u(bits[j], words[j][0]);
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
          prepare_linear,
          normals,
          normal_dot,
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
