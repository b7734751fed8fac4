// What the drivers of kernels that move or add rows share (selection_kernels.cpp,
// sign_flip_kernels.cpp): problems of all shapes, their tensors, and walks over the rows.
#pragma once

#include "harness.h"

// After the harness.
#include "cuda/rows.cuh"

namespace emulated {

struct RowCase {
  int64_t directions, repeats;
  int64_t in, out;  // columns of the input and of the result
  int64_t tokens = 1;
  int64_t groups = 0;   // of input rows: repeat r reads group r % groups; 0: every repeat its own
  bool shared = false;  // the input's rows are seen by every direction
  bool antithetic = false;
  bool replace = false;
  int64_t pad = 0;     // elements between rows of the input
  int64_t offset = 0;  // elements before the first
};

inline std::string describe(const RowCase& c) {
  return "D=" + std::to_string(c.directions) + " R=" + std::to_string(c.repeats) +
         " in=" + std::to_string(c.in) + " out=" + std::to_string(c.out) +
         " T=" + std::to_string(c.tokens) + " groups=" + std::to_string(c.groups) +
         (c.shared ? " shared" : "") + (c.antithetic ? " antithetic" : "") +
         (c.replace ? " replace" : "") + " pad=" + std::to_string(c.pad) +
         " offset=" + std::to_string(c.offset);
}

template <class T>
struct RowData {
  std::vector<T> out, x;
  std::vector<int64_t> key;
  RowArgs rows = {};
  bool x_aligned, out_aligned;

  RowData(const RowCase& c, const Draw& draw) {
    Inputs inputs{static_cast<uint32_t>(c.in * 131 + c.out)};
    const int64_t stride = c.in + c.pad;
    const int64_t groups = c.groups ? c.groups : c.repeats;
    const int64_t input_rows = groups * (c.shared ? 1 : c.directions) * c.tokens;
    // Exactly as long as needed, so that the address sanitizer sees one element too far.
    x = inputs.vector<T>(c.offset + (input_rows - 1) * stride + c.in);
    out = inputs.vector<T>(c.repeats * c.directions * c.tokens * c.out);
    key = draw.key();
    rows.directions = c.directions;
    rows.tokens = c.tokens;
    rows.repeats = c.repeats;
    rows.sources = groups;
    rows.token_stride = stride;
    rows.source_stride = c.tokens * stride * (c.shared ? 1 : c.directions);
    rows.direction_stride = c.shared ? 0 : c.tokens * stride;
    rows.antithetic = c.antithetic;
    x_aligned = c.in % 4 == 0 && c.pad % 4 == 0 && c.offset % 4 == 0;
    out_aligned = c.out % 4 == 0;
  }
};

// Calls visit(direction, sign, row of the input, row of the result) for every row and token; rows
// of the input as elements of x.
template <class Visit>
void for_rows(const RowCase& c, Visit visit) {
  const int64_t groups = c.groups ? c.groups : c.repeats;
  for (int64_t b = 0; b < c.repeats * c.directions; ++b) {
    const int64_t repeat = b / c.directions, d = b % c.directions;
    const double sign = c.antithetic && repeat >= c.repeats / 2 ? -1 : 1;
    const int64_t input = c.shared ? repeat : b % (groups * c.directions);
    for (int64_t t = 0; t < c.tokens; ++t) {
      visit(d, sign, c.offset + (input * c.tokens + t) * (c.in + c.pad),
            (b * c.tokens + t) * c.out);
    }
  }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Runs `launch(data, seed)` on two equal copies in different orders of threads and blocks, and
// compares with `expect(before)`, bit by bit.
template <class T, class Launch, class Expect>
void check_rows(const std::string& what, const RowCase& c, const Draw& draw, Launch launch,
                Expect expect) {
  RowData<T> data(c, draw), again(c, draw);
  const std::vector<T> expected = expect(data);
  launch(data, 1);
  launch(again, 987654321);
  const std::string text = what + " " + name_of<T>() + " " + describe(c);
  check(same_bits(data.out, again.out), text + ": depends on the order of threads");
  for (size_t i = 0; i < expected.size(); ++i) {
    check(std::memcmp(&data.out[i], &expected[i], sizeof(T)) == 0,
          text + ": element " + std::to_string(i) + " is " +
              std::to_string(as_double(data.out[i])) + ", expected " +
              std::to_string(as_double(expected[i])));
  }
}

}  // namespace emulated
