// The selections' kernels under emulation, against plain loops over the noise headers. Built and run
// by tests/test_cuda_emulation.py:  selection_kernels <group>. Prints one line per failed check.
#include "harness.h"

// After the harness, which gives CUDA's names their meaning.
#include "cuda/selection_kernels.cuh"
#include "cuda/selection_sum_kernels.cuh"
#include "rows.h"
#include "selections.h"

using namespace emulated;

namespace {

const uint32_t kCounter = stream_counter(6, kStreamSelectIn);

SelectArgs select_args(const RowArgs& rows, const std::vector<int64_t>& key, int64_t size,
                       bool replace) {
  SelectArgs args = {};
  args.selection = selection_args(key.data(), kCounter, size, replace);
  args.rows = rows;
  return args;
}

// ---- selections ---------------------------------------------------------------------------------

void check_selections(int64_t first, int64_t directions, int64_t size, int64_t count,
                      bool replace) {
  const Draw draw{kSign};
  const std::vector<int64_t> key = draw.key();
  std::vector<int64_t> runs[2];
  for (int run = 0; run < 2; ++run) {
    runs[run].assign(static_cast<size_t>(directions * count), -1);
    RowArgs rows = {};
    rows.directions = directions;
    rows.tokens = rows.sources = 1;
    SelectArgs args = select_args(rows, key, size, replace);
    args.out = runs[run].data();
    args.first = first;
    args.count = count;
    launch_selections<int64_t>(args, launcher(run + 3));
  }
  const std::string what = "selections first=" + std::to_string(first) +
                           " D=" + std::to_string(directions) + " size=" + std::to_string(size) +
                           " count=" + std::to_string(count) + (replace ? " replace" : "");
  check(same_bits(runs[0], runs[1]), what + ": depends on the order of threads");
  for (int64_t d = 0; d < directions; ++d) {
    const std::vector<uint32_t> expected =
        selection(draw, kCounter, first + d, size, count, replace);
    for (int64_t j = 0; j < count; ++j) {
      check(runs[0][static_cast<size_t>(d * count + j)] == expected[static_cast<size_t>(j)],
            what + ": entry (" + std::to_string(d) + ", " + std::to_string(j) + ") differs");
    }
  }
}

void selections() {
  for (const bool replace : {false, true}) {
    check_selections(0, 1, 1, 1, replace);
    check_selections(2, 3, 5, 5, replace);
    check_selections(0, 330, 7, 3, replace);  // past the grid's limit with 64 directions a block
    check_selections(1, 4, 300, 257, replace);
    check_selections(0, 7, 2049, 1100, replace);  // one direction a block, two tiles of columns
    check_selections(5, 2, 70000, 40, replace);
  }
  check_selections(0, 2, 3, 50, true);  // more than there are
}

// ---- select -------------------------------------------------------------------------------------

template <class T>
void check_select(const RowCase& c) {
  const Draw draw{kSign};
  check_rows<T>(
      "select", c, draw,
      [&](RowData<T>& data, uint64_t seed) {
        SelectArgs args = select_args(data.rows, data.key, c.in, c.replace);
        args.out = data.out.data();
        args.x = data.x.data() + c.offset;
        args.count = c.out;
        launch_select<T>(args, launcher(seed));
      },
      [&](const RowData<T>& data) {
        std::vector<T> expected = data.out;
        for_rows(c, [&](int64_t d, double sign, int64_t input, int64_t result) {
          const auto pi = selection(draw, kCounter, d, c.in, c.out, c.replace);
          for (int64_t j = 0; j < c.out; ++j) {
            const T value = data.x[static_cast<size_t>(input + pi[static_cast<size_t>(j)])];
            expected[static_cast<size_t>(result + j)] =
                static_cast<T>(static_cast<sum_t<T>>(sign * as_double(value)));
          }
        });
        return expected;
      });
}

template <class T>
void check_select_all() {
  const RowCase cases[] = {
      {.directions = 1, .repeats = 1, .in = 1, .out = 1},
      {.directions = 3, .repeats = 2, .in = 5, .out = 5, .antithetic = true},
      {.directions = 2, .repeats = 3, .in = 33, .out = 20, .tokens = 3},
      {.directions = 5, .repeats = 4, .in = 64, .out = 64, .tokens = 2, .antithetic = true},
      {.directions = 3, .repeats = 2, .in = 20, .out = 7, .tokens = 2, .shared = true},
      {.directions = 3, .repeats = 2, .in = 9, .out = 9, .pad = 3, .offset = 2},
      {.directions = 2, .repeats = 2, .in = 6, .out = 40, .antithetic = true, .replace = true},
      {.directions = 330, .repeats = 1, .in = 4, .out = 4},  // past the grid: directions
      {.directions = 2, .repeats = 2, .in = 6, .out = 6, .tokens = 45},  // past the grid: passes
      {.directions = 2, .repeats = 1, .in = 1100, .out = 1100},          // two tiles of columns
  };
  for (const RowCase& c : cases) check_select<T>(c);
}

// A NaN's payload and a zero's sign are moved too.
void check_select_bits() {
  const Draw draw{kSign};
  const RowCase c{.directions = 1, .repeats = 2, .in = 2, .out = 2, .antithetic = true};
  RowData<float> data(c, draw);
  const uint32_t words[] = {0x7fa12345u, 0x00000000u, 0x7fa12345u, 0x00000000u};
  std::memcpy(data.x.data(), words, sizeof(words));
  SelectArgs args = select_args(data.rows, data.key, c.in, false);
  args.out = data.out.data();
  args.x = data.x.data();
  args.count = c.out;
  launch_select<float>(args, launcher(1));
  const auto pi = selection(draw, kCounter, 0, 2, 2, false);
  for (size_t i = 0; i < 4; ++i) {
    const uint32_t expected = words[pi[i % 2]] ^ (i < 2 ? 0u : 0x80000000u);
    check(bits_from_float(data.out[i]) == expected, "select: bits of element " + std::to_string(i));
  }
}

void selected() {  // `select` is POSIX's
  check_select_all<float>();
  check_select_all<double>();
  check_select_all<Half>();
  check_select_all<BFloat16>();
  check_select_bits();
}

// ---- select_add_ --------------------------------------------------------------------------------

template <class T>
void check_select_add(const RowCase& c) {
  const Draw draw{kSign};
  check_rows<T>(
      "select_add", c, draw,
      [&](RowData<T>& data, uint64_t seed) {
        SelectArgs args = select_args(data.rows, data.key, c.out, c.replace);
        args.out = data.out.data();
        args.x = data.x.data() + c.offset;
        args.count = c.out;
        args.limit = c.in;
        launch_select_add<T>(args, launcher(seed));
      },
      [&](const RowData<T>& data) {
        using S = sum_t<T>;
        std::vector<T> expected = data.out;
        for_rows(c, [&](int64_t d, double sign, int64_t input, int64_t result) {
          const auto pi = selection(draw, kCounter, d, c.out, c.out, c.replace);
          for (int64_t i = 0; i < c.out; ++i) {
            const int64_t from = pi[static_cast<size_t>(i)];
            if (from >= c.in) continue;
            T& y = expected[static_cast<size_t>(result + i)];
            const S z = static_cast<S>(data.x[static_cast<size_t>(input + from)]);
            y = static_cast<T>(static_cast<S>(y) + static_cast<S>(sign) * z);
          }
        });
        return expected;
      });
}

template <class T>
void check_select_add_all() {
  const RowCase cases[] = {
      {.directions = 1, .repeats = 1, .in = 1, .out = 1},
      {.directions = 3, .repeats = 2, .in = 5, .out = 5, .groups = 1, .antithetic = true},
      {.directions = 2, .repeats = 3, .in = 20, .out = 33, .tokens = 3},
      {.directions = 5, .repeats = 4, .in = 50, .out = 64, .groups = 2, .antithetic = true},
      {.directions = 3, .repeats = 4, .in = 9, .out = 10, .tokens = 2, .groups = 1, .pad = 3},
      {.directions = 2, .repeats = 2, .in = 30, .out = 40, .groups = 1, .replace = true},
      {.directions = 330, .repeats = 1, .in = 3, .out = 4},
      {.directions = 2, .repeats = 4, .in = 5, .out = 6, .tokens = 50, .groups = 2},
      {.directions = 2, .repeats = 1, .in = 1000, .out = 1100},
  };
  for (const RowCase& c : cases) check_select_add<T>(c);
}

void select_add() {
  check_select_add_all<float>();
  check_select_add_all<double>();
  check_select_add_all<Half>();
  check_select_add_all<BFloat16>();
}

// ---- selection_sum ------------------------------------------------------------------------------

template <class S>
void check_sum(int64_t directions, int64_t first, int64_t rows, int64_t size, bool replace) {
  const Draw draw{kSign};
  const std::vector<int64_t> key = draw.key();
  Inputs inputs{static_cast<uint32_t>(size)};
  const std::vector<S> weights = inputs.vector<S>(directions);
  std::vector<S> runs[2];
  for (int run = 0; run < 2; ++run) {
    runs[run].assign(static_cast<size_t>(rows * size), std::numeric_limits<S>::quiet_NaN());
    SelectionSumArgs args = {};
    args.sum = runs[run].data();
    args.weights = weights.data();
    args.selection = selection_args(key.data(), kCounter, size, replace);
    args.directions = directions;
    args.first = first;
    args.rows = rows;
    args.size = size;
    launch_selection_sum<S>(args, launcher(run + 5));
  }
  // In the order of d, in the sum's own type: the same bits.
  std::vector<S> expected(runs[0].size());
  for (int64_t d = 0; d < directions; ++d) {
    const auto pi = selection(draw, kCounter, d, size, first + rows, replace);
    for (int64_t j = 0; j < rows; ++j) {
      expected[static_cast<size_t>(j * size + pi[static_cast<size_t>(first + j)])] +=
          weights[static_cast<size_t>(d)];
    }
  }
  const std::string what = std::string("selection_sum ") + name_of<S>() +
                           " D=" + std::to_string(directions) + " first=" + std::to_string(first) +
                           " rows=" + std::to_string(rows) + " size=" + std::to_string(size) +
                           (replace ? " replace" : "");
  check(same_bits(runs[0], runs[1]), what + ": depends on the order of threads");
  check(same_bits(runs[0], expected), what + ": differs from a plain loop");
}

template <class S>
void check_sums() {
  check_sum<S>(1, 0, 1, 1, false);
  check_sum<S>(0, 0, 3, 5, false);
  check_sum<S>(7, 0, 3, 3, false);
  check_sum<S>(40, 2, 9, 11, false);  // two blocks of rows, the second nearly empty
  check_sum<S>(300, 0, 4, 4, false);  // two tiles of directions, many weights an element
  check_sum<S>(600, 10, 3, 70, true);
  check_sum<S>(50, 20, 12, 6, true);     // rows beyond the size
  check_sum<S>(513, 1, 2, 1300, false);  // two or three chunks of columns
  check_sum<S>(270, 0, 1, 5500, true);   // more chunks than the grid holds
}

void selection_sum() {
  check_sums<float>();
  check_sums<double>();
}

}  // namespace

int main(int argc, char** argv) {
  return run_group(argc, argv,
                   {{"selections", selections},
                    {"select", selected},
                    {"select-add", select_add},
                    {"selection-sum", selection_sum}});
}
