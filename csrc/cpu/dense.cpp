// Dense family on the CPU: y += s sigma (E_d x + e_d), the estimate sigma sum_d w_d E_d, and E_d
// itself.
//
// Noise is drawn into a buffer that stays in the first-level cache, a few rows of E_d at a time,
// and is used from there; nothing of size D * m * n exists. Work is split by the shape alone and
// every output is summed by one thread in one order, so results do not depend on the number of
// threads. Limit: the noise (see docs/kernels.md); the sums are a few per cent until a direction
// has about 16 rows.
#include "bind/dense.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "bind/dispatch.h"
#include "cpu/kernels.h"
#include "noise/signs.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

constexpr int64_t kChunkBlocks = 512;   // blocks drawn at once: 8 KiB of normals or of sign bits
constexpr int64_t kDirectionTile = 64;  // directions that share one preparation of their blocks
constexpr int64_t kEstimateBlocks = 2 * kBatchBlocks;

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// One tensor's noise: the launch constants of its stream and of `count` directions from `first` on.
struct TensorNoise {
  PhiloxLaunch launch;
  std::vector<PhiloxDirection> directions;

  TensorNoise(const Tensor& key, int64_t stream, int64_t first, int64_t count) : directions(count) {
    const int64_t* k = key.const_data_ptr<int64_t>();
    launch = philox_launch(static_cast<uint32_t>(stream), static_cast<uint32_t>(k[1]),
                           philox_key(static_cast<uint64_t>(k[0])));
    for (int64_t d = 0; d < count; ++d) {
      directions[d] = philox_direction(launch, static_cast<uint32_t>(k[2] + first + d));
    }
  }
};

// ---- forward -----------------------------------------------------------------------------------

// Order of the elements of a packed row: as they come, or as `normal_dot` draws noise.
enum class RowOrder { kNatural, kDraw };

// x as the inner loops want it: rows of A (float or double), zero-padded, and the sum of each row
// where signs need it. Copies nothing if x is already so.
template <class A>
struct PackedRows {
  const A* data;
  int64_t row_stride, token_stride;
  int64_t width;  // padded length of a row
  std::vector<A> buffer;
  std::vector<A> sums;

  template <class T>
  PackedRows(const T* x, int64_t rows, const DenseLinearSizes& s, RowOrder order, bool with_sums) {
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
    if (with_sums) sums.resize(rows * s.tokens);
    if (usable && !with_sums) return;
    const int64_t grain = ceil_div<int64_t>(1 << 15, width);
    parallel_for(0, rows * s.tokens, grain, [&](int64_t begin, int64_t end) {
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
        if (with_sums) {
          double sum = 0;
          for (int64_t k = 0; k < s.in; ++k) sum += static_cast<double>(from[k]);
          sums[i] = static_cast<A>(sum);
        }
      }
    });
  }
};

// What one task of the forward pass works with.
template <class T>
struct Forward {
  using A = accumulator_t<T>;
  const DenseLinearSizes& s;
  const CpuKernels& k;
  const TensorNoise& noise;
  const PackedRows<A>& x;
  T* y;
  A sigma;

  // y[.., o] += s_r sigma value(source * tokens + t) for every row of direction d.
  template <class Value>
  void add(int64_t d, int64_t o, Value value) const {
    for (int64_t r = 0; r < s.repeats; ++r) {
      const A scale = s.antithetic && r >= s.repeats / 2 ? -sigma : sigma;
      T* out = y + (r * s.directions + d) * s.tokens * s.out + o;
      for (int64_t t = 0; t < s.tokens; ++t) {
        out[t * s.out] = static_cast<T>(static_cast<A>(out[t * s.out]) +
                                        scale * value(r % s.sources * s.tokens + t));
      }
    }
  }

  int64_t x_row(int64_t source, int64_t d) const {
    return s.shared ? source : source * s.directions + d;
  }

  // Calls product(x rows, stride, number of rows, index of the first) for every row of direction d.
  template <class Product>
  void each_row(int64_t d, Product product) const {
    const A* rows = x.data + x_row(0, d) * x.row_stride;
    const int64_t stride = x.row_stride * (s.shared ? 1 : s.directions);
    if (s.tokens == 1) {
      product(rows, stride, s.sources, int64_t{0});
    } else {
      for (int64_t j = 0; j < s.sources; ++j) {
        product(rows + j * stride, x.token_stride, s.tokens, j * s.tokens);
      }
    }
  }

  // Few rows of x and no great padding: the noise never leaves the registers.
  static bool draws_in_registers(const DenseLinearSizes& s) {
    const int64_t width = round_up(s.in, kBatchBlocks * kNormalBlockCols);
    return std::is_same_v<A, float> && s.sources * s.tokens <= 4 && width * 8 <= s.in * 9;
  }

  // Row `row` of E_d for the directions [d, d_end), drawn in registers.
  void register_task(int64_t row, int64_t d, int64_t d_end,
                     std::vector<PreparedBatch>& prepared) const {
    if constexpr (std::is_same_v<A, float>) {
      const int64_t batches = x.width / (kBatchBlocks * kNormalBlockCols);
      const int64_t first_block = row * normal_blocks_per_row(s.in);
      float products[4];
      k.prepare_linear(noise.launch, static_cast<uint32_t>(first_block), batches, prepared.data());
      for (; d < d_end; ++d) {
        const PhiloxDirection direction = noise.directions[d];
        each_row(d, [&](const float* rows, int64_t stride, int64_t count, int64_t first) {
          k.normal_dot(noise.launch, prepared.data(), batches, direction, rows, stride, count,
                       products + first);
        });
        add(d, row, [&](int64_t i) { return products[i]; });
      }
    }
  }

  // Rows [row, row_end) of E_d for the directions [d, d_end), drawn into a buffer.
  void normal_task(int64_t row, int64_t row_end, int64_t d, int64_t d_end,
                   std::vector<PreparedBatch>& prepared, std::vector<float>& drawn,
                   std::vector<A>& products) const {
    const int64_t per_row = normal_blocks_per_row(s.in);
    const int64_t batches = ceil_div((row_end - row) * per_row, kBatchBlocks);
    k.prepare_normal(noise.launch, static_cast<uint32_t>(row * per_row), batches, prepared.data());
    for (; d < d_end; ++d) {
      k.normals(noise.launch, prepared.data(), batches, noise.directions[d], drawn.data());
      for (int64_t o = row; o < row_end; ++o) {
        const float* e = drawn.data() + (o - row) * per_row * kNormalBlockCols;
        each_row(d, [&](const A* rows, int64_t stride, int64_t count, int64_t first) {
          if constexpr (std::is_same_v<A, double>) {
            k.dot_double(e, rows, stride, count, x.width, products.data() + first);
          } else {
            k.dot(e, rows, stride, count, x.width, products.data() + first);
          }
        });
        add(d, o, [&](int64_t i) { return products[i]; });
      }
    }
  }

  // Block rows (4 rows each) [row, row_end) of E_d for the directions [d, d_end).
  void sign_task(int64_t row, int64_t row_end, int64_t d, int64_t d_end,
                 std::vector<PreparedBatch>& prepared, std::vector<uint32_t>& drawn,
                 std::vector<A>& products) const {
    const int64_t per_row = sign_blocks_per_row(s.in);
    const int64_t batches = ceil_div((row_end - row) * per_row, kBatchBlocks);
    const int64_t stride_bits = batches * kBatchBlocks;
    k.prepare_linear(noise.launch, static_cast<uint32_t>(row * per_row), batches, prepared.data());
    for (; d < d_end; ++d) {
      k.sign_bits(noise.launch, prepared.data(), batches, noise.directions[d], stride_bits,
                  drawn.data());
      for (int64_t q = row; q < row_end; ++q) {
        const uint32_t* bits = drawn.data() + (q - row) * per_row;
        each_row(d, [&](const A* rows, int64_t stride, int64_t count, int64_t first) {
          A* out = products.data() + 4 * first;
          if constexpr (std::is_same_v<A, double>) {
            k.bit_sum_double(bits, stride_bits, rows, stride, count, per_row * 32, out);
          } else {
            k.bit_sum(bits, stride_bits, rows, stride, count, per_row * 32, out);
          }
        });
        const int64_t rows_here = std::min<int64_t>(4, s.out - 4 * q);
        for (int64_t j = 0; j < rows_here; ++j) {
          add(d, 4 * q + j, [&](int64_t i) {
            const int64_t row_of_x = x_row(i / s.tokens, d) * s.tokens + i % s.tokens;
            return 2 * products[4 * i + j] - x.sums[row_of_x];
          });
        }
      }
    }
  }

  void run(bool rademacher) const {
    const bool in_registers = !rademacher && draws_in_registers(s);
    const int64_t per_row = rademacher ? sign_blocks_per_row(s.in) : normal_blocks_per_row(s.in);
    const int64_t rows = rademacher ? ceil_div<int64_t>(s.out, kSignBlockRows) : s.out;
    const int64_t chunk = in_registers ? 1 : std::clamp<int64_t>(kChunkBlocks / per_row, 1, rows);
    const int64_t chunks = ceil_div(rows, chunk), tiles = ceil_div(s.directions, kDirectionTile);
    const int64_t batches = ceil_div(chunk * per_row, kBatchBlocks);
    const int64_t drawn = in_registers ? 0 : batches * kBatchBlocks * 4;
    parallel_for(0, chunks * tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<PreparedBatch> prepared(batches);
      std::vector<float> normals(rademacher ? 0 : drawn + kRowPadding);
      std::vector<uint32_t> bits(rademacher ? drawn : 0);
      std::vector<A> products(s.sources * s.tokens * (rademacher ? 4 : 1));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / tiles * chunk, d = task % tiles * kDirectionTile;
        const int64_t row_end = std::min(row + chunk, rows);
        const int64_t d_end = std::min(d + kDirectionTile, s.directions);
        if (rademacher) {
          sign_task(row, row_end, d, d_end, prepared, bits, products);
        } else if (in_registers) {
          register_task(row, d, d_end, prepared);
        } else {
          normal_task(row, row_end, d, d_end, prepared, normals, products);
        }
      }
    });
  }
};

// Draws the vector `noise` of length `count` for direction d into `out` (room for whole batches).
void draw_vector(const CpuKernels& k, const TensorNoise& noise, int64_t d, int64_t count,
                 bool rademacher, const std::vector<PreparedBatch>& prepared,
                 std::vector<uint32_t>& bits, std::vector<float>& out) {
  const int64_t batches = static_cast<int64_t>(prepared.size());
  if (!rademacher) {
    k.normals(noise.launch, prepared.data(), batches, noise.directions[d], out.data());
    return;
  }
  k.sign_bits(noise.launch, prepared.data(), batches, noise.directions[d], batches * kBatchBlocks,
              bits.data());
  for (int64_t i = 0; i < count; ++i) out[i] = sign_from_bit(bits[i / 32], i % 32);
}

template <class T>
void add_bias_noise(T* y, const DenseLinearSizes& s, const TensorNoise& noise,
                    accumulator_t<T> sigma, bool rademacher) {
  using A = accumulator_t<T>;
  const CpuKernels& k = kernels();
  const int64_t blocks = rademacher ? sign_blocks(1, s.out) : normal_blocks(1, s.out);
  const int64_t batches = ceil_div(blocks, kBatchBlocks);
  std::vector<PreparedBatch> prepared(batches);
  (rademacher ? k.prepare_linear : k.prepare_normal)(noise.launch, 0, batches, prepared.data());
  const int64_t grain = ceil_div<int64_t>(1 << 14, s.repeats * s.tokens * s.out);
  parallel_for(0, s.directions, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> bits(rademacher ? batches * kBatchBlocks * 4 : 0);
    std::vector<float> e(std::max(batches * kBatchBlocks * 4, s.out));
    for (int64_t d = begin; d < end; ++d) {
      draw_vector(k, noise, d, s.out, rademacher, prepared, bits, e);
      for (int64_t r = 0; r < s.repeats; ++r) {
        const A scale = s.antithetic && r >= s.repeats / 2 ? -sigma : sigma;
        for (int64_t t = 0; t < s.tokens; ++t) {
          T* out = y + ((r * s.directions + d) * s.tokens + t) * s.out;
          for (int64_t o = 0; o < s.out; ++o) {
            out[o] = static_cast<T>(static_cast<A>(out[o]) + scale * static_cast<A>(e[o]));
          }
        }
      }
    }
  });
}

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
    if (weight_stream >= 0 && s.in > 0) {
      const TensorNoise noise(key, weight_stream, 0, directions);
      const bool in_registers = !rademacher && Forward<T>::draws_in_registers(s);
      const PackedRows<A> rows(static_cast<const T*>(x.const_data_ptr()), x.size(0), s,
                               in_registers ? RowOrder::kDraw : RowOrder::kNatural, rademacher);
      Forward<T>{s, kernels(), noise, rows, out, scale}.run(rademacher);
    }
    if (bias_stream >= 0) {
      add_bias_noise<T>(out, s, TensorNoise(key, bias_stream, 0, directions), scale, rademacher);
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
                     const TensorNoise& noise, accumulator_t<T> sigma, bool accumulate) {
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
                   const TensorNoise& noise, accumulator_t<T> sigma, bool accumulate) {
  using A = accumulator_t<T>;
  const CpuKernels& k = kernels();
  const int64_t per_row = sign_blocks_per_row(cols), blocks = sign_blocks(rows, cols);
  const int64_t padded = round_up(count, kBatchBlocks);
  std::vector<uint32_t> e(padded), g(padded), h(padded);
  double total = 0;
  for (int64_t d = 0; d < count; ++d) {
    const PhiloxDirection direction = noise.directions[d];
    e[d] = direction.e, g[d] = direction.g, h[d] = direction.h;
    total += w[d];
  }
  const DirectionArrays directions{e.data(), g.data(), h.data()};
  parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    A sums[kSignBlockRows * kSignBlockCols];
    for (int64_t b = begin; b < end; ++b) {
      const uint32_t block = static_cast<uint32_t>(b);
      if constexpr (std::is_same_v<A, double>) {
        k.sign_estimate_double(noise.launch, block, directions, w, count, sums);
      } else {
        k.sign_estimate(noise.launch, block, directions, w, count, sums);
      }
      const int64_t o = b / per_row * kSignBlockRows, i = b % per_row * kSignBlockCols;
      const int64_t rows_here = std::min<int64_t>(kSignBlockRows, rows - o);
      const int64_t cols_here = std::min<int64_t>(kSignBlockCols, cols - i);
      for (int64_t j = 0; j < rows_here; ++j) {
        for (int64_t c = 0; c < cols_here; ++c) {
          const A sum = 2 * sums[kSignBlockCols * j + c] - static_cast<A>(total);
          assign(grad + (o + j) * cols + i + c, accumulate, sigma * sum);
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
  const TensorNoise noise(key, stream, 0, weights.size(0));
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
