// Arguments of the dense family's operators, checked once for every device and turned into plain
// structs. The CPU and CUDA twins (csrc/cpu/dense.cpp, csrc/cuda/dense.cu) start from these; the
// other families' checks are built on what is shared here.
#pragma once

#include "bind/check.h"
#include "noise/counters.h"

namespace perturbed {

struct DenseLinearSizes {
  int64_t directions;  // D
  int64_t repeats;     // R: rows of y per direction
  int64_t sources;     // rows of x per direction: R, or N < R if every member sees the same N rows
  int64_t tokens;      // T
  int64_t out, in;     // m, n
  bool shared;         // x holds N rows, not sources * D
  bool antithetic;
  int64_t x_row_stride, x_token_stride;  // in elements
};

inline void check_stream(const char* op, const char* name, int64_t stream) {
  PT_CHECK(stream >= -1 && stream < (int64_t{1} << 32), op, name,
           " must be -1 or a 32-bit counter word, got ", stream);
}

// c1 is one 32-bit word, so a tensor has fewer than 2^32 blocks.
inline void check_blocks(const char* op, int64_t rows, int64_t cols, bool rademacher) {
  constexpr int64_t kLimit = int64_t{1} << 32;
  // No tensor is that long, and below it nothing overflows but the product, hence a division.
  bool fits = rows < int64_t{1} << 62 && cols < int64_t{1} << 62;
  if (fits) {
    const int64_t down = rademacher ? ceil_div<int64_t>(rows, kSignBlockRows) : rows;
    const int64_t across = rademacher ? sign_blocks_per_row(cols) : normal_blocks_per_row(cols);
    fits = across == 0 || down <= (kLimit - 1) / across;
  }
  PT_CHECK(fits, op, "a tensor of rows x cols = ", rows, " x ", cols,
           " elements has more than 2^32 noise blocks");
}

// What every family's `<family>_linear_` has in common: the rows of y and x, key, sigma and bias.
inline DenseLinearSizes check_linear_rows(const char* op, const Tensor& y, const Tensor& x,
                                          const Tensor& key, const Tensor& sigma,
                                          int64_t bias_stream, int64_t directions,
                                          bool antithetic) {
  check_dim(op, "y", y, 3);
  check_dim(op, "x", x, 3);
  check_contiguous(op, "y", y);
  check_dtype(op, "x", x, y.scalar_type());
  check_same_device(op, "x", x, y);
  check_key(op, key, y);
  check_sigma(op, sigma, y);
  check_stream(op, "bias_stream", bias_stream);
  PT_CHECK(directions > 0, op, "directions must be positive, got ", directions);
  const int64_t rows = y.size(0);
  PT_CHECK(rows % directions == 0, op, "y must have a multiple of directions = ", directions,
           " rows, got ", rows);
  DenseLinearSizes s;
  s.directions = directions;
  s.repeats = rows / directions;
  s.tokens = y.size(1);
  s.out = y.size(2);
  s.in = x.size(2);
  s.antithetic = antithetic;
  s.shared = x.size(0) != rows;
  s.sources = s.shared ? x.size(0) : s.repeats;
  PT_CHECK(!antithetic || s.repeats % 2 == 0, op,
           "antithetic needs an even number of repeats, got ", s.repeats);
  PT_CHECK(x.size(1) == s.tokens, op, "x must have y's ", s.tokens, " tokens, got ", x.size(1));
  check_contiguous_rows(op, "x", x);
  s.x_row_stride = x.stride(0);
  s.x_token_stride = x.stride(1);
  return s;
}

// x of a `<family>_linear_`: one row per row of y, or the N rows that every member sees.
inline void check_shared_rows(const char* op, const DenseLinearSizes& s) {
  PT_CHECK(!s.shared || (s.sources > 0 && s.repeats % s.sources == 0), op,
           "x must have as many rows as y (", s.repeats * s.directions,
           ") or a divisor of the repeats (", s.repeats, "), got ", s.sources);
}

inline DenseLinearSizes check_dense_linear(const char* op, const Tensor& y, const Tensor& x,
                                           const Tensor& key, const Tensor& sigma,
                                           int64_t weight_stream, int64_t bias_stream,
                                           int64_t directions, bool antithetic, bool rademacher) {
  check_stream(op, "weight_stream", weight_stream);
  const DenseLinearSizes s =
      check_linear_rows(op, y, x, key, sigma, bias_stream, directions, antithetic);
  check_shared_rows(op, s);
  check_blocks(op, s.out, s.in, rademacher);
  return s;
}

// What every family's `<family>_estimate_` has in common.
inline void check_estimate(const char* op, const Tensor& grad, const Tensor& weights,
                           const Tensor& key, const Tensor& sigma) {
  check_dim(op, "grad", grad, 2);
  check_contiguous(op, "grad", grad);
  check_dim(op, "weights", weights, 1);
  check_contiguous(op, "weights", weights);
  check_dtype(op, "weights", weights,
              grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_same_device(op, "weights", weights, grad);
  check_key(op, key, grad);
  check_sigma(op, sigma, grad);
}

inline void check_dense_estimate(const char* op, const Tensor& grad, const Tensor& weights,
                                 const Tensor& key, const Tensor& sigma, int64_t stream,
                                 bool rademacher) {
  check_estimate(op, grad, weights, key, sigma);
  PT_CHECK(stream >= 0, op, "stream must be a counter word, got ", stream);
  check_stream(op, "stream", stream);
  check_blocks(op, grad.size(0), grad.size(1), rademacher);
}

inline void check_dense_materialise(const char* op, const Tensor& key, int64_t stream,
                                    int64_t first, int64_t count, int64_t rows, int64_t cols,
                                    bool rademacher) {
  check_key(op, key, key);
  PT_CHECK(stream >= 0, op, "stream must be a counter word, got ", stream);
  check_stream(op, "stream", stream);
  PT_CHECK(first >= 0, op, "first must not be negative, got ", first);
  PT_CHECK(count >= 0, op, "count must not be negative, got ", count);
  PT_CHECK(rows >= 0 && cols >= 0, op, "rows and cols must not be negative, got ", rows, " and ",
           cols);
  check_blocks(op, rows, cols, rademacher);
}

}  // namespace perturbed
