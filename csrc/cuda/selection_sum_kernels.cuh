// selection_sum on CUDA, without torch: S[j, k] = sum_d weights[d] [pi_d(first + j) = k]. The
// emulation compiles this file, launches included.
#pragma once

#include "cuda/selection_kernels.cuh"

namespace perturbed {

constexpr int kSumWarps = 8;                     // rows of a block, one to a warp
constexpr int kSumTile = kSumWarps * kWarpSize;  // threads, and directions staged at a time

// Columns of S that a block holds in shared memory for each of its rows; with the rest of what it
// stages that is 42 KiB. A multiple of the warp's size, so that a lane's columns share a bank.
template <class S>
constexpr int kSumColumns = 4096 / static_cast<int>(sizeof(S));

struct SelectionSumArgs {
  void* sum;            // [rows, size]
  const void* weights;  // [D]
  SelectionArgs selection;
  int64_t directions, first, rows, size;
};

// Which of the warp's entries fall to this lane, one bit each: those whose column is the lane's
// number modulo 32.
PT_DEVICE unsigned owned_entries(bool inside, uint32_t column, int lane) {
  unsigned mask = __ballot_sync(kFullWarp, inside);
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    const unsigned set = __ballot_sync(kFullWarp, (column >> bit & 1u) != 0);
    mask &= (lane >> bit & 1) != 0 ? set : ~set;
  }
  return mask;
}

// A block owns kSumWarps rows of S and a chunk of their columns. For a tile of directions every
// thread draws one direction's key and the entries of all rows; then each warp adds its row's
// weights. A column belongs to one lane, which adds in the order of d: no atomics, and the bits of a
// plain loop. About three of 32 entries fall to the same lane, which bounds the additions. Bound:
// issue slots, at the permutations and the additions alike.
template <class S>
__global__ void __launch_bounds__(kSumTile) selection_sum_kernel(SelectionSumArgs a) {
  constexpr int kColumns = kSumColumns<S>;
  PT_SHARED(S, sums, kSumWarps * kColumns);
  PT_SHARED(uint32_t, entries, kSumWarps* kSumTile);
  PT_SHARED(S, weights, kSumTile);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const NoiseKey noise = read_key(a.selection.key);
  const PhiloxLaunch launch = philox_launch(a.selection.counter, noise.generation, noise.key);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSumWarps;
  const int64_t row = row0 + warp;
  const int rows = static_cast<int>(a.rows - row0 < kSumWarps ? a.rows - row0 : kSumWarps);

  // Runs once unless the grid would be too large.
  for (int64_t column0 = static_cast<int64_t>(blockIdx.y) * kColumns; column0 < a.size;
       column0 += static_cast<int64_t>(gridDim.y) * kColumns) {
    const int width =
        static_cast<int>(a.size - column0 < kColumns ? a.size - column0 : int64_t{kColumns});
    for (int c = lane; c < width; c += kWarpSize) sums[warp * kColumns + c] = S(0);
    for (int64_t d0 = 0; d0 < a.directions; d0 += kSumTile) {
      const int64_t d = d0 + thread;
      const int count =
          static_cast<int>(a.directions - d0 < kSumTile ? a.directions - d0 : kSumTile);
      __syncthreads();  // the previous tile has been read
      if (thread < count) {
        const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(d);
        weights[thread] = static_cast<const S*>(a.weights)[d];
        PermutationKey key = {};
        if (!a.selection.replace) key = permutation_key(launch, philox_direction(launch, c3));
#pragma unroll 1
        for (int r = 0; r < rows; ++r) {
          const uint32_t index = static_cast<uint32_t>(a.first + row0 + r);
          const uint32_t entry = a.selection.replace
                                     ? drawn_entry(a.selection, noise, c3, index)
                                     : permutation_entry(a.selection.shape, key, index);
          // Wraps beyond any width for the columns before this chunk.
          entries[r * kSumTile + thread] = entry - static_cast<uint32_t>(column0);
        }
      }
      __syncthreads();
      if (warp >= rows) continue;
      for (int i = 0; i < count; i += kWarpSize) {
        const bool exists = i + lane < count;
        const uint32_t column = exists ? entries[warp * kSumTile + i + lane] : 0u;
        const bool inside = exists && column < static_cast<uint32_t>(width);
        unsigned mask = owned_entries(inside, column, lane);
        while (mask != 0) {
          const int at = i + __ffs(static_cast<int>(mask)) - 1;
          mask &= mask - 1;
          const uint32_t of = entries[warp * kSumTile + at];
          const S sum = sums[warp * kColumns + of];
          sums[warp * kColumns + of] = sum + weights[at];
        }
      }
    }
    if (warp < rows) {
      S* out = static_cast<S*>(a.sum) + row * a.size + column0;
      for (int c = lane; c < width; c += kWarpSize) out[c] = sums[warp * kColumns + c];
    }
  }
}

template <class S, class Launch>
void launch_selection_sum(const SelectionSumArgs& args, Launch&& launch) {
  launch(selection_sum_kernel<S>,
         grid_shape(ceil_div<int64_t>(args.rows, kSumWarps),
                    ceil_div<int64_t>(args.size, kSumColumns<S>)),
         kSumTile, args);
}

}  // namespace perturbed
