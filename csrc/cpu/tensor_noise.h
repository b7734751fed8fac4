// The noise of one tensor on the CPU: its stream's launch constants and its directions.
#pragma once

#include <vector>

#include "bind/check.h"
#include "cpu/kernels.h"
#include "noise/counters.h"

namespace perturbed {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// One tensor's noise: the launch constants of its stream and of `count` directions from `first` on.
struct TensorNoise {
  PhiloxLaunch launch;
  std::vector<PhiloxDirection> directions;

  TensorNoise(const Tensor& key, int64_t stream, int64_t first, int64_t count) : directions(count) {
    const int64_t* k = key.const_data_ptr<int64_t>();
    launch = philox_launch(static_cast<uint32_t>(stream), static_cast<uint32_t>(k[1]),
                           philox_key(static_cast<uint64_t>(k[0])));
    for (int64_t d = 0; d < count; ++d) {
      directions[d] = philox_direction(launch, static_cast<uint32_t>(k[2] + first + d));
    }
  }
};

}  // namespace perturbed
