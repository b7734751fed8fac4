// From checked tensors to the arguments that the forwards of low_rank.cu and sparse.cu share.
#pragma once

#include "bind/dense.h"
#include "bind/launch.h"
#include "cuda/expand.cuh"

namespace perturbed {

// Everything but the factor and the bias.
template <class T>
ExpandArgs expand_args(const DenseLinearSizes& s, Tensor& y, const Tensor& x, const Tensor& key,
                       const Tensor& sigma) {
  ExpandArgs args{};
  args.y = y.mutable_data_ptr();
  args.x = x.const_data_ptr();
  args.key = static_cast<const int64_t*>(key.const_data_ptr());
  args.sigma = static_cast<const double*>(sigma.const_data_ptr());
  args.directions = s.directions;
  args.repeats = s.repeats;
  args.tokens = s.tokens;
  args.out = s.out;
  args.in = s.in;
  args.sources = s.sources;
  args.x_source_stride = s.shared ? s.x_row_stride : s.directions * s.x_row_stride;
  args.x_direction_stride = s.shared ? 0 : s.x_row_stride;
  args.x_token_stride = s.x_token_stride;
  args.antithetic = s.antithetic;
  args.x_aligned = rows_aligned(args.x, sizeof(T), s.in, s.x_row_stride, s.x_token_stride);
  args.y_aligned = rows_aligned(args.y, sizeof(T), s.out);
  return args;
}

}  // namespace perturbed
