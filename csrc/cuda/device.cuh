// Vocabulary of the device code. A kernel header uses what is here, CUDA's index variables,
// __syncthreads, __shfl_sync, __shfl_xor_sync, __ballot_sync, __ffs and __popc, and nothing else, so
// that tests/emulation can compile the same source with a host compiler and run it thread by thread.
// No torch in here.
#pragma once

#include <cstdint>
#include <type_traits>

#include "noise/counters.h"
#include "noise/normal.h"
#include "noise/philox.h"
#include "noise/signs.h"

// PT_SHARED(type, name, count): an array in shared memory. The emulation replaces it by one that is
// poisoned and that reports reads and writes which no barrier separates.
#if !defined(PERTURBED_EMULATION)
#define PT_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace perturbed {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// Blocks in grid.y and grid.z; grid.x may reach 2^31 - 1.
#if defined(PERTURBED_MAX_GRID_YZ)
constexpr int64_t kMaxGridYZ = PERTURBED_MAX_GRID_YZ;
#else
constexpr int64_t kMaxGridYZ = 65535;
#endif

// Sums are double for double tensors and float for the rest.
template <class T>
using sum_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

PT_DEVICE float fused_multiply_add(float a, float b, float c) { return exact_fma(a, b, c); }
PT_DEVICE double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// Four consecutive elements, moved by one instruction where 16 bytes hold them and by two
// otherwise.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Vector4 {
  T v[4];
};

// Reads elements 0 .. 3 at `p`, of which the first `valid` exist; the others become zero.
// `aligned`: p is aligned for Vector4 and `valid` is not between 0 and 4.
template <class S, class T>
PT_DEVICE void load4(S (&out)[4], const T* p, int64_t valid, bool aligned) {
  if (aligned && valid > 0) {
    const Vector4<T> in = *reinterpret_cast<const Vector4<T>*>(p);
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = static_cast<S>(in.v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = k < valid ? static_cast<S>(p[k]) : S(0);
  }
}

// Writes what exists of elements 0 .. 3; the counterpart of load4.
template <class S, class T>
PT_DEVICE void store4(T* p, const S (&in)[4], int64_t valid, bool aligned) {
  if (aligned && valid > 0) {
    Vector4<T> out;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.v[k] = static_cast<T>(in[k]);
    *reinterpret_cast<Vector4<T>*>(p) = out;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < valid) p[k] = static_cast<T>(in[k]);
    }
  }
}

// What every kernel takes from the `key` and `sigma` tensors. They stay on the device: a host that
// read them would synchronise, and a captured graph would replay the same noise for ever.
struct NoiseKey {
  PhiloxKey key;
  uint32_t generation;
  uint32_t first_direction;
};

PT_DEVICE NoiseKey read_key(const int64_t* key) {
  return {philox_key(static_cast<uint64_t>(key[0])), static_cast<uint32_t>(key[1]),
          static_cast<uint32_t>(key[2])};
}

// The round keys, pinned in 14 registers. Left alone, ptxas adds them up again for every call,
// which is a tenth of a noise loop's instructions.
PT_DEVICE PhiloxSchedule pinned_schedule(PhiloxKey key) {
  PhiloxSchedule schedule = philox_schedule(key);
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kPhiloxRounds - 3; ++i) {
    asm volatile("" : "+r"(schedule.k0[i]), "+r"(schedule.k1[i]));
  }
#endif
  return schedule;
}

// Sums each of kValues values over `group` neighbouring lanes (a power of two, the same for the
// whole warp) and leaves every sum with a lane of the group: this lane then holds the sums first ..
// first + count - 1 in v[0 .. count). A group larger than kValues holds each sum several times.
// Halving the values with every step costs kValues - 1 shuffles instead of 5 kValues. The order of
// additions depends on kValues and group only.
template <int kValues, class S>
PT_DEVICE int group_sum(S (&v)[kValues], int group, int lane, int& first) {
  static_assert((kValues & (kValues - 1)) == 0 && kValues <= kWarpSize, "a power of two up to 32");
  int count = kValues;
  first = 0;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int mask = 1 << step;
    const int half = kValues >> (step + 1);
    if (mask < group) {
      if (half > 0) {
        const bool upper = (lane & mask) != 0;
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i) {
          if (i < half) {
            const S keep = upper ? v[i + half] : v[i];
            const S send = upper ? v[i] : v[i + half];
            v[i] = keep + __shfl_xor_sync(kFullWarp, send, mask);
          }
        }
        if (upper) first += half;
        count = half;
      } else {
        v[0] += __shfl_xor_sync(kFullWarp, v[0], mask);
      }
    }
  }
  return count;
}

// Smallest power of two that is at least `value` (1 for value <= 1) and at most `limit`, itself
// one.
inline int power_of_two_at_least(int64_t value, int limit) {
  int power = 1;
  while (power < value && power < limit) power *= 2;
  return power;
}

struct GridShape {
  unsigned x, y, z;
};

// A grid of blocks; y and z are cut to what CUDA allows, and their kernels loop.
inline GridShape grid_shape(int64_t x, int64_t y = 1, int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y < kMaxGridYZ ? y : kMaxGridYZ),
          static_cast<unsigned>(z < kMaxGridYZ ? z : kMaxGridYZ)};
}

}  // namespace perturbed
