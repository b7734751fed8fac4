// Sign-flip family on CUDA: checks and launches. Kernels and geometry are in sign_flip_kernels.cuh,
// the operators' contracts in csrc/schema.cpp, the CPU twin in csrc/cpu/sign_flip.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind/dispatch.h"
#include "bind/launch.h"
#include "bind/row_args.h"
#include "bind/sign_flip.h"
#include "cuda/sign_flip_kernels.cuh"

namespace perturbed {
namespace {

Tensor flip_cuda(Tensor x, Tensor key, int64_t stream, int64_t directions, bool antithetic,
                 bool shared) {
  const char* op = "flip";
  const MoveSizes s = check_flip(op, x, key, stream, directions, antithetic, shared);
  return dispatch_float(x.scalar_type(), op, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<int64_t> shape{s.rows, s.tokens, s.in};
    Tensor out = torch::stable::new_empty(x, shape);
    if (out.numel() == 0) return out;
    const LaunchScope scope(x);
    FlipArgs args = {};
    args.out = out.mutable_data_ptr();
    args.x = x.const_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.rows = move_rows(s);
    args.size = s.in;
    args.counter = static_cast<uint32_t>(stream);
    args.x_aligned = rows_aligned(args.x, sizeof(T), s.in, s.x_row_stride, s.x_token_stride);
    args.out_aligned = rows_aligned(args.out, sizeof(T), s.in);
    launch_flip<T>(args, launcher(scope.stream()));
    return out;
  });
}

void flip_add_on_stream(const char* op, Tensor& y, const Tensor& z, const Tensor& key,
                        int64_t stream, int64_t directions, bool antithetic) {
  const AddSizes s = check_flip_add(op, y, z, key, stream, directions, antithetic);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (y.numel() == 0) return;
    const LaunchScope scope(y);
    FlipArgs args = {};
    args.out = y.mutable_data_ptr();
    args.x = z.const_data_ptr();
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.rows = add_rows(s);
    args.size = s.out;
    args.counter = static_cast<uint32_t>(stream);
    args.x_aligned = rows_aligned(args.x, sizeof(T), s.in, s.z_row_stride, s.z_token_stride);
    args.out_aligned = rows_aligned(args.out, sizeof(T), s.out);
    launch_flip_add<T>(args, launcher(scope.stream()));
  });
}

void flip_add__cuda(Tensor y, Tensor z, Tensor key, int64_t stream, int64_t directions,
                    bool antithetic) {
  flip_add_on_stream("flip_add_", y, z, key, stream, directions, antithetic);
}

Tensor flip_add_cuda(Tensor y, Tensor z, Tensor key, int64_t stream, int64_t directions,
                     bool antithetic) {
  Tensor out = torch::stable::clone(y);
  flip_add_on_stream("flip_add", out, z, key, stream, directions, antithetic);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("flip", TORCH_BOX(&flip_cuda));
  m.impl("flip_add_", TORCH_BOX(&flip_add__cuda));
  m.impl("flip_add", TORCH_BOX(&flip_add_cuda));
}

}  // namespace perturbed
