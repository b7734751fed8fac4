// The sign-flip family's kernels under emulation, against plain loops over the noise headers. Built
// and run by tests/test_cuda_emulation.py:  sign_flip_kernels <group>.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include "cuda/sign_flip_kernels.cuh"
#include "rows.h"

using namespace emulated;

namespace {

const uint32_t kCounter = stream_counter(6, kStreamFlipIn);

template <class T>
FlipArgs flip_args(const RowCase& c, RowData<T>& data) {
  FlipArgs args = {};
  args.out = data.out.data();
  args.x = data.x.data() + c.offset;
  args.key = data.key.data();
  args.rows = data.rows;
  args.size = c.out;
  args.counter = kCounter;
  args.x_aligned = data.x_aligned;
  args.out_aligned = data.out_aligned;
  return args;
}

template <class T>
void check_flip(const RowCase& c) {
  const Draw draw{kSign};
  check_rows<T>(
      "flip", c, draw,
      [&](RowData<T>& data, uint64_t seed) { launch_flip<T>(flip_args(c, data), launcher(seed)); },
      [&](const RowData<T>& data) {
        std::vector<T> expected = data.out;
        for_rows(c, [&](int64_t d, double sign, int64_t input, int64_t result) {
          for (int64_t i = 0; i < c.out; ++i) {
            const double s = sign * draw(kCounter, d, c.out, 0, i);
            const double value = as_double(data.x[static_cast<size_t>(input + i)]);
            expected[static_cast<size_t>(result + i)] =
                static_cast<T>(static_cast<sum_t<T>>(s * value));
          }
        });
        return expected;
      });
}

template <class T>
void check_flip_add(const RowCase& c) {
  const Draw draw{kSign};
  check_rows<T>(
      "flip_add", c, draw,
      [&](RowData<T>& data, uint64_t seed) {
        launch_flip_add<T>(flip_args(c, data), launcher(seed));
      },
      [&](const RowData<T>& data) {
        using S = sum_t<T>;
        std::vector<T> expected = data.out;
        for_rows(c, [&](int64_t d, double sign, int64_t input, int64_t result) {
          for (int64_t i = 0; i < c.out; ++i) {
            T& y = expected[static_cast<size_t>(result + i)];
            const S s = static_cast<S>(sign * draw(kCounter, d, c.out, 0, i));
            const S z = static_cast<S>(data.x[static_cast<size_t>(input + i)]);
            y = static_cast<T>(static_cast<S>(y) + s * z);
          }
        });
        return expected;
      });
}

constexpr RowCase square(int64_t directions, int64_t repeats, int64_t columns) {
  return {.directions = directions, .repeats = repeats, .in = columns, .out = columns};
}

RowCase with(RowCase c, int64_t tokens, int64_t groups, bool shared, bool antithetic,
             int64_t pad = 0, int64_t offset = 0) {
  c.tokens = tokens;
  c.groups = groups;
  c.shared = shared;
  c.antithetic = antithetic;
  c.pad = pad;
  c.offset = offset;
  return c;
}

// Shapes that both operators run over.
const RowCase kCommon[] = {
    square(1, 1, 1),
    square(3, 2, 5),
    square(2, 1, 130),
    with(square(5, 4, 64), 1, 0, false, true),
    with(square(2, 2, 31), 3, 0, false, true),
    with(square(3, 3, 36), 2, 0, false, false, 3),
    with(square(3, 2, 12), 2, 0, false, true, 4, 4),
    with(square(3, 2, 12), 2, 0, false, true, 0, 1),
    square(1300, 1, 3),                          // past the grid: directions
    with(square(2, 2, 6), 45, 0, false, false),  // past the grid: passes
    square(2, 1, 1100),                          // two tiles of columns
};

template <class T>
void check_flips() {
  for (const RowCase& c : kCommon) check_flip<T>(c);
  check_flip<T>(with(square(3, 2, 40), 2, 0, true, false));
  check_flip<T>(with(square(7, 3, 33), 1, 0, true, false, 2));
}

template <class T>
void check_flip_adds() {
  for (const RowCase& c : kCommon) check_flip_add<T>(c);
  check_flip_add<T>(with(square(3, 2, 40), 1, 1, false, true));
  check_flip_add<T>(with(square(2, 4, 33), 3, 2, false, true));
  check_flip_add<T>(with(square(2, 6, 8), 2, 2, false, false, 1));
  check_flip_add<T>(with(square(2, 4, 5), 50, 2, false, true));
}

// A NaN's payload and a zero's sign are kept.
void check_flip_bits() {
  const Draw draw{kSign};
  const RowCase c = square(2, 1, 4);
  RowData<float> data(c, draw);
  std::vector<uint32_t> words(8, 0x7fa12345u);
  words[1] = words[6] = 0u;
  std::memcpy(data.x.data(), words.data(), 8 * sizeof(uint32_t));
  launch_flip<float>(flip_args(c, data), launcher(1));
  for (size_t i = 0; i < 8; ++i) {
    const bool minus = draw(kCounter, static_cast<int64_t>(i / 4), 4, 0, i % 4) < 0;
    check(bits_from_float(data.out[i]) == (words[i] ^ (minus ? 0x80000000u : 0u)),
          "flip: bits of element " + std::to_string(i));
  }
}

void flip() {
  check_flips<float>();
  check_flips<double>();
  check_flips<Half>();
  check_flips<BFloat16>();
  check_flip_bits();
}

void flip_add() {
  check_flip_adds<float>();
  check_flip_adds<double>();
  check_flip_adds<Half>();
  check_flip_adds<BFloat16>();
}

}  // namespace

int main(int argc, char** argv) {
  return run_group(argc, argv, {{"flip", flip}, {"flip-add", flip_add}});
}
