// Sign-flip family on the CPU: rows times the signs of their direction.
//
// A direction's bits are drawn once for all its rows, a chunk of columns at a time, and move into the
// sign bits of the values. Limit: memory bandwidth.
#include "bind/sign_flip.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

#include "bind/dispatch.h"
#include "cpu/moved_rows.h"
#include "cpu/tensor_noise.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

constexpr int64_t kFlipBatches = 8;
constexpr int64_t kFlipBlocks = kFlipBatches * kBatchBlocks;
constexpr int64_t kFlipColumns = kFlipBlocks * kSignBlockCols;  // 4096: columns of one chunk

template <class T>
void flip_row(const uint32_t* bits, bool negate, const T* x, int64_t n, T* out) {
  if constexpr (std::is_same_v<T, double>) {
    kernels().flip_signs_double(bits, negate, x, n, out);
  } else if constexpr (std::is_same_v<T, float>) {
    kernels().flip_signs(bits, negate, x, n, out);
  } else {
    kernels().flip_signs_half(bits, negate, reinterpret_cast<const uint16_t*>(x), n,
                              reinterpret_cast<uint16_t*>(out));
  }
}

// Calls row(i, d, first, count, bits) for every row i of `parts`, with chunk after chunk of the
// `columns` signs of its direction d.
template <class F>
void for_flipped_rows(const TensorNoise& noise, const RowParts& parts, int64_t columns,
                      const F& row) {
  parallel_for(0, parts.tasks(), move_grain(parts, columns), [&](int64_t begin, int64_t end) {
    PreparedBatch prepared[kFlipBatches];
    uint32_t words[kSignBlockRows * kFlipBlocks];  // the first row of the blocks, then three unused
    for (int64_t first = 0; first < columns; first += kFlipColumns) {
      const int64_t here = std::min(kFlipColumns, columns - first);
      const int64_t batches = ceil_div(ceil_div<int64_t>(here, kSignBlockCols), kBatchBlocks);
      kernels().prepare_linear(noise.launch, static_cast<uint32_t>(first / kSignBlockCols), batches,
                               prepared);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t d = parts.direction(task);
        if (task == begin || parts.direction(task - 1) != d) {
          kernels().sign_bits(noise.launch, prepared, batches, noise.directions[d], kFlipBlocks,
                              words);
        }
        for (int64_t i = parts.begin(task); i < parts.end(task); ++i) row(i, d, first, here, words);
      }
    }
  });
}

Tensor flip_cpu(const Tensor x, const Tensor key, int64_t stream, int64_t directions,
                bool antithetic, bool shared) {
  const char* op = "flip";
  const MoveSizes s = check_flip(op, x, key, stream, directions, antithetic, shared);
  Tensor out = torch::stable::new_empty(x, {s.rows, s.tokens, s.in});
  dispatch_float(x.scalar_type(), op, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (out.numel() == 0) return;
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const TensorNoise noise(key, stream, 0, directions);
    for_flipped_rows(noise, RowParts(directions, s.rows / directions * s.tokens), s.in,
                     [&](int64_t i, int64_t d, int64_t first, int64_t here, const uint32_t* bits) {
                       const int64_t row = i / s.tokens * directions + d, token = i % s.tokens;
                       const T* from =
                           in + s.source(row) * s.x_row_stride + token * s.x_token_stride + first;
                       T* result = to + (row * s.tokens + token) * s.in + first;
                       flip_row(bits, s.negative(row), from, here, result);
                     });
  });
  return out;
}

void flip_add_cpu_(Tensor y, const Tensor z, const Tensor key, int64_t stream, int64_t directions,
                   bool antithetic) {
  const char* op = "flip_add_";
  const AddSizes s = check_flip_add(op, y, z, key, stream, directions, antithetic);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    if (y.numel() == 0) return;
    const T* in = static_cast<const T*>(z.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const TensorNoise noise(key, stream, 0, directions);
    for_flipped_rows(
        noise, RowParts(directions, s.rows / directions * s.tokens), s.out,
        [&](int64_t i, int64_t d, int64_t first, int64_t here, const uint32_t* bits) {
          const int64_t row = i / s.tokens * directions + d, token = i % s.tokens;
          const T* from = in + s.source(row) * s.z_row_stride + token * s.z_token_stride + first;
          T* result = to + (row * s.tokens + token) * s.out + first;
          T flipped[kFlipColumns];
          flip_row(bits, s.negative(row), from, here, flipped);
          for (int64_t j = 0; j < here; ++j) {
            result[j] = static_cast<T>(static_cast<A>(result[j]) + static_cast<A>(flipped[j]));
          }
        });
  });
}

Tensor flip_add_cpu(const Tensor y, const Tensor z, const Tensor key, int64_t stream,
                    int64_t directions, bool antithetic) {
  Tensor out = torch::stable::clone(y);
  flip_add_cpu_(out, z, key, stream, directions, antithetic);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("flip", TORCH_BOX(&flip_cpu));
  m.impl("flip_add_", TORCH_BOX(&flip_add_cpu_));
  m.impl("flip_add", TORCH_BOX(&flip_add_cpu));
}

}  // namespace perturbed
