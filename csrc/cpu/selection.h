// Selections on the CPU (noise/permutation.h): drawn a chunk of entries at a time into a buffer of
// the first-level cache, once for all rows that use them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/tensor_noise.h"
#include "noise/permutation.h"

namespace perturbed {

// Entries of one chunk: 16 KB of them. A multiple of what a batch of words holds.
constexpr int64_t kSelectChunk = 4096;

// The selections of `count` directions from `first` on, out of 0 .. size - 1.
struct Selection {
  TensorNoise noise;
  PermutationShape shape;
  bool replace;
  std::vector<PermutationKey> keys;  // of the permutations; empty with `replace`

  Selection(const Tensor& key, int64_t stream, int64_t first, int64_t count, int64_t size,
            bool with_replacement)
      : noise(key, stream, first, count),
        shape(permutation_shape(static_cast<uint32_t>(size))),
        replace(with_replacement),
        keys(replace ? 0 : count) {
    torch::stable::parallel_for(0, static_cast<int64_t>(keys.size()), 256,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t d = begin; d < end; ++d) {
                                    keys[d] = permutation_key(noise.launch, noise.directions[d]);
                                  }
                                });
  }
};

// Entries first .. first + count - 1 of one direction after the other; a thread's own.
class SelectionChunk {
 public:
  SelectionChunk(const Selection& selection, int64_t first, int64_t count)
      : selection_(selection), first_(first), count_(count) {
    if (!selection.replace) return;
    const int64_t block = first / kWords;
    batches_ = ceil_div(ceil_div(first + count, kWords) - block, kBatchBlocks);
    prepared_.resize(batches_);
    words_.resize(kWords * batches_ * kBatchBlocks);
    kernels().prepare_linear(selection.noise.launch, static_cast<uint32_t>(block), batches_,
                             prepared_.data());
  }

  void draw(int64_t d, uint32_t* out) {
    if (!selection_.replace) {
      kernels().permutation(selection_.shape, selection_.keys[d], static_cast<uint32_t>(first_),
                            count_, out);
      return;
    }
    const uint64_t stride = static_cast<uint64_t>(batches_ * kBatchBlocks);
    kernels().sign_bits(selection_.noise.launch, prepared_.data(), batches_,
                        selection_.noise.directions[d], batches_ * kBatchBlocks, words_.data());
    const uint64_t skip = static_cast<uint64_t>(first_ % kWords);
    for (int64_t i = 0; i < count_; ++i) {
      const uint64_t word = skip + static_cast<uint64_t>(i);
      out[i] =
          replacement_entry(words_[word % kWords * stride + word / kWords], selection_.shape.size);
    }
  }

 private:
  static constexpr int64_t kWords = 4;  // words, that is entries, of a block

  const Selection& selection_;
  int64_t first_, count_, batches_ = 0;
  std::vector<PreparedBatch> prepared_;
  std::vector<uint32_t> words_;
};

}  // namespace perturbed
