// Selections on the CPU: entries, gathers by them, and their weighted sums.
//
// A direction's entries are computed once for all its rows, a chunk at a time, so that nothing of
// size D * n exists. Values only move, or are added once to an output of one thread, so results do not
// depend on the number of threads. Limit: one indexed load per element, in the first-level cache for
// rows up to its size; computing an entry costs about as much again.
#include "bind/selection.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bind/dispatch.h"
#include "cpu/moved_rows.h"
#include "cpu/selection.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

// Calls row(i, d, first, count, entries) for every row i of `parts`, with chunk after chunk of the
// first `count` entries of its direction d.
template <class F>
void for_selected_rows(const Selection& selection, const RowParts& parts, int64_t count,
                       const F& row) {
  parallel_for(0, parts.tasks(), move_grain(parts, count), [&](int64_t begin, int64_t end) {
    uint32_t entries[kSelectChunk];
    for (int64_t first = 0; first < count; first += kSelectChunk) {
      const int64_t here = std::min(kSelectChunk, count - first);
      SelectionChunk chunk(selection, first, here);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t d = parts.direction(task);
        if (task == begin || parts.direction(task - 1) != d) chunk.draw(d, entries);
        for (int64_t i = parts.begin(task); i < parts.end(task); ++i) {
          row(i, d, first, here, entries);
        }
      }
    }
  });
}

// ---- entries -----------------------------------------------------------------------------------

Tensor selections_cpu(const Tensor key, int64_t stream, int64_t first, int64_t directions,
                      int64_t size, int64_t count, bool replace) {
  const char* op = "selections";
  check_selections(op, key, stream, first, directions, size, count, replace);
  Tensor out = torch::stable::new_empty(key, {directions, count}, ScalarType::Long);
  if (out.numel() == 0) return out;
  int64_t* to = out.mutable_data_ptr<int64_t>();
  const Selection selection(key, stream, first, directions, size, replace);
  for_selected_rows(selection, RowParts(directions, 1), count,
                    [&](int64_t, int64_t d, int64_t at, int64_t here, const uint32_t* entries) {
                      std::copy(entries, entries + here, to + d * count + at);
                    });
  return out;
}

// ---- gathers -----------------------------------------------------------------------------------

Tensor select_cpu(const Tensor x, const Tensor key, int64_t stream, int64_t directions,
                  int64_t count, bool antithetic, bool shared, bool replace) {
  const char* op = "select";
  const MoveSizes s =
      check_select(op, x, key, stream, directions, count, antithetic, shared, replace);
  Tensor out = torch::stable::new_empty(x, {s.rows, s.tokens, count});
  dispatch_float(x.scalar_type(), op, "x", [&](auto tag) {
    using W = word_t<typename decltype(tag)::type>;
    if (out.numel() == 0) return;
    const W* in = static_cast<const W*>(x.const_data_ptr());
    W* to = static_cast<W*>(out.mutable_data_ptr());
    const Selection selection(key, stream, 0, directions, s.in, replace);
    for_selected_rows(
        selection, RowParts(directions, s.rows / directions * s.tokens), count,
        [&](int64_t i, int64_t d, int64_t first, int64_t here, const uint32_t* entries) {
          const int64_t row = i / s.tokens * directions + d, token = i % s.tokens;
          const W* from = in + s.source(row) * s.x_row_stride + token * s.x_token_stride;
          W* result = to + (row * s.tokens + token) * count + first;
          const W sign = sign_word<W>(s.negative(row));
          for (int64_t j = 0; j < here; ++j) result[j] = from[entries[j]] ^ sign;
        });
  });
  return out;
}

void select_add_cpu_(Tensor y, const Tensor z, const Tensor key, int64_t stream, int64_t directions,
                     bool antithetic, bool replace) {
  const char* op = "select_add_";
  const AddSizes s = check_select_add(op, y, z, key, stream, directions, antithetic, replace);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    using W = word_t<T>;
    if (y.numel() == 0 || s.in == 0) return;
    const T* in = static_cast<const T*>(z.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const Selection selection(key, stream, 0, directions, s.out, replace);
    for_selected_rows(
        selection, RowParts(directions, s.rows / directions * s.tokens), s.out,
        [&](int64_t i, int64_t d, int64_t first, int64_t here, const uint32_t* entries) {
          const int64_t row = i / s.tokens * directions + d, token = i % s.tokens;
          const T* from = in + s.source(row) * s.z_row_stride + token * s.z_token_stride;
          T* result = to + (row * s.tokens + token) * s.out + first;
          const A sign = s.negative(row) ? A(-1) : A(1);
          if (s.in == s.out) {
            for (int64_t j = 0; j < here; ++j) {
              result[j] = static_cast<T>(static_cast<A>(result[j]) +
                                         sign * static_cast<A>(from[entries[j]]));
            }
            return;
          }
          for (int64_t j = 0; j < here; ++j) {
            // All bits where the entry is below q, none elsewhere: what is not chosen adds a zero.
            // Written without a condition, which compilers make a branch, here a coin toss.
            const uint64_t chosen = static_cast<uint64_t>((int64_t{entries[j]} - s.in) >> 63);
            W word;
            std::memcpy(&word, from + (entries[j] & chosen), sizeof(word));
            word = static_cast<W>(word & chosen);
            T value;
            std::memcpy(&value, &word, sizeof(value));
            result[j] = static_cast<T>(static_cast<A>(result[j]) + sign * static_cast<A>(value));
          }
        });
  });
}

Tensor select_add_cpu(const Tensor y, const Tensor z, const Tensor key, int64_t stream,
                      int64_t directions, bool antithetic, bool replace) {
  Tensor out = torch::stable::clone(y);
  select_add_cpu_(out, z, key, stream, directions, antithetic, replace);
  return out;
}

// ---- sums --------------------------------------------------------------------------------------

constexpr int64_t kSumRows = 32;        // rows of S of one task
constexpr int64_t kSumDirections = 64;  // directions drawn before they are summed

// The rows of a task are summed one after the other, each in the first-level cache.
template <class T>
void sum_selections(const T* weights, int64_t count, const Selection& selection, int64_t first,
                    int64_t rows, int64_t size, T* out) {
  parallel_for(0, ceil_div(rows, kSumRows), 1, [&](int64_t begin, int64_t end) {
    uint32_t entries[kSumDirections * kSumRows];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t j = task * kSumRows, here = std::min(kSumRows, rows - j);
      SelectionChunk chunk(selection, first + j, here);
      std::fill(out + j * size, out + (j + here) * size, T(0));
      for (int64_t tile = 0; tile < count; tile += kSumDirections) {
        const int64_t drawn = std::min(kSumDirections, count - tile);
        for (int64_t d = 0; d < drawn; ++d) chunk.draw(tile + d, entries + d * kSumRows);
        for (int64_t row = 0; row < here; ++row) {
          T* to = out + (j + row) * size;
          for (int64_t d = 0; d < drawn; ++d) {
            to[entries[d * kSumRows + row]] += weights[tile + d];
          }
        }
      }
    }
  });
}

Tensor selection_sum_cpu(const Tensor weights, const Tensor key, int64_t stream, int64_t first,
                         int64_t rows, int64_t size, bool replace) {
  const char* op = "selection_sum";
  check_selection_sum(op, weights, key, stream, first, rows, size, replace);
  Tensor out = torch::stable::new_empty(weights, {rows, size});
  if (out.numel() == 0) return out;
  const int64_t count = weights.size(0);
  const Selection selection(key, stream, 0, count, size, replace);
  const auto sum = [&](auto zero) {
    using T = decltype(zero);
    sum_selections(weights.const_data_ptr<T>(), count, selection, first, rows, size,
                   out.mutable_data_ptr<T>());
  };
  weights.scalar_type() == ScalarType::Double ? sum(0.0) : sum(0.0f);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("selections", TORCH_BOX(&selections_cpu));
  m.impl("select", TORCH_BOX(&select_cpu));
  m.impl("select_add_", TORCH_BOX(&select_add_cpu_));
  m.impl("select_add", TORCH_BOX(&select_add_cpu));
  m.impl("selection_sum", TORCH_BOX(&selection_sum_cpu));
}

}  // namespace perturbed
