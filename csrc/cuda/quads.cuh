// Noise in quads: elements 4 quad .. 4 quad + 3 of up to four rows of a noise matrix, drawn by the
// thread that uses them. What the families with thin noise matrices (low rank, sparse) are built of.
#pragma once

#include "cuda/device.cuh"

namespace perturbed {

// A noise matrix of one launch.
struct NoiseMatrix {
  PhiloxLaunch launch;
  uint32_t blocks;  // of one row
};

// A distribution gives `matrix` and
//
//   rows<kRows>(matrix, keys, direction, row, count, quad, use)
//
// which calls use(k, e) for k < min(kRows, count) with the quad e of row `row` + k. kRows is 1, or 4
// with `row` a multiple of 4.

template <bool kExact>
struct NormalQuads {
  PT_DEVICE static NoiseMatrix matrix(uint32_t counter, const NoiseKey& noise, int64_t cols) {
    return {philox_launch(counter, noise.generation, noise.key),
            static_cast<uint32_t>(normal_blocks_per_row(cols))};
  }

  // A call of Philox for every row.
  template <int kRows, class Use>
  PT_DEVICE static void rows(const NoiseMatrix& matrix, const PhiloxSchedule& keys,
                             PhiloxDirection direction, uint32_t row, int count, uint32_t quad,
                             Use&& use) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k >= count) continue;
      const uint32_t c1 = (row + static_cast<uint32_t>(k)) * matrix.blocks + quad;
      const PhiloxWords words = philox_finish(philox_block(matrix.launch, c1), direction, keys);
      const NormalBlock e = kExact ? normal_block(words) : normal_block_fast(words);
      use(k, e.z);
    }
  }
};

struct SignQuads {
  PT_DEVICE static NoiseMatrix matrix(uint32_t counter, const NoiseKey& noise, int64_t cols) {
    return {philox_launch(counter, noise.generation, noise.key),
            static_cast<uint32_t>(sign_blocks_per_row(cols))};
  }

  // One call for all rows: its words are the rows, and eight quads use it.
  template <int kRows, class Use>
  PT_DEVICE static void rows(const NoiseMatrix& matrix, const PhiloxSchedule& keys,
                             PhiloxDirection direction, uint32_t row, int count, uint32_t quad,
                             Use&& use) {
    static_assert(kRows == 1 || kRows == kSignBlockRows, "one row, or those of a block");
    constexpr uint32_t kQuads = kSignBlockCols / 4;
    const uint32_t c1 = row / kSignBlockRows * matrix.blocks + quad / kQuads;
    const PhiloxWords words = philox_finish(philox_block(matrix.launch, c1), direction, keys);
    const int bit = static_cast<int>(quad % kQuads) * 4;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k >= count) continue;
      uint32_t word = words.w[k];
      if constexpr (kRows == 1) {
        // Not words.w[row % 4]: registers cannot be indexed.
        const uint32_t upper = row % 2 ? words.w[3] : words.w[2];
        word = row % 4 >= 2 ? upper : (row % 2 ? words.w[1] : words.w[0]);
      }
      const float e[4] = {sign_from_bit(word, bit), sign_from_bit(word, bit + 1),
                          sign_from_bit(word, bit + 2), sign_from_bit(word, bit + 3)};
      use(k, e);
    }
  }
};

}  // namespace perturbed
