// One element's step of particle swarm optimisation (Kennedy and Eberhart 1995; inertia: Shi and
// Eberhart 1998), for hosts and devices: the same operations in the same order everywhere, so that
// a swarm takes the same path on every processor.
#pragma once

#include "noise/uniform.h"

namespace perturbed {

enum SwarmBounds : int64_t {
  kSwarmUnbounded = 0,
  kSwarmClip = 1,
  kSwarmReflect = 2,
};

template <class T>
struct SwarmCoefficients {
  T inertia, own, social;
};

// Moves one element. Comparisons are written so that a NaN stays what it is.
template <SwarmBounds bounds, class T>
PT_HD void swarm_step(T& position, T& velocity, T best, T guide, uint32_t word,
                      const SwarmCoefficients<T>& c, T limit, T lower, T upper) {
  const UniformPair<T> r = uniform_pair<T>(word);
  T x = position;
  T v = exact_mul(c.inertia, velocity);
  v = exact_fma(exact_mul(c.own, r.first), exact_sub(best, x), v);
  v = exact_fma(exact_mul(c.social, r.second), exact_sub(guide, x), v);
  v = v > limit ? limit : v;
  v = v < -limit ? -limit : v;
  x = exact_add(x, v);
  if constexpr (bounds != kSwarmUnbounded) {
    const bool below = x<lower, above = x> upper;
    if constexpr (bounds == kSwarmReflect) {
      x = below ? exact_add(lower, exact_sub(lower, x)) : x;
      x = above ? exact_sub(upper, exact_sub(x, upper)) : x;
      v = below || above ? -v : v;
    } else {
      v = below || above ? T(0) : v;
    }
    x = x < lower ? lower : x;
    x = x > upper ? upper : x;
  }
  position = x;
  velocity = v;
}

}  // namespace perturbed
