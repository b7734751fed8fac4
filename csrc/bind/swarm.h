// Arguments of the particle swarm operators, checked once for every device and turned into plain
// sizes. The CPU and CUDA twins (csrc/cpu/swarm.cpp, csrc/cuda/swarm.cu) start from these.
#pragma once

#include <optional>

#include "bind/dispatch.h"
#include "bind/rows.h"
#include "noise/counters.h"
#include "noise/swarm.h"

namespace perturbed {

struct SwarmSizes {
  int64_t particles;  // P
  int64_t cols;       // N
  SwarmBounds bounds;
};

// The two dtypes of swarms and of uniform numbers: narrower ones would round some numbers to 1.
template <class F>
decltype(auto) dispatch_wide(ScalarType dtype, const char* op, const char* name, F&& f) {
  PT_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, name,
           " must be float32 or float64, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? f(type_tag<float>{}) : f(type_tag<double>{});
}

inline void check_word_blocks(const char* op, int64_t cols) {
  PT_CHECK(cols <= ((int64_t{1} << 32) - 1) * kWordBlockCols, op, "cols: ", cols,
           " columns have more than 2^32 noise blocks");
}

inline void check_uniforms(const char* op, const Tensor& key, int64_t stream, int64_t first,
                           int64_t count, int64_t cols) {
  check_key(op, key, key);
  check_counter_word(op, "stream", stream);
  PT_CHECK(first >= 0, op, "first must not be negative, got ", first);
  PT_CHECK(count >= 0, op, "count must not be negative, got ", count);
  PT_CHECK(cols >= 0, op, "cols must not be negative, got ", cols);
  check_word_blocks(op, cols);
}

// A matrix that a step changes, or reads elementwise: as `position`.
inline void check_swarm_matrix(const char* op, const char* name, const Tensor& tensor,
                               const Tensor& position) {
  PT_CHECK(
      tensor.dim() == 2 && tensor.size(0) == position.size(0) && tensor.size(1) == position.size(1),
      op, name, " must have position's shape ", shape_string(position), ", got ",
      shape_string(tensor));
  check_contiguous(op, name, tensor);
  check_dtype(op, name, tensor, position.scalar_type());
  check_same_device(op, name, tensor, position);
}

// One number for all elements, or one for each.
inline void check_swarm_limit(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& position) {
  PT_CHECK(tensor.dim() == 1 && (tensor.size(0) == 1 || tensor.size(0) == position.size(1)), op,
           name, " must have shape (1,) or (", position.size(1), ",), got ", shape_string(tensor));
  check_contiguous(op, name, tensor);
  check_dtype(op, name, tensor, position.scalar_type());
  check_same_device(op, name, tensor, position);
}

// Two matrices of one shape and dtype, both changed: with shared memory, the result would depend on
// the order of threads.
inline void check_apart(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                        const Tensor& b) {
  const auto at = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto bt = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  const auto bytes = static_cast<uintptr_t>(a.numel() * a.element_size());
  PT_CHECK(bytes == 0 || (at > bt ? at - bt : bt - at) >= bytes, op, a_name, " and ", b_name,
           " must not share memory");
}

inline SwarmSizes check_swarm_move(const char* op, const Tensor& position, const Tensor& velocity,
                                   const Tensor& best, const Tensor& improved, const Tensor& guide,
                                   const Tensor& key, const Tensor& coefficients,
                                   const Tensor& limit, const std::optional<Tensor>& lower,
                                   const std::optional<Tensor>& upper, int64_t stream,
                                   bool antithetic, int64_t bounds) {
  check_dim(op, "position", position, 2);
  check_contiguous(op, "position", position);
  check_swarm_matrix(op, "velocity", velocity, position);
  check_swarm_matrix(op, "best", best, position);
  check_apart(op, "position", position, "velocity", velocity);
  check_apart(op, "position", position, "best", best);
  check_apart(op, "velocity", velocity, "best", best);
  const int64_t particles = position.size(0), cols = position.size(1);
  const auto check_vector = [&](const char* name, const Tensor& tensor, int64_t size,
                                ScalarType dtype) {
    PT_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, name, " must have shape (", size,
             ",), got ", shape_string(tensor));
    check_dtype(op, name, tensor, dtype);
    check_contiguous(op, name, tensor);
    check_same_device(op, name, tensor, position);
  };
  check_vector("improved", improved, particles, ScalarType::Bool);
  check_vector("guide", guide, particles, ScalarType::Long);
  check_key(op, key, position);
  check_vector("coefficients", coefficients, 3, ScalarType::Double);
  check_swarm_limit(op, "limit", limit, position);
  check_counter_word(op, "stream", stream);
  check_word_blocks(op, cols);
  PT_CHECK(!antithetic || particles % 2 == 0, op,
           "antithetic needs an even number of particles, got ", particles);
  PT_CHECK(bounds >= kSwarmUnbounded && bounds <= kSwarmReflect, op,
           "bounds must be 0 (none), 1 (clip) or 2 (reflect), got ", bounds);
  PT_CHECK((bounds == kSwarmUnbounded) == (!lower && !upper), op, "lower and upper must ",
           bounds == kSwarmUnbounded ? "both be None" : "not both be None",
           " with bounds = ", bounds);
  if (lower) check_swarm_limit(op, "lower", *lower, position);
  if (upper) check_swarm_limit(op, "upper", *upper, position);
  return {particles, cols, static_cast<SwarmBounds>(bounds)};
}

}  // namespace perturbed
