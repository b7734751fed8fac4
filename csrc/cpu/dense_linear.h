// Forward pass of the dense family: y += s sigma (E_d x + e_d).
//
// A task covers a chunk of rows of E_d and a tile of directions. It prepares the chunk's blocks
// once (noise/philox.h), then draws them for one direction after the other and multiplies them with
// that direction's rows of x: in registers if the rows of x are few, from a first-level buffer
// otherwise.
#pragma once

#include <algorithm>

#include "bind/dispatch.h"
#include "cpu/packed_rows.h"
#include "noise/signs.h"

namespace perturbed {

constexpr int64_t kChunkBlocks = 512;   // blocks drawn at once: 8 KiB of normals or of sign bits
constexpr int64_t kLookupGroup = 1024;  // outputs that share one making of x's tables
constexpr int64_t kRegisterTile = 8;    // directions whose x stays in the first-level cache
constexpr int64_t kDirectionTile = 64;  // directions that share one preparation of their blocks

// What one task of the forward pass works with.
template <class T>
struct Forward {
  using A = accumulator_t<T>;
  const DenseLinearSizes& s;
  const CpuKernels& k;
  const TensorNoise& noise;
  const PackedRows<A>& x;
  const std::vector<float>& bias;  // [D, m], or empty
  T* y;
  A sigma;

  // y[.., o] += s_r sigma (value(source * tokens + t) + e_d[o]) for every row of direction d.
  template <class Value>
  void add(int64_t d, int64_t o, Value value) const {
    const A e = bias.empty() ? A(0) : static_cast<A>(bias[d * s.out + o]);
    int64_t source = 0;  // r % sources, without a division in what may be the inner loop
    for (int64_t r = 0; r < s.repeats; ++r) {
      const A scale = s.antithetic && r >= s.repeats / 2 ? -sigma : sigma;
      T* out = y + (r * s.directions + d) * s.tokens * s.out + o;
      for (int64_t t = 0; t < s.tokens; ++t) {
        const A sum = value(source * s.tokens + t) + e;
        out[t * s.out] = static_cast<T>(static_cast<A>(out[t * s.out]) + scale * sum);
      }
      if (++source == s.sources) source = 0;
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
      float products[4 * kRegisterTile];
      k.prepare_linear(noise.launch, static_cast<uint32_t>(first_block), batches, prepared.data());
      const int64_t count = d_end - d, next = s.shared ? 0 : x.row_stride;
      // One call for all the rows of x, or one per source if each has tokens.
      const int64_t calls = s.tokens == 1 ? 1 : s.sources;
      const int64_t rows = s.tokens == 1 ? s.sources : s.tokens;
      const int64_t stride =
          s.tokens > 1 ? x.token_stride : x.row_stride * (s.shared ? 1 : s.directions);
      for (int64_t j = 0; j < calls; ++j) {
        k.normal_dot(noise.launch, prepared.data(), batches, noise.directions.data() + d, count,
                     x.data + x_row(j, d) * x.row_stride, next, stride, rows, products + j * rows);
      }
      for (int64_t i = 0; i < count; ++i) {
        add(d + i, row, [&](int64_t r) { return products[4 * i + r]; });
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
            const int64_t row = x_row(first / s.tokens, d) * s.tokens;
            const int64_t step = s.tokens == 1 && !s.shared ? s.directions : 1;
            k.bit_sum(bits, stride_bits, rows, stride, x.halves.data() + row * x.halves_stride,
                      step * x.halves_stride, count, per_row * 32, out);
          }
        });
        const int64_t rows_here = std::min<int64_t>(4, s.out - 4 * q);
        for (int64_t j = 0; j < rows_here; ++j) {
          add(d, 4 * q + j, [&](int64_t i) { return products[4 * i + j]; });
        }
      }
    }
  }

  // Signs of many outputs: looked up from tables of x's signed sums, 64 rows of E_d at a time.
  static bool looks_up(const DenseLinearSizes& s) {
    return std::is_same_v<A, float> && s.out >= kLookupRows;
  }

  // Rows [o, o_end) of E_d for direction d.
  void lookup_task(int64_t d, int64_t o, int64_t o_end, std::vector<float>& tables,
                   float* products) const {
    if constexpr (std::is_same_v<A, float>) {
      const int64_t per_row = sign_blocks_per_row(s.in), size = 4 * x.width;
      each_row(d, [&](const float* rows, int64_t stride, int64_t count, int64_t first) {
        for (int64_t i = 0; i < count; ++i) {
          k.row_tables(rows + i * stride, x.width, tables.data() + (first + i) * size);
        }
      });
      const int64_t count = s.sources * s.tokens;
      for (; o < o_end; o += kLookupRows) {
        const uint32_t block = static_cast<uint32_t>(o / kSignBlockRows * per_row);
        const int64_t here = std::min(kLookupRows, s.out - o);
        for (int64_t i = 0; i < count; i += 2) {
          const int64_t pair = std::min<int64_t>(2, count - i);
          k.lookup_rows(noise.launch, block, per_row, noise.directions[d], tables.data() + i * size,
                        pair, products);
          for (int64_t p = 0; p < pair; ++p) add_row(d, o, here, i + p, products + p * kLookupRows);
        }
      }
    }
  }

  // y[.., o : o + count] += s_r sigma (values + e_d) for the rows of y that read row i of x.
  void add_row(int64_t d, int64_t o, int64_t count, int64_t i, const A* values) const {
    for (int64_t r = i / s.tokens; r < s.repeats; r += s.sources) {
      const A scale = s.antithetic && r >= s.repeats / 2 ? -sigma : sigma;
      T* out = y + ((r * s.directions + d) * s.tokens + i % s.tokens) * s.out + o;
      const float* e = bias.empty() ? nullptr : bias.data() + d * s.out + o;
      for (int64_t c = 0; c < count; ++c) {
        const A value = values[c] + (e ? static_cast<A>(e[c]) : A(0));
        out[c] = static_cast<T>(static_cast<A>(out[c]) + scale * value);
      }
    }
  }

  void run_lookups() const {
    const int64_t groups = ceil_div(s.out, kLookupGroup);
    torch::stable::parallel_for(0, s.directions * groups, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> tables(s.sources * s.tokens * 4 * x.width);
      float products[2 * kLookupRows];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t o = task % groups * kLookupGroup;
        lookup_task(task / groups, o, std::min(o + kLookupGroup, s.out), tables, products);
      }
    });
  }

  void run(bool rademacher) const {
    if (rademacher && looks_up(s)) return run_lookups();
    const bool in_registers = !rademacher && draws_in_registers(s);
    const int64_t per_row = rademacher ? sign_blocks_per_row(s.in) : normal_blocks_per_row(s.in);
    const int64_t rows = rademacher ? ceil_div<int64_t>(s.out, kSignBlockRows) : s.out;
    const int64_t chunk = in_registers ? 1 : std::clamp<int64_t>(kChunkBlocks / per_row, 1, rows);
    // Drawing in registers leaves x as the only traffic: few directions, all rows of E_d for them.
    const int64_t tile = in_registers ? kRegisterTile : kDirectionTile;
    const int64_t chunks = ceil_div(rows, chunk), tiles = ceil_div(s.directions, tile);
    const int64_t batches = ceil_div(chunk * per_row, kBatchBlocks);
    const int64_t drawn = in_registers ? 0 : batches * kBatchBlocks * 4;
    torch::stable::parallel_for(0, chunks * tiles, 1, [&](int64_t begin, int64_t end) {
      std::vector<PreparedBatch> prepared(batches);
      std::vector<float> normals(rademacher ? 0 : drawn + kRowPadding);
      std::vector<uint32_t> bits(rademacher ? drawn : 0);
      std::vector<A> products(s.sources * s.tokens * (rademacher ? 4 : 1));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task % chunks * chunk, d = task / chunks * tile;
        const int64_t row_end = std::min(row + chunk, rows);
        const int64_t d_end = std::min(d + tile, s.directions);
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

// Noise of a bias of length m for every direction: [D, m], the size of one row of y per direction.
inline std::vector<float> draw_bias(const TensorNoise& noise, int64_t m, bool rademacher) {
  const CpuKernels& k = kernels();
  const int64_t directions = static_cast<int64_t>(noise.directions.size());
  const int64_t blocks = rademacher ? sign_blocks(1, m) : normal_blocks(1, m);
  const int64_t batches = ceil_div(blocks, kBatchBlocks);
  std::vector<PreparedBatch> prepared(batches);
  (rademacher ? k.prepare_linear : k.prepare_normal)(noise.launch, 0, batches, prepared.data());
  std::vector<float> bias(directions * m);
  const int64_t grain = ceil_div<int64_t>(1 << 14, m);
  torch::stable::parallel_for(0, directions, grain, [&](int64_t begin, int64_t end) {
    const int64_t stride = batches * kBatchBlocks;
    std::vector<uint32_t> bits(rademacher ? 4 * stride : 0);
    std::vector<float> drawn(rademacher ? 0 : 4 * stride);
    for (int64_t d = begin; d < end; ++d) {
      float* e = bias.data() + d * m;
      if (rademacher) {
        k.sign_bits(noise.launch, prepared.data(), batches, noise.directions[d], stride,
                    bits.data());
        for (int64_t i = 0; i < m; ++i) e[i] = sign_from_bit(bits[i / 32], i % 32);
      } else {
        k.normals(noise.launch, prepared.data(), batches, noise.directions[d], drawn.data());
        std::copy(drawn.begin(), drawn.begin() + m, e);
      }
    }
  });
  return bias;
}

// y += s sigma e_d, for a layer whose weight is not perturbed here.
template <class T>
void add_bias(T* y, const DenseLinearSizes& s, const std::vector<float>& bias,
              accumulator_t<T> sigma) {
  using A = accumulator_t<T>;
  const int64_t grain = ceil_div<int64_t>(1 << 14, s.tokens * s.out);
  torch::stable::parallel_for(0, s.repeats * s.directions, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A scale = s.antithetic && b / s.directions >= s.repeats / 2 ? -sigma : sigma;
      const float* e = bias.data() + b % s.directions * s.out;
      for (int64_t t = 0; t < s.tokens; ++t) {
        T* out = y + (b * s.tokens + t) * s.out;
        for (int64_t o = 0; o < s.out; ++o) {
          out[o] = static_cast<T>(static_cast<A>(out[o]) + scale * static_cast<A>(e[o]));
        }
      }
    }
  });
}

}  // namespace perturbed
