// The dense family's kernels under emulation, against plain loops over the noise headers. Built and
// run by tests/test_cuda_emulation.py:  dense_kernels <group>. Prints one line per failed check.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include <algorithm>

#include "cuda/dense_launch.cuh"

using namespace emulated;

namespace {

// ---- dense_linear_ ------------------------------------------------------------------------------

struct LinearCase {
  int64_t m, n, directions, repeats, tokens = 1;
  int64_t shared = 0;  // rows of x that all members see; 0: every row of y has its own
  bool weight = true, bias = true, antithetic = false;
  int64_t pad = 0;     // elements between rows of x
  int64_t offset = 0;  // elements before the first
};

std::string describe(const LinearCase& c) {
  return "m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) +
         " D=" + std::to_string(c.directions) + " R=" + std::to_string(c.repeats) +
         " T=" + std::to_string(c.tokens) + " shared=" + std::to_string(c.shared) +
         (c.weight ? " weight" : "") + (c.bias ? " bias" : "") +
         (c.antithetic ? " antithetic" : "") + " pad=" + std::to_string(c.pad);
}

template <class T>
struct LinearData {
  std::vector<T> y, x;
  std::vector<int64_t> key;
  double sigma = 0.37;
  DenseLinearArgs args;

  LinearData(const LinearCase& c, const Draw& draw) {
    Inputs inputs{static_cast<uint32_t>(c.m * 131 + c.n)};
    const int64_t rows = c.directions * c.repeats;
    const int64_t stride = c.n + c.pad;
    const int64_t x_rows = (c.shared ? c.shared : rows) * c.tokens;
    // Exactly as long as needed, so that the address sanitizer sees one element too far.
    x = inputs.vector<T>(c.offset + (x_rows - 1) * stride + c.n);
    y = inputs.vector<T>(rows * c.tokens * c.m);
    key = draw.key();
    args = {};
    args.y = y.data();
    args.x = x.data() + c.offset;
    args.key = key.data();
    args.sigma = &sigma;
    args.directions = c.directions;
    args.repeats = c.repeats;
    args.tokens = c.tokens;
    args.out = c.m;
    args.in = c.weight ? c.n : 0;
    args.sources = c.shared ? c.shared : c.repeats;
    args.x_token_stride = stride;
    args.x_source_stride = c.tokens * stride * (c.shared ? 1 : c.directions);
    args.x_direction_stride = c.shared ? 0 : c.tokens * stride;
    args.weight_counter = stream_counter(5, kStreamWeight);
    args.bias_counter = stream_counter(5, kStreamBias);
    args.bias = c.bias;
    args.antithetic = c.antithetic;
    args.x_aligned = c.n % 4 == 0 && c.pad % 4 == 0 && c.offset % 4 == 0;
  }
};

template <class T>
void launch(Kind kind, const DenseLinearArgs& args, uint64_t seed) {
  if (kind == kExactNormal) return launch_dense_linear<true, T>(args, false, launcher(seed));
  launch_dense_linear<false, T>(args, kind == kSign, launcher(seed));
}

template <class T>
void check_linear(Kind kind, const LinearCase& c) {
  const std::string what =
      std::string("linear ") + name_of<T>() + " " + name_of(kind) + " " + describe(c);
  const Draw draw{kind};
  LinearData<T> data(c, draw), again(c, draw);
  const std::vector<T> before = data.y;
  launch<T>(kind, data.args, 1);
  launch<T>(kind, again.args, 987654321);
  check(std::memcmp(data.y.data(), again.y.data(), data.y.size() * sizeof(T)) == 0,
        what + ": depends on the order of threads");
  const T* x = static_cast<const T*>(data.args.x);
  for (int64_t b = 0; b < c.directions * c.repeats; ++b) {
    const int64_t repeat = b / c.directions, d = b % c.directions;
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int64_t x_row = (c.shared ? repeat % c.shared : b) * c.tokens + t;
      for (int64_t o = 0; o < c.m; ++o) {
        double sum = 0, magnitude = 0;
        for (int64_t i = 0; c.weight && i < c.n; ++i) {
          const double term = draw(data.args.weight_counter, d, c.n, o, i) *
                              as_double(x[x_row * (c.n + c.pad) + i]);
          sum += term;
          magnitude += std::fabs(term);
        }
        if (c.bias) {
          const double e = draw(data.args.bias_counter, d, c.m, 0, o);
          sum += e;
          magnitude += std::fabs(e);
        }
        const bool negative = c.antithetic && repeat >= c.repeats / 2;
        const size_t at = static_cast<size_t>((b * c.tokens + t) * c.m + o);
        const double expected = as_double(before[at]) + (negative ? -1 : 1) * data.sigma * sum;
        const double error = std::fabs(as_double(data.y[at]) - expected);
        const double allowed = kEpsilon<T> * std::fabs(expected) +
                               kEpsilon<sum_t<T>> * data.sigma * magnitude * (4 + c.n / 16.0);
        check(error <= allowed, what + ": y[" + std::to_string(b) + ", " + std::to_string(t) +
                                    ", " + std::to_string(o) + "] is off by " +
                                    std::to_string(error) + ", allowed " + std::to_string(allowed));
      }
    }
  }
}

// Directions 0 .. 7 at once against 0 .. 2 and 3 .. 7: the same bits.
template <class T>
void check_linear_shards(Kind kind) {
  const int64_t directions = 8, first = 3, m = 21, n = 70;
  Draw draw{kind};
  LinearData<T> whole({m, n, directions, 1}, draw);
  LinearData<T> head({m, n, first, 1}, draw);
  draw.first_direction += first;
  LinearData<T> tail({m, n, directions - first, 1}, draw);
  std::copy(whole.y.begin(), whole.y.begin() + first * m, head.y.begin());
  std::copy(whole.x.begin(), whole.x.begin() + first * n, head.x.begin());
  std::copy(whole.y.begin() + first * m, whole.y.end(), tail.y.begin());
  std::copy(whole.x.begin() + first * n, whole.x.end(), tail.x.begin());
  launch<T>(kind, whole.args, 1);
  launch<T>(kind, head.args, 2);
  launch<T>(kind, tail.args, 3);
  check(std::memcmp(whole.y.data(), head.y.data(), head.y.size() * sizeof(T)) == 0 &&
            std::memcmp(whole.y.data() + first * m, tail.y.data(), tail.y.size() * sizeof(T)) == 0,
        std::string("linear ") + name_of<T>() + " " + name_of(kind) + ": a shard differs");
}

// One row that every member sees against the same row written out for each: the same bits, although
// the second takes another instantiation.
template <class T>
void check_linear_shared(Kind kind, int64_t m, int64_t n) {
  for (const int64_t repeats : {2, 3, 7}) {
    const int64_t directions = 3;
    const Draw draw{kind};
    LinearData<T> shared({m, n, directions, repeats, 1, 1}, draw);
    LinearData<T> written({m, n, directions, repeats}, draw);
    for (int64_t b = 0; b < directions * repeats; ++b) {
      std::copy(shared.x.begin(), shared.x.end(), written.x.begin() + b * n);
    }
    written.y = shared.y;
    written.args.y = written.y.data();
    launch<T>(kind, shared.args, 1);
    launch<T>(kind, written.args, 2);
    check(std::memcmp(shared.y.data(), written.y.data(), shared.y.size() * sizeof(T)) == 0,
          std::string("linear ") + name_of<T>() + " " + name_of(kind) +
              ": a shared row differs from the row written out");
  }
}

void linear(Kind kind) {
  const LinearCase cases[] = {
      {1, 1, 1, 1},
      {3, 5, 2, 1},
      {18, 37, 3, 1},
      {37, 128, 2, 2, 1, 0, true, true, true},
      {16, 129, 1, 3},
      {9, 33, 3, 4, 1, 2, true, true, true},
      {33, 64, 5, 2, 1, 1, true, true, true},
      {5, 20, 2, 1, 3},
      {17, 36, 2, 2, 5, 0, true, false, true},
      {6, 44, 2, 4, 3, 2},
      {7, 12, 1, 11},
      {10, 40, 6, 1, 1, 0, false, true},
      {10, 40, 6, 2, 2, 1, false, true, true},
      {10, 40, 6, 1, 1, 0, true, false},
      {12, 24, 2, 2, 1, 0, true, true, false, 3},
      {12, 24, 2, 2, 1, 0, true, true, false, 4, 4},
      {12, 24, 2, 2, 1, 0, true, true, false, 0, 1},
      {4, 260, 2, 1},
      {2, 8, 43, 1},  // several directions in a block, past the grid's limit
      {140, 4, 1, 1},
      {4, 4, 1, 50},  // more passes over the sources than the grid holds
  };
  for (const LinearCase& c : cases) {
    check_linear<float>(kind, c);
    if (kind == kExactNormal) continue;
    check_linear<double>(kind, c);
    if (c.n % 2 == 0) check_linear<Half>(kind, c);
    if (c.m % 2 == 0) check_linear<BFloat16>(kind, c);
  }
  if (kind == kExactNormal) return;
  check_linear_shards<float>(kind);
  check_linear_shards<double>(kind);
  // Many rows and few columns, where only the number of sources could ask for larger groups.
  for (const int64_t n : {12, 100}) {
    check_linear_shared<float>(kind, 140, n);
    check_linear_shared<double>(kind, 140, n);
  }
}

// ---- dense_estimate_ ----------------------------------------------------------------------------

struct EstimateCase {
  int64_t m, n, directions;
  bool accumulate;
  int64_t slices = 0;  // 0: what the plan says
};

template <class T>
void check_estimate(Kind kind, const EstimateCase& c) {
  using S = sum_t<T>;
  const std::string what =
      std::string("estimate ") + name_of<T>() + " " + name_of(kind) + " m=" + std::to_string(c.m) +
      " n=" + std::to_string(c.n) + " D=" + std::to_string(c.directions) +
      (c.accumulate ? " accumulate" : "") + " slices=" + std::to_string(c.slices);
  const Draw draw{kind};
  Inputs inputs{static_cast<uint32_t>(c.m * 17 + c.n)};
  const std::vector<T> before = inputs.vector<T>(c.m * c.n);
  const std::vector<S> weights = inputs.vector<S>(c.directions);
  const std::vector<int64_t> key = draw.key();
  const double sigma = 0.25;
  std::vector<T> grads[2];
  for (int run = 0; run < 2; ++run) {
    grads[run] = before;
    DenseEstimateArgs args = {};
    args.grad = grads[run].data();
    args.weights = weights.data();
    args.key = key.data();
    args.sigma = &sigma;
    args.directions = c.directions;
    args.rows = c.m;
    args.cols = c.n;
    args.counter = stream_counter(9, kStreamWeight);
    args.accumulate = c.accumulate;
    args.aligned = c.n % 4 == 0;
    DenseEstimatePlan plan = plan_dense_estimate(args, kind == kSign, std::is_same_v<T, double>);
    check(plan.slices >= 1 && plan.slices <= kMaxGridYZ &&
              plan.slice * plan.slices >= c.directions &&
              (c.directions == 0 || plan.slice * (plan.slices - 1) < c.directions),
          what + ": slices do not cover the directions");
    if (c.slices) plan = {ceil_div(c.directions, c.slices), c.slices};
    std::vector<S> partial(static_cast<size_t>(plan.slices > 1 ? plan.slices * c.m * c.n : 0),
                           std::numeric_limits<S>::quiet_NaN());
    args.partial = partial.data();
    if (kind == kExactNormal) {
      launch_dense_estimate<true, T>(args, plan, false, launcher(run + 5));
    } else {
      launch_dense_estimate<false, T>(args, plan, kind == kSign, launcher(run + 5));
    }
  }
  check(std::memcmp(grads[0].data(), grads[1].data(), before.size() * sizeof(T)) == 0,
        what + ": depends on the order of threads");
  for (int64_t o = 0; o < c.m; ++o) {
    for (int64_t i = 0; i < c.n; ++i) {
      double sum = 0, magnitude = 0;
      for (int64_t d = 0; d < c.directions; ++d) {
        const double term = static_cast<double>(weights[static_cast<size_t>(d)]) *
                            draw(stream_counter(9, kStreamWeight), d, c.n, o, i);
        sum += term;
        magnitude += std::fabs(term);
      }
      const size_t at = static_cast<size_t>(o * c.n + i);
      const double expected = (c.accumulate ? as_double(before[at]) : 0.0) + sigma * sum;
      const double error = std::fabs(as_double(grads[0][at]) - expected);
      const double allowed = kEpsilon<T> * std::fabs(expected) +
                             kEpsilon<S> * sigma * magnitude * (4 + c.directions / 16.0);
      check(error <= allowed, what + ": grad[" + std::to_string(o) + ", " + std::to_string(i) +
                                  "] is off by " + std::to_string(error) + ", allowed " +
                                  std::to_string(allowed));
    }
  }
}

void estimate(Kind kind) {
  const EstimateCase cases[] = {
      {1, 1, 1, false},       {1, 1, 0, true},        {3, 5, 0, false},  {2, 7, 33, true},
      {6, 37, 70, false},     {9, 64, 41, true},      {17, 8, 5, false}, {1, 30, 129, true},
      {4, 36, 260, false, 1},  // past one tile of directions
      {5, 33, 600, true, 2},  {3, 129, 18, false, 5},
  };
  for (const EstimateCase& c : cases) {
    check_estimate<float>(kind, c);
    if (kind == kExactNormal) continue;
    check_estimate<double>(kind, c);
    if (c.n % 2 == 0) check_estimate<Half>(kind, c);
    if (c.m % 2 == 1) check_estimate<BFloat16>(kind, c);
  }
}

// ---- dense_materialise --------------------------------------------------------------------------

template <class T>
void check_materialise(Kind kind, int64_t first, int64_t count, int64_t rows, int64_t cols) {
  const std::string what = std::string("materialise ") + name_of<T>() + " " + name_of(kind) +
                           " count=" + std::to_string(count) + " rows=" + std::to_string(rows) +
                           " cols=" + std::to_string(cols);
  const Draw draw{kind};
  const std::vector<int64_t> key = draw.key();
  std::vector<T> noise(static_cast<size_t>(count * rows * cols), static_cast<T>(99.0f));
  DenseMaterialiseArgs args = {};
  args.noise = noise.data();
  args.key = key.data();
  args.first = first;
  args.count = count;
  args.rows = rows;
  args.cols = cols;
  args.counter = stream_counter(2, kStreamBias);
  args.aligned = cols % 4 == 0;
  if (kind == kExactNormal) {
    launch_dense_materialise<true, T>(args, false, launcher(11));
  } else {
    launch_dense_materialise<false, T>(args, kind == kSign, launcher(11));
  }
  for (int64_t d = 0; d < count; ++d) {
    for (int64_t o = 0; o < rows; ++o) {
      for (int64_t i = 0; i < cols; ++i) {
        const T expected = static_cast<T>(draw(args.counter, first + d, cols, o, i));
        const T& got = noise[static_cast<size_t>((d * rows + o) * cols + i)];
        check(std::memcmp(&got, &expected, sizeof(T)) == 0,
              what + ": element (" + std::to_string(d) + ", " + std::to_string(o) + ", " +
                  std::to_string(i) + ") differs");
      }
    }
  }
}

void materialise() {
  for (Kind kind : {kFast, kExactNormal, kSign}) {
    check_materialise<float>(kind, 0, 1, 1, 1);
    check_materialise<float>(kind, 2, 3, 9, 70);
    check_materialise<float>(kind, 0, 13, 5, 33);
    check_materialise<float>(kind, 1, 2, 70, 64);
    check_materialise<double>(kind, 1, 2, 3, 36);
    check_materialise<Half>(kind, 0, 2, 6, 31);
    check_materialise<BFloat16>(kind, 5, 2, 7, 32);
  }
  // The accuracy that noise/normal.h promises for the device form, with the modelled units.
  int64_t beyond = 0, blocks = 0;
  double squares = 0, worst = 0;
  for (uint32_t c1 = 0; c1 < 100000; ++c1) {
    const PhiloxWords w = philox4x32(1, c1, 2, 3, philox_key(4));
    const NormalBlock exact = normal_block(w), fast = normal_block_fast(w);
    for (int k = 0; k < 4; ++k) {
      const double error = std::fabs(static_cast<double>(exact.z[k]) - fast.z[k]);
      beyond += error > 4e-6;
      squares += error * error;
      worst = std::fmax(worst, error);
    }
    blocks += 4;
  }
  check(beyond <= blocks / 5000, "fast normals: more than 0.02 % differ by more than 4e-6");
  check(worst <= 5e-4, "fast normals: one differs by more than 5e-4");
  // The largest u, where a unit may call its logarithm positive, and the smallest.
  for (uint32_t word : {0xffffffffu, 0u}) {
    const NormalPair exact = box_muller(word, 12345u), fast = box_muller_fast(word, 12345u);
    check(std::fabs(exact.z0 - fast.z0) <= 5e-4 && std::fabs(exact.z1 - fast.z1) <= 5e-4,
          "fast normals: an extreme uniform is off or not a number");
  }
}

// ---- the emulation itself -----------------------------------------------------------------------

// Each body breaks a rule; the emulation must say so.
void expect_failure(const char* name, const char* words, const std::function<void()>& body) {
  try {
    emulation::launch({2, 1, 1}, 64, 42, body);
  } catch (const emulation::Failure& failure) {
    check(std::string(failure.what()).find(words) != std::string::npos,
          std::string(name) + ": reported as '" + failure.what() + "'");
    return;
  }
  check(false, std::string(name) + ": not noticed");
}

void emulator() {
  // A right kernel first: a block-wide sum through shared memory and a shuffle.
  std::vector<int> sums(3, 0);
  emulation::launch({3, 1, 1}, 64, 5, [&] {
    PT_SHARED(int, slot, 64);
    const unsigned me = threadIdx.x;
    slot[me] = static_cast<int>(me);
    __syncthreads();
    int value = slot[63 - me];
    for (int mask = 1; mask < 32; mask *= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
    __syncthreads();
    slot[me] = value;
    __syncthreads();
    if (me == 0) sums[blockIdx.x] = slot[0] + slot[32] + 1000 * static_cast<int>(blockIdx.x);
  });
  check(sums[0] == 2016 && sums[1] == 3016 && sums[2] == 4016, "block sum");
  const auto shift = [](bool barrier_before_read, bool barrier_before_write) {
    PT_SHARED(int, slot, 64);
    slot[threadIdx.x] = 0;
    __syncthreads();
    slot[threadIdx.x] = 1;
    if (barrier_before_read) __syncthreads();
    const int value = slot[63 - threadIdx.x];
    if (barrier_before_write) __syncthreads();
    slot[threadIdx.x] = value;
  };
  expect_failure("read after write", "no barrier between", [&] { shift(false, true); });
  expect_failure("write after read", "no barrier between", [&] { shift(true, false); });
  expect_failure("write after write", "also written by", [] {
    PT_SHARED(int, slot, 1);
    slot[0] = 1;
  });
  expect_failure("poison", "never written", [] {
    PT_SHARED(int, slot, 64);
    const int value = slot[threadIdx.x];
    if (value == 3) __syncthreads();
  });
  expect_failure("bounds", "out of bounds", [] {
    PT_SHARED(int, slot, 63);
    slot[threadIdx.x] = 1;
  });
  expect_failure("divergent barrier", "deadlock", [] {
    if (threadIdx.x < 40) __syncthreads();
  });
  expect_failure("divergent shuffle", "deadlock", [] {
    if (threadIdx.x != 5) __shfl_sync(kFullWarp, 1, 0);
  });
  emulation::launch({1, 1, 1}, 64, 5, [&] {
    const unsigned odd = __ballot_sync(kFullWarp, threadIdx.x % 2 == 1);
    const unsigned low = __ballot_sync(kFullWarp, threadIdx.x < 40);
    check(odd == 0xaaaaaaaau && low == (threadIdx.x < 32 ? kFullWarp : 0xffu), "ballot");
  });
  expect_failure("divergent ballot", "deadlock", [] {
    if (threadIdx.x != 5) __ballot_sync(kFullWarp, true);
  });
  expect_failure("barrier against shuffle", "deadlock", [] {
    if (threadIdx.x % 32 < 16) {
      __syncthreads();
    } else {
      __shfl_sync(kFullWarp, 1, 0);
    }
  });
  expect_failure("two shuffles", "other lanes at a", [] {
    if (threadIdx.x % 2) {
      __shfl_sync(kFullWarp, 1, 0);
    } else {
      __shfl_xor_sync(kFullWarp, 1, 1);
    }
  });
  try {
    emulation::launch({1, 70000, 1}, 32, 1, [] {});
    check(false, "grid limit: not noticed");
  } catch (const emulation::Failure&) {
    check(true, "");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_group(argc, argv,
                   {{"emulator", emulator},
                    {"materialise", materialise},
                    {"linear-normal",
                     [] {
                       linear(kFast);
                       linear(kExactNormal);
                     }},
                    {"linear-sign", [] { linear(kSign); }},
                    {"estimate-normal",
                     [] {
                       estimate(kFast);
                       estimate(kExactNormal);
                     }},
                    {"estimate-sign", [] { estimate(kSign); }}});
}
