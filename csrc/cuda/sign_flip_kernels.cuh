// Kernels of the sign-flip family, without torch: signs are drawn where they are used. The emulation
// compiles this file, launches included.
#pragma once

#include "cuda/rows.cuh"

namespace perturbed {

constexpr int kFlipColumns = 4;  // of a thread

struct FlipArgs {
  void* out;      // flip: [R, D, T, n]; flip_add_: y
  const void* x;  // see RowArgs
  const int64_t* key;
  RowArgs rows;
  int64_t size;  // n or m: columns of either
  uint32_t counter;
  bool x_aligned, out_aligned;  // every row may be accessed as Vector4
};

// Runs use(direction, column, bits) in every thread that has columns: column .. column + 3, whose
// signs are the low bits, set for +1. The signs are row 0 of a sign block: one call for 32 columns,
// which is repeated by the eight threads that share them rather than passed between them. It costs
// 15 instructions a column and is paid once for all sources.
template <class Use>
PT_DEVICE void for_signs(const FlipArgs& a, const RowPlan& plan, Use use) {
  const NoiseKey noise = read_key(a.key);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * plan.column_threads +
                          (thread & (plan.column_threads - 1))) *
                         kFlipColumns;
  if (column >= a.size) return;
  const PhiloxLaunch launch = philox_launch(a.counter, noise.generation, noise.key);
  const PhiloxBlock block = philox_block(launch, static_cast<uint32_t>(column / kSignBlockCols));
  for (int64_t d = static_cast<int64_t>(blockIdx.y) * plan.slots + (thread >> plan.slot_shift);
       d < a.rows.directions; d += static_cast<int64_t>(gridDim.y) * plan.slots) {
    const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(d);
    const PhiloxWords words = philox_finish(block, philox_direction(launch, c3), noise.key);
    use(d, column, words.w[0] >> static_cast<int>(column % kSignBlockCols));
  }
}

// out[b, t, i] = s_b sign_d[i] x[b, t, i], bits moved as they are. Bound: bytes of x and out.
template <class Bits>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) flip_kernel(FlipArgs a, RowPlan plan) {
  for_signs(a, plan, [&](int64_t d, int64_t column, uint32_t signs) {
    const int64_t valid = a.size - column;
    for_sources(a.rows, d, [&](int64_t source, int64_t row, int64_t offset) {
      const bool negative = a.rows.negative(source);
      Bits value[kFlipColumns];
      load4(value, static_cast<const Bits*>(a.x) + offset + column, valid, a.x_aligned);
#pragma unroll
      for (int k = 0; k < kFlipColumns; ++k) {
        const bool minus = (signs >> k & 1u) == 0;
        value[k] = static_cast<Bits>(value[k] ^ sign_bit<Bits>(minus != negative));
      }
      Bits* out = static_cast<Bits*>(a.out) + row * a.size + column;
      store4(out, value, valid, a.out_aligned);
    });
  });
}

// y[b, t, i] += s_b sign_d[i] z[b % M, t, i]. Bound: bytes of y, read and written once, and z.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    flip_add_kernel(FlipArgs a, RowPlan plan) {
  using S = sum_t<T>;
  for_signs(a, plan, [&](int64_t d, int64_t column, uint32_t signs) {
    const int64_t valid = a.size - column;
    for_sources(a.rows, d, [&](int64_t source, int64_t row, int64_t offset) {
      S step[kFlipColumns];
      load4(step, static_cast<const T*>(a.x) + offset + column, valid, a.x_aligned);
#pragma unroll
      for (int k = 0; k < kFlipColumns; ++k) {
        if ((signs >> k & 1u) == 0) step[k] = -step[k];
      }
      T* y = static_cast<T*>(a.out) + row * a.size + column;
      for (int64_t repeat = source; repeat < a.rows.repeats; repeat += a.rows.sources) {
        const bool negative = a.rows.negative(repeat);
        S sum[kFlipColumns];
        load4(sum, y, valid, a.out_aligned);
#pragma unroll
        for (int k = 0; k < kFlipColumns; ++k) sum[k] += negative ? -step[k] : step[k];
        store4(y, sum, valid, a.out_aligned);
        y += a.rows.cycle_rows() * a.size;
      }
    });
  });
}

// `launch` as in dense_launch.cuh. Nothing is summed, so results do not depend on the geometry.
template <class Kernel, class Launch>
void launch_rows(Kernel kernel, const FlipArgs& args, Launch&& launch) {
  const int64_t units = ceil_div<int64_t>(args.size, kFlipColumns);
  const RowPlan plan = plan_rows(units);
  launch(kernel, row_grid(plan, units, args.rows), kRowThreads, args, plan);
}

template <class T, class Launch>
void launch_flip(const FlipArgs& args, Launch&& launch) {
  launch_rows(flip_kernel<bits_t<sizeof(T)>>, args, launch);
}

template <class T, class Launch>
void launch_flip_add(const FlipArgs& args, Launch&& launch) {
  launch_rows(flip_add_kernel<T>, args, launch);
}

}  // namespace perturbed
