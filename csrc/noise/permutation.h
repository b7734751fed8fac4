// Selections of the noise contract: a permutation of 0 .. size - 1 for every direction, computed one
// entry at a time, so that no table of indices exists; or draws with replacement.
//
// Permutation: a Feistel network on `bits` >= ceil(log2 size) bits whose values beyond `size` are
// encrypted again until one falls below (cycle walking: Black and Rogaway, Ciphers with arbitrary
// finite domains, CT-RSA 2002). A round XORs one half with the top bits of a x + c, x the other
// half: for random words a and c that hash is exactly pairwise independent (Dietzfelbinger 1996),
// which is what keeps pairs of entries uniform. Fewer than 8 bits would mix visibly worse: smaller
// sizes walk in 256 values. The round keys are 16 words of one stream: c1 = 0 .. 3.
//
// With replacement: entry j is mulhi(word j, size), word j % 4 of c1 = j / 4. A value's probability
// deviates from 1 / size by less than 2^-32.
#pragma once

#include "noise/philox.h"

namespace perturbed {

constexpr int kPermutationRounds = 8;
constexpr int kPermutationMinBits = 8;
constexpr int kPermutationKeyBlocks = 2 * kPermutationRounds / 4;

// Halves of the network: `high` bits above `low` bits. A function of the size alone.
struct PermutationShape {
  uint32_t size;
  uint32_t low_mask;
  int low, high;
};

// Round keys of one direction.
struct PermutationKey {
  uint32_t multiplier[kPermutationRounds], offset[kPermutationRounds];
};

PT_HD PermutationShape permutation_shape(uint32_t size) {
  int bits = kPermutationMinBits;
  while (bits < 32 && (size - 1) >> bits != 0) ++bits;
  const int low = bits - bits / 2;
  return {size, (1u << low) - 1u, low, bits / 2};
}

PT_HD PermutationKey permutation_key(const PhiloxLaunch& launch, PhiloxDirection direction) {
  PermutationKey key;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int block = 0; block < kPermutationKeyBlocks; ++block) {
    const PhiloxWords words =
        philox_finish(philox_block(launch, static_cast<uint32_t>(block)), direction, launch.key);
    key.multiplier[2 * block] = words.w[0];
    key.offset[2 * block] = words.w[1];
    key.multiplier[2 * block + 1] = words.w[2];
    key.offset[2 * block + 1] = words.w[3];
  }
  return key;
}

// One pass through the network: a permutation of 0 .. 2^bits - 1.
PT_HD uint32_t permutation_step(const PermutationShape& shape, const PermutationKey& key,
                                uint32_t value) {
  uint32_t high = value >> shape.low, low = value & shape.low_mask;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPermutationRounds; round += 2) {
    high ^= (key.multiplier[round] * low + key.offset[round]) >> (32 - shape.high);
    low ^= (key.multiplier[round + 1] * high + key.offset[round + 1]) >> (32 - shape.low);
  }
  return high << shape.low | low;
}

// Entry `index` < size of the permutation.
PT_HD uint32_t permutation_entry(const PermutationShape& shape, const PermutationKey& key,
                                 uint32_t index) {
  uint32_t value = permutation_step(shape, key, index);
  while (value >= shape.size) value = permutation_step(shape, key, value);
  return value;
}

// Entry of the draws with replacement, from its word.
PT_HD uint32_t replacement_entry(uint32_t word, uint32_t size) {
  return high_word(mul_wide(word, size));
}

}  // namespace perturbed
