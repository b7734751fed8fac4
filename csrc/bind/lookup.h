// Arguments of dense_lookup, checked once for every device and turned into plain sizes.
#pragma once

#include "bind/dense.h"
#include "bind/rows.h"

namespace perturbed {

struct LookupSizes {
  int64_t directions;  // D
  int64_t tokens;      // T
  int64_t entries;     // B * T: entry i belongs to direction i / T % D
  int64_t rows, cols;  // of E_d
};

inline LookupSizes check_dense_lookup(const char* op, const Tensor& index, const Tensor& key,
                                      int64_t stream, int64_t directions, int64_t rows,
                                      int64_t cols, bool rademacher) {
  check_dim(op, "index", index, 2);
  check_dtype(op, "index", index, ScalarType::Long);
  check_contiguous(op, "index", index);
  check_key(op, key, index);
  check_counter_word(op, "stream", stream);
  PT_CHECK(directions > 0, op, "directions must be positive, got ", directions);
  PT_CHECK(index.size(0) % directions == 0, op,
           "index must have a multiple of directions = ", directions, " rows, got ", index.size(0));
  PT_CHECK(rows >= 0 && cols >= 0, op, "rows and cols must not be negative, got ", rows, " and ",
           cols);
  check_blocks(op, rows, cols, rademacher);
  return {directions, index.size(1), index.numel(), rows, cols};
}

}  // namespace perturbed
