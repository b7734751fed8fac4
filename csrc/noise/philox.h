// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
// A pure function (counter, key) -> four 32-bit words; Random123's known-answer vectors apply.
#pragma once

#include "noise/hd.h"

namespace perturbed {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

struct PhiloxKey {
  uint32_t k0, k1;
};

struct PhiloxWords {
  uint32_t w[4];
};

PT_HD uint64_t mul_wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
PT_HD uint32_t high_word(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
PT_HD uint32_t low_word(uint64_t p) { return static_cast<uint32_t>(p); }

// Key of round `round` (0-based): the user's key plus `round` Weyl steps.
PT_HD PhiloxKey round_key(PhiloxKey key, uint32_t round) {
  return {key.k0 + round * kPhiloxW0, key.k1 + round * kPhiloxW1};
}

PT_HD PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = mul_wide(kPhiloxM0, c0);
    const uint64_t p1 = mul_wide(kPhiloxM1, c2);
    c0 = high_word(p1) ^ c1 ^ key.k0;
    c1 = low_word(p1);
    c2 = high_word(p0) ^ c3 ^ key.k1;
    c3 = low_word(p0);
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// ---- the same function in two steps -----------------------------------------------------------
//
// Noise keeps c0 and c2 fixed for a whole launch, varies c1 over the blocks of a tensor and c3 over
// directions (noise/counters.h). A word that enters by XOR only leaves the first rounds partly
// constant, so three of the ten rounds split into one part that depends on the block and one that
// depends on the direction. A kernel that visits D directions of one block pays the block's part
// once, and 14 instead of 20 multiplications per call after that.

struct PhiloxLaunch {  // constant for a launch: functions of (c0, c2, key)
  uint32_t x1;         // round 1: c0' = c1 ^ x1
  uint32_t y1;         // round 1: c2' = c3 ^ y1
  uint32_t x2;         // round 2: c0'' = hi(M1 c2') ^ x2
  uint32_t y2;         // round 2: c2'' = hi(M0 c0') ^ y2
  PhiloxKey key;
};

struct PhiloxBlock {  // one c1
  uint64_t p0;        // round 2's M0 product: its low word is c3 before round 3
  uint64_t p1;        // round 3's M1 product
};

struct PhiloxDirection {  // one c3
  uint32_t e;             // round 3: c0 = hi(p1) ^ e
  uint32_t g;             // round 3: c2 = lo(p0) ^ g
  uint32_t h;             // round 3: c3
};

PT_HD PhiloxLaunch philox_launch(uint32_t c0, uint32_t c2, PhiloxKey key) {
  const uint64_t p0 = mul_wide(kPhiloxM0, c0);
  const uint64_t p1 = mul_wide(kPhiloxM1, c2);
  const PhiloxKey second = round_key(key, 1);
  return {high_word(p1) ^ key.k0, high_word(p0) ^ key.k1, low_word(p1) ^ second.k0,
          low_word(p0) ^ second.k1, key};
}

PT_HD PhiloxBlock philox_block(const PhiloxLaunch& launch, uint32_t c1) {
  const uint64_t p0 = mul_wide(kPhiloxM0, c1 ^ launch.x1);
  return {p0, mul_wide(kPhiloxM1, high_word(p0) ^ launch.y2)};
}

PT_HD PhiloxDirection philox_direction(const PhiloxLaunch& launch, uint32_t c3) {
  const uint64_t p1 = mul_wide(kPhiloxM1, c3 ^ launch.y1);             // round 2
  const uint64_t p0 = mul_wide(kPhiloxM0, high_word(p1) ^ launch.x2);  // round 3
  const PhiloxKey third = round_key(launch.key, 2);
  return {low_word(p1) ^ third.k0, high_word(p0) ^ third.k1, low_word(p0)};
}

// Keys of rounds 4 to 10.
struct PhiloxSchedule {
  uint32_t k0[kPhiloxRounds - 3], k1[kPhiloxRounds - 3];
};

PT_HD PhiloxSchedule philox_schedule(PhiloxKey key) {
  PhiloxSchedule schedule;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    const PhiloxKey at = round_key(key, static_cast<uint32_t>(i) + 3);
    schedule.k0[i] = at.k0;
    schedule.k1[i] = at.k1;
  }
  return schedule;
}

// Rounds 4 to 10. philox_finish(philox_block(l, c1), philox_direction(l, c3), key) equals
// philox4x32(c0, c1, c2, c3, key).
PT_HD PhiloxWords philox_finish(PhiloxBlock block, PhiloxDirection direction,
                                const PhiloxSchedule& keys) {
  uint32_t c0 = high_word(block.p1) ^ direction.e;
  uint32_t c1 = low_word(block.p1);
  uint32_t c2 = low_word(block.p0) ^ direction.g;
  uint32_t c3 = direction.h;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    const uint64_t p0 = mul_wide(kPhiloxM0, c0);
    const uint64_t p1 = mul_wide(kPhiloxM1, c2);
    c0 = high_word(p1) ^ c1 ^ keys.k0[i];
    c1 = low_word(p1);
    c2 = high_word(p0) ^ c3 ^ keys.k1[i];
    c3 = low_word(p0);
  }
  return {{c0, c1, c2, c3}};
}

PT_HD PhiloxWords philox_finish(PhiloxBlock block, PhiloxDirection direction, PhiloxKey key) {
  return philox_finish(block, direction, philox_schedule(key));
}

}  // namespace perturbed
