// Rows of dense noise on CUDA: checks and launch. Kernel and geometry are in lookup_kernels.cuh, the
// operator's contract in csrc/schema.cpp, the CPU twin in csrc/cpu/lookup.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind/dispatch.h"
#include "bind/launch.h"
#include "bind/lookup.h"
#include "cuda/lookup_kernels.cuh"

namespace perturbed {
namespace {

// Normals on the special-function units; the exact ones, at twice the cost, are for tests.
constexpr bool kExact = false;

Tensor dense_lookup_cuda(Tensor index, Tensor key, int64_t stream, int64_t directions, int64_t rows,
                         int64_t cols, bool rademacher, ScalarType dtype) {
  const char* op = "dense_lookup";
  const LookupSizes s =
      check_dense_lookup(op, index, key, stream, directions, rows, cols, rademacher);
  return dispatch_float(dtype, op, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<int64_t> shape{index.size(0), s.tokens, cols};
    Tensor out = torch::stable::new_empty(key, shape, dtype);
    if (out.numel() == 0) return out;
    const LaunchScope scope(key);
    LookupArgs args;
    args.out = out.mutable_data_ptr();
    args.index = static_cast<const int64_t*>(index.const_data_ptr());
    args.key = static_cast<const int64_t*>(key.const_data_ptr());
    args.directions = s.directions;
    args.tokens = s.tokens;
    args.entries = s.entries;
    args.cols = cols;
    args.counter = static_cast<uint32_t>(stream);
    args.aligned = rows_aligned(args.out, sizeof(T), cols);
    launch_dense_lookup<kExact, T>(args, rademacher, launcher(scope.stream()));
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("dense_lookup", TORCH_BOX(&dense_lookup_cuda));
}

}  // namespace perturbed
