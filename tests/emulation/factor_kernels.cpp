// The kernels of the low-rank and sparse families under emulation, against plain loops over the noise
// headers: products with the whole of E_d, element by element. Built and run by
// tests/test_cuda_emulation.py:  factor_kernels <group>. Prints one line per failed check.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include <algorithm>

#include "cuda/low_rank_kernels.cuh"
#include "cuda/sparse_kernels.cuh"
#include "selections.h"

using namespace emulated;

namespace {

const uint32_t kFactor = stream_counter(5, kStreamFactorA);
const uint32_t kProjection = stream_counter(5, kStreamFactorB);
const uint32_t kColumns = stream_counter(5, kStreamColumns);
const uint32_t kBias = stream_counter(5, kStreamBias);

// ---- forward ------------------------------------------------------------------------------------

enum Family { kLowRank, kProjected, kSparse };

struct ForwardCase {
  int64_t m, n, rank, directions, repeats, tokens = 1;
  int64_t shared = 0;  // rows of x that all members see; 0: every row of y has its own
  bool bias = true, antithetic = false;
  int64_t pad = 0;       // elements between rows of x
  int64_t products = 0;  // kProjected: rows of x per direction, 0 for as many as y
};

std::string describe(Family family, const ForwardCase& c) {
  const char* names[] = {"low rank", "projected", "sparse"};
  return std::string(names[family]) + " m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) +
         " rank=" + std::to_string(c.rank) + " D=" + std::to_string(c.directions) +
         " R=" + std::to_string(c.repeats) + " T=" + std::to_string(c.tokens) +
         " shared=" + std::to_string(c.shared) + (c.bias ? " bias" : "") +
         (c.antithetic ? " antithetic" : "") + " pad=" + std::to_string(c.pad);
}

template <class T>
struct ForwardData {
  std::vector<T> y, x;
  std::vector<int64_t> key;
  double sigma = 0.37;
  ExpandArgs args{};
  LowRankArgs projection{};
  SparseArgs columns{};
  int64_t width;  // of a row of x

  ForwardData(Family family, const ForwardCase& c, const Draw& draw) {
    Inputs inputs{static_cast<uint32_t>(c.m * 131 + c.n + c.rank)};
    const int64_t rows = c.directions * c.repeats;
    width = family == kProjected ? c.rank : c.n;
    const int64_t stride = width + c.pad;
    args.sources = c.shared ? c.shared : c.products ? c.products : c.repeats;
    const int64_t x_rows = args.sources * (c.shared ? 1 : c.directions) * c.tokens;
    // Exactly as long as needed, so that the address sanitizer sees one element too far.
    x = inputs.vector<T>(x_rows > 0 ? (x_rows - 1) * stride + width : 0);
    y = inputs.vector<T>(rows * c.tokens * c.m);
    key = draw.key();
    args.y = y.data();
    args.x = x.data();
    args.key = key.data();
    args.sigma = &sigma;
    args.directions = c.directions;
    args.repeats = c.repeats;
    args.tokens = c.tokens;
    args.out = c.m;
    args.in = width;
    args.x_token_stride = stride;
    args.x_source_stride = c.tokens * stride * (c.shared ? 1 : c.directions);
    args.x_direction_stride = c.shared ? 0 : c.tokens * stride;
    args.rank = c.rank;
    args.scale = family == kSparse ? std::sqrt(static_cast<double>(c.n) / c.rank)
                                   : 1 / std::sqrt(static_cast<double>(c.rank));
    args.factor_counter = kFactor;
    args.bias_counter = kBias;
    args.bias = c.bias;
    args.antithetic = c.antithetic;
    args.x_aligned = width % 4 == 0 && c.pad % 4 == 0;
    args.y_aligned = c.m % 4 == 0;
    projection = {kProjection, family == kProjected};
    columns = {permutation_shape(static_cast<uint32_t>(c.n)), kColumns};
  }
};

template <class T>
void launch(Family family, Kind kind, const ForwardData<T>& data, uint64_t seed) {
  const bool signs = kind == kSign;
  if (family == kSparse) {
    if (kind == kExactNormal) {
      return launch_sparse_linear<true, T>(data.args, data.columns, false, launcher(seed));
    }
    return launch_sparse_linear<false, T>(data.args, data.columns, signs, launcher(seed));
  }
  if (kind == kExactNormal) {
    return launch_low_rank_linear<true, T>(data.args, data.projection, false, launcher(seed));
  }
  launch_low_rank_linear<false, T>(data.args, data.projection, signs, launcher(seed));
}

struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

template <class T>
void check_forward(Family family, Kind kind, const ForwardCase& c) {
  const std::string what =
      std::string(name_of<T>()) + " " + name_of(kind) + " " + describe(family, c);
  const Draw draw{kind};
  ForwardData<T> data(family, c, draw), again(family, c, draw);
  const std::vector<T> before = data.y;
  launch<T>(family, kind, data, 1);
  launch<T>(family, kind, again, 987654321);
  check(std::memcmp(data.y.data(), again.y.data(), data.y.size() * sizeof(T)) == 0,
        what + ": depends on the order of threads");
  for (int64_t b = 0; b < c.directions * c.repeats; ++b) {
    const int64_t repeat = b / c.directions, d = b % c.directions;
    std::vector<uint32_t> columns;
    if (family == kSparse) columns = selection(draw, kColumns, d, c.n, c.rank, false);
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int64_t source = repeat % data.args.sources;
      const T* x =
          data.x.data() +
          ((c.shared ? source : source * c.directions + d) * c.tokens + t) * (data.width + c.pad);
      std::vector<Sum> products(static_cast<size_t>(c.rank));
      for (int64_t q = 0; q < c.rank; ++q) {
        Sum& product = products[static_cast<size_t>(q)];
        if (family == kLowRank) {
          for (int64_t i = 0; i < c.n; ++i) {
            product.add(as_double(x[i]) * draw(kProjection, d, c.n, q, i));
          }
        } else {
          product.add(as_double(x[family == kSparse ? columns[static_cast<size_t>(q)] : q]));
        }
      }
      for (int64_t o = 0; o < c.m; ++o) {
        double sum = 0, magnitude = 0;
        for (int64_t q = 0; q < c.rank; ++q) {
          const double e = data.args.scale * draw(kFactor, d, c.m, q, o);
          sum += e * products[static_cast<size_t>(q)].value;
          magnitude += std::fabs(e) * products[static_cast<size_t>(q)].magnitude;
        }
        if (c.bias) {
          const double e = draw(kBias, d, c.m, 0, o);
          sum += e;
          magnitude += std::fabs(e);
        }
        const bool negative = c.antithetic && repeat >= c.repeats / 2;
        const size_t at = static_cast<size_t>((b * c.tokens + t) * c.m + o);
        const double expected = as_double(before[at]) + (negative ? -1 : 1) * data.sigma * sum;
        const double error = std::fabs(as_double(data.y[at]) - expected);
        const double allowed = kEpsilon<T> * std::fabs(expected) +
                               kEpsilon<sum_t<T>> * data.sigma * magnitude *
                                   (4 + static_cast<double>(c.rank + data.width) / 64);
        check(error <= allowed, what + ": y[" + std::to_string(b) + ", " + std::to_string(t) +
                                    ", " + std::to_string(o) + "] is off by " +
                                    std::to_string(error) + ", allowed " + std::to_string(allowed));
      }
    }
  }
}

// Directions 0 .. 10 at once against 0 .. 3 and 4 .. 10: the same bits, also where the few directions
// of a shard share out their outputs among more blocks.
template <class T>
void check_forward_shards(Family family, Kind kind, int64_t m, int64_t n, int64_t rank) {
  const int64_t directions = 11, first = 4;
  Draw draw{kind};
  ForwardData<T> whole(family, {m, n, rank, directions, 1}, draw);
  ForwardData<T> head(family, {m, n, rank, first, 1}, draw);
  draw.first_direction += first;
  ForwardData<T> tail(family, {m, n, rank, directions - first, 1}, draw);
  const int64_t width = whole.width;
  std::copy(whole.y.begin(), whole.y.begin() + first * m, head.y.begin());
  std::copy(whole.x.begin(), whole.x.begin() + first * width, head.x.begin());
  std::copy(whole.y.begin() + first * m, whole.y.end(), tail.y.begin());
  std::copy(whole.x.begin() + first * width, whole.x.end(), tail.x.begin());
  launch<T>(family, kind, whole, 1);
  launch<T>(family, kind, head, 2);
  launch<T>(family, kind, tail, 3);
  check(std::memcmp(whole.y.data(), head.y.data(), head.y.size() * sizeof(T)) == 0 &&
            std::memcmp(whole.y.data() + first * m, tail.y.data(), tail.y.size() * sizeof(T)) == 0,
        std::string(name_of<T>()) + " " + name_of(kind) + " " +
            describe(family, {m, n, rank, directions, 1}) + ": a shard differs");
}

// One row that every member sees against the same row written out for each, and antithetic halves
// against each other: the same bits.
template <class T>
void check_forward_shared(Family family, Kind kind, int64_t m, int64_t n, int64_t rank) {
  for (const int64_t repeats : {2, 4, 6}) {
    const int64_t directions = 3;
    const Draw draw{kind};
    const ForwardCase one{m, n, rank, directions, repeats, 1, 1, true, true};
    const ForwardCase all{m, n, rank, directions, repeats, 1, 0, true, true};
    ForwardData<T> shared(family, one, draw), written(family, all, draw);
    std::fill(shared.y.begin(), shared.y.end(), T(0.0f));
    written.y = shared.y;
    written.args.y = written.y.data();
    for (int64_t b = 0; b < directions * repeats; ++b) {
      std::copy(shared.x.begin(), shared.x.end(), written.x.begin() + b * n);
    }
    launch<T>(family, kind, shared, 1);
    launch<T>(family, kind, written, 2);
    const std::string what =
        std::string(name_of<T>()) + " " + name_of(kind) + " " + describe(family, all);
    check(std::memcmp(shared.y.data(), written.y.data(), shared.y.size() * sizeof(T)) == 0,
          what + ": a shared row differs from the row written out");
    const size_t half = shared.y.size() / 2;
    bool negated = true;
    for (size_t i = 0; i < half; ++i) {
      negated &= as_double(shared.y[i]) == -as_double(shared.y[half + i]);
    }
    check(negated, what + ": antithetic halves are no negatives");
  }
}

void forward(Family family, Kind kind) {
  const ForwardCase cases[] = {
      {1, 1, 1, 1, 1},
      {3, 5, 1, 2, 1},
      {18, 37, 2, 3, 1},
      {37, 128, 3, 2, 2, 1, 0, true, true},
      {132, 129, 4, 1, 3},                 // more than a warp of quads: sums of several warps
      {9, 33, 5, 3, 4, 1, 2, true, true},  // two rows that every member sees
      {33, 64, 7, 5, 2, 1, 1, true, true},
      {5, 20, 1, 10, 1, 3},  // tokens; directions that do not fill a block
      {17, 36, 4, 2, 2, 5, 0, false, true},
      {6, 44, 1, 2, 4, 3, 2},
      {7, 12, 2, 1, 11},
      {12, 24, 6, 2, 2, 1, 0, true, false, 3},
      {12, 24, 1, 2, 1, 1, 0, true, false, 4},
      {16, 40, 8, 43, 1},
      {4, 8, 1, 1, 50},    // more passes over the sources than the grid holds
      {5, 100, 70, 2, 1},  // more products than a group's part of shared memory, over and over
      {2, 70, 70, 9, 1, 1, 0, true, false},
      {1030, 6, 3, 2, 1},  // more than one chunk of outputs, on blocks of their own
      // More chunks than the grid holds, with more products than shared memory holds: made anew.
      {5125, 520, 514, 1, 1},
      {1100, 8, 2, 265, 1},  // so many directions that each keeps its two chunks in one block
  };
  for (ForwardCase c : cases) {
    if (kind != kFast && c.m * c.rank * c.directions > 100000) continue;
    check_forward<float>(family, kind, c);
    if (family == kProjected && c.repeats % 2 == 0 && !c.shared) {
      c.products = c.repeats / 2;
      check_forward<float>(family, kind, c);
    }
    if (kind == kExactNormal || c.m > 1000) continue;
    check_forward<double>(family, kind, c);
    if (c.n % 2 == 0) check_forward<Half>(family, kind, c);
    if (c.m % 2 == 0) check_forward<BFloat16>(family, kind, c);
  }
  if (kind == kExactNormal) return;
  check_forward_shards<float>(family, kind, 21, 70, 1);
  check_forward_shards<float>(family, kind, 21, 70, 5);
  check_forward_shards<double>(family, kind, 140, 70, 3);
  if (family == kProjected) return;
  check_forward_shared<float>(family, kind, 140, 12, 1);
  check_forward_shared<float>(family, kind, 9, 160, 6);
  check_forward_shared<double>(family, kind, 33, 100, 2);
}

void low_rank(Kind kind) {
  forward(kLowRank, kind);
  forward(kProjected, kind);
}

// ---- sparse_estimate_ ---------------------------------------------------------------------------

struct EstimateCase {
  int64_t m, n, count, directions;
  bool accumulate;
};

template <class T>
void check_estimate(Kind kind, const EstimateCase& c) {
  using S = sum_t<T>;
  const std::string what = std::string("sparse estimate ") + name_of<T>() + " " + name_of(kind) +
                           " m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) +
                           " count=" + std::to_string(c.count) +
                           " D=" + std::to_string(c.directions) +
                           (c.accumulate ? " accumulate" : "");
  const Draw draw{kind};
  Inputs inputs{static_cast<uint32_t>(c.m * 17 + c.n)};
  const std::vector<T> before = inputs.vector<T>(c.m * c.n);
  const std::vector<S> weights = inputs.vector<S>(c.directions);
  const std::vector<int64_t> key = draw.key();
  const double sigma = 0.25;
  const double scale = std::sqrt(static_cast<double>(c.n) / static_cast<double>(c.count));
  std::vector<T> grads[2];
  for (int run = 0; run < 2; ++run) {
    grads[run] = before;
    std::vector<uint32_t> columns(static_cast<size_t>(c.directions * c.count), 0xffffffffu);
    SparseEstimateArgs args{};
    args.grad = grads[run].data();
    args.columns = columns.data();
    args.weights = weights.data();
    args.key = key.data();
    args.sigma = &sigma;
    args.directions = c.directions;
    args.rows = c.m;
    args.cols = c.n;
    args.count = c.count;
    args.scale = scale;
    args.shape = permutation_shape(static_cast<uint32_t>(c.n));
    args.column_counter = kColumns;
    args.value_counter = kFactor;
    args.accumulate = c.accumulate;
    if (kind == kExactNormal) {
      launch_sparse_estimate<true, T>(args, false, launcher(run + 5));
    } else {
      launch_sparse_estimate<false, T>(args, kind == kSign, launcher(run + 5));
    }
  }
  check(std::memcmp(grads[0].data(), grads[1].data(), before.size() * sizeof(T)) == 0,
        what + ": depends on the order of threads");
  std::vector<Sum> sums(static_cast<size_t>(c.m * c.n));
  for (int64_t d = 0; d < c.directions; ++d) {
    const std::vector<uint32_t> columns = selection(draw, kColumns, d, c.n, c.count, false);
    for (int64_t q = 0; q < c.count; ++q) {
      const int64_t i = columns[static_cast<size_t>(q)];
      for (int64_t o = 0; o < c.m; ++o) {
        sums[static_cast<size_t>(o * c.n + i)].add(
            scale * static_cast<double>(weights[static_cast<size_t>(d)]) *
            draw(kFactor, d, c.m, q, o));
      }
    }
  }
  for (size_t at = 0; at < sums.size(); ++at) {
    const double expected = (c.accumulate ? as_double(before[at]) : 0.0) + sigma * sums[at].value;
    const double error = std::fabs(as_double(grads[0][at]) - expected);
    const double allowed =
        kEpsilon<T> * std::fabs(expected) +
        kEpsilon<S> * sigma * sums[at].magnitude * (4 + static_cast<double>(c.directions) / 64);
    check(error <= allowed, what + ": element " + std::to_string(at) + " is off by " +
                                std::to_string(error) + ", allowed " + std::to_string(allowed));
  }
}

void estimate(Kind kind) {
  const EstimateCase cases[] = {
      {1, 1, 1, 1, false},    {3, 5, 2, 0, true},     {3, 5, 2, 0, false},
      {2, 7, 7, 33, true},    {6, 37, 1, 70, false},  {9, 64, 9, 41, true},
      {17, 8, 3, 257, false}, {130, 19, 5, 40, true},  // past one tile of rows
      {5, 33, 11, 600, true},                          // past two tiles of directions
      {6, 31, 24, 12, true},                           // whole runs of entries
      {700, 9, 2, 3, false},                           // more tiles of rows than the grid holds
  };
  for (const EstimateCase& c : cases) {
    check_estimate<float>(kind, c);
    if (kind == kExactNormal) continue;
    check_estimate<double>(kind, c);
    if (c.n % 2 == 0) check_estimate<Half>(kind, c);
    if (c.m % 2 == 1) check_estimate<BFloat16>(kind, c);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_group(argc, argv,
                   {{"low-rank-normal",
                     [] {
                       low_rank(kFast);
                       low_rank(kExactNormal);
                     }},
                    {"low-rank-sign", [] { low_rank(kSign); }},
                    {"sparse-normal",
                     [] {
                       forward(kSparse, kFast);
                       forward(kSparse, kExactNormal);
                     }},
                    {"sparse-sign", [] { forward(kSparse, kSign); }},
                    {"sparse-estimate-normal",
                     [] {
                       estimate(kFast);
                       estimate(kExactNormal);
                     }},
                    {"sparse-estimate-sign", [] { estimate(kSign); }}});
}
