// Dense family on the CPU: y += s sigma (E_d x + e_d), the estimate sigma sum_d w_d E_d, and E_d.
//
// Noise is drawn where it is used and stays in registers or the first-level cache; nothing of size
// D * m * n exists. Work is split by the shape alone and every output is summed by one thread in
// one order, so results do not depend on the number of threads. Limit: drawing (docs/kernels.md).
#include "bind/dense.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "bind/dispatch.h"
#include "cpu/dense_linear.h"
#include "cpu/sign_panels.h"
#include "cpu/tensor_noise.h"
#include "noise/signs.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

constexpr int64_t kEstimateBlocks = 2 * kBatchBlocks;
// Rows of x per direction from which the table lookup of sign_panels.h beats masked sums.
constexpr int64_t kPanelLookupRows = 12;

// ---- forward -----------------------------------------------------------------------------------

void dense_linear_cpu_(Tensor y, const Tensor x, const Tensor key, const Tensor sigma,
                       int64_t weight_stream, int64_t bias_stream, int64_t directions,
                       bool antithetic, bool rademacher) {
  const char* op = "dense_linear_";
  const DenseLinearSizes s = check_dense_linear(op, y, x, key, sigma, weight_stream, bias_stream,
                                                directions, antithetic, rademacher);
  if (y.numel() == 0) return;
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    T* out = static_cast<T*>(y.mutable_data_ptr());
    const A scale = static_cast<A>(*sigma.const_data_ptr<double>());
    std::vector<float> bias;
    if (bias_stream >= 0) {
      bias = draw_bias(TensorNoise(key, bias_stream, 0, directions), s.out, rademacher);
    }
    if (weight_stream < 0 || s.in == 0) {
      if (!bias.empty()) add_bias(out, s, bias, scale);
      return;
    }
    const TensorNoise noise(key, weight_stream, 0, directions);
    const T* in = static_cast<const T*>(x.const_data_ptr());
    if (rademacher && std::is_same_v<A, float> && s.sources * s.tokens >= kPanelLookupRows) {
      const SharedPanels panels(in, s);
      SignProducts<T>{s, kernels(), noise, in, panels, bias, out, static_cast<float>(scale)}.run();
    } else {
      const bool in_registers = !rademacher && Forward<T>::draws_in_registers(s);
      const PackedRows<A> rows(in, x.size(0), s,
                               in_registers ? RowOrder::kDraw : RowOrder::kNatural,
                               rademacher && !Forward<T>::looks_up(s));
      Forward<T>{s, kernels(), noise, rows, bias, out, scale}.run(rademacher);
    }
  });
}

Tensor dense_linear_cpu(const Tensor y, const Tensor x, const Tensor key, const Tensor sigma,
                        int64_t weight_stream, int64_t bias_stream, int64_t directions,
                        bool antithetic, bool rademacher) {
  Tensor out = torch::stable::clone(y);
  dense_linear_cpu_(out, x, key, sigma, weight_stream, bias_stream, directions, antithetic,
                    rademacher);
  return out;
}

// ---- estimate ----------------------------------------------------------------------------------

// grad[i] = (accumulate ? grad[i] : 0) + value
template <class T>
void assign(T* grad, bool accumulate, accumulator_t<T> value) {
  using A = accumulator_t<T>;
  *grad = static_cast<T>(accumulate ? static_cast<A>(*grad) + value : value);
}

template <class T>
void normal_estimate(T* grad, int64_t rows, int64_t cols, const accumulator_t<T>* w, int64_t count,
                     TensorNoise& noise, accumulator_t<T> sigma, bool accumulate) {
  using A = accumulator_t<T>;
  const CpuKernels& k = kernels();
  const int64_t per_row = normal_blocks_per_row(cols), blocks = rows * per_row;
  parallel_for(0, ceil_div(blocks, kEstimateBlocks), 1, [&](int64_t begin, int64_t end) {
    PreparedBatch prepared[2];
    A sums[kEstimateBlocks * kNormalBlockCols];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kEstimateBlocks;
      const int64_t last = std::min(first + kEstimateBlocks, blocks);
      k.prepare_normal(noise.launch, static_cast<uint32_t>(first), 2, prepared);
      if constexpr (std::is_same_v<A, double>) {
        k.normal_estimate_double(noise.launch, prepared, noise.directions.data(), w, count, sums);
      } else {
        k.normal_estimate(noise.launch, prepared, noise.directions.data(), w, count, sums);
      }
      for (int64_t b = first; b < last; ++b) {
        const int64_t o = b / per_row, i = b % per_row * kNormalBlockCols;
        const int64_t here = std::min<int64_t>(kNormalBlockCols, cols - i);
        const A* sum = sums + (b - first) * kNormalBlockCols;
        for (int64_t c = 0; c < here; ++c)
          assign(grad + o * cols + i + c, accumulate, sigma * sum[c]);
      }
    }
  });
}

template <class T>
void sign_estimate(T* grad, int64_t rows, int64_t cols, const accumulator_t<T>* w, int64_t count,
                   TensorNoise& noise, accumulator_t<T> sigma, bool accumulate) {
  using A = accumulator_t<T>;
  constexpr int64_t kBlock = kSignBlockRows * kSignBlockCols;
  const CpuKernels& k = kernels();
  const int64_t per_row = sign_blocks_per_row(cols), blocks = sign_blocks(rows, cols);
  // Whole groups of four directions: those that fill the last one have weight 0.
  const int64_t groups = ceil_div<int64_t>(count, 4);
  std::vector<float> tables;
  if constexpr (std::is_same_v<A, float>) {
    std::vector<float> weights(w, w + count);
    weights.resize(4 * groups, 0.0f);
    noise.directions.resize(4 * groups);
    tables.resize(16 * groups);
    k.row_tables(weights.data(), 4 * groups, tables.data());
  }
  parallel_for(0, ceil_div(blocks, kBatchBlocks), 1, [&](int64_t begin, int64_t end) {
    PreparedBatch prepared;
    std::vector<A> sums(kBatchBlocks * kBlock);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kBatchBlocks, last = std::min(first + kBatchBlocks, blocks);
      k.prepare_linear(noise.launch, static_cast<uint32_t>(first), 1, &prepared);
      if constexpr (std::is_same_v<A, double>) {
        k.sign_estimate_double(noise.launch, &prepared, noise.directions.data(), w, count,
                               sums.data());
      } else {
        k.sign_estimate(noise.launch, &prepared, noise.directions.data(), tables.data(), groups,
                        sums.data());
      }
      for (int64_t b = first; b < last; ++b) {
        const int64_t o = b / per_row * kSignBlockRows, i = b % per_row * kSignBlockCols;
        const int64_t rows_here = std::min<int64_t>(kSignBlockRows, rows - o);
        const int64_t cols_here = std::min<int64_t>(kSignBlockCols, cols - i);
        const A* sum = sums.data() + (b - first) * kBlock;
        for (int64_t j = 0; j < rows_here; ++j, sum += kSignBlockCols) {
          for (int64_t c = 0; c < cols_here; ++c) {
            assign(grad + (o + j) * cols + i + c, accumulate, sigma * sum[c]);
          }
        }
      }
    }
  });
}

void dense_estimate_cpu_(Tensor grad, const Tensor weights, const Tensor key, const Tensor sigma,
                         int64_t stream, bool rademacher, bool accumulate) {
  const char* op = "dense_estimate_";
  check_dense_estimate(op, grad, weights, key, sigma, stream, rademacher);
  if (grad.numel() == 0) return;
  TensorNoise noise(key, stream, 0, weights.size(0));
  dispatch_float(grad.scalar_type(), op, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    (rademacher ? sign_estimate<T>
                : normal_estimate<T>)(static_cast<T*>(grad.mutable_data_ptr()), grad.size(0),
                                      grad.size(1), static_cast<const A*>(weights.const_data_ptr()),
                                      weights.size(0), noise,
                                      static_cast<A>(*sigma.const_data_ptr<double>()), accumulate);
  });
}

// ---- materialise -------------------------------------------------------------------------------

template <class T>
void materialise_normals(T* out, int64_t count, int64_t rows, int64_t cols,
                         const TensorNoise& noise) {
  const CpuKernels& k = kernels();
  const int64_t per_row = normal_blocks_per_row(cols), blocks = rows * per_row;
  const int64_t chunks = ceil_div(blocks, kChunkBlocks), tiles = ceil_div(count, kDirectionTile);
  parallel_for(0, chunks * tiles, 1, [&](int64_t begin, int64_t end) {
    PreparedBatch prepared[kChunkBlocks / kBatchBlocks];
    float drawn[kChunkBlocks * kNormalBlockCols];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / tiles * kChunkBlocks;
      const int64_t block_end = std::min(block + kChunkBlocks, blocks);
      const int64_t batches = ceil_div(block_end - block, kBatchBlocks);
      const int64_t d_end = std::min((task % tiles + 1) * kDirectionTile, count);
      k.prepare_normal(noise.launch, static_cast<uint32_t>(block), batches, prepared);
      for (int64_t d = task % tiles * kDirectionTile; d < d_end; ++d) {
        k.normals(noise.launch, prepared, batches, noise.directions[d], drawn);
        T* to = out + d * rows * cols;
        if (cols % kNormalBlockCols == 0) {
          to += block * kNormalBlockCols;
          const int64_t elements = (block_end - block) * kNormalBlockCols;
          for (int64_t i = 0; i < elements; ++i) to[i] = static_cast<T>(drawn[i]);
          continue;
        }
        for (int64_t b = block; b < block_end; ++b) {
          const int64_t o = b / per_row, i = b % per_row * kNormalBlockCols;
          const int64_t here = std::min<int64_t>(kNormalBlockCols, cols - i);
          const float* z = drawn + (b - block) * kNormalBlockCols;
          for (int64_t c = 0; c < here; ++c) to[o * cols + i + c] = static_cast<T>(z[c]);
        }
      }
    }
  });
}

template <class T>
void materialise_signs(T* out, int64_t count, int64_t rows, int64_t cols,
                       const TensorNoise& noise) {
  const CpuKernels& k = kernels();
  const int64_t per_row = sign_blocks_per_row(cols), blocks = sign_blocks(rows, cols);
  const int64_t chunks = ceil_div(blocks, kChunkBlocks);
  parallel_for(0, chunks * count, 1, [&](int64_t begin, int64_t end) {
    PreparedBatch prepared[kChunkBlocks / kBatchBlocks];
    uint32_t words[4 * kChunkBlocks];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t d = task / chunks, block = task % chunks * kChunkBlocks;
      const int64_t block_end = std::min(block + kChunkBlocks, blocks);
      const int64_t batches = ceil_div(block_end - block, kBatchBlocks);
      k.prepare_linear(noise.launch, static_cast<uint32_t>(block), batches, prepared);
      k.sign_bits(noise.launch, prepared, batches, noise.directions[d], kChunkBlocks, words);
      for (int64_t b = block; b < block_end; ++b) {
        const int64_t o = b / per_row * kSignBlockRows, i = b % per_row * kSignBlockCols;
        const int64_t rows_here = std::min<int64_t>(kSignBlockRows, rows - o);
        const int64_t cols_here = std::min<int64_t>(kSignBlockCols, cols - i);
        for (int64_t j = 0; j < rows_here; ++j) {
          const uint32_t word = words[j * kChunkBlocks + b - block];
          T* to = out + (d * rows + o + j) * cols + i;
          for (int64_t c = 0; c < cols_here; ++c) {
            to[c] = static_cast<T>(sign_from_bit(word, static_cast<int>(c)));
          }
        }
      }
    }
  });
}

Tensor dense_materialise_cpu(const Tensor key, int64_t stream, int64_t first, int64_t count,
                             int64_t rows, int64_t cols, bool rademacher, ScalarType dtype) {
  const char* op = "dense_materialise";
  check_dense_materialise(op, key, stream, first, count, rows, cols, rademacher);
  Tensor out = torch::stable::new_empty(key, {count, rows, cols}, dtype);
  dispatch_float(dtype, op, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (out.numel() == 0) return;
    (rademacher ? materialise_signs<T>
                : materialise_normals<T>)(static_cast<T*>(out.mutable_data_ptr()), count, rows,
                                          cols, TensorNoise(key, stream, first, count));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("dense_linear_", TORCH_BOX(&dense_linear_cpu_));
  m.impl("dense_linear", TORCH_BOX(&dense_linear_cpu));
  m.impl("dense_estimate_", TORCH_BOX(&dense_estimate_cpu_));
  m.impl("dense_materialise", TORCH_BOX(&dense_materialise_cpu));
}

}  // namespace perturbed
