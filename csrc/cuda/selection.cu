// Selections on CUDA: checks and launches. Kernels and geometry are in selection_kernels.cuh and
// selection_sum_kernels.cuh, the operators' contracts in csrc/schema.cpp, the CPU twin in
// csrc/cpu/selection.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "bind/dispatch.h"
#include "bind/launch.h"
#include "bind/row_args.h"
#include "bind/selection.h"
#include "cuda/selection_kernels.cuh"
#include "cuda/selection_sum_kernels.cuh"

namespace perturbed {
namespace {

const int64_t* key_words(const Tensor& key) {
  return static_cast<const int64_t*>(key.const_data_ptr());
}

Tensor selections_cuda(Tensor key, int64_t stream, int64_t first, int64_t directions, int64_t size,
                       int64_t count, bool replace) {
  check_selections("selections", key, stream, first, directions, size, count, replace);
  const std::vector<int64_t> shape{directions, count};
  Tensor out = torch::stable::new_empty(key, shape);
  if (out.numel() == 0) return out;
  const LaunchScope scope(key);
  SelectArgs args = {};
  args.out = out.mutable_data_ptr();
  args.selection = selection_args(key_words(key), stream, size, replace);
  args.rows.directions = directions;
  args.rows.tokens = args.rows.sources = 1;
  args.first = first;
  args.count = count;
  launch_selections<int64_t>(args, launcher(scope.stream()));
  return out;
}

Tensor select_cuda(Tensor x, Tensor key, int64_t stream, int64_t directions, int64_t count,
                   bool antithetic, bool shared, bool replace) {
  const char* op = "select";
  const MoveSizes s =
      check_select(op, x, key, stream, directions, count, antithetic, shared, replace);
  return dispatch_float(x.scalar_type(), op, "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const std::vector<int64_t> shape{s.rows, s.tokens, count};
    Tensor out = torch::stable::new_empty(x, shape);
    if (out.numel() == 0) return out;
    const LaunchScope scope(x);
    SelectArgs args = {};
    args.out = out.mutable_data_ptr();
    args.x = x.const_data_ptr();
    args.selection = selection_args(key_words(key), stream, s.in, replace);
    args.rows = move_rows(s);
    args.count = count;
    launch_select<T>(args, launcher(scope.stream()));
    return out;
  });
}

void select_add_on_stream(const char* op, Tensor& y, const Tensor& z, const Tensor& key,
                          int64_t stream, int64_t directions, bool antithetic, bool replace) {
  const AddSizes s = check_select_add(op, y, z, key, stream, directions, antithetic, replace);
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (y.numel() == 0 || s.in == 0) return;
    const LaunchScope scope(y);
    SelectArgs args = {};
    args.out = y.mutable_data_ptr();
    args.x = z.const_data_ptr();
    args.selection = selection_args(key_words(key), stream, s.out, replace);
    args.rows = add_rows(s);
    args.count = s.out;
    args.limit = s.in;
    launch_select_add<T>(args, launcher(scope.stream()));
  });
}

void select_add__cuda(Tensor y, Tensor z, Tensor key, int64_t stream, int64_t directions,
                      bool antithetic, bool replace) {
  select_add_on_stream("select_add_", y, z, key, stream, directions, antithetic, replace);
}

Tensor select_add_cuda(Tensor y, Tensor z, Tensor key, int64_t stream, int64_t directions,
                       bool antithetic, bool replace) {
  Tensor out = torch::stable::clone(y);
  select_add_on_stream("select_add", out, z, key, stream, directions, antithetic, replace);
  return out;
}

Tensor selection_sum_cuda(Tensor weights, Tensor key, int64_t stream, int64_t first, int64_t rows,
                          int64_t size, bool replace) {
  check_selection_sum("selection_sum", weights, key, stream, first, rows, size, replace);
  const std::vector<int64_t> shape{rows, size};
  Tensor sum = torch::stable::new_empty(weights, shape);
  if (sum.numel() == 0) return sum;
  const LaunchScope scope(weights);
  SelectionSumArgs args = {};
  args.sum = sum.mutable_data_ptr();
  args.weights = weights.const_data_ptr();
  args.selection = selection_args(key_words(key), stream, size, replace);
  args.directions = weights.size(0);
  args.first = first;
  args.rows = rows;
  args.size = size;
  if (weights.scalar_type() == ScalarType::Double) {
    launch_selection_sum<double>(args, launcher(scope.stream()));
  } else {
    launch_selection_sum<float>(args, launcher(scope.stream()));
  }
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CUDA, m) {
  m.impl("selections", TORCH_BOX(&selections_cuda));
  m.impl("select", TORCH_BOX(&select_cuda));
  m.impl("select_add_", TORCH_BOX(&select_add__cuda));
  m.impl("select_add", TORCH_BOX(&select_add_cuda));
  m.impl("selection_sum", TORCH_BOX(&selection_sum_cuda));
}

}  // namespace perturbed
