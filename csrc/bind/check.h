// Argument checks of the operators: one wording, "<op>: <argument> must <contract>, got <value>".
// Only headers in csrc/bind include torch, and only through its stable ABI.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

namespace perturbed {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define PT_CHECK(condition, op, ...)                                  \
  do {                                                                \
    STD_TORCH_CHECK(condition, "perturbed::", op, ": ", __VA_ARGS__); \
  } while (0)

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  PT_CHECK(tensor.dim() == dim, op, name, " must have ", dim, " dimensions, got shape ",
           shape_string(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  PT_CHECK(tensor.scalar_type() == dtype, op, name, " must have dtype ",
           torch::headeronly::toString(dtype), ", got ",
           torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& other) {
  PT_CHECK(
      tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(),
      op, name, " must be on the same device as the other tensors");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  PT_CHECK(tensor.is_contiguous(), op, name, " must be contiguous; call .contiguous()");
}

// Rows of a [.., .., n] tensor, which may lie anywhere; an empty tensor has no rows to lie wrongly,
// and .contiguous() would leave its strides alone.
inline void check_contiguous_rows(const char* op, const char* name, const Tensor& tensor) {
  PT_CHECK(tensor.size(2) <= 1 || tensor.numel() == 0 || tensor.stride(2) == 1, op, name,
           " must be contiguous in its last dimension; call .contiguous()");
}

inline void check_key(const char* op, const Tensor& key, const Tensor& on) {
  PT_CHECK(key.dim() == 1 && key.size(0) == 3, op, "key must have shape (3,), got ",
           shape_string(key));
  check_dtype(op, "key", key, ScalarType::Long);
  check_contiguous(op, "key", key);
  check_same_device(op, "key", key, on);
}

inline void check_sigma(const char* op, const Tensor& sigma, const Tensor& on) {
  PT_CHECK(sigma.numel() == 1, op, "sigma must have one element, got shape ", shape_string(sigma));
  check_dtype(op, "sigma", sigma, ScalarType::Double);
  check_same_device(op, "sigma", sigma, on);
}

}  // namespace perturbed
