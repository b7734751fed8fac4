// Arguments of the sign-flip operators, checked once for every device and turned into plain sizes.
// The CPU and CUDA twins (csrc/cpu/sign_flip.cpp, csrc/cuda/sign_flip.cu) start from these.
#pragma once

#include "bind/rows.h"
#include "noise/counters.h"

namespace perturbed {

inline MoveSizes check_flip(const char* op, const Tensor& x, const Tensor& key, int64_t stream,
                            int64_t directions, bool antithetic, bool shared) {
  const MoveSizes s = check_move(op, x, key, stream, directions, antithetic, shared);
  check_blocks(op, 1, s.in, true);
  return s;
}

inline AddSizes check_flip_add(const char* op, const Tensor& y, const Tensor& z, const Tensor& key,
                               int64_t stream, int64_t directions, bool antithetic) {
  const AddSizes s = check_add(op, y, z, key, stream, directions, antithetic);
  PT_CHECK(s.in == s.out, op, "z must have y's ", s.out, " columns, got ", s.in);
  check_blocks(op, 1, s.out, true);
  return s;
}

}  // namespace perturbed
