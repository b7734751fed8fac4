// The CPU inner loops of cpu/kernels.h. Each isa_<name>.cpp includes this file under its own target
// and namespace and exports one table.
#pragma once

#include "cpu/isa_conv.h"
#include "cpu/isa_rows.h"
#include "cpu/isa_signs.h"
#include "cpu/isa_swarm.h"
#include "cpu/lanes.h"

namespace perturbed::PERTURBED_ISA {

// ---- preparing and drawing ---------------------------------------------------------------------

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

// The products of one row of E_d, never stored, with R rows of x in draw order, for one direction
// after the other (so that the key schedule and the broadcasts are paid once).
template <int R>
static void normal_dot_rows(const PhiloxLaunch& launch_in, const PreparedBatch* prepared,
                            int64_t batches, const PhiloxDirection* directions, int64_t count,
                            const float* x, int64_t x_direction_stride, int64_t x_stride,
                            float* out) {
  const PhiloxLaunch launch = launch_in;
  const int64_t parts = batches * kParts;
  for (int64_t n = 0; n < count; ++n, x += x_direction_stride, out += 4) {
    const Directions d = broadcast(directions[n]);
    F sum[R][2];
    PT_UNROLL for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Simd::zero();
    const auto multiply = [&](int64_t i, const F(&z)[4]) {
      const float* at = x + i / kParts * kBatchBlocks * 4 + i % kParts * kLanes;
      PT_UNROLL for (int r = 0; r < R; ++r) {
        PT_UNROLL for (int j = 0; j < 4; ++j) {
          const F value = Simd::load(at + r * x_stride + j * kBatchBlocks);
          sum[r][j % 2] = Simd::fma(z[j], value, sum[r][j % 2]);
        }
      }
    };
    int64_t i = 0;
    for (; i + kChains <= parts; i += kChains) {
      Counters c[kChains];
      PT_UNROLL for (int k = 0; k < kChains; ++k) c[k] = load_part(prepared, i + k);
      F z[kChains][4];
      draw_normals(c, d, launch, z);
      PT_UNROLL for (int k = 0; k < kChains; ++k) multiply(i + k, z[k]);
    }
    for (; i < parts; ++i) {
      const Counters c[1] = {load_part(prepared, i)};
      F z[1][4];
      draw_normals(c, d, launch, z);
      multiply(i, z[0]);
    }
    for (int r = 0; r < R; ++r) out[r] = Simd::sum(Simd::add(sum[r][0], sum[r][1]));
  }
}

static void normal_dot(const PhiloxLaunch& launch, const PreparedBatch* prepared, int64_t batches,
                       const PhiloxDirection* directions, int64_t count, const float* x,
                       int64_t x_direction_stride, int64_t x_stride, int64_t rows, float* out) {
  const auto of_rows = rows == 1   ? normal_dot_rows<1>
                       : rows == 2 ? normal_dot_rows<2>
                       : rows == 3 ? normal_dot_rows<3>
                                   : normal_dot_rows<4>;
  of_rows(launch, prepared, batches, directions, count, x, x_direction_stride, x_stride, out);
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
          row_tables,
          lookup_rows,
          half_sums,
          sign_table,
          sign_lookup,
          add_column,
          normal_estimate,
          normal_estimate_double,
          sign_estimate,
          sign_estimate_double,
          add_rows,
          add_rows_double,
          permutation,
          flip_signs,
          flip_signs_half,
          flip_signs_double,
          element_words,
          swarm_move,
          swarm_move_double,
          conv_panel,
          conv_transpose};
}

}  // namespace perturbed::PERTURBED_ISA
