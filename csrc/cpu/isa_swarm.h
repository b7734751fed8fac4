// The CPU inner loops of particle swarms. Part of isa.h.
#pragma once

#include "cpu/lanes.h"
#include "noise/swarm.h"

namespace perturbed::PERTURBED_ISA {

// Columns of kLanes blocks, back in their order, as words.
PT_INLINE void store_words(U (&w)[4], U flips, uint32_t* out) {
  F as_floats[4];
  PT_UNROLL for (int k = 0; k < 4; ++k) as_floats[k] = Simd::as_float(Simd::xor_u(w[k], flips));
  Simd::interleave(as_floats);
  PT_UNROLL for (int k = 0; k < 4; ++k)
      Simd::store_u(out + kLanes * k, Simd::as_bits(as_floats[k]));
}

static void element_words(const PhiloxLaunch& launch_in, const PreparedBatch* prepared,
                          int64_t batches, PhiloxDirection direction, uint32_t flips_in,
                          uint32_t* out) {
  const PhiloxLaunch launch = launch_in;
  const Directions d = broadcast(direction);
  const U flips = Simd::set1_u(flips_in);
  const int64_t parts = batches * kParts;
  int64_t i = 0;
  for (; i + kChains <= parts; i += kChains) {
    Counters c[kChains];
    PT_UNROLL for (int n = 0; n < kChains; ++n) c[n] = load_part(prepared, i + n);
    U w[4][kChains];
    finish(c, d, launch, w);
    PT_UNROLL for (int n = 0; n < kChains; ++n) {
      U columns[4] = {w[0][n], w[1][n], w[2][n], w[3][n]};
      store_words(columns, flips, out + 4 * kLanes * (i + n));
    }
  }
  for (; i < parts; ++i) {
    const Counters c[1] = {load_part(prepared, i)};
    U w[4][1];
    finish(c, d, launch, w);
    U columns[4] = {w[0][0], w[1][0], w[2][0], w[3][0]};
    store_words(columns, flips, out + 4 * kLanes * i);
  }
}

// A loop that compilers turn into vector code: every operation of swarm_step is elementwise.
template <SwarmBounds bounds, class T>
PT_INLINE void swarm_loop(const SwarmRow<T>& row, int64_t n) {
  T* __restrict position = row.position;
  T* __restrict velocity = row.velocity;
  const T* best = row.best;
  const T* guide = row.guide;
  const uint32_t* words = row.words;
  const T* limit = row.limit;
  const T* lower = row.lower;
  const T* upper = row.upper;
  const SwarmCoefficients<T> c = row.coefficients;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T x = position[i], v = velocity[i];
    const T low = bounds == kSwarmUnbounded ? T(0) : lower[i];
    const T high = bounds == kSwarmUnbounded ? T(0) : upper[i];
    swarm_step<bounds>(x, v, best[i], guide[i], words[i], c, limit[i], low, high);
    position[i] = x;
    velocity[i] = v;
  }
}

template <class T>
PT_INLINE void swarm_move_row(const SwarmRow<T>& row, int64_t n, SwarmBounds bounds) {
  if (bounds == kSwarmUnbounded) {
    swarm_loop<kSwarmUnbounded>(row, n);
  } else if (bounds == kSwarmClip) {
    swarm_loop<kSwarmClip>(row, n);
  } else {
    swarm_loop<kSwarmReflect>(row, n);
  }
}

static void swarm_move(const SwarmRow<float>& row, int64_t n, SwarmBounds bounds) {
  swarm_move_row(row, n, bounds);
}

static void swarm_move_double(const SwarmRow<double>& row, int64_t n, SwarmBounds bounds) {
  swarm_move_row(row, n, bounds);
}

}  // namespace perturbed::PERTURBED_ISA
