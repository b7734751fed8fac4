// Kernels of the dense family, without torch. E_d is never stored: a thread recomputes the counters
// of the block of E_d that it needs. dense_launch.cuh chooses the geometry; docs/kernels.md has the
// analysis.
#pragma once

#include "cuda/device.cuh"

namespace perturbed {

// ---- dense_linear_ ------------------------------------------------------------------------------

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarpSize;
constexpr int kQuad = 4;  // output rows of one lane: a sign block's rows, and 4 independent chains

// Most sources that share one regeneration: what registers hold.
template <class Noise, class T>
constexpr int kMaxSources = std::is_same_v<T, double> ? 4 : Noise::kMaxSources;

// One "source" is one vector x of a direction: (repeat or shared row, token).
struct DenseLinearArgs {
  void* y;              // [R, D, T, m]
  const void* x;        // see x_*_stride
  const int64_t* key;   // [3]
  const double* sigma;  // []
  int64_t directions, repeats, tokens, out;
  int64_t in;       // 0 if the weight is not perturbed
  int64_t sources;  // rows of x per direction; row r of y reads source r % sources
  int64_t x_source_stride, x_direction_stride, x_token_stride;  // in elements
  uint32_t weight_counter, bias_counter;                        // c0
  bool bias, antithetic;
  bool x_aligned;  // every row of x may be read as Vector4
};

struct DenseLinearPlan {
  int sources_per_pass;      // 1, 2, 4 or 8: how many sources share one regeneration of the noise
  int group;                 // lanes that share a quad of output rows and split its columns
  int direction_warps_log2;  // warps of a block that work on the same direction
};

template <bool kExact>
struct NormalNoise {
  static constexpr int kCols = kNormalBlockCols;
  static constexpr float kScale = 1.0f;  // what accumulate's sums are to be multiplied by
  static constexpr bool kPinKeys = true;
  static constexpr int kMaxSources = 8;

  PT_DEVICE static NormalBlock block(PhiloxWords words) {
    if constexpr (kExact) {
      return normal_block(words);
    } else {
      return normal_block_fast(words);
    }
  }

  // Four rows by four columns: four calls, one a row. acc[r * kSources + j] += E[r] . x[j].
  template <int kSources, class T, class S>
  PT_DEVICE static void accumulate(S (&acc)[kQuad * kSources], const T* const (&x)[kSources],
                                   const PhiloxLaunch& launch, const PhiloxSchedule& keys,
                                   PhiloxDirection direction, int64_t row, uint32_t block_col,
                                   int64_t cols, bool aligned) {
    const uint32_t blocks = static_cast<uint32_t>(normal_blocks_per_row(cols));
    const int64_t col = static_cast<int64_t>(block_col) * kCols;
    S xv[kSources][4];
#pragma unroll
    for (int j = 0; j < kSources; ++j) load4(xv[j], x[j] + col, cols - col, aligned);
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      const uint32_t c1 = static_cast<uint32_t>(row + r) * blocks + block_col;
      const NormalBlock e = block(philox_finish(philox_block(launch, c1), direction, keys));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < kSources; ++j) {
          S& sum = acc[r * kSources + j];
          sum = fused_multiply_add(static_cast<S>(e.z[k]), xv[j][k], sum);
        }
      }
    }
  }

  // Elements row .. row + 3 of a vector; row is a multiple of 4.
  PT_DEVICE static void vector_quad(float (&e)[kQuad], const PhiloxLaunch& launch,
                                    PhiloxDirection direction, int64_t row) {
    const PhiloxBlock at = philox_block(launch, static_cast<uint32_t>(row / kCols));
    const NormalBlock b = block(philox_finish(at, direction, launch.key));
#pragma unroll
    for (int r = 0; r < kQuad; ++r) e[r] = b.z[r];
  }
};

struct SignNoise {
  static constexpr int kCols = kSignBlockCols;
  static constexpr float kScale = 2.0f;
  static constexpr bool kPinKeys = false;  // one call serves 128 elements: sums need the registers
  static constexpr int kMaxSources = 4;    // eight spill on sm_80 and would save a tenth

  // Four rows by 32 columns: one call. sum of +-x = 2 (sum of x at set bits - half the sum of x),
  // so an element costs one predicated add. The half is taken off block by block: partial sums then
  // stay as small as those of the +-x themselves, also for inputs of one sign.
  template <int kSources, class T, class S>
  PT_DEVICE static void accumulate(S (&acc)[kQuad * kSources], const T* const (&x)[kSources],
                                   const PhiloxLaunch& launch, const PhiloxSchedule& keys,
                                   PhiloxDirection direction, int64_t row, uint32_t block_col,
                                   int64_t cols, bool aligned) {
    const uint32_t blocks = static_cast<uint32_t>(sign_blocks_per_row(cols));
    const uint32_t c1 = static_cast<uint32_t>(row / kSignBlockRows) * blocks + block_col;
    PhiloxWords words = philox_finish(philox_block(launch, c1), direction, keys);
    const int64_t col = static_cast<int64_t>(block_col) * kCols;
    S total[kSources] = {};
    // Unrolled whole for few sources, where bits at fixed places become predicates by the seven;
    // for more, that would overflow the instruction cache.
    constexpr bool kUnrolled = kSources <= 2;
#pragma unroll(kUnrolled ? kCols / 4 : 1)
    for (int step = 0; step < kCols / 4; ++step) {
      S xv[kSources][4];
#pragma unroll
      for (int j = 0; j < kSources; ++j) {
        load4(xv[j], x[j] + col + 4 * step, cols - col - 4 * step, aligned);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int j = 0; j < kSources; ++j) total[j] += xv[j][k];
#pragma unroll
        for (int r = 0; r < kQuad; ++r) {
          const bool set = (words.w[r] >> (kUnrolled ? 4 * step + k : k) & 1u) != 0;
#pragma unroll
          for (int j = 0; j < kSources; ++j) {
            if (set) acc[r * kSources + j] += xv[j][k];
          }
        }
      }
      if constexpr (!kUnrolled) {
#pragma unroll
        for (int r = 0; r < kQuad; ++r) words.w[r] >>= 4;
      }
    }
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
#pragma unroll
      for (int j = 0; j < kSources; ++j) acc[r * kSources + j] -= S(0.5) * total[j];
    }
  }

  PT_DEVICE static void vector_quad(float (&e)[kQuad], const PhiloxLaunch& launch,
                                    PhiloxDirection direction, int64_t row) {
    const PhiloxBlock at = philox_block(launch, static_cast<uint32_t>(row / kCols));
    const uint32_t word = philox_finish(at, direction, launch.key).w[0];
#pragma unroll
    for (int r = 0; r < kQuad; ++r) e[r] = sign_from_bit(word, static_cast<int>(row % kCols) + r);
  }
};

// A warp works on one direction and kSources sources; each group of its lanes on four output rows,
// whose column blocks the lanes of the group deal out. A thread draws its noise into registers,
// uses it for all kSources and drops it. x is read through L1, where the warps of a block share it;
// nothing else is read, and y is read and written once. Bound: Philox and Box-Muller (normal),
// issue slots (signs).
template <class Noise, int kSources, class T>
__global__ void __launch_bounds__(kLinearThreads, kSources * sizeof(sum_t<T>) <= 8 ? 3 : 2)
    dense_linear_kernel(DenseLinearArgs a, DenseLinearPlan plan) {
  using S = sum_t<T>;
  constexpr int kValues = kQuad * kSources;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch weight = philox_launch(a.weight_counter, noise.generation, noise.key);
  const PhiloxLaunch bias = philox_launch(a.bias_counter, noise.generation, noise.key);
  const PhiloxSchedule keys =
      Noise::kPinKeys ? pinned_schedule(noise.key) : philox_schedule(noise.key);
  const S sigma = static_cast<S>(*a.sigma);

  const int direction_warps = 1 << plan.direction_warps_log2;
  const int64_t tile =
      static_cast<int64_t>(blockIdx.x) * direction_warps + (warp & (direction_warps - 1));
  const int64_t row = (tile * (kWarpSize / plan.group) + lane / plan.group) * kQuad;
  const int64_t blocks = ceil_div<int64_t>(a.in, Noise::kCols);
  const int64_t all_sources = a.sources * a.tokens;
  const int64_t block_directions = kLinearWarps >> plan.direction_warps_log2;

  // Both loops run once unless the grid would be too large.
  for (int64_t q0 = static_cast<int64_t>(blockIdx.z) * kSources; q0 < all_sources;
       q0 += static_cast<int64_t>(gridDim.z) * kSources) {
    for (int64_t d = blockIdx.y * block_directions + (warp >> plan.direction_warps_log2);
         d < a.directions; d += gridDim.y * block_directions) {
      const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(d);
      S acc[kValues] = {};
      if (row < a.out) {
        const PhiloxDirection direction = philox_direction(weight, c3);
        const T* x[kSources];
#pragma unroll
        for (int j = 0; j < kSources; ++j) {
          // The last pass may have fewer sources: it repeats the last one and drops the result.
          const int64_t q = q0 + j < all_sources ? q0 + j : all_sources - 1;
          const int64_t source = a.tokens == 1 ? q : q / a.tokens;
          x[j] = static_cast<const T*>(a.x) + source * a.x_source_stride +
                 d * a.x_direction_stride + (q - source * a.tokens) * a.x_token_stride;
        }
        for (int64_t b = lane % plan.group; b < blocks; b += plan.group) {
          Noise::template accumulate<kSources>(acc, x, weight, keys, direction, row,
                                               static_cast<uint32_t>(b), a.in, a.x_aligned);
        }
      }
      int first;
      const int count = group_sum(acc, plan.group, lane, first);
      if (row >= a.out || lane % plan.group >= kValues) continue;

      float bias_noise[kQuad] = {};
      if (a.bias) Noise::vector_quad(bias_noise, bias, philox_direction(bias, c3), row);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {  // count <= kQuad because group >= kSources
        const int r = (first + i) / kSources;
        const int64_t q = q0 + (first + i) % kSources;
        if (i >= count || row + r >= a.out || q >= all_sources) continue;
        const float e = r < 2 ? (r == 0 ? bias_noise[0] : bias_noise[1])
                              : (r == 2 ? bias_noise[2] : bias_noise[3]);
        const S step = sigma * (acc[i] * S(Noise::kScale) + static_cast<S>(e));
        const int64_t source = a.tokens == 1 ? q : q / a.tokens;
        const int64_t token = q - source * a.tokens;
        for (int64_t repeat = source; repeat < a.repeats; repeat += a.sources) {
          T* y = static_cast<T*>(a.y) + ((repeat * a.directions + d) * a.tokens + token) * a.out +
                 row + r;
          const bool negative = a.antithetic && repeat >= a.repeats / 2;
          *y = static_cast<T>(static_cast<S>(*y) + (negative ? -step : step));
        }
      }
    }
  }
}

// ---- dense_estimate_ ----------------------------------------------------------------------------

// Threads of a block, and directions staged in shared memory at a time.
constexpr int kEstimateTile = 256;
constexpr int kSignEstimateTile = 128;  // its threads hold 128 sums each

struct DenseEstimateArgs {
  void* grad;           // [m, n]
  void* partial;        // [slices, m, n] sums if slices > 1
  const void* weights;  // [D] sums
  const int64_t* key;
  const double* sigma;
  int64_t directions, rows, cols;
  uint32_t counter;
  bool accumulate;
  bool aligned;  // every row of grad may be written as Vector4
};

struct DenseEstimatePlan {
  int64_t slice;   // directions of one slice
  int64_t slices;  // blockIdx.y
};

// Rows of a sign block that one thread sums: 128 registers of sums either way.
template <class T>
constexpr int kSignRows = std::is_same_v<T, double> ? 2 : 4;

// What a block stages for each direction: its part of the Philox rounds, and its weight.
template <class S>
struct alignas(sizeof(S) == 4 ? 16 : 8) StagedDirection {
  PhiloxDirection direction;
  S weight;
};

// Stages directions d0 .. as far as they are below `end`, one a thread. Every thread of the block
// calls it.
template <class S, class Tile>
PT_DEVICE void stage_directions(Tile& tile, const DenseEstimateArgs& a, const PhiloxLaunch& launch,
                                uint32_t first_direction, int64_t d0, int64_t end) {
  __syncthreads();  // the previous tile has been read
  const int64_t d = d0 + threadIdx.x;
  if (d < end) {
    tile[threadIdx.x] =
        StagedDirection<S>{philox_direction(launch, first_direction + static_cast<uint32_t>(d)),
                           static_cast<const S*>(a.weights)[d]};
  }
  __syncthreads();
}

// Writes four sums of one row: into grad, or into this slice's partial sums.
template <class T, class S>
PT_DEVICE void store_estimate(const DenseEstimateArgs& a, bool sliced, S (&sum)[4], int64_t row,
                              int64_t col) {
  const int64_t at = row * a.cols + col;
  const int64_t valid = a.cols - col;
  if (sliced) {
    const int64_t slice_offset = static_cast<int64_t>(blockIdx.y) * a.rows * a.cols;
    store4(static_cast<S*>(a.partial) + slice_offset + at, sum, valid, a.cols % 4 == 0);
    return;
  }
  T* grad = static_cast<T*>(a.grad) + at;
  const S sigma = static_cast<S>(*a.sigma);
  S old[4] = {};
  if (a.accumulate) load4(old, grad, valid, a.aligned);
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k] = fused_multiply_add(sigma, sum[k], old[k]);
  store4(grad, sum, valid, a.aligned);
}

// One thread per normal block (1 row x 4 columns) and slice, looping over directions: the block's
// part of Philox is computed once. Sums run tile by tile, which keeps rounding at that of blocked
// summation. Reads weights, writes grad or partial sums once. Bound: Philox and Box-Muller.
template <bool kExact, class T>
__global__ void __launch_bounds__(kEstimateTile)
    dense_estimate_normal_kernel(DenseEstimateArgs a, DenseEstimatePlan plan) {
  using S = sum_t<T>;
  PT_SHARED(StagedDirection<S>, tile, kEstimateTile);
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch launch = philox_launch(a.counter, noise.generation, noise.key);
  const uint32_t blocks = static_cast<uint32_t>(normal_blocks_per_row(a.cols));
  const uint32_t c1 = blockIdx.x * kEstimateTile + threadIdx.x;  // below 2^32 + kEstimateTile
  const PhiloxBlock block = philox_block(launch, c1);
  const PhiloxSchedule keys = pinned_schedule(noise.key);
  const int64_t begin = blockIdx.y * plan.slice;
  const int64_t end = begin + plan.slice < a.directions ? begin + plan.slice : a.directions;
  S sum[4] = {};
  for (int64_t d0 = begin; d0 < end; d0 += kEstimateTile) {
    stage_directions<S>(tile, a, launch, noise.first_direction, d0, end);
    const int count = static_cast<int>(end - d0 < kEstimateTile ? end - d0 : kEstimateTile);
    S part[4] = {};
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const StagedDirection<S> at = tile[i];
      const NormalBlock e = NormalNoise<kExact>::block(philox_finish(block, at.direction, keys));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        part[k] = fused_multiply_add(at.weight, static_cast<S>(e.z[k]), part[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += part[k];
  }
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kEstimateTile + threadIdx.x;
  if (index >= normal_blocks(a.rows, a.cols)) return;
  store_estimate<T>(a, plan.slices > 1, sum, c1 / blocks, static_cast<int64_t>(c1 % blocks) * 4);
}

// One thread per sign block (4 rows x 32 columns; two threads of 2 rows for double) and slice,
// looping over directions with all its sums in registers: one predicated add per element. As in
// SignNoise::accumulate the sums are of the set bits less half of all weights, every kSignFold
// directions. Bound: issue slots.
constexpr int kSignFold = 32;

template <class T>
__global__ void __launch_bounds__(kSignEstimateTile, std::is_same_v<T, double> ? 2 : 3)
    dense_estimate_sign_kernel(DenseEstimateArgs a, DenseEstimatePlan plan) {
  using S = sum_t<T>;
  constexpr int kRows = kSignRows<T>;
  constexpr int kSplit = kSignBlockRows / kRows;  // threads of one sign block
  PT_SHARED(StagedDirection<S>, tile, kSignEstimateTile);
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch launch = philox_launch(a.counter, noise.generation, noise.key);
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSignEstimateTile + threadIdx.x;
  const uint32_t c1 = static_cast<uint32_t>(index / kSplit);
  const int first_word = static_cast<int>(index % kSplit) * kRows;
  const PhiloxBlock block = philox_block(launch, c1);
  const PhiloxSchedule keys = pinned_schedule(noise.key);
  const int64_t begin = blockIdx.y * plan.slice;
  const int64_t end = begin + plan.slice < a.directions ? begin + plan.slice : a.directions;
  S sum[kRows][kSignBlockCols] = {};
  for (int64_t d0 = begin; d0 < end; d0 += kSignEstimateTile) {
    stage_directions<S>(tile, a, launch, noise.first_direction, d0, end);
    const int count = static_cast<int>(end - d0 < kSignEstimateTile ? end - d0 : kSignEstimateTile);
    for (int i = 0; i < count;) {
      const int fold = i + kSignFold < count ? i + kSignFold : count;
      S total = S(0);
      for (; i < fold; ++i) {
        const StagedDirection<S> at = tile[i];
        const PhiloxWords words = philox_finish(block, at.direction, keys);
        total += at.weight;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t word = kSplit == 1 || first_word == 0 ? words.w[r] : words.w[r + 2];
#pragma unroll
          for (int k = 0; k < kSignBlockCols; ++k) {
            if (word >> k & 1u) sum[r][k] += at.weight;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int k = 0; k < kSignBlockCols; ++k) sum[r][k] -= S(0.5) * total;
      }
    }
  }
  if (index >= sign_blocks(a.rows, a.cols) * kSplit) return;
  const uint32_t blocks = static_cast<uint32_t>(sign_blocks_per_row(a.cols));
  const int64_t row = static_cast<int64_t>(c1 / blocks) * kSignBlockRows + first_word;
  const int64_t col = static_cast<int64_t>(c1 % blocks) * kSignBlockCols;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row + r >= a.rows) break;
#pragma unroll
    for (int k = 0; k < kSignBlockCols; k += 4) {
      S four[4] = {S(2) * sum[r][k], S(2) * sum[r][k + 1], S(2) * sum[r][k + 2],
                   S(2) * sum[r][k + 3]};
      store_estimate<T>(a, plan.slices > 1, four, row + r, col + k);
    }
  }
}

// Adds the slices of one element in their order. One thread per element; bound: bytes of `partial`.
template <class T>
__global__ void __launch_bounds__(kEstimateTile)
    dense_estimate_reduce_kernel(DenseEstimateArgs a, DenseEstimatePlan plan) {
  using S = sum_t<T>;
  const int64_t size = a.rows * a.cols;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kEstimateTile + threadIdx.x;
  if (at >= size) return;
  const S* partial = static_cast<const S*>(a.partial) + at;
  S sum = S(0);
#pragma unroll 4
  for (int64_t slice = 0; slice < plan.slices; ++slice) sum += partial[slice * size];
  T* grad = static_cast<T*>(a.grad) + at;
  const S old = a.accumulate ? static_cast<S>(*grad) : S(0);
  *grad = static_cast<T>(fused_multiply_add(static_cast<S>(*a.sigma), sum, old));
}

// ---- dense_materialise --------------------------------------------------------------------------

constexpr int kMaterialiseThreads = 256;

struct DenseMaterialiseArgs {
  void* noise;  // [count, rows, cols]
  const int64_t* key;
  int64_t first, count, rows, cols;  // directions `first` .. from the key's first one
  uint32_t counter;
  bool aligned;  // every row of noise may be written as Vector4
};

// One thread per normal block and direction. Bound: bytes written (16 a thread for float).
template <bool kExact, class T>
__global__ void __launch_bounds__(kMaterialiseThreads)
    dense_materialise_normal_kernel(DenseMaterialiseArgs a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMaterialiseThreads + threadIdx.x;
  if (index >= normal_blocks(a.rows, a.cols)) return;
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch launch = philox_launch(a.counter, noise.generation, noise.key);
  const uint32_t blocks = static_cast<uint32_t>(normal_blocks_per_row(a.cols));
  const uint32_t c1 = static_cast<uint32_t>(index);
  const PhiloxBlock block = philox_block(launch, c1);
  const int64_t row = c1 / blocks;
  const int64_t col = static_cast<int64_t>(c1 % blocks) * kNormalBlockCols;
  for (int64_t i = blockIdx.y; i < a.count; i += gridDim.y) {
    const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(a.first + i);
    const NormalBlock e =
        NormalNoise<kExact>::block(philox_finish(block, philox_direction(launch, c3), noise.key));
    store4(static_cast<T*>(a.noise) + (i * a.rows + row) * a.cols + col, e.z, a.cols - col,
           a.aligned);
  }
}

// One thread draws a sign block; then the warp writes the blocks of its lanes one after the other,
// a lane per column, so that stores are coalesced. Bound: bytes written.
template <class T>
__global__ void __launch_bounds__(kMaterialiseThreads)
    dense_materialise_sign_kernel(DenseMaterialiseArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMaterialiseThreads + threadIdx.x;
  const int64_t total = sign_blocks(a.rows, a.cols);
  const NoiseKey noise = read_key(a.key);
  const PhiloxLaunch launch = philox_launch(a.counter, noise.generation, noise.key);
  const uint32_t blocks = static_cast<uint32_t>(sign_blocks_per_row(a.cols));
  const PhiloxBlock block = philox_block(launch, static_cast<uint32_t>(index));
  for (int64_t i = blockIdx.y; i < a.count; i += gridDim.y) {
    const uint32_t c3 = noise.first_direction + static_cast<uint32_t>(a.first + i);
    const PhiloxWords words = philox_finish(block, philox_direction(launch, c3), noise.key);
    for (int source = 0; source < kWarpSize; ++source) {
      uint32_t word[kSignBlockRows];
#pragma unroll
      for (int r = 0; r < kSignBlockRows; ++r) {
        word[r] = __shfl_sync(kFullWarp, words.w[r], source);
      }
      const int64_t of = index - lane + source;
      if (of >= total) break;  // the same for the whole warp
      const int64_t row = static_cast<int64_t>(static_cast<uint32_t>(of) / blocks) * kSignBlockRows;
      const int64_t col =
          static_cast<int64_t>(static_cast<uint32_t>(of) % blocks) * kSignBlockCols + lane;
      if (col >= a.cols) continue;
      T* noise_row = static_cast<T*>(a.noise) + (i * a.rows + row) * a.cols + col;
#pragma unroll
      for (int r = 0; r < kSignBlockRows; ++r) {
        if (row + r < a.rows) {
          noise_row[r * a.cols] = static_cast<T>(sign_from_bit(word[r], lane));
        }
      }
    }
  }
}

}  // namespace perturbed
