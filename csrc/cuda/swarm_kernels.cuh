// Kernels of particle swarms and their launches, without torch. The emulation compiles this file.
#pragma once

#include "cuda/device.cuh"
#include "noise/swarm.h"

namespace perturbed {

constexpr int kSwarmThreads = 256;
// Columns of a thread: those of one Philox call.
constexpr int kSwarmColumns = kWordBlockCols;

struct SwarmArgs {
  void* position;  // [P, N]
  void* velocity;
  void* best;
  const bool* improved;        // [P]
  const int64_t* guide;        // [P]
  const int64_t* key;          // [3]
  const double* coefficients;  // [3]: inertia, c1, c2
  const void* limit;           // [1] or [N]
  const void* lower;           // the same, or null
  const void* upper;
  int64_t particles, cols;
  bool limit_each, lower_each, upper_each;  // [N]
  uint32_t counter;
  bool per_dimension, antithetic;
  bool aligned;         // every row of the [P, N] tensors may be read as Vector4
  bool limits_aligned;  // and so may the [N] ones
};

// A thread's particle and its first column. Neighbours have neighbouring columns.
struct SwarmUnit {
  int64_t particle, col;
  bool exists;
};

PT_HD int64_t swarm_units(int64_t cols) { return ceil_div<int64_t>(cols, kSwarmColumns); }

PT_DEVICE SwarmUnit swarm_unit(int64_t particles, int64_t cols) {
  const int64_t units = swarm_units(cols);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kSwarmThreads + threadIdx.x;
  const int64_t particle = unit / units;
  return {particle, (unit - particle * units) * kSwarmColumns, particle < particles};
}

// best[p] = position[p] where improved[p]. A launch of its own: particles that follow p read its new
// best in the next one. Bound: bytes of improved rows, which are few in most steps.
template <class T>
__global__ void __launch_bounds__(kSwarmThreads) swarm_keep_kernel(SwarmArgs a) {
  const SwarmUnit unit = swarm_unit(a.particles, a.cols);
  if (!unit.exists || !a.improved[unit.particle]) return;
  const int64_t at = unit.particle * a.cols + unit.col, valid = a.cols - unit.col;
  T x[kSwarmColumns];
  load4(x, static_cast<const T*>(a.position) + at, valid, a.aligned);
  store4(static_cast<T*>(a.best) + at, x, valid, a.aligned);
}

// The thread's elements of a limit; `missing` where there is none.
template <class T>
PT_DEVICE void load_limit(T (&out)[kSwarmColumns], const void* limit, bool each, int64_t col,
                          int64_t valid, bool aligned, T missing) {
  const T* from = static_cast<const T*>(limit);
  if (each) {
    load4(out, from + col, valid, aligned);
  } else {
    const T value = from == nullptr ? missing : *from;
#pragma unroll
    for (int k = 0; k < kSwarmColumns; ++k) out[k] = value;
  }
}

// The step of four elements of a particle, whose words are one Philox call. A guide out of range is
// taken to the nearest particle: the host cannot look without waiting for the device. Bound: bytes of
// position and velocity, read and written, and of best; those of a guide that many follow come from
// the second-level cache.
template <SwarmBounds bounds, class T>
__global__ void __launch_bounds__(kSwarmThreads) swarm_move_kernel(SwarmArgs a) {
  const SwarmUnit unit = swarm_unit(a.particles, a.cols);
  if (!unit.exists) return;
  const int64_t p = unit.particle, at = p * a.cols + unit.col, valid = a.cols - unit.col;
  int64_t guide_row = a.guide[p];
  guide_row = guide_row < 0 ? 0 : guide_row;
  guide_row = guide_row >= a.particles ? a.particles - 1 : guide_row;

  T* position = static_cast<T*>(a.position) + at;
  T* velocity = static_cast<T*>(a.velocity) + at;
  const T* bests = static_cast<const T*>(a.best);
  T x[kSwarmColumns], v[kSwarmColumns], best[kSwarmColumns], guide[kSwarmColumns];
  load4(x, position, valid, a.aligned);
  load4(v, velocity, valid, a.aligned);
  load4(best, bests + at, valid, a.aligned);
  load4(guide, bests + guide_row * a.cols + unit.col, valid, a.aligned);
  T limit[kSwarmColumns], lower[kSwarmColumns] = {}, upper[kSwarmColumns] = {};
  load_limit(limit, a.limit, a.limit_each, unit.col, valid, a.limits_aligned, T(0));
  if constexpr (bounds != kSwarmUnbounded) {
    const T infinity = static_cast<T>(float_from_bits(0x7f800000u));
    load_limit(lower, a.lower, a.lower_each, unit.col, valid, a.limits_aligned, -infinity);
    load_limit(upper, a.upper, a.upper_each, unit.col, valid, a.limits_aligned, infinity);
  }

  // The second half of an antithetic swarm has the words of the first, complemented.
  const int64_t half = a.particles / 2;
  const bool mirrored = a.antithetic && p >= half;
  const NoiseKey noise = read_key(a.key);
  const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(mirrored ? p - half : p);
  const uint32_t c1 = a.per_dimension ? static_cast<uint32_t>(unit.col / kWordBlockCols) : 0u;
  const PhiloxWords words = philox4x32(a.counter, c1, noise.generation, c3, noise.key);
  const uint32_t flips = mirrored ? ~0u : 0u;
  const SwarmCoefficients<T> c = {static_cast<T>(a.coefficients[0]),
                                  static_cast<T>(a.coefficients[1]),
                                  static_cast<T>(a.coefficients[2])};
#pragma unroll
  for (int k = 0; k < kSwarmColumns; ++k) {
    const uint32_t word = (a.per_dimension ? words.w[k] : words.w[0]) ^ flips;
    swarm_step<bounds>(x[k], v[k], best[k], guide[k], word, c, limit[k], lower[k], upper[k]);
  }
  store4(position, x, valid, a.aligned);
  store4(velocity, v, valid, a.aligned);
}

struct UniformArgs {
  void* out;           // [count, cols]
  const int64_t* key;  // [3]
  int64_t first, count, cols;
  uint32_t counter;
  bool aligned;  // every row of `out` may be written as Vector4
};

// Four uniform numbers a thread. Bound: bytes written.
template <class T>
__global__ void __launch_bounds__(kSwarmThreads) uniforms_kernel(UniformArgs a) {
  const SwarmUnit unit = swarm_unit(a.count, a.cols);
  if (!unit.exists) return;
  const NoiseKey noise = read_key(a.key);
  const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(a.first + unit.particle);
  const uint32_t c1 = static_cast<uint32_t>(unit.col / kWordBlockCols);
  const PhiloxWords words = philox4x32(a.counter, c1, noise.generation, c3, noise.key);
  float u[kSwarmColumns];
#pragma unroll
  for (int k = 0; k < kSwarmColumns; ++k) u[k] = uniform_from_word(words.w[k]);
  store4(static_cast<T*>(a.out) + unit.particle * a.cols + unit.col, u, a.cols - unit.col,
         a.aligned);
}

// ---- launches -----------------------------------------------------------------------------------

// `launch` as in dense_launch.cuh. Elements are independent, so results do not depend on geometry.
inline GridShape swarm_grid(int64_t rows, int64_t cols) {
  return grid_shape(ceil_div<int64_t>(rows * swarm_units(cols), kSwarmThreads));
}

template <class T, class Launch>
void launch_swarm_move(const SwarmArgs& args, SwarmBounds bounds, Launch&& launch) {
  const GridShape grid = swarm_grid(args.particles, args.cols);
  launch(swarm_keep_kernel<T>, grid, kSwarmThreads, args);
  if (bounds == kSwarmUnbounded) {
    launch(swarm_move_kernel<kSwarmUnbounded, T>, grid, kSwarmThreads, args);
  } else if (bounds == kSwarmClip) {
    launch(swarm_move_kernel<kSwarmClip, T>, grid, kSwarmThreads, args);
  } else {
    launch(swarm_move_kernel<kSwarmReflect, T>, grid, kSwarmThreads, args);
  }
}

template <class T, class Launch>
void launch_uniforms(const UniformArgs& args, Launch&& launch) {
  launch(uniforms_kernel<T>, swarm_grid(args.count, args.cols), kSwarmThreads, args);
}

}  // namespace perturbed
