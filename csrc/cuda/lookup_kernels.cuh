// Kernel of dense_lookup and its launch, without torch: rows of dense noise, drawn where they are
// written. The emulation compiles this file.
#pragma once

#include "cuda/dense_kernels.cuh"

namespace perturbed {

constexpr int kLookupThreads = 256;
constexpr int kLookupColumns = 4;  // of a thread

struct LookupArgs {
  void* out;             // [B, T, cols]
  const int64_t* index;  // [B, T]
  const int64_t* key;    // [3]
  int64_t directions, tokens, entries, cols;
  uint32_t counter;
  bool aligned;  // every row of `out` may be written as Vector4
};

// One thread per entry and four columns: neighbours write neighbouring columns. Signs come 32 to a
// Philox call, which is repeated by the eight threads that share them rather than passed between
// them. An index past the last row draws noise that no matrix has; the caller rules it out. Bound:
// Philox and Box-Muller (normal), bytes written (signs).
template <class Noise, class T>
__global__ void __launch_bounds__(kLookupThreads) dense_lookup_kernel(LookupArgs a) {
  const int64_t units = ceil_div<int64_t>(a.cols, kLookupColumns);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kLookupThreads + threadIdx.x;
  if (unit >= a.entries * units) return;
  const int64_t entry = unit / units;
  const int64_t col = (unit - entry * units) * kLookupColumns;
  const int64_t row = a.index[entry];
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch launch = philox_launch(a.counter, noise.generation, noise.key);
  const int64_t d = entry / a.tokens % a.directions;
  const PhiloxDirection direction =
      philox_direction(launch, noise.first_direction + static_cast<uint32_t>(d));
  const uint32_t blocks = static_cast<uint32_t>(ceil_div<int64_t>(a.cols, Noise::kCols));
  const int64_t block_row = std::is_same_v<Noise, SignNoise> ? row / kSignBlockRows : row;
  const uint32_t c1 =
      static_cast<uint32_t>(block_row) * blocks + static_cast<uint32_t>(col / Noise::kCols);
  const PhiloxWords words = philox_finish(philox_block(launch, c1), direction, noise.key);
  float e[kLookupColumns];
  if constexpr (std::is_same_v<Noise, SignNoise>) {
    // Words are picked by comparison: an index would move them to local memory.
    uint32_t word = words.w[0];
#pragma unroll
    for (int r = 1; r < kSignBlockRows; ++r) {
      if (row % kSignBlockRows == r) word = words.w[r];
    }
    const int bit = static_cast<int>(col % kSignBlockCols);
#pragma unroll
    for (int k = 0; k < kLookupColumns; ++k) e[k] = sign_from_bit(word, bit + k);
  } else {
    const NormalBlock block = Noise::block(words);
#pragma unroll
    for (int k = 0; k < kLookupColumns; ++k) e[k] = block.z[k];
  }
  store4(static_cast<T*>(a.out) + entry * a.cols + col, e, a.cols - col, a.aligned);
}

// `launch` as in dense_launch.cuh.
template <bool kExact, class T, class Launch>
void launch_dense_lookup(const LookupArgs& args, bool rademacher, Launch&& launch) {
  const int64_t units = args.entries * ceil_div<int64_t>(args.cols, kLookupColumns);
  const GridShape grid = grid_shape(ceil_div<int64_t>(units, kLookupThreads));
  if (rademacher) {
    launch(dense_lookup_kernel<SignNoise, T>, grid, kLookupThreads, args);
  } else {
    launch(dense_lookup_kernel<NormalNoise<kExact>, T>, grid, kLookupThreads, args);
  }
}

}  // namespace perturbed
