// What operators that only move values share: element types as words, and tasks over rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bind/dispatch.h"
#include "bind/rows.h"

namespace perturbed {

// The word of an element's size: a value that moves or changes its sign keeps every other bit, NaNs
// included.
template <class T>
using word_t = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// What a negative row's words are XORed with.
template <class W>
constexpr W sign_word(bool negative) {
  return negative ? static_cast<W>(W(1) << (8 * sizeof(W) - 1)) : W(0);
}

// Rows of a direction are cut into parts where there are too few directions for the threads. Rows
// here are those of all repeats and tokens: the ith is token i % T of row i / T * D + d.
struct RowParts {
  int64_t directions, rows, parts;

  RowParts(int64_t directions_in, int64_t rows_in)
      : directions(directions_in), rows(rows_in), parts(1) {
    constexpr int64_t kTasks = 64;
    if (directions < kTasks) {
      parts = std::clamp<int64_t>(ceil_div(kTasks, directions), 1, std::max<int64_t>(rows, 1));
    }
  }

  int64_t tasks() const { return directions * parts; }
  int64_t direction(int64_t task) const { return task / parts; }
  int64_t begin(int64_t task) const { return task % parts * rows / parts; }
  int64_t end(int64_t task) const { return (task % parts + 1) * rows / parts; }
};

// Tasks per call of a thread for which starting it pays: some 2^15 elements.
inline int64_t move_grain(const RowParts& parts, int64_t columns) {
  const int64_t elements = std::max<int64_t>(ceil_div(parts.rows, parts.parts) * columns, 1);
  return ceil_div(int64_t{1} << 15, elements);
}

}  // namespace perturbed
