// Rows of noise in a buffer of floats, for families whose noise is a few rows per direction (bias,
// low-rank factors, the values of sparse columns). Signs become floats too: they are drawn once
// and read by all rows of a direction.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/tensor_noise.h"

namespace perturbed {

// Draws one tensor of noise. One per thread: it keeps what its last call prepared.
class NoiseRows {
 public:
  NoiseRows(const TensorNoise& noise, int64_t cols, bool rademacher)
      : noise_(&noise),
        cols_(cols),
        per_row_(rademacher ? sign_blocks_per_row(cols) : normal_blocks_per_row(cols)),
        rademacher_(rademacher) {}

  // Distance of two rows in the buffer.
  int64_t stride() const { return round_up(cols_, kNormalBlockCols); }

  // Floats that `draw` may write for so many rows: blocks are drawn in whole batches.
  int64_t capacity(int64_t rows) const {
    return round_up(rows * stride(), kBatchBlocks * kNormalBlockCols);
  }

  // Rows [row, row_end) of direction d (counted from the launch's first): row r at
  // out + (r - row) * stride(). What lies between the end of a row and the next is finite. For
  // signs `row` is a multiple of kSignBlockRows.
  void draw(int64_t d, int64_t row, int64_t row_end, float* out) {
    if (!rademacher_) return normals(d, row * per_row_, (row_end - row) * per_row_, out);
    const int64_t block_rows = ceil_div<int64_t>(row_end - row, kSignBlockRows);
    bits(d, row / kSignBlockRows * per_row_, block_rows * per_row_);
    for (int64_t r = 0; r < row_end - row; ++r) {
      signs(r % kSignBlockRows, r / kSignBlockRows * per_row_, cols_, out + r * stride());
    }
  }

  // Columns [col, col_end) of one row, col a multiple of both block widths. Writes whole batches
  // (64 floats) of normals.
  void draw_part(int64_t d, int64_t row, int64_t col, int64_t col_end, float* out) {
    const int64_t block_cols = rademacher_ ? kSignBlockCols : kNormalBlockCols;
    const int64_t blocks = ceil_div(col_end - col, block_cols);
    if (!rademacher_) return normals(d, row * per_row_ + col / block_cols, blocks, out);
    bits(d, row / kSignBlockRows * per_row_ + col / block_cols, blocks);
    signs(row % kSignBlockRows, 0, col_end - col, out);
  }

 private:
  // Prepared blocks depend on the tensor alone; directions that follow each other share them.
  int64_t prepare(int64_t first_block, int64_t blocks) {
    const int64_t batches = ceil_div(blocks, kBatchBlocks);
    if (first_block != first_block_ || batches > prepared_batches_) {
      if (batches > static_cast<int64_t>(prepared_.size())) prepared_.resize(batches);
      const CpuKernels& k = kernels();
      (rademacher_ ? k.prepare_linear : k.prepare_normal)(
          noise_->launch, static_cast<uint32_t>(first_block), batches, prepared_.data());
      first_block_ = first_block;
      prepared_batches_ = batches;
    }
    return batches;
  }

  void normals(int64_t d, int64_t first_block, int64_t blocks, float* out) {
    const int64_t batches = prepare(first_block, blocks);
    kernels().normals(noise_->launch, prepared_.data(), batches, noise_->directions[d], out);
  }

  void bits(int64_t d, int64_t first_block, int64_t blocks) {
    const int64_t batches = prepare(first_block, blocks);
    words_.resize(4 * batches * kBatchBlocks);
    kernels().sign_bits(noise_->launch, prepared_.data(), batches, noise_->directions[d],
                        batches * kBatchBlocks, words_.data());
  }

  // The bit string of word `word`, from block `block` of the last `bits` on, as +-1.
  void signs(int64_t word, int64_t block, int64_t count, float* out) {
    std::fill(out, out + count, 1.0f);
    kernels().flip_signs(words_.data() + word * (static_cast<int64_t>(words_.size()) / 4) + block,
                         false, out, count, out);
  }

  const TensorNoise* noise_;
  int64_t cols_, per_row_;
  bool rademacher_;
  int64_t first_block_ = -1, prepared_batches_ = 0;
  std::vector<PreparedBatch> prepared_;
  std::vector<uint32_t> words_;
};

}  // namespace perturbed
