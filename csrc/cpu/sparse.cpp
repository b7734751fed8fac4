// Sparse family on the CPU: `count` perturbed columns per direction.
//
// Forward: the selected elements of x are the coefficients of V_d's rows (cpu/expansion.h). Limit:
// drawing count * m + m elements per direction, then one pass over y.
//
// Estimate: every element of every V_d goes into one element of the gradient. The (direction, entry)
// pairs are sorted by column; a task owns a tile of the gradient and adds up the lists of its
// columns in order of the directions, without atomics and whatever the number of threads. Limit:
// drawing D * count * m elements, and writing the gradient.
#include "bind/sparse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bind/dispatch.h"
#include "cpu/expansion.h"
#include "noise/permutation.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

// Fewer entries than this are computed one by one: in a group of lanes, all wait for the one that
// walks longest.
constexpr int64_t kFewColumns = 8;

// Entries 0 .. count - 1 of one direction's permutation of n columns.
void draw_columns(const TensorNoise& noise, int64_t d, int64_t n, int64_t count, uint32_t* out) {
  const PermutationShape shape = permutation_shape(static_cast<uint32_t>(n));
  const PermutationKey key = permutation_key(noise.launch, noise.directions[d]);
  if (count >= kFewColumns) return kernels().permutation(shape, key, 0, count, out);
  for (int64_t j = 0; j < count; ++j) {
    out[j] = permutation_entry(shape, key, static_cast<uint32_t>(j));
  }
}

// ---- forward -----------------------------------------------------------------------------------

void sparse_linear_cpu_(Tensor y, const Tensor x, const Tensor key, const Tensor sigma,
                        int64_t column_stream, int64_t value_stream, int64_t bias_stream,
                        int64_t directions, int64_t count, bool antithetic, bool rademacher) {
  const char* op = "sparse_linear_";
  const SparseLinearSizes s =
      check_sparse_linear(op, y, x, key, sigma, column_stream, value_stream, bias_stream,
                          directions, count, antithetic, rademacher);
  if (y.numel() == 0) return;
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const double scale = *sigma.const_data_ptr<double>();
    const TensorNoise columns(key, column_stream, 0, directions);
    const TensorNoise values(key, value_stream, 0, directions);
    const TensorNoise bias(key, bias_stream, 0, bias_stream < 0 ? 0 : directions);
    const double widened = scale * std::sqrt(static_cast<double>(s.in) / count);
    const Expansion<T> expansion{s,
                                 values,
                                 bias_stream < 0 ? nullptr : &bias,
                                 count,
                                 rademacher,
                                 static_cast<T*>(y.mutable_data_ptr()),
                                 static_cast<A>(widened),
                                 static_cast<A>(scale)};
    expansion.run([&] {
      std::vector<uint32_t> selected(count);
      return [&, selected](int64_t d, int64_t i, int64_t i_end, A* h) mutable {
        draw_columns(columns, d, s.in, count, selected.data());
        for (; i < i_end; ++i) {
          const T* row = source_row(in, s, d, i);
          for (const uint32_t column : selected) *h++ = static_cast<A>(row[column]);
        }
      };
    });
  });
}

Tensor sparse_linear_cpu(const Tensor y, const Tensor x, const Tensor key, const Tensor sigma,
                         int64_t column_stream, int64_t value_stream, int64_t bias_stream,
                         int64_t directions, int64_t count, bool antithetic, bool rademacher) {
  Tensor out = torch::stable::clone(y);
  sparse_linear_cpu_(out, x, key, sigma, column_stream, value_stream, bias_stream, directions,
                     count, antithetic, rademacher);
  return out;
}

// ---- estimate ----------------------------------------------------------------------------------

// Tile of the gradient that one task sums up: a cache line of every row, and enough outputs to fill
// the batches that noise is drawn in. Its sums take 16 KiB.
constexpr int64_t kTileCols = 16, kTileRows = 256;

// The (direction, entry) pairs d * count + q of every column c, in ascending order, at
// pairs[begin[c]] .. pairs[begin[c + 1] - 1].
struct ColumnLists {
  std::vector<int64_t> begin, pairs;

  ColumnLists(const TensorNoise& noise, int64_t n, int64_t count) : begin(n + 1) {
    const int64_t directions = static_cast<int64_t>(noise.directions.size());
    std::vector<uint32_t> columns(directions * count);
    const int64_t grain = ceil_div<int64_t>(1 << 12, count + 32);
    parallel_for(0, directions, grain, [&](int64_t d, int64_t d_end) {
      for (; d < d_end; ++d) draw_columns(noise, d, n, count, columns.data() + d * count);
    });
    for (const uint32_t column : columns) ++begin[column + 1];
    for (int64_t c = 0; c < n; ++c) begin[c + 1] += begin[c];
    pairs.resize(columns.size());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (size_t i = 0; i < columns.size(); ++i) {
      pairs[next[columns[i]]++] = static_cast<int64_t>(i);
    }
  }
};

template <class T>
struct SparseEstimate {
  using A = accumulator_t<T>;
  T* grad;
  int64_t rows, cols;  // m, n
  const A* weights;
  const TensorNoise& values;
  const ColumnLists& lists;
  int64_t count;
  bool rademacher, accumulate;
  A scale;

  void run() const {
    const int64_t across = ceil_div(cols, kTileCols), down = ceil_div(rows, kTileRows);
    parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
      NoiseRows noise(values, rows, rademacher);
      float drawn[kTileRows];
      std::vector<A> sums(kTileCols * kTileRows);
      for (int64_t task = begin; task < end; ++task) {
        // Neighbouring tasks draw the same outputs and share their preparation.
        const int64_t c = task % across * kTileCols, o = task / across * kTileRows;
        const int64_t c_end = std::min(c + kTileCols, cols), o_end = std::min(o + kTileRows, rows);
        if (accumulate && lists.begin[c] == lists.begin[c_end]) continue;
        std::fill(sums.begin(), sums.end(), A(0));
        for (int64_t column = c; column < c_end; ++column) {
          A* sum = sums.data() + (column - c) * kTileRows;
          for (int64_t i = lists.begin[column]; i < lists.begin[column + 1]; ++i) {
            const int64_t d = lists.pairs[i] / count, q = lists.pairs[i] % count;
            noise.draw_part(d, q, o, o_end, drawn);
            add_noise_rows(sum, drawn, 0, weights + d, 1, o_end - o);
          }
        }
        write(sums.data(), c, c_end, o, o_end);
      }
    });
  }

  void write(const A* sums, int64_t c, int64_t c_end, int64_t o, int64_t o_end) const {
    for (int64_t r = 0; r < o_end - o; ++r) {
      T* out = grad + (o + r) * cols + c;
      for (int64_t k = 0; k < c_end - c; ++k) {
        const A value = scale * sums[k * kTileRows + r];
        out[k] = static_cast<T>(accumulate ? static_cast<A>(out[k]) + value : value);
      }
    }
  }
};

void sparse_estimate_cpu_(Tensor grad, const Tensor weights, const Tensor key, const Tensor sigma,
                          int64_t column_stream, int64_t value_stream, int64_t count,
                          bool rademacher, bool accumulate) {
  const char* op = "sparse_estimate_";
  check_sparse_estimate(op, grad, weights, key, sigma, column_stream, value_stream, count,
                        rademacher);
  if (grad.numel() == 0) return;
  const int64_t directions = weights.size(0), cols = grad.size(1);
  const TensorNoise values(key, value_stream, 0, directions);
  const ColumnLists lists(TensorNoise(key, column_stream, 0, directions), cols, count);
  const double scale =
      *sigma.const_data_ptr<double>() * std::sqrt(static_cast<double>(cols) / count);
  dispatch_float(grad.scalar_type(), op, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    SparseEstimate<T>{static_cast<T*>(grad.mutable_data_ptr()),
                      grad.size(0),
                      cols,
                      static_cast<const A*>(weights.const_data_ptr()),
                      values,
                      lists,
                      count,
                      rademacher,
                      accumulate,
                      static_cast<A>(scale)}
        .run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("sparse_linear_", TORCH_BOX(&sparse_linear_cpu_));
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear_cpu));
  m.impl("sparse_estimate_", TORCH_BOX(&sparse_estimate_cpu_));
}

}  // namespace perturbed
