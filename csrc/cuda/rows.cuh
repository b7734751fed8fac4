// What kernels share that move or add whole rows of activations (selection_kernels.cuh,
// sign_flip_kernels.cuh): which row reads which, how threads divide them, and bits that stand for
// floats.
//
// A direction's noise is drawn once by the threads that need it and serves all its "sources", the
// rows of the input that see this direction: (repeat or shared row, token).
#pragma once

#include "cuda/device.cuh"

namespace perturbed {

struct RowArgs {
  int64_t directions, tokens;
  int64_t repeats;  // rows of the result per direction
  int64_t sources;  // rows of the input per direction; repeat r reads source r % sources
  int64_t source_stride, direction_stride, token_stride;  // of the input, in elements
  bool antithetic;

  // Rows of the result from one repeat of a source to the next.
  PT_HD_MEMBER int64_t cycle_rows() const { return sources * directions * tokens; }
  PT_HD_MEMBER bool negative(int64_t repeat) const { return antithetic && repeat >= repeats / 2; }
};

// A block of kRowThreads works on a tile of columns of `slots` directions and, per pass, on
// kRowSources sources. Grid: x tiles of columns, y directions, z passes.
constexpr int kRowThreads = 256;
constexpr int kRowSources = 16;
constexpr int kRowBlocks = 3;  // of a multiprocessor; keeps registers at 80, where none spills

struct RowPlan {
  int column_threads;  // threads of one direction, a power of two
  int slots;           // directions of a block
  int slot_shift;      // log2(column_threads)
};

// `units`: work items of one direction. Narrow rows leave threads for other directions; with at
// least `fewest` threads for each.
inline RowPlan plan_rows(int64_t units, int fewest = 1) {
  RowPlan plan;
  plan.column_threads = power_of_two_at_least(units > fewest ? units : fewest, kRowThreads);
  plan.slots = kRowThreads / plan.column_threads;
  plan.slot_shift = 0;
  while (1 << plan.slot_shift < plan.column_threads) ++plan.slot_shift;
  return plan;
}

inline GridShape row_grid(const RowPlan& plan, int64_t units, const RowArgs& rows) {
  return grid_shape(ceil_div<int64_t>(units, plan.column_threads),
                    ceil_div<int64_t>(rows.directions, plan.slots),
                    ceil_div<int64_t>(rows.sources * rows.tokens, kRowSources));
}

// Calls visit(source, row, offset) for the sources of this block's passes: repeat `source`'s row of
// the result, and where the input's begins. More than one pass only if the grid would be too large.
template <class Visit>
PT_DEVICE void for_sources(const RowArgs& a, int64_t direction, Visit visit) {
  const int64_t all = a.sources * a.tokens;
  const int64_t next_row = (a.directions - 1) * a.tokens + 1;
  const int64_t next_offset = a.source_stride - (a.tokens - 1) * a.token_stride;
  for (int64_t first = static_cast<int64_t>(blockIdx.z) * kRowSources; first < all;
       first += static_cast<int64_t>(gridDim.z) * kRowSources) {
    const int count = static_cast<int>(all - first < kRowSources ? all - first : kRowSources);
    int64_t source = a.tokens == 1 ? first : first / a.tokens;
    int64_t token = first - source * a.tokens;
    int64_t row = (source * a.directions + direction) * a.tokens + token;
    int64_t offset =
        source * a.source_stride + direction * a.direction_stride + token * a.token_stride;
#pragma unroll 1  // four columns a thread are enough in flight; more would cost occupancy
    for (int q = 0; q < count; ++q) {
      visit(source, row, offset);
      const bool wraps = ++token == a.tokens;
      row += wraps ? next_row : 1;
      offset += wraps ? next_offset : a.token_stride;
      if (wraps) {
        token = 0;
        ++source;
      }
    }
  }
}

// Unsigned integers of a float type's size. Rows are moved and negated as such, which keeps every
// bit of every dtype and serves float16 and bfloat16 with one kernel.
template <size_t kBytes>
using bits_t =
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;

// The sign bit where `negative`, else zero: what to XOR with.
template <class Bits>
PT_DEVICE Bits sign_bit(bool negative) {
  return static_cast<Bits>(static_cast<Bits>(negative) << (8 * sizeof(Bits) - 1));
}

}  // namespace perturbed
