// What the drivers of tests/emulation share: checks, element types, inputs, the noise of the contract
// element by element, and a main() that runs the group named on the command line. Include it before
// any header of csrc/cuda.
#pragma once

#include "cuda_emulation.h"

// After the emulation, which gives CUDA's names their meaning.
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device.cuh"

namespace emulated {

using namespace perturbed;

inline int failures = 0;
inline int checks = 0;

inline void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

// ---- element types ------------------------------------------------------------------------------

using Half = _Float16;

struct BFloat16 {
  uint16_t bits = 0;
  BFloat16() = default;
  explicit BFloat16(float value) {  // round to nearest even; tests use no NaN
    const uint32_t b = bits_from_float(value);
    bits = static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
  }
  explicit operator float() const { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
  explicit operator double() const { return static_cast<float>(*this); }
};

template <class T>
inline constexpr double kEpsilon = std::numeric_limits<T>::epsilon();
template <>
inline constexpr double kEpsilon<Half> = 0x1p-10;
template <>
inline constexpr double kEpsilon<BFloat16> = 0x1p-7;

template <class T>
const char* name_of() {
  if constexpr (std::is_same_v<T, float>) return "float";
  if constexpr (std::is_same_v<T, double>) return "double";
  if constexpr (std::is_same_v<T, Half>) return "half";
  return "bfloat16";
}

template <class T>
double as_double(T value) {
  return static_cast<double>(static_cast<sum_t<T>>(value));
}

// Values in [-2, 2] whose sums round, so that another order of adding shows in the bits.
struct Inputs {
  uint32_t state;
  double next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<double>(static_cast<int>(state >> 25) - 64) / 33.0;
  }
  template <class T>
  std::vector<T> vector(int64_t size) {
    std::vector<T> values(static_cast<size_t>(size));
    for (T& value : values) value = static_cast<T>(static_cast<sum_t<T>>(next()));
    return values;
  }
};

// ---- plain loops --------------------------------------------------------------------------------

enum Kind { kFast, kExactNormal, kSign };

struct Draw {
  Kind kind;
  uint64_t seed = 0x123456789abcdefull;
  uint32_t generation = 3;
  uint32_t first_direction = 7;

  std::vector<int64_t> key() const {
    return {static_cast<int64_t>(seed), generation, first_direction};
  }

  // Element (row, col) of E_d of an m x cols matrix, straight from the contract.
  float operator()(uint32_t counter, int64_t d, int64_t cols, int64_t row, int64_t col) const {
    const uint32_t c3 = first_direction + static_cast<uint32_t>(d);
    if (kind == kSign) {
      const int64_t c1 = row / 4 * ((cols + 31) / 32) + col / 32;
      const PhiloxWords w =
          philox4x32(counter, static_cast<uint32_t>(c1), generation, c3, philox_key(seed));
      return w.w[row % 4] >> (col % 32) & 1u ? 1.0f : -1.0f;
    }
    const int64_t c1 = row * ((cols + 3) / 4) + col / 4;
    const PhiloxWords w =
        philox4x32(counter, static_cast<uint32_t>(c1), generation, c3, philox_key(seed));
    const NormalBlock block = kind == kFast ? normal_block_fast(w) : normal_block(w);
    return block.z[col % 4];
  }
};

inline const char* name_of(Kind kind) {
  return kind == kFast ? "fast" : kind == kExactNormal ? "exact" : "sign";
}

// Runs a launch under emulation; `seed` orders threads and blocks.
inline auto launcher(uint64_t seed) {
  return [seed](auto kernel, GridShape grid, int threads, auto... args) {
    emulation::launch({grid.x, grid.y, grid.z}, static_cast<unsigned>(threads), seed,
                      [&] { kernel(args...); });
  };
}

// ---- groups -------------------------------------------------------------------------------------

using Group = std::pair<const char*, std::function<void()>>;

// main() of a driver: runs one of `groups` and prints "<group>: <n> checks, <n> failures".
inline int run_group(int argc, char** argv, const std::vector<Group>& groups) {
  const std::string name = argc > 1 ? argv[1] : "";
  for (const auto& [group, run] : groups) {
    if (name != group) continue;
    try {
      run();
    } catch (const std::exception& error) {
      std::printf("FAIL %s\n", error.what());
      ++failures;
    }
    std::printf("%s: %d checks, %d failures\n", group, checks, failures);
    return failures ? 1 : 0;
  }
  std::printf("unknown group '%s'\n", name.c_str());
  return 2;
}

}  // namespace emulated
