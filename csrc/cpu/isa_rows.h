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

constexpr int kPermutationGroup = 16;   // entries that take a step side by side
constexpr int kPermutationBlock = 256;  // entries whose walks are followed together

// One step of the first `count` values, and of some behind them; a form that compilers turn into
// vector code.
PT_INLINE void permutation_steps(const PermutationShape& shape, const PermutationKey& key,
                                 int count, uint32_t* values) {
  for (int k = 0; k < count; k += kPermutationGroup) {
    uint32_t group[kPermutationGroup];
    std::memcpy(group, values + k, sizeof(group));
    for (uint32_t& value : group) value = permutation_step(shape, key, value);
    std::memcpy(values + k, group, sizeof(group));
  }
}

// The smallest network, by a table of all its values: a small size walks long, 256 / size steps, and
// step after step of so few entries would wait for its own latency.
static void permutation_by_table(const PermutationShape& shape, const PermutationKey& key,
                                 uint32_t first, int64_t count, uint32_t* out) {
  constexpr int kValues = 1 << kPermutationMinBits;
  uint32_t next[kValues];
  for (int v = 0; v < kValues; ++v) next[v] = static_cast<uint32_t>(v);
  permutation_steps(shape, key, kValues, next);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t value = next[first + static_cast<uint32_t>(i)];
    while (value >= shape.size) value = next[value];
    out[i] = value;
  }
}

// Entries that walk on are collected before each further step: a vector that waits for the longest
// walk of its lanes would take two to three times the average number of steps.
static void permutation(const PermutationShape& shape_in, const PermutationKey& key_in,
                        uint32_t first, int64_t count, uint32_t* out) {
  const PermutationShape shape = shape_in;
  const PermutationKey key = key_in;
  const int bits = shape.low + shape.high;
  const bool walks = uint64_t{shape.size} >> bits == 0;
  // Walks take 2^bits / size steps on average, so all entries together 2^bits.
  if (walks && bits == kPermutationMinBits && 4 * count >= shape.size) {
    return permutation_by_table(shape, key, first, count, out);
  }
  uint32_t value[kPermutationBlock], walk[kPermutationBlock] = {};
  uint32_t where[kPermutationBlock];
  for (int64_t i = 0; i < count; i += kPermutationBlock, first += kPermutationBlock) {
    const int here =
        static_cast<int>(count - i < kPermutationBlock ? count - i : kPermutationBlock);
    for (int l = 0; l < kPermutationBlock; ++l) value[l] = first + static_cast<uint32_t>(l);
    permutation_steps(shape, key, here, value);
    int walking = 0;
    for (int l = 0; walks && l < here; ++l) {
      where[walking] = static_cast<uint32_t>(l);
      walking += value[l] >= shape.size;
    }
    while (walking > 0) {
      for (int k = 0; k < walking; ++k) walk[k] = value[where[k]];
      permutation_steps(shape, key, walking, walk);
      int still = 0;
      for (int k = 0; k < walking; ++k) {
        value[where[k]] = walk[k];
        where[still] = where[k];
        still += walk[k] >= shape.size;
      }
      walking = still;
    }
    std::memcpy(out + i, value, static_cast<size_t>(here) * sizeof(uint32_t));
  }
}

// The sign bit of x, flipped for a clear bit (for a set one if `negate`). On words W of the size of T,
// so that every value keeps its other bits, and in the compiler's own vectors: of a plain loop it
// unrolls the 16-bit form and leaves the 64-bit one scalar.
template <class W, class T>
PT_INLINE void flip_words(const uint32_t* bits, bool negate, const T* x, int64_t n, T* out) {
  static_assert(sizeof(W) == sizeof(T));
  constexpr int kVectorBytes = 4 * kLanes, kWidth = 8 * sizeof(W);
  constexpr int kVector = kVectorBytes / sizeof(W);  // elements: a divisor of 32
  typedef W Vector __attribute__((vector_size(kVectorBytes)));
  Vector lanes;
  for (int c = 0; c < kVector; ++c) lanes[c] = static_cast<W>(W(1) << (c % kWidth));
  const Vector signs = Vector{} + static_cast<W>(W(1) << (kWidth - 1));
  const Vector clear = negate ? Vector{} : signs;
  for (int64_t i = 0; i < n; i += kVector) {
    const uint32_t word = bits[i / 32] >> (i % 32);
    Vector tested, value = {};
    if constexpr (kVector > kWidth) {
      for (int c = 0; c < kVector; ++c) tested[c] = static_cast<W>(word >> (c / kWidth * kWidth));
    } else {
      tested = Vector{} + static_cast<W>(word);
    }
    const Vector is_set = (Vector)((tested & lanes) == lanes);  // all bits or none
    const Vector flips = (is_set & signs) ^ clear;
    if (i + kVector <= n) {
      std::memcpy(&value, x + i, sizeof(value));
      value ^= flips;
      std::memcpy(out + i, &value, sizeof(value));
    } else {
      const size_t bytes = static_cast<size_t>(n - i) * sizeof(T);
      std::memcpy(&value, x + i, bytes);
      value ^= flips;
      std::memcpy(out + i, &value, bytes);
    }
  }
}

static void flip_signs(const uint32_t* bits, bool negate, const float* x, int64_t n, float* out) {
  flip_words<uint32_t>(bits, negate, x, n, out);
}

static void flip_signs_half(const uint32_t* bits, bool negate, const uint16_t* x, int64_t n,
                            uint16_t* out) {
  flip_words<uint16_t>(bits, negate, x, n, out);
}

static void flip_signs_double(const uint32_t* bits, bool negate, const double* x, int64_t n,
                              double* out) {
  flip_words<uint64_t>(bits, negate, x, n, out);
}

}  // namespace perturbed::PERTURBED_ISA
