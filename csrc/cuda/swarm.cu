// Particle swarms on CUDA: checks and launches. Kernels and geometry are in swarm_kernels.cuh, the
// operators' contracts in csrc/schema.cpp, the CPU twin in csrc/cpu/swarm.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "bind/launch.h"
#include "bind/swarm.h"
#include "cuda/swarm_kernels.cuh"

namespace perturbed {
namespace {

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

void swarm_move__cuda(Tensor position, Tensor velocity, Tensor best, Tensor improved, Tensor guide,
                      Tensor key, Tensor coefficients, Tensor limit, std::optional<Tensor> lower,
                      std::optional<Tensor> upper, int64_t stream, bool per_dimension,
                      bool antithetic, int64_t bounds) {
  const char* op = "swarm_move_";
  const SwarmSizes s =
      check_swarm_move(op, position, velocity, best, improved, guide, key, coefficients, limit,
                       lower, upper, stream, antithetic, bounds);
  dispatch_wide(position.scalar_type(), op, "position", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (position.numel() == 0) return;
    const LaunchScope scope(position);
    SwarmArgs args = {};
    args.position = position.mutable_data_ptr();
    args.velocity = velocity.mutable_data_ptr();
    args.best = best.mutable_data_ptr();
    args.improved = static_cast<const bool*>(improved.const_data_ptr());
    args.guide = static_cast<const int64_t*>(guide.const_data_ptr());
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.coefficients = static_cast<const double*>(coefficients.const_data_ptr());
    args.limit = limit.const_data_ptr();
    args.lower = data_or_null(lower);
    args.upper = data_or_null(upper);
    args.particles = s.particles;
    args.cols = s.cols;
    args.limit_each = limit.numel() != 1;
    args.lower_each = lower && lower->numel() != 1;
    args.upper_each = upper && upper->numel() != 1;
    args.counter = static_cast<uint32_t>(stream);
    args.per_dimension = per_dimension;
    args.antithetic = antithetic;
    const auto aligned = [&](const void* data) { return rows_aligned(data, sizeof(T), s.cols); };
    args.aligned = aligned(args.position) && aligned(args.velocity) && aligned(args.best);
    args.limits_aligned = (!args.limit_each || aligned(args.limit)) &&
                          (!args.lower_each || aligned(args.lower)) &&
                          (!args.upper_each || aligned(args.upper));
    launch_swarm_move<T>(args, s.bounds, launcher(scope.stream()));
  });
}

Tensor uniforms_cuda(Tensor key, int64_t stream, int64_t first, int64_t count, int64_t cols,
                     ScalarType dtype) {
  const char* op = "uniforms";
  check_uniforms(op, key, stream, first, count, cols);
  return dispatch_wide(dtype, op, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<int64_t> shape{count, cols};
    Tensor out = torch::stable::new_empty(key, shape, dtype);
    if (out.numel() == 0) return out;
    const LaunchScope scope(key);
    UniformArgs args = {};
    args.out = out.mutable_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.first = first;
    args.count = count;
    args.cols = cols;
    args.counter = static_cast<uint32_t>(stream);
    args.aligned = rows_aligned(args.out, sizeof(T), cols);
    launch_uniforms<T>(args, launcher(scope.stream()));
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("swarm_move_", TORCH_BOX(&swarm_move__cuda));
  m.impl("uniforms", TORCH_BOX(&uniforms_cuda));
}

}  // namespace perturbed
