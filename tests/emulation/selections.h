// pi_d by plain loops over noise/permutation.h, for the drivers of tests/emulation.
#pragma once

#include "harness.h"

// After the harness.
#include "noise/permutation.h"

namespace emulated {

// Entries 0 .. count - 1 of pi_d.
inline std::vector<uint32_t> selection(const Draw& draw, uint32_t counter, int64_t d, int64_t size,
                                       int64_t count, bool replace) {
  const PhiloxKey key = philox_key(draw.seed);
  const uint32_t c3 = draw.first_direction + static_cast<uint32_t>(d);
  std::vector<uint32_t> entries;
  if (replace) {
    for (uint32_t j = 0; j < count; ++j) {
      const PhiloxWords words = philox4x32(counter, j / 4, draw.generation, c3, key);
      entries.push_back(replacement_entry(words.w[j % 4], static_cast<uint32_t>(size)));
    }
    return entries;
  }
  const PhiloxLaunch launch = philox_launch(counter, draw.generation, key);
  const PermutationKey words = permutation_key(launch, philox_direction(launch, c3));
  const PermutationShape shape = permutation_shape(static_cast<uint32_t>(size));
  for (uint32_t j = 0; j < count; ++j) entries.push_back(permutation_entry(shape, words, j));
  return entries;
}

}  // namespace emulated
