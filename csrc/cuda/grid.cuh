// Grids of a launch, without CUDA's types, so that tests/emulation can run them.
#pragma once

#include "cuda/device.cuh"

namespace perturbed {

struct GridShape {
  unsigned x, y, z;
};

// A grid of blocks; y and z are cut to what CUDA allows, and their kernels loop.
inline GridShape grid_shape(int64_t x, int64_t y = 1, int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y < kMaxGridYZ ? y : kMaxGridYZ),
          static_cast<unsigned>(z < kMaxGridYZ ? z : kMaxGridYZ)};
}

}  // namespace perturbed
