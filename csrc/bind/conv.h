// Arguments of conv_members_, checked once and turned into plain sizes and strides.
#pragma once

#include <array>
#include <optional>

#include "bind/check.h"

namespace perturbed {

struct ConvSizes {
  int64_t repeats, directions;  // R, D: all four of y and x are [R, D, channels, height, width]
  int64_t in, out;              // channels C and O
  int64_t kernel_height, kernel_width;
  int64_t height, width;  // of y
  int64_t stride_height, stride_width, dilation_height, dilation_width;
  std::array<int64_t, 5> x_strides, y_strides;  // in elements
  int64_t kernel_stride, bias_stride;           // from one direction to the next, in elements
  bool channels_last;                           // how a row of y lies: [H', W', O] or [O, H', W']

  int64_t taps() const { return in * kernel_height * kernel_width; }
  int64_t pixels() const { return repeats * height * width; }  // of one direction
};

// Whether every row y[r, d] lies in memory as [O, H', W'] or as [H', W', O], without gaps.
inline bool rows_are_dense(const Tensor& y, bool channels_last) {
  const int64_t order[2][3] = {{4, 3, 2}, {2, 4, 3}};  // innermost first
  int64_t expected = 1;
  for (const int64_t axis : order[channels_last]) {
    if (y.size(axis) != 1 && y.stride(axis) != expected) return false;
    expected *= y.size(axis);
  }
  return true;
}

inline ConvSizes check_conv_members(const char* op, const Tensor& y, const Tensor& x,
                                    const Tensor& kernels, const std::optional<Tensor>& bias,
                                    int64_t stride_height, int64_t stride_width,
                                    int64_t dilation_height, int64_t dilation_width) {
  check_dim(op, "y", y, 5);
  check_dim(op, "x", x, 5);
  check_dim(op, "kernels", kernels, 5);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"y", y}, {"x", x}, {"kernels", kernels}}) {
    check_dtype(op, name, tensor, ScalarType::Float);
    check_same_device(op, name, tensor, y);
  }
  PT_CHECK(stride_height > 0 && stride_width > 0 && dilation_height > 0 && dilation_width > 0, op,
           "strides and dilations must be positive, got ", stride_height, ", ", stride_width,
           " and ", dilation_height, ", ", dilation_width);
  // So that no product with a size overflows.
  constexpr int64_t kLimit = int64_t{1} << 31;
  PT_CHECK(stride_height < kLimit && stride_width < kLimit && dilation_height < kLimit &&
               dilation_width < kLimit,
           op, "strides and dilations must be below 2^31, got ", stride_height, ", ", stride_width,
           " and ", dilation_height, ", ", dilation_width);
  ConvSizes s;
  s.repeats = y.size(0);
  s.directions = y.size(1);
  s.out = y.size(2);
  s.height = y.size(3);
  s.width = y.size(4);
  s.in = x.size(2);
  s.kernel_height = kernels.size(3);
  s.kernel_width = kernels.size(4);
  s.stride_height = stride_height;
  s.stride_width = stride_width;
  s.dilation_height = dilation_height;
  s.dilation_width = dilation_width;
  PT_CHECK(x.size(0) == s.repeats && x.size(1) == s.directions, op, "x must have y's ", s.repeats,
           " repeats and ", s.directions, " directions, got shape ", shape_string(x));
  PT_CHECK(kernels.size(0) == s.directions && kernels.size(1) == s.out && kernels.size(2) == s.in,
           op, "kernels must be of ", s.directions, " directions, ", s.out, " outputs and ", s.in,
           " inputs, got shape ", shape_string(kernels));
  PT_CHECK(s.kernel_height > 0 && s.kernel_width > 0, op, "kernels must have taps, got shape ",
           shape_string(kernels));
  const int64_t height = (s.height - 1) * stride_height + (s.kernel_height - 1) * dilation_height;
  const int64_t width = (s.width - 1) * stride_width + (s.kernel_width - 1) * dilation_width;
  PT_CHECK(y.numel() == 0 || (height < x.size(3) && width < x.size(4)), op,
           "y must be as small as what fits in x, ", shape_string(x), ", got ", shape_string(y));
  s.channels_last = !rows_are_dense(y, false);
  const int64_t row = s.out * s.height * s.width;
  PT_CHECK(rows_are_dense(y, s.channels_last) && (s.directions <= 1 || y.stride(1) >= row) &&
               (s.repeats <= 1 || y.stride(0) >= row * s.directions),
           op, "y must have rows of their own, contiguous or channels-last");
  s.kernel_stride = kernels.stride(0);
  int64_t expected = 1;
  for (int64_t axis = 4; axis > 0; --axis) {
    PT_CHECK(kernels.size(axis) == 1 || kernels.numel() == 0 || kernels.stride(axis) == expected,
             op, "kernels must be contiguous in every direction");
    expected *= kernels.size(axis);
  }
  s.bias_stride = 0;
  if (bias) {
    PT_CHECK(bias->dim() == 2 && bias->size(0) == s.directions && bias->size(1) == s.out, op,
             "bias must have shape (", s.directions, ", ", s.out, "), got ", shape_string(*bias));
    check_dtype(op, "bias", *bias, ScalarType::Float);
    check_same_device(op, "bias", *bias, y);
    PT_CHECK(s.out <= 1 || bias->stride(1) == 1, op,
             "bias must be contiguous in its last dimension");
    s.bias_stride = bias->stride(0);
  }
  for (int axis = 0; axis < 5; ++axis) {
    s.x_strides[axis] = x.stride(axis);
    s.y_strides[axis] = y.stride(axis);
  }
  return s;
}

}  // namespace perturbed
