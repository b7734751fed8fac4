// The CPU inner loops on Rademacher signs: drawing bits, masked sums, and sums by lookup. Part of isa.h.
#pragma once

#include "cpu/lanes.h"

namespace perturbed::PERTURBED_ISA {

// ---- bits and the estimate ---------------------------------------------------------------------

static void sign_bits(const PhiloxLaunch& launch_in, const PreparedBatch* prepared, int64_t batches,
                      PhiloxDirection direction, int64_t stride, uint32_t* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  for (int64_t i = 0; i < batches; ++i) {
    for (int part = 0; part < kParts; ++part) {
      const Counters c[1] = {load_part(prepared, i * kParts + part)};
      U w[4][1];
      finish(c, d, launch, w);
      for (int j = 0; j < 4; ++j) Simd::store_u(out + j * stride, w[j][0]);
      out += kLanes;
    }
  }
}

// out[p] = the bits 4 m + p of four words, word k's at bit 4 m + k: a 4 x 4 transposition per nibble.
PT_INLINE void transpose_nibbles(const U (&w)[4], U (&out)[4]) {
  const U even = Simd::set1_u(0x55555555u), odd = Simd::set1_u(0xaaaaaaaau);
  const U low = Simd::set1_u(0x33333333u), high = Simd::set1_u(0xccccccccu);
  U pairs[2][2];  // [words 0 and 1, words 2 and 3][even, odd bits]
  PT_UNROLL for (int i = 0; i < 2; ++i) {
    const U a = w[2 * i], b = w[2 * i + 1];
    pairs[i][0] = Simd::and_or(Simd::template shl<1>(b), odd, Simd::and_u(a, even));
    pairs[i][1] = Simd::and_or(Simd::template shr<1>(a), even, Simd::and_u(b, odd));
  }
  PT_UNROLL for (int i = 0; i < 2; ++i) {
    const U a = pairs[0][i], b = pairs[1][i];
    out[i] = Simd::and_or(Simd::template shl<2>(b), high, Simd::and_u(a, low));
    out[i + 2] = Simd::and_or(Simd::template shr<2>(a), low, Simd::and_u(b, high));
  }
}

// Four directions choose among the 16 signed sums of their weights. Lanes are blocks; a chunk's bits
// are drawn and transposed first, then eight columns are summed in registers over its directions.
static void sign_estimate(const PhiloxLaunch& launch_in, const PreparedBatch* prepared,
                          const PhiloxDirection* directions, const float* tables, int64_t groups,
                          float* out) {
  constexpr int kChunk = 16;  // groups whose transposed bits, 16 KiB, stay in the first-level cache
  const PhiloxLaunch launch = launch_in;
  for (int part = 0; part < kParts; ++part) {
    const Counters c[1] = {load_part(prepared, part)};
    alignas(64) uint32_t bits[4][4][kChunk][kLanes];  // [row][column % 4][group][block]
    alignas(64) float sums[4][4][8][kLanes] = {};     // [row][column % 4][column / 4][block]
    for (int64_t first = 0; first < groups; first += kChunk) {
      const int count = static_cast<int>(groups - first < kChunk ? groups - first : kChunk);
      for (int g = 0; g < count; ++g) {
        U words[4][4];  // [row][direction]
        for (int k = 0; k < 4; ++k) {
          U w[4][1];
          finish(c, broadcast(directions[4 * (first + g) + k]), launch, w);
          PT_UNROLL for (int j = 0; j < 4; ++j) words[j][k] = w[j][0];
        }
        for (int j = 0; j < 4; ++j) {
          U by_column[4];
          transpose_nibbles(words[j], by_column);
          PT_UNROLL for (int p = 0; p < 4; ++p) Simd::store_u(bits[j][p][g], by_column[p]);
        }
      }
      for (int j = 0; j < 4; ++j) {
        for (int p = 0; p < 4; ++p) {
          F sum[8];
          PT_UNROLL for (int m = 0; m < 8; ++m) sum[m] = Simd::load(sums[j][p][m]);
          for (int g = 0; g < count; ++g) {
            U index = Simd::load_u(bits[j][p][g]);
            const float* table = tables + 16 * (first + g);
            PT_UNROLL for (int m = 0; m < 8; ++m) {
              sum[m] = Simd::add(sum[m], Simd::lookup16(table, index));
              index = Simd::template shr<4>(index);
            }
          }
          PT_UNROLL for (int m = 0; m < 8; ++m) Simd::store(sums[j][p][m], sum[m]);
        }
      }
    }
    for (int b = 0; b < kLanes; ++b, out += kSignBlockRows * kSignBlockCols) {
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < kSignBlockCols; ++i) {
          out[kSignBlockCols * j + i] = sums[j][i % 4][i / 4][b];
        }
      }
    }
  }
}

static void sign_estimate_double(const PhiloxLaunch& launch, const PreparedBatch* prepared,
                                 const PhiloxDirection* directions, const double* w, int64_t count,
                                 double* out) {
  constexpr int64_t kElements = kBatchBlocks * kSignBlockRows * kSignBlockCols;
  for (int64_t i = 0; i < kElements; ++i) out[i] = 0;
  for (int64_t d = 0; d < count; ++d) {
    uint32_t words[kSignBlockRows * kBatchBlocks];
    sign_bits(launch, prepared, 1, directions[d], kBatchBlocks, words);
    for (int64_t i = 0; i < kElements; ++i) {
      const int64_t block = i / 128, row = i / 32 % 4;
      out[i] += words[row * kBatchBlocks + block] >> (i % 32) & 1u ? w[d] : -w[d];
    }
  }
}

// ---- masked sums ------------------------------------------------------------------------------

constexpr int64_t kHalfSumWords = kHalfSumColumns / 32;

static void half_sums(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kHalfSumColumns, out += kHalfSumSize) {
    const int64_t end = i + kHalfSumColumns < n ? i + kHalfSumColumns : n;
    F sum = Simd::zero();
    for (int64_t k = i; k < end; k += kLanes) sum = Simd::add(sum, Simd::load(x + k));
    Simd::store(out, Simd::mul(sum, Simd::set1(0.5f)));
  }
}

template <int R>
static void bit_sum_rows(const uint32_t* bits, int64_t bits_stride, const float* x,
                         int64_t x_stride, const float* halves, int64_t halves_stride, int64_t n,
                         float* out) {
  constexpr int kVectors = 32 / kLanes;
  F sum[R][4];
  for (auto& row : sum) {
    for (F& value : row) value = Simd::zero();
  }
  for (int64_t first = 0; first < n / 32; first += kHalfSumWords, halves += kHalfSumSize) {
    const int64_t last = first + kHalfSumWords < n / 32 ? first + kHalfSumWords : n / 32;
    for (int64_t word = first; word < last; ++word) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const F value = Simd::load(x + r * x_stride + 32 * word + kLanes * v);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            sum[r][j] = Simd::add_where(sum[r][j], value, bits + j * bits_stride + word, v);
          }
        }
      }
    }
    PT_UNROLL for (int r = 0; r < R; ++r) {
      const F half = Simd::load(halves + r * halves_stride);
      PT_UNROLL for (int j = 0; j < 4; ++j) sum[r][j] = Simd::sub(sum[r][j], half);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 4; ++j) out[4 * r + j] = 2.0f * Simd::sum(sum[r][j]);
  }
}

static void bit_sum(const uint32_t* bits, int64_t bits_stride, const float* x, int64_t x_stride,
                    const float* halves, int64_t halves_stride, int64_t rows, int64_t n,
                    float* out) {
  for (; rows >= 2; rows -= 2, x += 2 * x_stride, halves += 2 * halves_stride, out += 8) {
    bit_sum_rows<2>(bits, bits_stride, x, x_stride, halves, halves_stride, n, out);
  }
  if (rows == 1) bit_sum_rows<1>(bits, bits_stride, x, x_stride, halves, halves_stride, n, out);
}

static void bit_sum_double(const uint32_t* bits, int64_t bits_stride, const double* x,
                           int64_t x_stride, int64_t rows, int64_t n, double* out) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride) {
    for (int j = 0; j < 4; ++j) {
      double sum[8] = {};
      for (int64_t i = 0; i < n; i += 8) {
        const uint32_t byte = bits[j * bits_stride + i / 32] >> (i % 32);
        for (int c = 0; c < 8; ++c) sum[c] += byte >> c & 1u ? x[i + c] : -x[i + c];
      }
      out[4 * r + j] =
          ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    }
  }
}

// ---- sums by lookup, rows of signs as lanes ---------------------------------------------------

// The table of four columns: entry p is the sum of x[k] with the signs of p's bits.
static void row_tables(const float* x, int64_t n, float* tables) {
  for (int64_t i = 0; i < n; i += 4, tables += 16) {
    const float low[4] = {-x[i] - x[i + 1], x[i] - x[i + 1], x[i + 1] - x[i], x[i] + x[i + 1]};
    const float high[4] = {-x[i + 2] - x[i + 3], x[i + 2] - x[i + 3], x[i + 3] - x[i + 2],
                           x[i + 2] + x[i + 3]};
    for (int p = 0; p < 16; ++p) tables[p] = low[p & 3] + high[p >> 2];
  }
}

// Lanes are block rows: word j of a lane holds 32 signs of its row j, and four of them choose among
// the 16 sums of their columns. No sign is ever turned into a mask.
template <int R>
static void lookup_rows_of(const PhiloxLaunch& launch_in, uint32_t block, int64_t per_row,
                           PhiloxDirection direction, const float* tables, float* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  const int64_t stride = per_row * 8 * 16;  // from one row's tables to the next's
  for (int part = 0; part < kParts; ++part) {
    alignas(64) uint32_t blocks[kLanes];
    Simd::store_u(blocks, Simd::block_order());  // so that `interleave` leaves rows in order
    for (uint32_t& b : blocks) {
      b = block + (static_cast<uint32_t>(part * kLanes) + b) * static_cast<uint32_t>(per_row);
    }
    U c1 = Simd::load_u(blocks);
    F sum[R][4];
    PT_UNROLL for (int r = 0; r < R; ++r) {
      PT_UNROLL for (int j = 0; j < 4; ++j) sum[r][j] = Simd::zero();
    }
    const float* table = tables;
    for (int64_t b = 0; b < per_row; ++b, c1 = Simd::add_u(c1, Simd::set1_u(1))) {
      const Counters c[1] = {prepare(launch, c1)};
      U w[4][1];
      finish(c, d, launch, w);
      for (int group = 0; group < 8; ++group, table += 16) {
        PT_UNROLL for (int j = 0; j < 4; ++j) {
          PT_UNROLL for (int r = 0; r < R; ++r) {
            sum[r][j] = Simd::add(sum[r][j], Simd::lookup16(table + r * stride, w[j][0]));
          }
          w[j][0] = Simd::template shr<4>(w[j][0]);
        }
      }
    }
    PT_UNROLL for (int r = 0; r < R; ++r) {
      Simd::interleave(sum[r]);
      PT_UNROLL for (int k = 0; k < 4; ++k) {
        Simd::store(out + r * kLookupRows + 4 * kLanes * part + kLanes * k, sum[r][k]);
      }
    }
  }
}

static void lookup_rows(const PhiloxLaunch& launch, uint32_t block, int64_t per_row,
                        PhiloxDirection direction, const float* tables, int64_t rows, float* out) {
  (rows == 2 ? lookup_rows_of<2> : lookup_rows_of<1>)(launch, block, per_row, direction, tables,
                                                      out);
}

// ---- sign products by table --------------------------------------------------------------------
//
// Four columns of x admit 16 signed sums. With those of a panel of 32 rows in a table, four columns
// of a row of signs cost one addition instead of four: the method of Arlazarov, Dinic, Kronrod and
// Faradzev (1970), "four Russians", as used for 1-bit weights. A table of 8 groups, the columns of
// one word of signs, fills half of a 32 KiB first-level cache.

constexpr int kPanelVectors = kPanelRows / kLanes;

static void sign_table(const float* x, float* out) {
  for (int group = 0; group < 8; ++group, x += 4 * kPanelRows, out += 16 * kPanelRows) {
    for (int v = 0; v < kPanelVectors; ++v) {
      const F a = Simd::load(x + v * kLanes), b = Simd::load(x + kPanelRows + v * kLanes);
      const F c = Simd::load(x + 2 * kPanelRows + v * kLanes);
      const F d = Simd::load(x + 3 * kPanelRows + v * kLanes);
      const F none = Simd::zero();
      const F low[4] = {Simd::sub(Simd::sub(none, a), b), Simd::sub(a, b), Simd::sub(b, a),
                        Simd::add(a, b)};
      const F high[4] = {Simd::sub(Simd::sub(none, c), d), Simd::sub(c, d), Simd::sub(d, c),
                         Simd::add(c, d)};
      PT_UNROLL for (int pattern = 0; pattern < 16; ++pattern) {
        Simd::store(out + pattern * kPanelRows + v * kLanes,
                    Simd::add(low[pattern & 3], high[pattern >> 2]));
      }
    }
  }
}

static void sign_lookup(const float* table, const uint32_t* bits, int64_t bits_stride, int64_t rows,
                        float* sums, int64_t sums_stride) {
  for (int64_t r = 0; r < rows; ++r, bits += bits_stride, sums += sums_stride) {
    const uint32_t word = *bits;
    // Two vectors at a time: their addresses are shared and their sums are independent.
    constexpr int kStep = kPanelVectors < 2 ? kPanelVectors : 2;
    for (int v = 0; v < kPanelVectors; v += kStep) {
      F sum[kStep];
      PT_UNROLL for (int k = 0; k < kStep; ++k) sum[k] = Simd::load(sums + (v + k) * kLanes);
      PT_UNROLL for (int group = 0; group < 8; ++group) {
        const float* entry = table + (16 * group + (word >> (4 * group) & 15u)) * kPanelRows;
        PT_UNROLL for (int k = 0; k < kStep; ++k) {
          sum[k] = Simd::add(sum[k], Simd::load(entry + (v + k) * kLanes));
        }
      }
      PT_UNROLL for (int k = 0; k < kStep; ++k) Simd::store(sums + (v + k) * kLanes, sum[k]);
    }
  }
}

static void add_column(const float* sums, int64_t rows, float scale, float* y) {
  const F factor = Simd::set1(scale);
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    const F column = Simd::template load_strided<kPanelRows>(sums + r * kPanelRows);
    Simd::store(y + r, Simd::fma(factor, column, Simd::load(y + r)));
  }
  for (; r < rows; ++r) y[r] = exact_fma(scale, sums[r * kPanelRows], y[r]);
}

}  // namespace perturbed::PERTURBED_ISA
