// dense_lookup's kernel under emulation, against the contract element by element. Built and run by
// tests/test_cuda_emulation.py:  lookup_kernels <group>.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include "cuda/lookup_kernels.cuh"

using namespace emulated;

namespace {

const uint32_t kCounter = stream_counter(6, kStreamWeight);

struct Case {
  int64_t repeats, directions, tokens, rows, cols, offset;
};

const Case kCases[] = {
    {1, 1, 1, 1, 1, 0},   {2, 3, 1, 7, 5, 0},    {1, 4, 3, 9, 4, 0},   {3, 2, 2, 40, 64, 0},
    {2, 2, 5, 13, 36, 0}, {1, 2, 1, 6, 1100, 0}, {2, 1, 4, 100, 8, 1}, {2, 5, 60, 11, 33, 0},
};

template <bool kExact, class T>
void check_lookup(const Case& c, bool rademacher) {
  const Draw draw{rademacher ? kSign : kExact ? kExactNormal : kFast};
  const std::vector<int64_t> key = draw.key();
  const int64_t entries = c.repeats * c.directions * c.tokens;
  std::vector<int64_t> index(static_cast<size_t>(entries));
  for (int64_t i = 0; i < entries; ++i) index[static_cast<size_t>(i)] = (i * 7 + 3) % c.rows;
  // What lies around the result is not to be touched.
  const T guard = static_cast<T>(-77.0f);
  std::vector<T> out(static_cast<size_t>(entries * c.cols + 16), guard);
  for (uint64_t seed : {1, 2}) {
    LookupArgs args = {};
    args.out = out.data() + c.offset;
    args.index = index.data();
    args.key = key.data();
    args.directions = c.directions;
    args.tokens = c.tokens;
    args.entries = entries;
    args.cols = c.cols;
    args.counter = kCounter;
    args.aligned = c.cols % 4 == 0 && c.offset % 4 == 0;
    launch_dense_lookup<kExact, T>(args, rademacher, launcher(seed));
    const std::string what = std::string("lookup ") + name_of<T>() + " " + name_of(draw.kind) +
                             " " + std::to_string(entries) + "x" + std::to_string(c.cols);
    bool good = true;
    for (int64_t i = 0; i < entries; ++i) {
      for (int64_t k = 0; k < c.cols; ++k) {
        const int64_t row = index[static_cast<size_t>(i)];
        const T expected =
            static_cast<T>(draw(kCounter, i / c.tokens % c.directions, c.cols, row, k));
        good &=
            as_double(out[static_cast<size_t>(c.offset + i * c.cols + k)]) == as_double(expected);
      }
    }
    check(good, what);
    for (size_t i = 0; i < out.size(); ++i) {
      const auto at = static_cast<int64_t>(i) - c.offset;
      if (at >= 0 && at < entries * c.cols) continue;
      check(as_double(out[i]) == as_double(guard), what + ": wrote outside");
    }
  }
}

template <class T>
void check_dtype(bool rademacher) {
  for (const Case& c : kCases) {
    check_lookup<true, T>(c, rademacher);
    if (!rademacher) check_lookup<false, T>(c, false);
  }
}

void check_all(bool rademacher) {
  check_dtype<float>(rademacher);
  check_dtype<double>(rademacher);
  check_dtype<Half>(rademacher);
  check_dtype<BFloat16>(rademacher);
}

}  // namespace

int main(int argc, char** argv) {
  return run_group(argc, argv,
                   {{"normal", [] { check_all(false); }}, {"sign", [] { check_all(true); }}});
}
