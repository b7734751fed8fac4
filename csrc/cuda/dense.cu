// Dense family on CUDA: checks, geometry and launches. Kernels and geometry are in
// dense_kernels.cuh and dense_launch.cuh, the operators' contracts in csrc/schema.cpp, the CPU
// twin in csrc/cpu/dense.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind/dense.h"
#include "bind/dispatch.h"
#include "bind/launch.h"
#include "cuda/dense_launch.cuh"

namespace perturbed {
namespace {

// Normals on the special-function units; the exact ones, at twice the cost, are for tests.
constexpr bool kExact = false;

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
    launch_dense_linear<kExact, T>(args, rademacher, launcher(scope.stream()));
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
    launch_dense_estimate<kExact, T>(args, plan, rademacher, launcher(scope.stream()));
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
    launch_dense_materialise<kExact, T>(args, rademacher, launcher(scope.stream()));
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
