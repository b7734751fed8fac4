// The kernels of particle swarms under emulation, against plain loops over the contract. Built and run
// by tests/test_cuda_emulation.py:  swarm_kernels <group>.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include <cmath>

#include "cuda/swarm_kernels.cuh"

using namespace emulated;

namespace {

const uint32_t kCounter = stream_counter(kOptimizerId, kStreamSwarm);
const double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  int64_t particles, cols, offset;  // offset: misaligns every tensor
};

const Case kCases[] = {{1, 1, 0},  {2, 3, 0},    {6, 51, 0},  {4, 64, 0},
                       {4, 64, 1}, {2, 1100, 0}, {300, 6, 0}, {10, 260, 2}};

struct Options {
  SwarmBounds bounds = kSwarmUnbounded;
  bool each = false;  // limits of each column
  bool lower = true, upper = true;
  bool per_dimension = true, antithetic = false;
};

// The word of an element straight from the contract.
uint32_t word_of(const Draw& draw, const Options& o, int64_t particles, int64_t p, int64_t col) {
  const bool mirrored = o.antithetic && p >= particles / 2;
  const auto d = static_cast<uint32_t>(mirrored ? p - particles / 2 : p);
  const int64_t at = o.per_dimension ? col : 0;
  const PhiloxWords words = philox4x32(kCounter, static_cast<uint32_t>(at / 4), draw.generation,
                                       draw.first_direction + d, philox_key(draw.seed));
  return mirrored ? ~words.w[at % 4] : words.w[at % 4];
}

template <class T>
struct Swarm {
  std::vector<T> position, velocity, best;
};

// Written apart from swarm_step, in the order of operations that the reference documents.
template <class T>
Swarm<T> plain_step(const Swarm<T>& from, const std::vector<uint8_t>& improved,
                    const std::vector<int64_t>& guide, const double* coefficients,
                    const std::vector<T>& limit, const std::vector<T>& lower,
                    const std::vector<T>& upper, const Draw& draw, const Options& o,
                    const Case& c) {
  Swarm<T> to = from;
  const auto index = [&](int64_t p, int64_t k) {
    return static_cast<size_t>(c.offset + p * c.cols + k);
  };
  for (int64_t p = 0; p < c.particles; ++p) {
    for (int64_t k = 0; improved[static_cast<size_t>(p)] && k < c.cols; ++k) {
      to.best[index(p, k)] = from.position[index(p, k)];
    }
  }
  for (int64_t p = 0; p < c.particles; ++p) {
    const int64_t g =
        std::min(std::max<int64_t>(guide[static_cast<size_t>(p)], 0), c.particles - 1);
    for (int64_t k = 0; k < c.cols; ++k) {
      const uint32_t word = word_of(draw, o, c.particles, p, k);
      const T r1 = static_cast<T>((2.0 * (word >> 16) + 1) / 131072);
      const T r2 = static_cast<T>((2.0 * (word & 0xffff) + 1) / 131072);
      const T x = from.position[index(p, k)];
      T v = static_cast<T>(coefficients[0]) * from.velocity[index(p, k)];
      v = std::fma(static_cast<T>(coefficients[1]) * r1, to.best[index(p, k)] - x, v);
      v = std::fma(static_cast<T>(coefficients[2]) * r2, to.best[index(g, k)] - x, v);
      const auto at = static_cast<size_t>(c.offset + k);
      v = std::max(std::min(v, limit[at]), -limit[at]);
      T moved = x + v;
      if (o.bounds != kSwarmUnbounded) {
        const T low = o.lower ? lower[at] : static_cast<T>(-kInfinity);
        const T high = o.upper ? upper[at] : static_cast<T>(kInfinity);
        if (moved < low || moved > high) {
          v = o.bounds == kSwarmClip ? T(0) : -v;
          if (o.bounds == kSwarmReflect) {
            moved = moved < low ? low + (low - moved) : high - (moved - high);
          }
          moved = std::min(std::max(moved, low), high);
        }
      }
      to.position[index(p, k)] = moved;
      to.velocity[index(p, k)] = v;
    }
  }
  return to;
}

template <class T>
void check_equal(const std::vector<T>& got, const std::vector<T>& expected,
                 const std::string& what) {
  bool good = got.size() == expected.size();
  for (size_t i = 0; good && i < got.size(); ++i) good = got[i] == expected[i];
  check(good, what);
}

template <class T>
void check_move(const Case& c, const Options& o) {
  if (o.antithetic && c.particles % 2 != 0) return;
  const Draw draw{kExactNormal};
  const std::vector<int64_t> key = draw.key();
  Inputs inputs{static_cast<uint32_t>(c.particles * 1000 + c.cols)};
  // What lies around the rows is not to be touched: it is compared with the rest.
  const int64_t size = c.particles * c.cols + c.offset + 8;
  const Swarm<T> start = {inputs.vector<T>(size), inputs.vector<T>(size), inputs.vector<T>(size)};
  std::vector<uint8_t> improved(static_cast<size_t>(c.particles));
  std::vector<int64_t> guide(static_cast<size_t>(c.particles));
  for (int64_t p = 0; p < c.particles; ++p) {
    improved[static_cast<size_t>(p)] = p % 3 != 1;
    // Some out of range, which the kernel takes to the nearest particle.
    guide[static_cast<size_t>(p)] = (p * 7 + 3) % (c.particles + 2) - 1;
  }
  const double coefficients[3] = {0.73, 1.5, 1.4};
  std::vector<T> limit = inputs.vector<T>(c.cols + c.offset), lower = limit, upper = limit;
  for (size_t i = 0; i < limit.size(); ++i) {
    const T spread = o.each ? limit[i] * limit[i] : T(0.5);
    limit[i] = T(0.4) + spread, lower[i] = T(-0.3) - spread, upper[i] = T(0.2) + spread;
  }
  const Swarm<T> expected =
      plain_step(start, improved, guide, coefficients, limit, lower, upper, draw, o, c);
  for (uint64_t seed : {1, 2}) {
    Swarm<T> swarm = start;
    SwarmArgs args = {};
    args.position = swarm.position.data() + c.offset;
    args.velocity = swarm.velocity.data() + c.offset;
    args.best = swarm.best.data() + c.offset;
    args.improved = reinterpret_cast<const bool*>(improved.data());
    args.guide = guide.data();
    args.key = key.data();
    args.coefficients = coefficients;
    args.limit = limit.data() + c.offset;
    const bool walls = o.bounds != kSwarmUnbounded;
    args.lower = walls && o.lower ? lower.data() + c.offset : nullptr;
    args.upper = walls && o.upper ? upper.data() + c.offset : nullptr;
    args.particles = c.particles;
    args.cols = c.cols;
    args.limit_each = o.each;
    args.lower_each = o.each && args.lower != nullptr;
    args.upper_each = o.each && args.upper != nullptr;
    args.counter = kCounter;
    args.per_dimension = o.per_dimension;
    args.antithetic = o.antithetic;
    args.aligned = args.limits_aligned = c.cols % 4 == 0 && c.offset % 4 == 0;
    launch_swarm_move<T>(args, o.bounds, launcher(seed));
    const std::string what = std::string("swarm ") + name_of<T>() + " " +
                             std::to_string(c.particles) + "x" + std::to_string(c.cols) +
                             " bounds " + std::to_string(o.bounds);
    check_equal(swarm.best, expected.best, what + " best");
    check_equal(swarm.velocity, expected.velocity, what + " velocity");
    check_equal(swarm.position, expected.position, what + " position");
  }
}

template <class T>
void check_moves() {
  for (const Case& c : kCases) {
    for (SwarmBounds bounds : {kSwarmUnbounded, kSwarmClip, kSwarmReflect}) {
      for (bool each : {false, true}) check_move<T>(c, {.bounds = bounds, .each = each});
    }
    check_move<T>(c, {.bounds = kSwarmReflect, .lower = false});
    check_move<T>(c, {.bounds = kSwarmClip, .each = true, .upper = false});
    for (bool per_dimension : {false, true}) {
      check_move<T>(c, {.per_dimension = per_dimension, .antithetic = true});
    }
    check_move<T>(c, {.per_dimension = false});
  }
}

template <class T>
void check_uniforms(const Case& c) {
  const Draw draw{kExactNormal};
  const std::vector<int64_t> key = draw.key();
  const int64_t first = 5;
  std::vector<T> expected(static_cast<size_t>(c.particles * c.cols + c.offset + 8), T(-77));
  for (int64_t d = 0; d < c.particles; ++d) {
    for (int64_t k = 0; k < c.cols; ++k) {
      const uint32_t word = word_of(draw, {}, c.particles, d + first, k);
      const double u = (2.0 * (word >> 9) + 1) / 16777216;
      expected[static_cast<size_t>(c.offset + d * c.cols + k)] = static_cast<T>(u);
    }
  }
  for (uint64_t seed : {1, 2}) {
    std::vector<T> out(expected.size(), T(-77));
    UniformArgs args = {};
    args.out = out.data() + c.offset;
    args.key = key.data();
    args.first = first;
    args.count = c.particles;
    args.cols = c.cols;
    args.counter = kCounter;
    args.aligned = c.cols % 4 == 0 && c.offset % 4 == 0;
    launch_uniforms<T>(args, launcher(seed));
    check_equal(out, expected,
                std::string("uniforms ") + name_of<T>() + " " + std::to_string(c.particles) + "x" +
                    std::to_string(c.cols));
  }
}

void check_all_uniforms() {
  for (const Case& c : kCases) {
    check_uniforms<float>(c);
    check_uniforms<double>(c);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_group(argc, argv,
                   {{"move-float", check_moves<float>},
                    {"move-double", check_moves<double>},
                    {"uniforms", check_all_uniforms}});
}
