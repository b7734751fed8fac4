// Launches of the dense family: geometry and choice of instantiation, without torch. `launch`
// starts a kernel: launch(kernel, grid, threads, arguments...). csrc/cuda/dense.cu passes CUDA's
// <<<>>>, tests/emulation its own.
//
// Geometry is a function of shapes alone, never of the card, so results are the same bits on every
// card; that of dense_linear does not look at the number of directions either, so a shard of the
// population computes the same bits as the whole.
#pragma once

#include "cuda/dense_kernels.cuh"

namespace perturbed {

// ---- dense_linear_ ------------------------------------------------------------------------------

template <class Noise, class T>
DenseLinearPlan plan_dense_linear(const DenseLinearArgs& a) {
  DenseLinearPlan plan;
  plan.sources_per_pass = power_of_two_at_least(a.sources * a.tokens, kMaxSources<Noise, T>);
  // Not a function of sources_per_pass: the same x gives the same bits however often it is written
  // out. At least kMaxSources, so that a lane is left with at most kQuad of its group's sums.
  plan.group = Noise::kMaxSources;
  if (std::is_same_v<Noise, SignNoise>) {
    // At most four blocks of columns a lane, and no more quads in a warp than the matrix has.
    const int64_t quads = ceil_div<int64_t>(a.out, kQuad);
    while (plan.group < kWarpSize &&
           (plan.group * 4 < sign_blocks_per_row(a.in) || kWarpSize / plan.group > quads)) {
      plan.group *= 2;
    }
  } else {
    while (plan.group < kWarpSize && plan.group < normal_blocks_per_row(a.in)) plan.group *= 2;
  }
  const int64_t tiles = ceil_div<int64_t>(a.out, kWarpSize / plan.group * kQuad);
  plan.direction_warps_log2 = 0;
  while (1 << plan.direction_warps_log2 < power_of_two_at_least(tiles, kLinearWarps)) {
    ++plan.direction_warps_log2;
  }
  return plan;
}

inline GridShape dense_linear_grid(const DenseLinearArgs& a, const DenseLinearPlan& plan) {
  const int64_t tiles = ceil_div<int64_t>(a.out, kWarpSize / plan.group * kQuad);
  const int64_t direction_warps = int64_t{1} << plan.direction_warps_log2;
  return grid_shape(ceil_div(tiles, direction_warps),
                    ceil_div<int64_t>(a.directions, kLinearWarps / direction_warps),
                    ceil_div<int64_t>(a.sources * a.tokens, plan.sources_per_pass));
}

template <class Noise, class T, class Launch>
void launch_dense_linear(const DenseLinearArgs& args, Launch&& launch) {
  const DenseLinearPlan plan = plan_dense_linear<Noise, T>(args);
  const GridShape grid = dense_linear_grid(args, plan);
  switch (plan.sources_per_pass) {
    case 1:
      return launch(dense_linear_kernel<Noise, 1, T>, grid, kLinearThreads, args, plan);
    case 2:
      return launch(dense_linear_kernel<Noise, 2, T>, grid, kLinearThreads, args, plan);
    case 4:
      return launch(dense_linear_kernel<Noise, 4, T>, grid, kLinearThreads, args, plan);
    default:  // 8, which only noise with room for it asks for
      if constexpr (kMaxSources<Noise, T> >= 8) {
        launch(dense_linear_kernel<Noise, 8, T>, grid, kLinearThreads, args, plan);
      }
  }
}

template <bool kExact, class T, class Launch>
void launch_dense_linear(const DenseLinearArgs& args, bool rademacher, Launch&& launch) {
  if (rademacher) {
    launch_dense_linear<SignNoise, T>(args, launch);
  } else {
    launch_dense_linear<NormalNoise<kExact>, T>(args, launch);
  }
}

// ---- dense_estimate_ ----------------------------------------------------------------------------

inline int64_t dense_estimate_threads(const DenseEstimateArgs& a, bool rademacher,
                                      bool double_sums) {
  if (!rademacher) return normal_blocks(a.rows, a.cols);
  return sign_blocks(a.rows, a.cols) *
         (kSignBlockRows / (double_sums ? kSignRows<double> : kSignRows<float>));
}

// Directions are cut into slices until the card is full (two waves of an H200 for normals, whose
// threads are many and small; a quarter of one for signs, where 128 independent sums in a thread
// hide latency), but a slice is long enough to pay for writing and reading its partial sums.
inline DenseEstimatePlan plan_dense_estimate(const DenseEstimateArgs& a, bool rademacher,
                                             bool double_sums) {
  const int64_t wanted = ceil_div<int64_t>(int64_t{1} << (rademacher ? 15 : 19),
                                           dense_estimate_threads(a, rademacher, double_sums));
  const int64_t most = ceil_div<int64_t>(a.directions, rademacher ? 16 : 32);
  int64_t slices = wanted < most ? wanted : most;
  if (slices > kMaxGridYZ) slices = kMaxGridYZ;
  DenseEstimatePlan plan;
  plan.slice = a.directions > 0 ? ceil_div<int64_t>(a.directions, slices) : 1;
  plan.slices = a.directions > 0 ? ceil_div<int64_t>(a.directions, plan.slice) : 1;
  return plan;
}

// `args.partial` must have room for plan.slices * rows * cols sums if plan.slices > 1.
template <bool kExact, class T, class Launch>
void launch_dense_estimate(const DenseEstimateArgs& args, const DenseEstimatePlan& plan,
                           bool rademacher, Launch&& launch) {
  const int64_t threads = dense_estimate_threads(args, rademacher, std::is_same_v<T, double>);
  if (rademacher) {
    launch(dense_estimate_sign_kernel<T>,
           grid_shape(ceil_div<int64_t>(threads, kSignEstimateTile), plan.slices),
           kSignEstimateTile, args, plan);
  } else {
    launch(dense_estimate_normal_kernel<kExact, T>,
           grid_shape(ceil_div<int64_t>(threads, kEstimateTile), plan.slices), kEstimateTile, args,
           plan);
  }
  if (plan.slices > 1) {
    launch(dense_estimate_reduce_kernel<T>,
           grid_shape(ceil_div<int64_t>(args.rows * args.cols, kEstimateTile)), kEstimateTile, args,
           plan);
  }
}

// ---- dense_materialise --------------------------------------------------------------------------

template <bool kExact, class T, class Launch>
void launch_dense_materialise(const DenseMaterialiseArgs& args, bool rademacher, Launch&& launch) {
  const int64_t blocks =
      rademacher ? sign_blocks(args.rows, args.cols) : normal_blocks(args.rows, args.cols);
  const GridShape grid = grid_shape(ceil_div<int64_t>(blocks, kMaterialiseThreads), args.count);
  if (rademacher) {
    launch(dense_materialise_sign_kernel<T>, grid, kMaterialiseThreads, args);
  } else {
    launch(dense_materialise_normal_kernel<kExact, T>, grid, kMaterialiseThreads, args);
  }
}

}  // namespace perturbed
