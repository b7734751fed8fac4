// Uniform numbers of the noise contract: one word of a counter's four makes one number or a pair of
// coarser ones. All are odd multiples of a power of two, strictly between 0 and 1, exact in float32,
// and 1 - u is what the complement of the word gives.
#pragma once

#include "noise/hd.h"

namespace perturbed {

// (2 (word >> 9) + 1) 2^-24: the 23 bits that Box and Muller's radius takes too. One bit more, and
// the largest would round to 1 in float32.
PT_HD float uniform_from_word(uint32_t word) {
  return exact_mul(static_cast<float>(static_cast<int32_t>(2 * (word >> 9) + 1)), 0x1p-24f);
}

template <class T>
struct UniformPair {
  T first, second;
};

// (2 h + 1) 2^-17 of the word's high and low half h.
template <class T>
PT_HD UniformPair<T> uniform_pair(uint32_t word) {
  const T step = static_cast<T>(0x1p-16f), half = static_cast<T>(0x1p-17f);
  return {exact_fma(static_cast<T>(static_cast<int32_t>(word >> 16)), step, half),
          exact_fma(static_cast<T>(static_cast<int32_t>(word & 0xffffu)), step, half)};
}

}  // namespace perturbed
