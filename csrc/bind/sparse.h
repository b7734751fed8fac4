// Arguments of the sparse family's operators, checked once for every device.
#pragma once

#include "bind/selection.h"

namespace perturbed {

struct SparseLinearSizes : DenseLinearSizes {
  int64_t count;  // perturbed columns of a direction
};

// `count` of `in` columns are perturbed, each by `out` elements.
inline void check_columns(const char* op, int64_t in, int64_t count, int64_t out, bool rademacher) {
  PT_CHECK(count > 0, op, "count must be positive, got ", count);
  check_selection(op, "count", in, 0, count, false);
  check_blocks(op, count, out, rademacher);
}

inline SparseLinearSizes check_sparse_linear(const char* op, const Tensor& y, const Tensor& x,
                                             const Tensor& key, const Tensor& sigma,
                                             int64_t column_stream, int64_t value_stream,
                                             int64_t bias_stream, int64_t directions, int64_t count,
                                             bool antithetic, bool rademacher) {
  check_counter_word(op, "column_stream", column_stream);
  check_counter_word(op, "value_stream", value_stream);
  const SparseLinearSizes s{
      check_linear_rows(op, y, x, key, sigma, bias_stream, directions, antithetic), count};
  check_shared_rows(op, s);
  check_columns(op, s.in, count, s.out, rademacher);
  return s;
}

// grad: [m, n]
inline void check_sparse_estimate(const char* op, const Tensor& grad, const Tensor& weights,
                                  const Tensor& key, const Tensor& sigma, int64_t column_stream,
                                  int64_t value_stream, int64_t count, bool rademacher) {
  check_estimate(op, grad, weights, key, sigma);
  check_counter_word(op, "column_stream", column_stream);
  check_counter_word(op, "value_stream", value_stream);
  check_columns(op, grad.size(1), count, grad.size(0), rademacher);
}

}  // namespace perturbed
