// Rademacher signs of the noise contract: one bit per element, set = +1, clear = -1. The block
// shape (4 rows x 32 columns per Philox call) is in noise/counters.h.
#pragma once

#include "noise/hd.h"

namespace perturbed {

// The bit of `word` as a sign, without a branch.
PT_HD float sign_from_bit(uint32_t word, int bit) {
  return float_from_bits(0xbf800000u ^ ((word >> bit & 1u) << 31));
}

}  // namespace perturbed
