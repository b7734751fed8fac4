// Dense family on CUDA: checks, geometry and launches. The kernels are in dense_kernels.cuh, the
// operators' contracts in csrc/schema.cpp, the CPU twin in csrc/cpu/dense.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind/dense.h"
#include "bind/dispatch.h"
#include "bind/launch.h"
#include "cuda/dense_kernels.cuh"

namespace perturbed {
namespace {

// The default normals: special-function units. The exact ones are for tests.
using FastNormals = NormalNoise<false>;

template <class Noise, int kSources, class T>
void launch_dense_linear(const DenseLinearArgs& args, const DenseLinearPlan& plan,
                         cudaStream_t stream) {
  const dim3 grid(plan.grid_x, plan.grid_y, plan.grid_z);
  dense_linear_kernel<Noise, kSources, T><<<grid, kLinearThreads, 0, stream>>>(args, plan);
}

template <class Noise, class T>
void launch_dense_linear(const DenseLinearArgs& args, const DenseLinearPlan& plan,
                         cudaStream_t stream) {
  switch (plan.sources_per_pass) {
    case 1:
      return launch_dense_linear<Noise, 1, T>(args, plan, stream);
    case 2:
      return launch_dense_linear<Noise, 2, T>(args, plan, stream);
    case 4:
      return launch_dense_linear<Noise, 4, T>(args, plan, stream);
    default:
      if constexpr (!std::is_same_v<T, double>) {
        return launch_dense_linear<Noise, 8, T>(args, plan, stream);
      }
  }
}

void dense_linear_on_stream(const char* op, Tensor& y, const Tensor& x, const Tensor& key,
                            const Tensor& sigma, int64_t weight_stream, int64_t bias_stream,
                            int64_t directions, bool antithetic, bool rademacher) {
  const DenseLinearSizes s = check_dense_linear(op, y, x, key, sigma, weight_stream, bias_stream,
                                                directions, antithetic, rademacher);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool weight = weight_stream >= 0 && s.in > 0;
    if (y.numel() == 0 || (!weight && bias_stream < 0)) return;
    const LaunchScope scope(y);
    DenseLinearArgs args;
    args.y = y.mutable_data_ptr();
    args.x = x.const_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.sigma = static_cast<const double*>(sigma.const_data_ptr());
    args.directions = s.directions;
    args.repeats = s.repeats;
    args.tokens = s.tokens;
    args.out = s.out;
    args.in = weight ? s.in : 0;
    args.sources = s.sources;
    args.x_source_stride = s.shared ? s.x_row_stride : s.directions * s.x_row_stride;
    args.x_direction_stride = s.shared ? 0 : s.x_row_stride;
    args.x_token_stride = s.x_token_stride;
    args.weight_counter = static_cast<uint32_t>(weight_stream);
    args.bias_counter = static_cast<uint32_t>(bias_stream);
    args.bias = bias_stream >= 0;
    args.antithetic = antithetic;
    args.x_aligned = rows_aligned(args.x, sizeof(T), args.in, s.x_row_stride, s.x_token_stride);
    const DenseLinearPlan plan = plan_dense_linear(args, rademacher, std::is_same_v<T, double>);
    if (rademacher) {
      launch_dense_linear<SignNoise, T>(args, plan, scope.stream());
    } else {
      launch_dense_linear<FastNormals, T>(args, plan, scope.stream());
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void dense_linear__cuda(Tensor y, Tensor x, Tensor key, Tensor sigma, int64_t weight_stream,
                        int64_t bias_stream, int64_t directions, bool antithetic, bool rademacher) {
  dense_linear_on_stream("dense_linear_", y, x, key, sigma, weight_stream, bias_stream, directions,
                         antithetic, rademacher);
}

Tensor dense_linear_cuda(Tensor y, Tensor x, Tensor key, Tensor sigma, int64_t weight_stream,
                         int64_t bias_stream, int64_t directions, bool antithetic,
                         bool rademacher) {
  Tensor out = torch::stable::clone(y);
  dense_linear_on_stream("dense_linear", out, x, key, sigma, weight_stream, bias_stream, directions,
                         antithetic, rademacher);
  return out;
}

void dense_estimate__cuda(Tensor grad, Tensor weights, Tensor key, Tensor sigma, int64_t stream,
                          bool rademacher, bool accumulate) {
  const char* op = "dense_estimate_";
  check_dense_estimate(op, grad, weights, key, sigma, stream, rademacher);
  dispatch_float(grad.scalar_type(), op, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (grad.numel() == 0) return;
    const LaunchScope scope(grad);
    DenseEstimateArgs args;
    args.grad = grad.mutable_data_ptr();
    args.partial = nullptr;
    args.weights = weights.const_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.sigma = static_cast<const double*>(sigma.const_data_ptr());
    args.directions = weights.size(0);
    args.rows = grad.size(0);
    args.cols = grad.size(1);
    args.counter = static_cast<uint32_t>(stream);
    args.accumulate = accumulate;
    args.aligned = rows_aligned(args.grad, sizeof(T), args.cols);
    const DenseEstimatePlan plan = plan_dense_estimate(args, rademacher, std::is_same_v<T, double>);
    Tensor partial;
    if (plan.slices > 1) {
      const std::vector<int64_t> shape{plan.slices, args.rows, args.cols};
      partial = torch::stable::new_empty(weights, shape);
      args.partial = partial.mutable_data_ptr();
    }
    const dim3 grid(plan.grid_x, static_cast<unsigned>(plan.slices));
    if (rademacher) {
      dense_estimate_sign_kernel<T><<<grid, kSignEstimateTile, 0, scope.stream()>>>(args, plan);
    } else {
      dense_estimate_normal_kernel<false, T>
          <<<grid, kEstimateTile, 0, scope.stream()>>>(args, plan);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (plan.slices > 1) {
      const unsigned blocks =
          static_cast<unsigned>(ceil_div<int64_t>(args.rows * args.cols, kEstimateTile));
      dense_estimate_reduce_kernel<T>
          <<<blocks, kEstimateTile, 0, scope.stream()>>>(args, plan.slices);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

Tensor dense_materialise_cuda(Tensor key, int64_t stream, int64_t first, int64_t count,
                              int64_t rows, int64_t cols, bool rademacher, ScalarType dtype) {
  const char* op = "dense_materialise";
  check_dense_materialise(op, key, stream, first, count, rows, cols, rademacher);
  return dispatch_float(dtype, op, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<int64_t> shape{count, rows, cols};
    Tensor noise = torch::stable::new_empty(key, shape, dtype);
    if (noise.numel() == 0) return noise;
    const LaunchScope scope(key);
    DenseMaterialiseArgs args;
    args.noise = noise.mutable_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.first = first;
    args.count = count;
    args.rows = rows;
    args.cols = cols;
    args.counter = static_cast<uint32_t>(stream);
    args.aligned = rows_aligned(args.noise, sizeof(T), cols);
    const dim3 grid(materialise_grid_x(args, rademacher), materialise_grid_y(args));
    if (rademacher) {
      dense_materialise_sign_kernel<T><<<grid, kMaterialiseThreads, 0, scope.stream()>>>(args);
    } else {
      dense_materialise_normal_kernel<false, T>
          <<<grid, kMaterialiseThreads, 0, scope.stream()>>>(args);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return noise;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("dense_linear_", TORCH_BOX(&dense_linear__cuda));
  m.impl("dense_linear", TORCH_BOX(&dense_linear_cuda));
  m.impl("dense_estimate_", TORCH_BOX(&dense_estimate__cuda));
  m.impl("dense_materialise", TORCH_BOX(&dense_materialise_cuda));
}

}  // namespace perturbed
