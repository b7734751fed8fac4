// Sparse family on CUDA: checks and launches. The kernels are in sparse_kernels.cuh, the operators'
// contracts in csrc/schema.cpp, the CPU twin in csrc/cpu/sparse.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "bind/dispatch.h"
#include "bind/launch.h"
#include "bind/sparse.h"
#include "cuda/expand_args.h"
#include "cuda/sparse_kernels.cuh"

namespace perturbed {
namespace {

// Normals on the special-function units; the exact ones, at twice the cost, are for tests.
constexpr bool kExact = false;

// What keeps the variance of `count` columns out of `cols` at that of them all.
double column_scale(int64_t cols, int64_t count) {
  return std::sqrt(static_cast<double>(cols) / static_cast<double>(count));
}

void sparse_linear_on_stream(const char* op, Tensor& y, const Tensor& x, const Tensor& key,
                             const Tensor& sigma, int64_t column_stream, int64_t value_stream,
                             int64_t bias_stream, int64_t directions, int64_t count,
                             bool antithetic, bool rademacher) {
  const SparseLinearSizes s =
      check_sparse_linear(op, y, x, key, sigma, column_stream, value_stream, bias_stream,
                          directions, count, antithetic, rademacher);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (y.numel() == 0) return;
    const LaunchScope scope(y);
    ExpandArgs args = expand_args<T>(s, y, x, key, sigma);
    args.rank = count;
    args.scale = column_scale(s.in, count);
    args.factor_counter = static_cast<uint32_t>(value_stream);
    args.bias_counter = static_cast<uint32_t>(bias_stream);
    args.bias = bias_stream >= 0;
    const SparseArgs columns{permutation_shape(static_cast<uint32_t>(s.in)),
                             static_cast<uint32_t>(column_stream)};
    launch_sparse_linear<kExact, T>(args, columns, rademacher, launcher(scope.stream()));
  });
}

void sparse_linear__cuda(Tensor y, Tensor x, Tensor key, Tensor sigma, int64_t column_stream,
                         int64_t value_stream, int64_t bias_stream, int64_t directions,
                         int64_t count, bool antithetic, bool rademacher) {
  sparse_linear_on_stream("sparse_linear_", y, x, key, sigma, column_stream, value_stream,
                          bias_stream, directions, count, antithetic, rademacher);
}

Tensor sparse_linear_cuda(Tensor y, Tensor x, Tensor key, Tensor sigma, int64_t column_stream,
                          int64_t value_stream, int64_t bias_stream, int64_t directions,
                          int64_t count, bool antithetic, bool rademacher) {
  Tensor out = torch::stable::clone(y);
  sparse_linear_on_stream("sparse_linear", out, x, key, sigma, column_stream, value_stream,
                          bias_stream, directions, count, antithetic, rademacher);
  return out;
}

void sparse_estimate__cuda(Tensor grad, Tensor weights, Tensor key, Tensor sigma,
                           int64_t column_stream, int64_t value_stream, int64_t count,
                           bool rademacher, bool accumulate) {
  const char* op = "sparse_estimate_";
  check_sparse_estimate(op, grad, weights, key, sigma, column_stream, value_stream, count,
                        rademacher);
  dispatch_float(grad.scalar_type(), op, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (grad.numel() == 0) return;
    const LaunchScope scope(grad);
    SparseEstimateArgs args;
    args.grad = grad.mutable_data_ptr();
    args.weights = weights.const_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.sigma = static_cast<const double*>(sigma.const_data_ptr());
    args.directions = weights.size(0);
    args.rows = grad.size(0);
    args.cols = grad.size(1);
    args.count = count;
    args.scale = column_scale(args.cols, count);
    args.shape = permutation_shape(static_cast<uint32_t>(args.cols));
    args.column_counter = static_cast<uint32_t>(column_stream);
    args.value_counter = static_cast<uint32_t>(value_stream);
    args.accumulate = accumulate;
    const std::vector<int64_t> entries{args.directions, count};
    Tensor columns = torch::stable::new_empty(grad, entries, ScalarType::Int);
    args.columns = static_cast<uint32_t*>(columns.mutable_data_ptr());
    launch_sparse_estimate<kExact, T>(args, rademacher, launcher(scope.stream()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("sparse_linear_", TORCH_BOX(&sparse_linear__cuda));
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear_cuda));
  m.impl("sparse_estimate_", TORCH_BOX(&sparse_estimate__cuda));
}

}  // namespace perturbed
