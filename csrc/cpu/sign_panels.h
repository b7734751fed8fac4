// Forward pass of Rademacher noise for many rows per direction: y += s sigma E_d x by table lookup.
//
// The rows of x are transposed into panels of 32. A task takes a panel and a tile of rows of
// E_d (of several directions if all see the same x), builds the table of each 32 columns once and
// adds one entry per four columns and row. A quarter of a matrix product's additions, and no E_d in
// memory but the tile's bits. Limit: loads from the first-level cache, one register per four
// columns.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "bind/dispatch.h"
#include "cpu/packed_rows.h"

namespace perturbed {

constexpr int64_t kTileBlockRows = 64;  // block rows (4 rows of E_d each) of one tile
constexpr int64_t kPanelsPerTask = 4;   // panels that share one drawing of the tile's bits

// Transposes rows [first, first + kPanelRows) of the rows of x that belong to direction d (or to all)
// into a panel: [columns padded to 32][kPanelRows], zeros beyond the rows and columns of x.
template <class T>
void transpose_panel(const T* x, const DenseLinearSizes& s, int64_t d, int64_t first,
                     float* panel) {
  const int64_t here = std::min(kPanelRows, s.sources * s.tokens - first);
  const int64_t width = round_up(s.in, kSignBlockCols);
  if (here < kPanelRows || width > s.in) std::fill(panel, panel + width * kPanelRows, 0.0f);
  for (int64_t lane = 0; lane < here; ++lane) {
    const int64_t source = (first + lane) / s.tokens, token = (first + lane) % s.tokens;
    const int64_t row = s.shared ? source : source * s.directions + d;
    const T* from = x + row * s.x_row_stride + token * s.x_token_stride;
    for (int64_t i = 0; i < s.in; ++i) panel[i * kPanelRows + lane] = static_cast<float>(from[i]);
  }
}

// The panels of x that many tasks use: all of them if every member sees the same rows, none otherwise
// (a task then transposes the panel it needs).
struct SharedPanels {
  std::unique_ptr<float[]> data;

  template <class T>
  SharedPanels(const T* x, const DenseLinearSizes& s) {
    if (!s.shared) return;
    const int64_t panels = ceil_div(s.sources * s.tokens, kPanelRows);
    const int64_t size = round_up(s.in, kSignBlockCols) * kPanelRows;
    data.reset(new float[panels * size]);
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        transpose_panel(x, s, 0, p * kPanelRows, data.get() + p * size);
      }
    });
  }
};

template <class T>
struct SignProducts {
  const DenseLinearSizes& s;
  const CpuKernels& k;
  const TensorNoise& noise;
  const T* x;
  const SharedPanels& panels;
  const std::vector<float>& bias;  // [D, m], or empty
  T* y;
  float sigma;

  // The sums of rows [o, o + rows) of E_d and one panel, to all the rows of y that they belong to.
  void add(const float* sums, int64_t d, int64_t o, int64_t rows, int64_t panel) const {
    const int64_t first = panel * kPanelRows;
    const int64_t here = std::min(kPanelRows, s.sources * s.tokens - first);
    for (int64_t lane = 0; lane < here; ++lane) {
      const int64_t source = (first + lane) / s.tokens, token = (first + lane) % s.tokens;
      for (int64_t r = source; r < s.repeats; r += s.sources) {
        const float scale = s.antithetic && r >= s.repeats / 2 ? -sigma : sigma;
        T* out = y + ((r * s.directions + d) * s.tokens + token) * s.out + o;
        if constexpr (std::is_same_v<T, float>) {
          k.add_column(sums + lane, rows, scale, out);
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            out[i] =
                static_cast<T>(static_cast<float>(out[i]) + scale * sums[i * kPanelRows + lane]);
          }
        }
      }
    }
  }

  void run() const {
    const int64_t per_row = sign_blocks_per_row(s.in);
    const int64_t block_rows = ceil_div<int64_t>(s.out, kSignBlockRows);
    const int64_t tile_rows = std::min(block_rows, kTileBlockRows);
    const int64_t tile_directions = s.shared ? kTileBlockRows / tile_rows : 1;
    const int64_t row_tiles = ceil_div(block_rows, tile_rows);
    const int64_t direction_tiles = ceil_div(s.directions, tile_directions);
    const int64_t panel_count = ceil_div(s.sources * s.tokens, kPanelRows);
    const int64_t panel_tiles = ceil_div(panel_count, kPanelsPerTask);
    const int64_t batches = ceil_div(tile_rows * per_row, kBatchBlocks);
    const int64_t stride = batches * kBatchBlocks;
    torch::stable::parallel_for(
        0, row_tiles * direction_tiles * panel_tiles, 1, [&](int64_t begin, int64_t end) {
          std::vector<PreparedBatch> prepared(batches);
          std::vector<uint32_t> bits(tile_directions * 4 * stride);
          std::vector<float> table(kSignTableSize);
          std::vector<float> columns(s.shared ? 0 : per_row * kSignBlockCols * kPanelRows);
          std::vector<float> sums(tile_directions * tile_rows * kSignBlockRows * kPanelRows);
          for (int64_t task = begin; task < end; ++task) {
            const int64_t tile = task / panel_tiles;
            const int64_t q = tile % row_tiles * tile_rows;
            const int64_t q_count = std::min(tile_rows, block_rows - q);
            const int64_t d = tile / row_tiles * tile_directions;
            const int64_t d_count = std::min(tile_directions, s.directions - d);
            k.prepare_linear(noise.launch, static_cast<uint32_t>(q * per_row), batches,
                             prepared.data());
            for (int64_t i = 0; i < d_count; ++i) {
              k.sign_bits(noise.launch, prepared.data(), batches, noise.directions[d + i], stride,
                          bits.data() + i * 4 * stride);
            }
            const int64_t panel_end =
                std::min((task % panel_tiles + 1) * kPanelsPerTask, panel_count);
            for (int64_t p = task % panel_tiles * kPanelsPerTask; p < panel_end; ++p) {
              panel_task(d, d_count, q, q_count, p, stride, bits.data(), table.data(),
                         columns.data(), sums);
            }
          }
        });
  }

  void panel_task(int64_t d, int64_t d_count, int64_t q, int64_t q_count, int64_t panel,
                  int64_t stride, const uint32_t* bits, float* table, float* own_columns,
                  std::vector<float>& sums) const {
    const int64_t per_row = sign_blocks_per_row(s.in);
    const int64_t per_direction = q_count * kSignBlockRows * kPanelRows;
    const float* columns = own_columns;
    if (s.shared) {
      columns = panels.data.get() + panel * per_row * kSignBlockCols * kPanelRows;
    } else {
      transpose_panel(x, s, d, panel * kPanelRows, own_columns);
    }
    const int64_t first_row = q * kSignBlockRows;
    const int64_t rows = std::min(q_count * kSignBlockRows, s.out - first_row);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t i = 0; i < d_count && !bias.empty(); ++i) {
      for (int64_t o = 0; o < rows; ++o) {
        std::fill_n(sums.data() + i * per_direction + o * kPanelRows, kPanelRows,
                    bias[(d + i) * s.out + first_row + o]);
      }
    }
    for (int64_t word = 0; word < per_row; ++word) {
      k.sign_table(columns + word * kSignBlockCols * kPanelRows, table);
      for (int64_t i = 0; i < d_count; ++i) {
        for (int64_t j = 0; j < kSignBlockRows; ++j) {
          k.sign_lookup(table, bits + (i * 4 + j) * stride + word, per_row, q_count,
                        sums.data() + i * per_direction + j * kPanelRows,
                        kSignBlockRows * kPanelRows);
        }
      }
    }
    for (int64_t i = 0; i < d_count; ++i) {
      add(sums.data() + i * per_direction, d + i, first_row, rows, panel);
    }
  }
};

}  // namespace perturbed
