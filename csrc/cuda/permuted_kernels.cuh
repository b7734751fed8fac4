// permuted_estimate_ on CUDA, without torch. The emulation compiles this file, launches included.
#pragma once

#include "cuda/selection_kernels.cuh"

namespace perturbed {

constexpr int kPermutedThreads = 256;
constexpr int kPermutedTile = 32;  // directions staged at a time
// Sums of a block, 32 KiB; with what else it stages 45 KiB of shared memory.
template <class S>
constexpr int kPermutedSums = 32768 / static_cast<int>(sizeof(S));
// Fewest threads that share a row, which bounds the rows of a block: 8 rows of 8 groups.
constexpr int kPermutedColumnThreads = 32;
constexpr int kPermutedRows = 8;  // of a thread
static_assert(2 * kPermutedTile * kPermutationKeyBlocks == kPermutedThreads, "one call a thread");
constexpr int kPermutedBlockRows = kPermutedRows * (kPermutedThreads / kPermutedColumnThreads);

struct PermutedEstimateArgs {
  void* grad;           // [m, n]
  void* partial;        // [slices, m, n] sums
  const void* base;     // [q, p] sums
  const void* weights;  // [D] sums
  const int64_t* key;
  PermutationShape in_shape, out_shape;
  int64_t directions, rows, cols;  // D, m, n
  int64_t base_rows, base_cols;    // q, p
  uint32_t in_counter, out_counter;
  bool permute_in, permute_out;  // else the identity
  bool accumulate;
};

struct PermutedEstimatePlan {
  int column_threads;     // threads that share a row
  int column_shift;       // log2
  int rows_log2;          // of a block
  int chunk;              // columns of grad whose sums a block holds
  int64_t slice, slices;  // directions of one slice; blockIdx.y
};

// A block owns some rows of grad and a chunk of their columns, and adds the directions of its slice
// one after the other, in order: entry in_d(j) is computed once and serves kRows rows. Within one
// direction in_d is injective, so no two threads add to one sum; a barrier separates directions, and
// with that one tile from the next. A sum is cleared and written out by one thread. base is read
// coalesced, from the second-level cache. Bound: issue slots, 28 instructions per element and
// direction, and bank conflicts of the sums, which lie scattered.
template <class S, int kRows>
__global__ void __launch_bounds__(kPermutedThreads, 3)
    permuted_estimate_kernel(PermutedEstimateArgs a, PermutedEstimatePlan plan) {
  PT_SHARED(S, sums, kPermutedSums<S>);
  PT_SHARED(uint32_t, sources, kPermutedTile* kPermutedBlockRows);
  PT_SHARED(KeyWords, in_words, kPermutedTile * kPermutationKeyBlocks);
  PT_SHARED(KeyWords, out_words, kPermutedTile * kPermutationKeyBlocks);
  PT_SHARED(S, weights, kPermutedTile);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread >> plan.column_shift;  // of kRows rows
  const int column_thread = thread & (plan.column_threads - 1);
  const int block_rows = 1 << plan.rows_log2;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * block_rows;
  const NoiseKey noise = read_key(a.key);
  const int64_t begin = blockIdx.y * plan.slice;
  const int64_t end = begin + plan.slice < a.directions ? begin + plan.slice : a.directions;
  const uint32_t base_rows = static_cast<uint32_t>(a.base_rows);

  // Runs once unless the grid would be too large.
  for (int64_t column0 = static_cast<int64_t>(blockIdx.z) * plan.chunk; column0 < a.cols;
       column0 += static_cast<int64_t>(gridDim.z) * plan.chunk) {
    const int64_t left = a.cols - column0;
    const uint32_t width = static_cast<uint32_t>(left < plan.chunk ? left : plan.chunk);
    for (int i = thread; i < block_rows * plan.chunk; i += kPermutedThreads) sums[i] = S(0);

    for (int64_t d0 = begin; d0 < end; d0 += kPermutedTile) {
      const int count = static_cast<int>(end - d0 < kPermutedTile ? end - d0 : kPermutedTile);
      {
        const bool out = thread >= kPermutedTile * kPermutationKeyBlocks;
        const int at = thread % (kPermutedTile * kPermutationKeyBlocks);
        const int i = at / kPermutationKeyBlocks;
        if (i < count && (out ? a.permute_out : a.permute_in)) {
          const KeyWords words =
              draw_key_words(out ? a.out_counter : a.in_counter, at % kPermutationKeyBlocks, noise,
                             noise.first_direction + static_cast<uint32_t>(d0 + i));
          if (out) {
            out_words[at] = words;
          } else {
            in_words[at] = words;
          }
        }
        if (thread < count) weights[thread] = static_cast<const S*>(a.weights)[d0 + thread];
      }
      __syncthreads();
      // Which row of base every row takes; base_rows if none.
      for (int i = thread; i < count << plan.rows_log2; i += kPermutedThreads) {
        const int64_t row = row0 + (i & (block_rows - 1));
        uint32_t source = base_rows;
        if (row < a.rows) {
          source = static_cast<uint32_t>(row);
          if (a.permute_out) {
            const int words = (i >> plan.rows_log2) * kPermutationKeyBlocks;
            source = permutation_entry(a.out_shape, staged_key(out_words, words), source);
          }
        }
        sources[i] = source;
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        const S weight = weights[i];
        PermutationKey key = {};
        if (a.permute_in) key = staged_key(in_words, i * kPermutationKeyBlocks);
        for (int64_t j = column_thread; j < a.base_cols; j += plan.column_threads) {
          uint32_t column = static_cast<uint32_t>(j);
          if (a.permute_in) column = permutation_entry(a.in_shape, key, column);
          column -= static_cast<uint32_t>(column0);  // wraps beyond any width
          if (column >= width) continue;
          S value[kRows];
          bool adds[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const uint32_t source = sources[(i << plan.rows_log2) + group * kRows + r];
            adds[r] = source < base_rows;
            value[r] = adds[r] ? static_cast<const S*>(a.base)[source * a.base_cols + j] : S(0);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int at = (group * kRows + r) * plan.chunk + static_cast<int>(column);
            if (adds[r]) {
              const S sum = sums[at];
              sums[at] = fused_multiply_add(weight, value[r], sum);
            }
          }
        }
        __syncthreads();
      }
    }
    for (int i = thread; i < block_rows * plan.chunk; i += kPermutedThreads) {
      const int64_t row = row0 + i / plan.chunk;
      const int column = i % plan.chunk;
      if (row >= a.rows || static_cast<uint32_t>(column) >= width) continue;
      static_cast<S*>(a.partial)[(blockIdx.y * a.rows + row) * a.cols + column0 + column] = sums[i];
    }
  }
}

// Adds the slices of one element in their order, and what grad holds. One thread per element; bound:
// bytes of `partial`.
template <class T>
__global__ void __launch_bounds__(kPermutedThreads)
    permuted_reduce_kernel(PermutedEstimateArgs a, PermutedEstimatePlan plan) {
  using S = sum_t<T>;
  const int64_t size = a.rows * a.cols;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPermutedThreads + threadIdx.x;
  if (at >= size) return;
  const S* partial = static_cast<const S*>(a.partial) + at;
  S sum = S(0);
#pragma unroll 4
  for (int64_t slice = 0; slice < plan.slices; ++slice) sum += partial[slice * size];
  T* grad = static_cast<T*>(a.grad) + at;
  *grad = static_cast<T>(a.accumulate ? static_cast<S>(*grad) + sum : sum);
}

// ---- launches -----------------------------------------------------------------------------------

// Rows of a thread: many where the sums of whole rows fit, so that few blocks repeat an entry.
template <class S>
int permuted_rows(int64_t cols) {
  return cols <= kPermutedSums<S> / kPermutedRows ? kPermutedRows : kPermutedRows / 4;
}

// Directions are cut into slices until there are some five blocks for each of an H200's
// multiprocessors, which hides the latency of one direction after the other; but a slice is one
// tile at least. The sums of several slices so take 40 MB at most.
template <class S>
PermutedEstimatePlan plan_permuted_estimate(const PermutedEstimateArgs& a) {
  PermutedEstimatePlan plan;
  const int rows = permuted_rows<S>(a.cols);
  plan.column_threads = kPermutedColumnThreads;
  plan.column_shift = 5;
  // No more rows in a block than leave room for their columns.
  while (plan.column_threads < kPermutedThreads &&
         (plan.column_threads < a.base_cols ||
          rows * (kPermutedThreads / plan.column_threads) * a.cols > kPermutedSums<S>)) {
    plan.column_threads *= 2;
    ++plan.column_shift;
  }
  const int block_rows = rows * (kPermutedThreads / plan.column_threads);
  plan.rows_log2 = 0;
  while (1 << plan.rows_log2 < block_rows) ++plan.rows_log2;
  const int most = kPermutedSums<S> / block_rows;
  plan.chunk = static_cast<int>(a.cols < most ? a.cols : int64_t{most});
  const int64_t blocks =
      ceil_div<int64_t>(a.rows, block_rows) * ceil_div<int64_t>(a.cols, plan.chunk);
  const int64_t wanted = ceil_div<int64_t>(640, blocks);
  const int64_t tiles = ceil_div<int64_t>(a.directions, kPermutedTile);
  int64_t slices = wanted < tiles ? wanted : tiles;
  if (slices > kMaxGridYZ) slices = kMaxGridYZ;
  plan.slice = slices > 1 ? ceil_div(tiles, slices) * kPermutedTile : a.directions;
  plan.slices = slices > 1 ? ceil_div(a.directions, plan.slice) : 1;
  return plan;
}

// Whether the sums of the only slice are what grad is to hold.
template <class T>
bool permuted_in_place(const PermutedEstimateArgs& a, const PermutedEstimatePlan& plan) {
  return std::is_same_v<T, sum_t<T>> && plan.slices == 1 && !a.accumulate;
}

// `args.partial` must have room for plan.slices * rows * cols sums unless permuted_in_place.
template <class T, class Launch>
void launch_permuted_estimate(PermutedEstimateArgs args, const PermutedEstimatePlan& plan,
                              Launch&& launch) {
  using S = sum_t<T>;
  const bool in_place = permuted_in_place<T>(args, plan);
  if (in_place) args.partial = args.grad;
  const GridShape grid = grid_shape(ceil_div<int64_t>(args.rows, int64_t{1} << plan.rows_log2),
                                    plan.slices, ceil_div<int64_t>(args.cols, plan.chunk));
  if (permuted_rows<S>(args.cols) == kPermutedRows) {
    launch(permuted_estimate_kernel<S, kPermutedRows>, grid, kPermutedThreads, args, plan);
  } else {
    launch(permuted_estimate_kernel<S, kPermutedRows / 4>, grid, kPermutedThreads, args, plan);
  }
  if (in_place) return;
  launch(permuted_reduce_kernel<T>,
         grid_shape(ceil_div<int64_t>(args.rows * args.cols, kPermutedThreads)), kPermutedThreads,
         args, plan);
}

}  // namespace perturbed
