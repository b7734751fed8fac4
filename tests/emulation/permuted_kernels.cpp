// permuted_estimate_ under emulation, against plain loops over the noise headers. Built and run by
// tests/test_cuda_emulation.py:  permuted_kernels <group>.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include "cuda/permuted_kernels.cuh"
#include "selections.h"

using namespace emulated;

namespace {

const uint32_t kIn = stream_counter(6, kStreamSelectIn);
const uint32_t kOut = stream_counter(6, kStreamSelectOut);

struct EstimateCase {
  int64_t directions, m, n, q, p;
  bool in = true, out = true, accumulate = false;
  int64_t slices = 0;  // 0: what the plan says
};

std::string describe(const EstimateCase& c) {
  return "D=" + std::to_string(c.directions) + " grad=" + std::to_string(c.m) + "x" +
         std::to_string(c.n) + " base=" + std::to_string(c.q) + "x" + std::to_string(c.p) +
         (c.in ? " in" : "") + (c.out ? " out" : "") + (c.accumulate ? " accumulate" : "") +
         " slices=" + std::to_string(c.slices);
}

std::vector<uint32_t> entries(const Draw& draw, bool permute, uint32_t counter, int64_t d,
                              int64_t size, int64_t count) {
  if (permute) return selection(draw, counter, d, size, count, false);
  std::vector<uint32_t> identity;
  for (uint32_t j = 0; j < count; ++j) identity.push_back(j);
  return identity;
}

template <class T>
void check_estimate(const EstimateCase& c) {
  using S = sum_t<T>;
  const std::string what = std::string("permuted_estimate ") + name_of<T>() + " " + describe(c);
  const Draw draw{kSign};
  const std::vector<int64_t> key = draw.key();
  Inputs inputs{static_cast<uint32_t>(c.m * 17 + c.n)};
  const std::vector<T> before = inputs.vector<T>(c.m * c.n);
  const std::vector<S> weights = inputs.vector<S>(c.directions);
  const std::vector<S> base = inputs.vector<S>(c.q * c.p);
  std::vector<T> grads[2];
  for (int run = 0; run < 2; ++run) {
    grads[run] = before;
    PermutedEstimateArgs args = {};
    args.grad = grads[run].data();
    args.base = base.data();
    args.weights = weights.data();
    args.key = key.data();
    args.in_shape = permutation_shape(static_cast<uint32_t>(c.n));
    args.out_shape = permutation_shape(static_cast<uint32_t>(c.m));
    args.directions = c.directions;
    args.rows = c.m;
    args.cols = c.n;
    args.base_rows = c.q;
    args.base_cols = c.p;
    args.in_counter = kIn;
    args.out_counter = kOut;
    args.permute_in = c.in;
    args.permute_out = c.out;
    args.accumulate = c.accumulate;
    PermutedEstimatePlan plan = plan_permuted_estimate<S>(args);
    check(plan.slices >= 1 && plan.slices <= kMaxGridYZ &&
              plan.slice * plan.slices >= c.directions &&
              (plan.slices == 1 || plan.slice * (plan.slices - 1) < c.directions),
          what + ": slices do not cover the directions");
    check((plan.chunk << plan.rows_log2) <= kPermutedSums<S> &&
              1 << plan.rows_log2 <= kPermutedBlockRows,
          what + ": a block has no room for its rows");
    if (c.slices) {
      plan.slices = c.slices;
      plan.slice = ceil_div(c.directions, c.slices);
    }
    std::vector<S> partial(
        static_cast<size_t>(permuted_in_place<T>(args, plan) ? 0 : plan.slices * c.m * c.n),
        std::numeric_limits<S>::quiet_NaN());
    args.partial = partial.data();
    launch_permuted_estimate<T>(args, plan, launcher(run + 5));
  }
  check(std::memcmp(grads[0].data(), grads[1].data(), before.size() * sizeof(T)) == 0,
        what + ": depends on the order of threads");
  std::vector<double> sums(before.size()), magnitudes(before.size());
  for (int64_t d = 0; d < c.directions; ++d) {
    const auto columns = entries(draw, c.in, kIn, d, c.n, c.p);
    const auto rows = entries(draw, c.out, kOut, d, c.m, c.m);
    for (int64_t i = 0; i < c.m; ++i) {
      const int64_t row = rows[static_cast<size_t>(i)];
      if (row >= c.q) continue;
      for (int64_t j = 0; j < c.p; ++j) {
        const double term = static_cast<double>(weights[static_cast<size_t>(d)]) *
                            base[static_cast<size_t>(row * c.p + j)];
        sums[static_cast<size_t>(i * c.n + columns[static_cast<size_t>(j)])] += term;
        magnitudes[static_cast<size_t>(i * c.n + columns[static_cast<size_t>(j)])] +=
            std::fabs(term);
      }
    }
  }
  for (size_t at = 0; at < before.size(); ++at) {
    const double expected = (c.accumulate ? as_double(before[at]) : 0.0) + sums[at];
    const double error = std::fabs(as_double(grads[0][at]) - expected);
    const double allowed = kEpsilon<T> * std::fabs(expected) +
                           kEpsilon<S> * magnitudes[at] * (2 + c.directions / 16.0);
    check(error <= allowed, what + ": element " + std::to_string(at) + " is off by " +
                                std::to_string(error) + ", allowed " + std::to_string(allowed));
  }
}

void estimate() {
  const EstimateCase cases[] = {
      {1, 1, 1, 1, 1},
      {0, 3, 5, 3, 5},
      {0, 3, 5, 3, 5, true, true, true},
      {9, 6, 37, 6, 37},
      {40, 5, 12, 5, 12, true, false, true},
      {40, 12, 5, 12, 5, false, true},
      {33, 7, 20, 7, 20, false, false, true},
      {70, 11, 33, 4, 9, true, true, false},  // few columns and rows of base
      {35, 70, 8, 50, 6, true, true, true},   // two blocks of rows
      {5, 3, 9, 0, 4},                        // a base without rows
      {300, 3, 70, 3, 66, true, true, true},  // slices
      {100, 9, 300, 9, 300, true, true, false, 3},
      {34, 10, 1000, 7, 900, true, true, false, 1},
      {3, 3, 1030, 2, 800},               // two rows a thread
      {2, 2, 21000, 2, 300, true, true},  // more chunks of columns than the grid holds
      {33, 2, 4500, 1, 4400, true, true, true, 2},
  };
  for (const EstimateCase& c : cases) {
    check_estimate<float>(c);
    check_estimate<double>(c);
    // Sums are float's; only the last kernel knows the type of grad.
    if (c.n < 60) check_estimate<Half>(c);
    if (c.n < 60) check_estimate<BFloat16>(c);
  }
}

}  // namespace

int main(int argc, char** argv) { return run_group(argc, argv, {{"estimate", estimate}}); }
