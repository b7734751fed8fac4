// Low-rank family on CUDA: checks and launches. The kernel is in low_rank_kernels.cuh, the operators'
// contracts in csrc/schema.cpp, the CPU twin in csrc/cpu/low_rank.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>

#include "bind/dispatch.h"
#include "bind/launch.h"
#include "bind/low_rank.h"
#include "cuda/expand_args.h"
#include "cuda/low_rank_kernels.cuh"

namespace perturbed {
namespace {

// Normals on the special-function units; the exact ones, at twice the cost, are for tests.
constexpr bool kExact = false;

void low_rank_linear_on_stream(const char* op, Tensor& y, const Tensor& x, const Tensor& key,
                               const Tensor& sigma, int64_t a_stream, int64_t b_stream,
                               int64_t bias_stream, int64_t directions, int64_t rank,
                               bool antithetic, bool rademacher) {
  const LowRankLinearSizes s =
      check_low_rank_linear(op, y, x, key, sigma, a_stream, b_stream, bias_stream, directions, rank,
                            antithetic, rademacher);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (y.numel() == 0) return;
    const LaunchScope scope(y);
    ExpandArgs args = expand_args<T>(s, y, x, key, sigma);
    args.rank = rank;
    args.scale = 1.0 / std::sqrt(static_cast<double>(rank));
    args.factor_counter = static_cast<uint32_t>(a_stream);
    args.bias_counter = static_cast<uint32_t>(bias_stream);
    args.bias = bias_stream >= 0;
    const LowRankArgs projection{static_cast<uint32_t>(b_stream), s.projected};
    launch_low_rank_linear<kExact, T>(args, projection, rademacher, launcher(scope.stream()));
  });
}

void low_rank_linear__cuda(Tensor y, Tensor x, Tensor key, Tensor sigma, int64_t a_stream,
                           int64_t b_stream, int64_t bias_stream, int64_t directions, int64_t rank,
                           bool antithetic, bool rademacher) {
  low_rank_linear_on_stream("low_rank_linear_", y, x, key, sigma, a_stream, b_stream, bias_stream,
                            directions, rank, antithetic, rademacher);
}

Tensor low_rank_linear_cuda(Tensor y, Tensor x, Tensor key, Tensor sigma, int64_t a_stream,
                            int64_t b_stream, int64_t bias_stream, int64_t directions, int64_t rank,
                            bool antithetic, bool rademacher) {
  Tensor out = torch::stable::clone(y);
  low_rank_linear_on_stream("low_rank_linear", out, x, key, sigma, a_stream, b_stream, bias_stream,
                            directions, rank, antithetic, rademacher);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("low_rank_linear_", TORCH_BOX(&low_rank_linear__cuda));
  m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear_cuda));
}

}  // namespace perturbed
