// The CPU inner loops of the families that work on whole rows: sums of noise rows, permutations and
// signs. Part of isa.h.
#pragma once

#include "cpu/lanes.h"
#include "noise/permutation.h"

namespace perturbed::PERTURBED_ISA {

// The sum is complete before y joins it: y is rounded once, and -coefficients give -(sum).
template <int N>
PT_INLINE void add_rows_at(float* y, const float* noise, int64_t stride, const float* coefficients,
                           int64_t count) {
  F sum[N];
  PT_UNROLL for (int v = 0; v < N; ++v) sum[v] = Simd::zero();
  for (int64_t k = 0; k < count; ++k) {
    const F c = Simd::set1(coefficients[k]);
    PT_UNROLL for (int v = 0; v < N; ++v) {
      sum[v] = Simd::fma(c, Simd::load(noise + k * stride + v * kLanes), sum[v]);
    }
  }
  PT_UNROLL for (int v = 0; v < N; ++v) {
    Simd::store(y + v * kLanes, Simd::add(Simd::load(y + v * kLanes), sum[v]));
  }
}

static void add_rows(float* y, const float* noise, int64_t stride, const float* coefficients,
                     int64_t count, int64_t n) {
  constexpr int kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= n; i += kVectors * kLanes) {
    add_rows_at<kVectors>(y + i, noise + i, stride, coefficients, count);
  }
  for (; i + kLanes <= n; i += kLanes) {
    add_rows_at<1>(y + i, noise + i, stride, coefficients, count);
  }
  for (; i < n; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      sum = exact_fma(coefficients[k], noise[k * stride + i], sum);
    }
    y[i] += sum;
  }
}

static void add_rows_double(double* y, const float* noise, int64_t stride,
                            const double* coefficients, int64_t count, int64_t n) {
  constexpr int64_t kGroup = 16;
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t here = n - i < kGroup ? n - i : kGroup;
    double sum[kGroup] = {};
    for (int64_t k = 0; k < count; ++k) {
      const float* row = noise + k * stride + i;
      for (int64_t l = 0; l < here; ++l) sum[l] += coefficients[k] * row[l];
    }
    for (int64_t l = 0; l < here; ++l) y[i + l] += sum[l];
  }
}

// A group of entries takes the same step at a time, which the compiler turns into vector code; those
// that are below `size` already stay.
static void permutation(const PermutationShape& shape_in, const PermutationKey& key_in,
                        uint32_t first, int64_t count, uint32_t* out) {
  constexpr int kGroup = 32;
  const PermutationShape shape = shape_in;
  const PermutationKey key = key_in;
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t here = count - i < kGroup ? count - i : kGroup;
    uint32_t value[kGroup];
    for (int l = 0; l < kGroup; ++l) {
      const uint32_t entry = first + static_cast<uint32_t>(i) + static_cast<uint32_t>(l);
      value[l] = permutation_step(shape, key, entry);
      if (l >= here) value[l] = 0;  // nobody waits for entries that are not asked for
    }
    for (;;) {
      uint32_t beyond = 0;
      for (int l = 0; l < kGroup; ++l) beyond |= value[l] >= shape.size ? 1u : 0u;
      if (!beyond) break;
      for (int l = 0; l < kGroup; ++l) {
        const uint32_t next = permutation_step(shape, key, value[l]);
        value[l] = value[l] >= shape.size ? next : value[l];
      }
    }
    std::memcpy(out + i, value, static_cast<size_t>(here) * sizeof(uint32_t));
  }
}

static void flip_signs(const uint32_t* bits, bool negate, const float* x, int64_t n, float* out) {
  const uint32_t clear = negate ? 0u : 0x80000000u;  // what a clear bit flips
  for (int64_t i = 0; i < n; i += 32) {
    const uint32_t word = bits[i / 32];
    const int here = static_cast<int>(n - i < 32 ? n - i : 32);
    for (int c = 0; c < here; ++c) {
      const uint32_t sign = (word >> c << 31) ^ clear;
      out[i + c] = float_from_bits(bits_from_float(x[i + c]) ^ sign);
    }
  }
}

}  // namespace perturbed::PERTURBED_ISA
