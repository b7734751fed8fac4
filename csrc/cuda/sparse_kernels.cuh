// Kernels and launches of the sparse family, without torch: E_d[:, pi_d(q)] = sqrt(n / count) V_d[q]
// for q < count, and 0 elsewhere. docs/kernels.md has the analysis.
#pragma once

#include "cuda/expand.cuh"
#include "noise/permutation.h"

namespace perturbed {

// ---- sparse_linear_ -----------------------------------------------------------------------------

// Beside ExpandArgs, whose factor is V_d and whose rank is `count`.
struct SparseArgs {
  PermutationShape columns;
  uint32_t column_counter;  // c0 of pi_d
};

// Low rank's kernel with t[q] = x[pi_d(q)]: a thread computes pi_d(q) and reads it from all sources.
// Reads and writes y once and count elements of x. Bound: these bytes.
template <class Noise, int kSources, class T>
__global__ void __launch_bounds__(kExpandThreads, 2)
    sparse_linear_kernel(ExpandArgs a, ExpandPlan plan, SparseArgs b) {
  using S = sum_t<T>;
  PT_SHARED(S, products, kExpandTile * kSources);
  const NoiseKey noise = read_key(a.key);
  const PhiloxSchedule keys = philox_schedule(noise.key);
  const auto fill = [&](const ExpandPlace<kSources, T>& place, int64_t first, int count) {
    __syncthreads();
    if (place.thread < count) {
      const PhiloxLaunch launch = philox_launch(b.column_counter, noise.generation, noise.key);
      const PermutationKey key = permutation_key(launch, philox_direction(launch, place.c3));
      for (int q = place.thread; q < count; q += place.threads) {
        const uint32_t at = permutation_entry(b.columns, key, static_cast<uint32_t>(first + q));
#pragma unroll
        for (int j = 0; j < kSources; ++j) {
          products[place.base + q * kSources + j] = static_cast<S>(place.x[j][at]);
        }
      }
    }
    __syncthreads();
  };
  expand<Noise, kSources, T>(a, plan, noise, keys, products, fill);
}

template <class Noise, class T, class Launch>
void launch_sparse_linear(const ExpandArgs& a, const SparseArgs& b, Launch&& launch) {
  const ExpandPlan plan = plan_expand<T>(a, 0);
  const GridShape grid = expand_grid(a, plan);
  switch (plan.sources_per_pass) {
    case 1:
      return launch(sparse_linear_kernel<Noise, 1, T>, grid, kExpandThreads, a, plan, b);
    case 2:
      return launch(sparse_linear_kernel<Noise, 2, T>, grid, kExpandThreads, a, plan, b);
    default:  // 4, where T has room for it
      if constexpr (kExpandSources<T> >= 4) {
        launch(sparse_linear_kernel<Noise, 4, T>, grid, kExpandThreads, a, plan, b);
      }
  }
}

template <bool kExact, class T, class Launch>
void launch_sparse_linear(const ExpandArgs& a, const SparseArgs& b, bool rademacher,
                          Launch&& launch) {
  if (rademacher) return launch_sparse_linear<SignQuads, T>(a, b, launch);
  launch_sparse_linear<NormalQuads<kExact>, T>(a, b, launch);
}

// ---- sparse_estimate_ ---------------------------------------------------------------------------

constexpr int kSparseThreads = 256;
constexpr int kSparseTile = kSparseThreads;  // directions that a block stages at a time
constexpr int kSparseColumns = 8;            // columns of grad of a block: one sector of 32 bytes
constexpr int kSparseRows = 4 * kSparseThreads / kSparseColumns;  // its rows of grad
constexpr int kSparseRun = 8;  // entries of pi_d that one thread computes
static_assert(kSparseThreads / kWarpSize == kSparseColumns, "a warp lists the hits of a column");

struct SparseEstimateArgs {
  void* grad;           // [m, n]
  uint32_t* columns;    // [D, count] scratch: pi_d(q)
  const void* weights;  // [D] sums
  const int64_t* key;
  const double* sigma;
  int64_t directions, rows, cols, count;
  double scale;
  PermutationShape shape;
  uint32_t column_counter, value_counter;  // c0
  bool accumulate;
};

// Writes pi_d(q): one thread per direction and kRun entries, which share the round keys (four calls
// of Philox). Bound: arithmetic.
template <int kRun>
__global__ void __launch_bounds__(kSparseThreads) sparse_columns_kernel(SparseEstimateArgs a) {
  const int64_t runs = ceil_div<int64_t>(a.count, kRun);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSparseThreads + threadIdx.x;
  if (index >= a.directions * runs) return;
  const int64_t d = index / runs;
  const int64_t begin = (index - d * runs) * kRun;
  const int64_t end = begin + kRun < a.count ? begin + kRun : a.count;
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch launch = philox_launch(a.column_counter, noise.generation, noise.key);
  const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(d);
  const PermutationKey key = permutation_key(launch, philox_direction(launch, c3));
  for (int64_t q = begin; q < end; ++q) {
    a.columns[d * a.count + q] = permutation_entry(a.shape, key, static_cast<uint32_t>(q));
  }
}

template <class S>
struct alignas(sizeof(S) == 4 ? 16 : 8) SparseDirection {
  PhiloxDirection direction;  // of the values
  S weight;
};

// A block owns kSparseColumns columns and kSparseRows rows of grad, a thread four rows of one
// column. For kSparseTile directions at a time the block searches their entries for its columns,
// notes which row of V_d each direction puts there (at most one: pi_d is a permutation), and every
// warp lists the hits of one column in the order of directions. Then each thread draws only what
// hits its column. Directions are summed in their order, tile by tile. Reads `columns` once for
// every block, from L2, and writes grad once. Bound: the search, until D * count is several n.
template <class Noise, class T>
__global__ void __launch_bounds__(kSparseThreads, 2) sparse_estimate_kernel(SparseEstimateArgs a) {
  using S = sum_t<T>;
  constexpr uint32_t kMiss = 0xffffffffu;  // no row: V_d has fewer than 2^32 - 1
  PT_SHARED(uint32_t, hit, kSparseColumns* kSparseTile);
  PT_SHARED(uint16_t, list, kSparseColumns*(kSparseTile + 2));  // padded: columns in other banks
  PT_SHARED(int, hits, kSparseColumns);
  PT_SHARED(SparseDirection<S>, staged, kSparseTile);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int column = thread % kSparseColumns;
  const NoiseKey noise = read_key(a.key);
  const NoiseMatrix values = Noise::matrix(a.value_counter, noise, a.rows);
  const PhiloxSchedule keys = philox_schedule(noise.key);
  const S scale = static_cast<S>(*a.sigma) * static_cast<S>(a.scale);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSparseColumns + column;
  const uint32_t first_col = blockIdx.x * kSparseColumns;

  for (int64_t start = static_cast<int64_t>(blockIdx.y) * kSparseRows; start < a.rows;
       start += static_cast<int64_t>(gridDim.y) * kSparseRows) {
    const int64_t row = start + thread / kSparseColumns * 4;
    const bool used = row < a.rows && col < a.cols;
    S sum[4] = {};
    for (int64_t d0 = 0; d0 < a.directions; d0 += kSparseTile) {
      const int64_t tile = smaller(a.directions - d0, kSparseTile);
      __syncthreads();  // the previous tile has been read
#pragma unroll
      for (int c = 0; c < kSparseColumns; ++c) hit[c * kSparseTile + thread] = kMiss;
      if (thread < tile) {
        const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(d0 + thread);
        staged[thread] = SparseDirection<S>{philox_direction(values.launch, c3),
                                            static_cast<const S*>(a.weights)[d0 + thread]};
      }
      __syncthreads();
      const uint32_t* entries = a.columns + d0 * a.count;
#pragma unroll 4
      for (int64_t i = thread; i < tile * a.count; i += kSparseThreads) {
        const uint32_t c = entries[i] - first_col;
        if (c < kSparseColumns) {
          const int64_t direction = i / a.count;
          hit[c * kSparseTile + direction] = static_cast<uint32_t>(i - direction * a.count);
        }
      }
      __syncthreads();
      int found = 0;
      for (int i = lane; i < kSparseTile; i += kWarpSize) {
        const bool here = hit[warp * kSparseTile + i] != kMiss;
        const unsigned votes = __ballot_sync(kFullWarp, here);
        if (here) {
          const int before = __popc(votes & ((1u << lane) - 1u));
          list[warp * (kSparseTile + 2) + found + before] = static_cast<uint16_t>(i);
        }
        found += __popc(votes);
      }
      if (lane == 0) hits[warp] = found;
      __syncthreads();
      if (!used) continue;
      const int count = hits[column];
      S part[4] = {};
      for (int i = 0; i < count; ++i) {
        const uint16_t d = list[column * (kSparseTile + 2) + i];
        const uint32_t q = hit[column * kSparseTile + d];
        const SparseDirection<S> at = staged[d];
        Noise::template rows<1>(values, keys, at.direction, q, 1, static_cast<uint32_t>(row / 4),
                                [&](int, const float (&e)[4]) {
#pragma unroll
                                  for (int k = 0; k < 4; ++k) {
                                    part[k] = fused_multiply_add(at.weight, static_cast<S>(e[k]),
                                                                 part[k]);
                                  }
                                });
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += part[k];
    }
    if (!used) continue;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (row + k >= a.rows) continue;
      T* grad = static_cast<T*>(a.grad) + (row + k) * a.cols + col;
      const S old = a.accumulate ? static_cast<S>(*grad) : S(0);
      *grad = static_cast<T>(fused_multiply_add(scale, sum[k], old));
    }
  }
}

template <bool kExact, class T, class Launch>
void launch_sparse_estimate(const SparseEstimateArgs& a, bool rademacher, Launch&& launch) {
  if (a.directions > 0) {
    const int64_t threads = a.directions * ceil_div<int64_t>(a.count, kSparseRun);
    launch(sparse_columns_kernel<kSparseRun>,
           grid_shape(ceil_div<int64_t>(threads, kSparseThreads)), kSparseThreads, a);
  }
  const GridShape grid =
      grid_shape(ceil_div<int64_t>(a.cols, kSparseColumns), ceil_div<int64_t>(a.rows, kSparseRows));
  if (rademacher) {
    launch(sparse_estimate_kernel<SignQuads, T>, grid, kSparseThreads, a);
  } else {
    launch(sparse_estimate_kernel<NormalQuads<kExact>, T>, grid, kSparseThreads, a);
  }
}

}  // namespace perturbed
