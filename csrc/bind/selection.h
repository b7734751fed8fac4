// Arguments of the selection and permuted operators, checked once for every device and turned into
// plain sizes. The CPU and CUDA twins (csrc/cpu, csrc/cuda: selection, permuted) start from these.
#pragma once

#include "bind/rows.h"
#include "noise/permutation.h"

namespace perturbed {

// Entries first .. first + count - 1 of a selection from 0 .. size - 1. An entry and one past it fit
// a 32-bit word.
inline void check_selection(const char* op, const char* name, int64_t size, int64_t first,
                            int64_t count, bool replace) {
  constexpr int64_t kLimit = (int64_t{1} << 32) - 1;
  PT_CHECK(size >= 0 && size < kLimit, op,
           "size: selections are made from 0 to 2^32 - 2 elements, got ", size);
  PT_CHECK(first >= 0, op, "first must not be negative, got ", first);
  PT_CHECK(count >= 0, op, name, " must not be negative, got ", count);
  if (replace) {
    PT_CHECK(first < kLimit && count < kLimit - first, op, "first + ", name,
             " must be below 2^32 - 1, got ", first, " + ", count);
    PT_CHECK(count == 0 || size > 0, op, name, " must be 0 where there is nothing to select, got ",
             count);
  } else {
    PT_CHECK(first <= size && count <= size - first, op, name, " must be at most ", size,
             " elements to select from", first ? " less first = " + std::to_string(first) : "",
             ", got ", count);
  }
}

inline void check_selections(const char* op, const Tensor& key, int64_t stream, int64_t first,
                             int64_t directions, int64_t size, int64_t count, bool replace) {
  check_key(op, key, key);
  check_counter_word(op, "stream", stream);
  PT_CHECK(first >= 0, op, "first must not be negative, got ", first);
  PT_CHECK(directions >= 0, op, "directions must not be negative, got ", directions);
  check_selection(op, "count", size, 0, count, replace);
}

inline MoveSizes check_select(const char* op, const Tensor& x, const Tensor& key, int64_t stream,
                              int64_t directions, int64_t count, bool antithetic, bool shared,
                              bool replace) {
  const MoveSizes s = check_move(op, x, key, stream, directions, antithetic, shared);
  check_selection(op, "count", s.in, 0, count, replace);
  return s;
}

inline AddSizes check_select_add(const char* op, const Tensor& y, const Tensor& z,
                                 const Tensor& key, int64_t stream, int64_t directions,
                                 bool antithetic, bool replace) {
  const AddSizes s = check_add(op, y, z, key, stream, directions, antithetic);
  check_selection(op, "y's last dimension", s.out, 0, s.out, replace);
  PT_CHECK(s.in <= s.out, op, "z must have at most y's ", s.out, " columns, got ", s.in);
  return s;
}

// Weights of a sum over directions: [D], float32 or float64.
inline void check_weights(const char* op, const Tensor& weights) {
  check_dim(op, "weights", weights, 1);
  check_contiguous(op, "weights", weights);
  PT_CHECK(
      weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double, op,
      "weights must have dtype Float or Double, got ",
      torch::headeronly::toString(weights.scalar_type()));
}

inline void check_selection_sum(const char* op, const Tensor& weights, const Tensor& key,
                                int64_t stream, int64_t first, int64_t rows, int64_t size,
                                bool replace) {
  check_weights(op, weights);
  check_key(op, key, weights);
  check_counter_word(op, "stream", stream);
  check_selection(op, "rows", size, first, rows, replace);
}

inline void check_permuted_estimate(const char* op, const Tensor& grad, const Tensor& base,
                                    const Tensor& weights, const Tensor& key, int64_t in_stream,
                                    int64_t out_stream) {
  check_dim(op, "grad", grad, 2);
  check_contiguous(op, "grad", grad);
  check_weights(op, weights);
  check_dtype(op, "weights", weights,
              grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_same_device(op, "weights", weights, grad);
  check_dim(op, "base", base, 2);
  check_contiguous(op, "base", base);
  check_dtype(op, "base", base, weights.scalar_type());
  check_same_device(op, "base", base, grad);
  check_key(op, key, grad);
  check_stream(op, "in_stream", in_stream);
  check_stream(op, "out_stream", out_stream);
  check_selection(op, "base's rows", grad.size(0), 0, base.size(0), false);
  check_selection(op, "base's columns", grad.size(1), 0, base.size(1), false);
}

}  // namespace perturbed
