// Kernels of the selections, without torch: pi_d is computed entry by entry where it is used, and no
// table of indices exists. The emulation compiles this file, launches included.
#pragma once

#include "cuda/rows.cuh"
#include "noise/permutation.h"

namespace perturbed {

// ---- pi_d ---------------------------------------------------------------------------------------

// The selections of one stream; what permutation_shape says of the size.
struct SelectionArgs {
  const int64_t* key;  // [3]
  PermutationShape shape;
  uint32_t counter;  // c0
  bool replace;
};

inline SelectionArgs selection_args(const int64_t* key, int64_t stream, int64_t size,
                                    bool replace) {
  return {key, permutation_shape(static_cast<uint32_t>(size)), static_cast<uint32_t>(stream),
          replace};
}

// One block of four round keys. A permutation has four, one after the other in shared memory, drawn
// by as many threads.
struct alignas(16) KeyWords {
  uint32_t w[4];
};
static_assert(kPermutationKeyBlocks == 4, "threads are dealt out in fours");

PT_DEVICE KeyWords draw_key_words(uint32_t counter, uint32_t block, const NoiseKey& noise,
                                  uint32_t c3) {
  const PhiloxWords words = philox4x32(counter, block, noise.generation, c3, noise.key);
  return {{words.w[0], words.w[1], words.w[2], words.w[3]}};
}

// The key whose blocks start at `first`; words in the order of permutation_key.
template <class Words>
PT_DEVICE PermutationKey staged_key(Words& words, int first) {
  PermutationKey key;
#pragma unroll
  for (int block = 0; block < kPermutationKeyBlocks; ++block) {
    const KeyWords at = words[first + block];
    key.multiplier[2 * block] = at.w[0];
    key.offset[2 * block] = at.w[1];
    key.multiplier[2 * block + 1] = at.w[2];
    key.offset[2 * block + 1] = at.w[3];
  }
  return key;
}

// Entry `index` of the draws with replacement.
PT_DEVICE uint32_t drawn_entry(const SelectionArgs& s, const NoiseKey& noise, uint32_t c3,
                               uint32_t index) {
  const PhiloxWords words = philox4x32(s.counter, index / 4, noise.generation, c3, noise.key);
  const uint32_t low = index & 1u ? words.w[1] : words.w[0];
  const uint32_t high = index & 1u ? words.w[3] : words.w[2];
  return replacement_entry(index & 2u ? high : low, s.shape.size);
}

// ---- select, select_add_, selections ------------------------------------------------------------

// Columns of a thread, a block's column threads apart: as many independent permutations.
constexpr int kSelectColumns = 4;

struct Entries {
  uint32_t of[kSelectColumns];
};

struct SelectArgs {
  void* out;      // select: [R, D, T, count]; select_add_: y; selections: int64 [D, count]
  const void* x;  // see RowArgs
  SelectionArgs selection;
  RowArgs rows;
  int64_t first;  // selections: the first direction, from the key's own
  int64_t count;  // columns of `out`
  int64_t limit;  // select_add_: columns of x
};

// Stages the keys of directions d0 .. of this block, one block of words a thread. Every thread of
// the block calls it.
template <class Words>
PT_DEVICE void stage_keys(Words& words, const SelectArgs& a, const NoiseKey& noise, int64_t d0,
                          int slots) {
  if (a.selection.replace) return;
  __syncthreads();  // the previous keys have been read
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t d = d0 + thread / kPermutationKeyBlocks;
  if (thread < slots * kPermutationKeyBlocks && d < a.rows.directions) {
    words[thread] = draw_key_words(a.selection.counter, thread % kPermutationKeyBlocks, noise,
                                   noise.first_direction + static_cast<uint32_t>(a.first + d));
  }
  __syncthreads();
}

// Runs use(direction, column, entries) in every thread that has columns below `count`: entry k is that
// of column + k * column_threads, or 0 if there is no such column.
template <class Use>
PT_DEVICE void for_selections(const SelectArgs& a, const RowPlan& plan, Use use) {
  PT_SHARED(KeyWords, words, kRowThreads);
  const NoiseKey noise = read_key(a.selection.key);
  const int thread = static_cast<int>(threadIdx.x);
  const int slot = thread >> plan.slot_shift;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * plan.column_threads * kSelectColumns +
                         (thread & (plan.column_threads - 1));
  for (int64_t d0 = static_cast<int64_t>(blockIdx.y) * plan.slots; d0 < a.rows.directions;
       d0 += static_cast<int64_t>(gridDim.y) * plan.slots) {
    stage_keys(words, a, noise, d0, plan.slots);
    const int64_t d = d0 + slot;
    if (d >= a.rows.directions || column >= a.count) continue;
    const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(a.first + d);
    Entries entries;
    PermutationKey key = {};
    if (!a.selection.replace) key = staged_key(words, slot * kPermutationKeyBlocks);
#pragma unroll
    for (int k = 0; k < kSelectColumns; ++k) {
      const int64_t at = column + k * plan.column_threads;
      const uint32_t index = static_cast<uint32_t>(at);
      entries.of[k] = 0;
      if (at < a.count) {
        entries.of[k] = a.selection.replace ? drawn_entry(a.selection, noise, c3, index)
                                            : permutation_entry(a.selection.shape, key, index);
      }
    }
    use(d, column, entries);
  }
}

// out[b, t, j] = s_b x[b, t, pi_d(j)]. A thread owns four columns of a direction, computes their
// entries once and moves them for all sources of the pass; stores are coalesced, loads are spread
// over a row that the first-level cache holds. Bound: bytes of x and out.
template <class Bits>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    select_kernel(SelectArgs a, RowPlan plan) {
  for_selections(a, plan, [&](int64_t d, int64_t column, const Entries& entries) {
    for_sources(a.rows, d, [&](int64_t source, int64_t row, int64_t offset) {
      const Bits* x = static_cast<const Bits*>(a.x) + offset;
      Bits* out = static_cast<Bits*>(a.out) + row * a.count + column;
      const Bits sign = sign_bit<Bits>(a.rows.negative(source));
      Bits value[kSelectColumns];
#pragma unroll
      for (int k = 0; k < kSelectColumns; ++k) {
        value[k] = static_cast<Bits>(x[entries.of[k]] ^ sign);
      }
#pragma unroll
      for (int k = 0; k < kSelectColumns; ++k) {
        const int64_t at = static_cast<int64_t>(k) * plan.column_threads;
        if (column + at < a.count) out[at] = value[k];
      }
    });
  });
}

// y[b, t, i] += s_b z[b % M, t, pi_d(i)] where pi_d(i) < q: a thread owns four columns of y, so
// nothing is added by two. Bound: bytes of y, read and written once, and z.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    select_add_kernel(SelectArgs a, RowPlan plan) {
  using S = sum_t<T>;
  for_selections(a, plan, [&](int64_t d, int64_t column, const Entries& entries) {
    for_sources(a.rows, d, [&](int64_t source, int64_t row, int64_t offset) {
      const T* z = static_cast<const T*>(a.x) + offset;
      S value[kSelectColumns];
      bool adds[kSelectColumns];
#pragma unroll
      for (int k = 0; k < kSelectColumns; ++k) {
        adds[k] = column + static_cast<int64_t>(k) * plan.column_threads < a.count &&
                  static_cast<int64_t>(entries.of[k]) < a.limit;
        value[k] = adds[k] ? static_cast<S>(z[entries.of[k]]) : S(0);
      }
      T* y = static_cast<T*>(a.out) + row * a.count + column;
      for (int64_t repeat = source; repeat < a.rows.repeats; repeat += a.rows.sources) {
        const bool negative = a.rows.negative(repeat);
#pragma unroll
        for (int k = 0; k < kSelectColumns; ++k) {
          const int64_t at = static_cast<int64_t>(k) * plan.column_threads;
          if (adds[k]) {
            y[at] = static_cast<T>(static_cast<S>(y[at]) + (negative ? -value[k] : value[k]));
          }
        }
        y += a.rows.cycle_rows() * a.count;
      }
    });
  });
}

// Entries 0 .. count - 1 of the directions first ..: [D, count]. Bound: the permutations themselves.
template <class Index>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    selections_kernel(SelectArgs a, RowPlan plan) {
  for_selections(a, plan, [&](int64_t d, int64_t column, const Entries& entries) {
    Index* out = static_cast<Index*>(a.out) + d * a.count + column;
#pragma unroll
    for (int k = 0; k < kSelectColumns; ++k) {
      const int64_t at = static_cast<int64_t>(k) * plan.column_threads;
      if (column + at < a.count) out[at] = static_cast<Index>(entries.of[k]);
    }
  });
}

// ---- launches -----------------------------------------------------------------------------------

// `launch` as in dense_launch.cuh. Geometry is a function of shapes alone. None of these adds up
// anything, so results do not depend on it either.
template <class Kernel, class Launch>
void launch_selections(Kernel kernel, const SelectArgs& args, Launch&& launch) {
  const int64_t units = ceil_div<int64_t>(args.count, kSelectColumns);
  // A permutation's key blocks are drawn by a thread each.
  const RowPlan plan = plan_rows(units, kPermutationKeyBlocks);
  launch(kernel, row_grid(plan, units, args.rows), kRowThreads, args, plan);
}

template <class T, class Launch>
void launch_select(const SelectArgs& args, Launch&& launch) {
  launch_selections(select_kernel<bits_t<sizeof(T)>>, args, launch);
}

template <class T, class Launch>
void launch_select_add(const SelectArgs& args, Launch&& launch) {
  launch_selections(select_add_kernel<T>, args, launch);
}

template <class Index, class Launch>
void launch_selections(const SelectArgs& args, Launch&& launch) {
  launch_selections(selections_kernel<Index>, args, launch);
}

}  // namespace perturbed
