// Arguments of the low-rank family's operators, checked once for every device.
#pragma once

#include "bind/rows.h"

namespace perturbed {

// With `projected`, x holds the products B_d x: `in` is then the rank, `shared` is false, and
// `sources` is M / D. Either way row r * D + d of y reads the x of source r % sources.
struct LowRankLinearSizes : DenseLinearSizes {
  int64_t rank;
  bool projected;
};

inline LowRankLinearSizes check_low_rank_linear(const char* op, const Tensor& y, const Tensor& x,
                                                const Tensor& key, const Tensor& sigma,
                                                int64_t a_stream, int64_t b_stream,
                                                int64_t bias_stream, int64_t directions,
                                                int64_t rank, bool antithetic, bool rademacher) {
  check_counter_word(op, "a_stream", a_stream);
  check_stream(op, "b_stream", b_stream);
  PT_CHECK(rank > 0, op, "rank must be positive, got ", rank);
  LowRankLinearSizes s{check_linear_rows(op, y, x, key, sigma, bias_stream, directions, antithetic),
                       rank, b_stream < 0};
  if (s.projected) {
    const int64_t rows = x.size(0), all = s.repeats * directions;
    PT_CHECK(s.in == rank, op, "x must hold products of rank = ", rank,
             " elements if b_stream is -1, got shape ", shape_string(x));
    PT_CHECK(rows == all || (rows > 0 && rows % directions == 0 && all % rows == 0), op,
             "x must have a multiple of directions = ", directions, " rows that divides y's ", all,
             " if b_stream is -1, got ", rows);
    s.shared = false;
    s.sources = rows / directions;
  } else {
    check_shared_rows(op, s);
    check_blocks(op, rank, s.in, rademacher);
  }
  check_blocks(op, rank, s.out, rademacher);
  return s;
}

}  // namespace perturbed
