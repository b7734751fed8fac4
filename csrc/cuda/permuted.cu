// Permuted family on CUDA: checks and launches. Kernels and geometry are in permuted_kernels.cuh, the
// operator's contract in csrc/schema.cpp, the CPU twin in csrc/cpu/permuted.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind/dispatch.h"
#include "bind/launch.h"
#include "bind/selection.h"
#include "cuda/permuted_kernels.cuh"

namespace perturbed {
namespace {

void permuted_estimate__cuda(Tensor grad, Tensor base, Tensor weights, Tensor key,
                             int64_t in_stream, int64_t out_stream, bool accumulate) {
  const char* op = "permuted_estimate_";
  check_permuted_estimate(op, grad, base, weights, key, in_stream, out_stream);
  dispatch_float(grad.scalar_type(), op, "grad", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (grad.numel() == 0) return;
    const LaunchScope scope(grad);
    PermutedEstimateArgs args = {};
    args.grad = grad.mutable_data_ptr();
    args.base = base.const_data_ptr();
    args.weights = weights.const_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.in_shape = permutation_shape(static_cast<uint32_t>(grad.size(1)));
    args.out_shape = permutation_shape(static_cast<uint32_t>(grad.size(0)));
    args.directions = weights.size(0);
    args.rows = grad.size(0);
    args.cols = grad.size(1);
    args.base_rows = base.size(0);
    args.base_cols = base.size(1);
    args.in_counter = static_cast<uint32_t>(in_stream);
    args.out_counter = static_cast<uint32_t>(out_stream);
    args.permute_in = in_stream >= 0;
    args.permute_out = out_stream >= 0;
    args.accumulate = accumulate;
    const PermutedEstimatePlan plan = plan_permuted_estimate<sum_t<T>>(args);
    Tensor partial;
    if (!permuted_in_place<T>(args, plan)) {
      const std::vector<int64_t> shape{plan.slices, args.rows, args.cols};
      partial = torch::stable::new_empty(weights, shape);
      args.partial = partial.mutable_data_ptr();
    }
    launch_permuted_estimate<T>(args, plan, launcher(scope.stream()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("permuted_estimate_", TORCH_BOX(&permuted_estimate__cuda));
}

}  // namespace perturbed
