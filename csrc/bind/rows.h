// Arguments of the operators that move rows of activations (select, flip) or add them (select_add_,
// flip_add_): one set of checks, and the plain sizes that the kernels start from.
#pragma once

#include "bind/check.h"
#include "bind/dense.h"

namespace perturbed {

// Row b of the result comes from row b of x, or from row b / D if `shared`.
struct MoveSizes {
  int64_t rows;        // of the result: B, or N * D if shared
  int64_t directions;  // D
  int64_t tokens;      // T
  int64_t in;          // n
  bool shared, antithetic;
  int64_t x_row_stride, x_token_stride;  // in elements

  int64_t source(int64_t row) const { return shared ? row / directions : row; }
  bool negative(int64_t row) const {
    return antithetic && row / directions >= rows / directions / 2;
  }
};

// Row b of y takes row b % M of z.
struct AddSizes {
  int64_t rows;        // B
  int64_t directions;  // D
  int64_t tokens;      // T
  int64_t out;         // m: columns of y
  int64_t sources;     // M: rows of z
  int64_t in;          // columns of z
  bool antithetic;
  int64_t z_row_stride, z_token_stride;  // in elements

  int64_t source(int64_t row) const { return row % sources; }
  bool negative(int64_t row) const {
    return antithetic && row / directions >= rows / directions / 2;
  }
};

inline void check_counter_word(const char* op, const char* name, int64_t stream) {
  PT_CHECK(stream >= 0 && stream < (int64_t{1} << 32), op, name,
           " must be a 32-bit counter word, got ", stream);
}

inline void check_repeats(const char* op, const char* name, int64_t rows, int64_t directions,
                          bool antithetic) {
  PT_CHECK(directions > 0, op, "directions must be positive, got ", directions);
  PT_CHECK(rows % directions == 0, op, name, " must have a multiple of directions = ", directions,
           " rows, got ", rows);
  PT_CHECK(!antithetic || rows / directions % 2 == 0, op,
           "antithetic needs an even number of repeats, got ", rows / directions);
}

inline MoveSizes check_move(const char* op, const Tensor& x, const Tensor& key, int64_t stream,
                            int64_t directions, bool antithetic, bool shared) {
  check_dim(op, "x", x, 3);
  check_key(op, key, x);
  check_counter_word(op, "stream", stream);
  PT_CHECK(!(antithetic && shared), op, "antithetic and shared exclude each other");
  if (shared) {
    PT_CHECK(directions > 0, op, "directions must be positive, got ", directions);
  } else {
    check_repeats(op, "x", x.size(0), directions, antithetic);
  }
  MoveSizes s;
  s.rows = shared ? x.size(0) * directions : x.size(0);
  s.directions = directions;
  s.tokens = x.size(1);
  s.in = x.size(2);
  s.shared = shared;
  s.antithetic = antithetic;
  check_contiguous_rows(op, "x", x);
  s.x_row_stride = x.stride(0);
  s.x_token_stride = x.stride(1);
  return s;
}

inline AddSizes check_add(const char* op, const Tensor& y, const Tensor& z, const Tensor& key,
                          int64_t stream, int64_t directions, bool antithetic) {
  check_dim(op, "y", y, 3);
  check_dim(op, "z", z, 3);
  check_contiguous(op, "y", y);
  check_dtype(op, "z", z, y.scalar_type());
  check_same_device(op, "z", z, y);
  check_key(op, key, y);
  check_counter_word(op, "stream", stream);
  check_repeats(op, "y", y.size(0), directions, antithetic);
  AddSizes s;
  s.rows = y.size(0);
  s.directions = directions;
  s.tokens = y.size(1);
  s.out = y.size(2);
  s.sources = z.size(0);
  s.in = z.size(2);
  s.antithetic = antithetic;
  // Of a y without rows nothing is read, so that z may have none either.
  PT_CHECK(
      s.sources % directions == 0 && (s.rows == 0 || (s.sources > 0 && s.rows % s.sources == 0)),
      op, "z must have a multiple of directions = ", directions, " rows that divides y's ", s.rows,
      ", got ", s.sources);
  PT_CHECK(z.size(1) == s.tokens, op, "z must have y's ", s.tokens, " tokens, got ", z.size(1));
  check_contiguous_rows(op, "z", z);
  s.z_row_stride = z.stride(0);
  s.z_token_stride = z.stride(1);
  return s;
}

}  // namespace perturbed
