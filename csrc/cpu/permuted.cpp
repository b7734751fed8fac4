// Estimate of the permuted family on the CPU: grad[i, in_d(j)] += w_d base[out_d(i), j].
//
// Directions come in tiles: first their permutations are computed, then every row of the gradient meets
// all directions of the tile while it is in the first-level cache. Every element is summed by one
// thread in the order of the directions. Limit: one indexed load per element and direction.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "bind/dispatch.h"
#include "bind/selection.h"
#include "cpu/selection.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

// Entries of a tile's permutations: 512 KB, which the second-level cache holds.
constexpr int64_t kTileEntries = 1 << 17;
// Terms, and entries, for which starting a thread pays.
constexpr int64_t kGrain = 1 << 14;

// A side's permutations; without a stream the identity.
struct Side {
  std::unique_ptr<const Selection> selection;

  Side(const Tensor& key, int64_t stream, int64_t directions, int64_t size) {
    if (stream >= 0) {
      selection = std::make_unique<Selection>(key, stream, 0, directions, size, false);
    }
  }

  // The first `count` entries of direction d.
  void draw(int64_t d, int64_t count, uint32_t* out) const {
    if (selection) {
      kernels().permutation(selection->shape, selection->keys[d], 0, count, out);
    } else {
      std::iota(out, out + count, 0u);
    }
  }
};

template <class T>
struct Estimate {
  using A = accumulator_t<T>;
  T* grad;
  const A *base, *weights;
  int64_t rows, columns, base_rows, base_columns, directions;
  Side in, out;
  bool accumulate;

  void run() const {
    const int64_t tile = std::clamp<int64_t>(kTileEntries / (rows + base_columns), 1,
                                             std::max<int64_t>(directions, 1));
    std::vector<A> sums(rows * columns);
    std::vector<uint32_t> in_entries(tile * base_columns), out_entries(tile * rows);
    for (int64_t d = 0; d < directions; d += tile) {
      const int64_t count = std::min(tile, directions - d);
      parallel_for(0, count, ceil_div(kGrain, rows + base_columns),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t k = begin; k < end; ++k) {
                       in.draw(d + k, base_columns, in_entries.data() + k * base_columns);
                       out.draw(d + k, rows, out_entries.data() + k * rows);
                     }
                   });
      parallel_for(0, rows, ceil_div(kGrain, count * base_columns + 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       add_row(weights + d, count, in_entries.data(), out_entries.data() + i,
                               sums.data() + i * columns);
                     }
                   });
    }
    parallel_for(0, rows * columns, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        grad[i] = static_cast<T>(accumulate ? static_cast<A>(grad[i]) + sums[i] : sums[i]);
      }
    });
  }

  // One row's terms of a tile of directions.
  void add_row(const A* w, int64_t count, const uint32_t* in_entries, const uint32_t* out_entries,
               A* sums) const {
    for (int64_t k = 0; k < count; ++k, in_entries += base_columns, out_entries += rows) {
      if (*out_entries >= base_rows) continue;
      const A* from = base + *out_entries * base_columns;
      for (int64_t j = 0; j < base_columns; ++j) sums[in_entries[j]] += w[k] * from[j];
    }
  }
};

void permuted_estimate_cpu_(Tensor grad, const Tensor base, const Tensor weights, const Tensor key,
                            int64_t in_stream, int64_t out_stream, bool accumulate) {
  const char* op = "permuted_estimate_";
  check_permuted_estimate(op, grad, base, weights, key, in_stream, out_stream);
  dispatch_float(grad.scalar_type(), op, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    if (grad.numel() == 0) return;
    const int64_t rows = grad.size(0), columns = grad.size(1), directions = weights.size(0);
    Estimate<T>{static_cast<T*>(grad.mutable_data_ptr()),
                static_cast<const A*>(base.const_data_ptr()),
                static_cast<const A*>(weights.const_data_ptr()),
                rows,
                columns,
                base.size(0),
                base.size(1),
                directions,
                Side(key, in_stream, directions, columns),
                Side(key, out_stream, directions, rows),
                accumulate}
        .run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("permuted_estimate_", TORCH_BOX(&permuted_estimate_cpu_));
}

}  // namespace perturbed
