// Kernel and launch of the low-rank family, without torch: E_d = A_d^T B_d / sqrt(rank), both
// factors drawn where they are used. docs/kernels.md has the analysis.
#pragma once

#include "cuda/expand.cuh"

namespace perturbed {

// Beside ExpandArgs, whose factor is A_d.
struct LowRankArgs {
  uint32_t project_counter;  // c0 of B_d
  bool projected;            // x holds the products B_d x: [rank] for every source
};

// t[first + q] = B_d[first + q] . x for q < count, kRows rows of B_d at a time. Sums run along a
// thread, then its warp, then the warps of the group, in an order that depends on n alone.
template <class Noise, int kRows, int kSources, class T, class Products, class Partial>
PT_DEVICE void project(const ExpandArgs& a, const NoiseMatrix& matrix, const PhiloxSchedule& keys,
                       const ExpandPlace<kSources, T>& place, int64_t first, int count,
                       Products& products, Partial& partial) {
  using S = sum_t<T>;
  constexpr int kValues = kRows * kSources;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = place.threads / kWarpSize;
  const PhiloxDirection direction = philox_direction(matrix.launch, place.c3);
  const int64_t quads = ceil_div<int64_t>(a.in, 4);
  for (int q = 0; q < count; q += kRows) {
    S sum[kValues] = {};
    for (int64_t quad = place.thread; quad < quads; quad += place.threads) {
      S x[kSources][4];
#pragma unroll
      for (int j = 0; j < kSources; ++j) {
        load4(x[j], place.x[j] + 4 * quad, a.in - 4 * quad, a.x_aligned);
      }
      Noise::template rows<kRows>(matrix, keys, direction, static_cast<uint32_t>(first + q),
                                  count - q, static_cast<uint32_t>(quad),
                                  [&](int k, const float (&e)[4]) {
#pragma unroll
                                    for (int j = 0; j < kSources; ++j) {
                                      S& s = sum[k * kSources + j];
#pragma unroll
                                      for (int i = 0; i < 4; ++i)
                                        s = fused_multiply_add(static_cast<S>(e[i]), x[j][i], s);
                                    }
                                  });
    }
    int value;
    group_sum(sum, kWarpSize, lane, value);
    if (lane < kValues) partial[warp * kValues + value] = sum[0];
    __syncthreads();
    if (place.thread < kValues) {
      S total = S(0);
      for (int w = 0; w < warps; ++w) {
        total += partial[(place.group * warps + w) * kValues + place.thread];
      }
      products[place.base + q * kSources + place.thread] = total;
    }
    __syncthreads();
  }
}

// One group of threads per direction and pass of kSources sources; t = B_d x in shared memory, then
// y. kRows: rows of B_d drawn together, 1 for rank 1 and else 4. Reads x once for every kRows ranks,
// reads and writes y once. Bound: these bytes; Philox and Box-Muller from rank 4 or so.
template <class Noise, int kRows, int kSources, class T>
__global__ void __launch_bounds__(kExpandThreads, 2)
    low_rank_linear_kernel(ExpandArgs a, ExpandPlan plan, LowRankArgs b) {
  using S = sum_t<T>;
  PT_SHARED(S, products, kExpandTile * kSources);
  PT_SHARED(S, partial, kExpandWarps * kRows * kSources);
  const NoiseKey noise = read_key(a.key);
  const PhiloxSchedule keys = philox_schedule(noise.key);
  const NoiseMatrix matrix = Noise::matrix(b.project_counter, noise, a.in);
  const auto fill = [&](const ExpandPlace<kSources, T>& place, int64_t first, int count) {
    if (!b.projected) {
      return project<Noise, kRows>(a, matrix, keys, place, first, count, products, partial);
    }
    __syncthreads();
    for (int q = place.thread; q < count; q += place.threads) {
#pragma unroll
      for (int j = 0; j < kSources; ++j) {
        products[place.base + q * kSources + j] = static_cast<S>(place.x[j][first + q]);
      }
    }
    __syncthreads();
  };
  expand<Noise, kSources, T>(a, plan, noise, keys, products, fill);
}

// ---- launch -------------------------------------------------------------------------------------

template <class Noise, int kRows, class T, class Launch>
void launch_low_rank_linear(const ExpandArgs& a, const LowRankArgs& b, Launch&& launch) {
  const ExpandPlan plan = plan_expand<T>(a, b.projected ? 0 : a.in);
  const GridShape grid = expand_grid(a, plan);
  switch (plan.sources_per_pass) {
    case 1:
      return launch(low_rank_linear_kernel<Noise, kRows, 1, T>, grid, kExpandThreads, a, plan, b);
    case 2:
      return launch(low_rank_linear_kernel<Noise, kRows, 2, T>, grid, kExpandThreads, a, plan, b);
    default:  // 4, where T has room for it
      if constexpr (kExpandSources<T> >= 4) {
        launch(low_rank_linear_kernel<Noise, kRows, 4, T>, grid, kExpandThreads, a, plan, b);
      }
  }
}

template <bool kExact, class T, class Launch>
void launch_low_rank_linear(const ExpandArgs& a, const LowRankArgs& b, bool rademacher,
                            Launch&& launch) {
  if (rademacher) {
    if (a.rank == 1) return launch_low_rank_linear<SignQuads, 1, T>(a, b, launch);
    return launch_low_rank_linear<SignQuads, kFactorRows, T>(a, b, launch);
  }
  if (a.rank == 1) return launch_low_rank_linear<NormalQuads<kExact>, 1, T>(a, b, launch);
  launch_low_rank_linear<NormalQuads<kExact>, kFactorRows, T>(a, b, launch);
}

}  // namespace perturbed
