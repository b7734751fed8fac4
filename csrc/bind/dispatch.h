// Dtype dispatch without macros: `f` is called with a tag whose `type` is the element type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "bind/check.h"

namespace perturbed {

template <class T>
struct type_tag {
  using type = T;
};

template <class F>
decltype(auto) dispatch_float(ScalarType dtype, const char* op, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(type_tag<float>{});
    case ScalarType::Double:
      return f(type_tag<double>{});
    case ScalarType::BFloat16:
      return f(type_tag<torch::headeronly::BFloat16>{});
    case ScalarType::Half:
      return f(type_tag<torch::headeronly::Half>{});
    default:
      break;
  }
  STD_TORCH_CHECK(false, "perturbed::", op, ": ", name,
                  " must be float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(dtype));
}

// Accumulator of an element type: double for double, float for the rest.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

}  // namespace perturbed
