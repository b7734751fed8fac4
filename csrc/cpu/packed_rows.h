// Rows of activations in the form that the inner loops read.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <type_traits>
#include <vector>

#include "bind/dense.h"
#include "cpu/tensor_noise.h"

namespace perturbed {

// Order of the elements of a packed row: as they come, or as `normal_dot` draws noise.
enum class RowOrder { kNatural, kDraw };

// x as the inner loops want it: rows of A (float or double), zero-padded, and their half sums
// where signs need them. Copies nothing if x is already so.
template <class A>
struct PackedRows {
  const A* data;
  int64_t row_stride, token_stride;
  int64_t width;  // padded length of a row
  std::vector<A> buffer;
  std::vector<A> halves;  // half sums of each row, halves_stride apart
  int64_t halves_stride = 0;

  template <class T>
  PackedRows(const T* x, int64_t rows, const DenseLinearSizes& s, RowOrder order,
             bool with_halves) {
    constexpr int64_t kBatchColumns = kBatchBlocks * kNormalBlockCols;
    const bool draw_order = order == RowOrder::kDraw;
    width = round_up(s.in, draw_order ? kBatchColumns : kRowPadding);
    const bool usable = std::is_same_v<T, A> && width == s.in && !draw_order;
    if (usable) {
      data = reinterpret_cast<const A*>(x);
      row_stride = s.x_row_stride;
      token_stride = s.x_token_stride;
    } else {
      buffer.assign(rows * s.tokens * width, A(0));
      data = buffer.data();
      row_stride = s.tokens * width;
      token_stride = width;
    }
    if (with_halves) {
      halves_stride = ceil_div(width, kHalfSumColumns) * kHalfSumSize;
      halves.resize(rows * s.tokens * halves_stride);
    }
    if (usable && !with_halves) return;
    const int64_t grain = ceil_div<int64_t>(1 << 15, width);
    torch::stable::parallel_for(0, rows * s.tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = x + i / s.tokens * s.x_row_stride + i % s.tokens * s.x_token_stride;
        A* to = buffer.data() + i * width;
        if (draw_order) {
          for (int64_t k = 0; k < s.in; ++k) {
            const int64_t block = k % kBatchColumns / kNormalBlockCols,
                          column = k % kNormalBlockCols;
            to[k - k % kBatchColumns + column * kBatchBlocks + block] = static_cast<A>(from[k]);
          }
        } else if (!usable) {
          for (int64_t k = 0; k < s.in; ++k) to[k] = static_cast<A>(from[k]);
        }
        if constexpr (std::is_same_v<A, float>) {
          if (with_halves) {
            kernels().half_sums(usable ? reinterpret_cast<const float*>(from) : to, width,
                                halves.data() + i * halves_stride);
          }
        }
      }
    });
  }
};

}  // namespace perturbed
