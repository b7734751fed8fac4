// What the low-rank and sparse forwards have in common. Both add, to every row of y,
//
//   s_b sigma (scale sum_q F_d[q, :] t[q] + e_d),     F_d: [rank, m], a noise matrix
//
// and differ in the products t: B_d x for low rank, elements of x for sparse noise. A group of 32 to
// 256 threads works on one direction: it puts t into shared memory (`fill`, the kernel's own), and
// then every thread draws quads of F_d and uses them for all sources of the pass.
//
// A "source" is one vector x of a direction: (repeat or shared row, token), as in dense_kernels.cuh.
#pragma once

#include "cuda/quads.cuh"

namespace perturbed {

constexpr int kExpandThreads = 256;
constexpr int kExpandWarps = kExpandThreads / kWarpSize;
constexpr int kExpandTile = 512;  // rows of F whose products a block holds at a time, per source
constexpr int kFactorRows = 4;    // rows of F drawn together

// Most sources that share one draw. Four make reading x and y cost more than drawing.
template <class T>
constexpr int kExpandSources = std::is_same_v<T, double> ? 2 : 4;

struct ExpandArgs {
  void* y;              // [R, D, T, m]
  const void* x;        // see x_*_stride
  const int64_t* key;   // [3]
  const double* sigma;  // []
  int64_t directions, repeats, tokens, out, in;
  int64_t sources;  // rows of x per direction; row r of y reads source r % sources
  int64_t x_source_stride, x_direction_stride, x_token_stride;  // in elements
  int64_t rank;                                                 // rows of F
  double scale;
  uint32_t factor_counter, bias_counter;  // c0
  bool bias, antithetic;
  bool x_aligned, y_aligned;  // every row may be read as Vector4
};

struct ExpandPlan {
  int group_log2;        // threads that share a direction, 2^5 .. 2^8
  int sources_per_pass;  // 1, 2 or 4
};

// What a group needs to fill in its products.
template <int kSources, class T>
struct ExpandPlace {
  const T* x[kSources];
  uint32_t c3;        // direction
  int group, thread;  // group of the block, thread of the group
  int threads;        // of the group
  int base;           // its first element of the products in shared memory
};

PT_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The vectors of sources q0 .. of direction d. The last pass may have fewer sources: it repeats the
// last one and drops the result.
template <int kSources, class T>
PT_DEVICE void find_sources(const T* (&x)[kSources], const ExpandArgs& a, int64_t d, int64_t q0) {
#pragma unroll
  for (int j = 0; j < kSources; ++j) {
    const int64_t q = smaller(q0 + j, a.sources * a.tokens - 1);
    const int64_t source = a.tokens == 1 ? q : q / a.tokens;
    x[j] = static_cast<const T*>(a.x) + source * a.x_source_stride + d * a.x_direction_stride +
           (q - source * a.tokens) * a.x_token_stride;
  }
}

// Adds +-step to four outputs from `row` on, in every repeat that reads source q0 + j. All sources
// are loaded before the first store, which the compiler could not move them past.
template <int kSources, class T, class S>
PT_DEVICE void add_steps(const ExpandArgs& a, int64_t d, int64_t q0, int64_t row,
                         const S (&step)[kSources][4]) {
  const int64_t valid = a.out - row;
  const int64_t repeat_size = a.directions * a.tokens * a.out;
  const int64_t half = a.repeats / 2 * repeat_size;  // where negative repeats begin
  int64_t at[kSources];
#pragma unroll
  for (int j = 0; j < kSources; ++j) {
    const int64_t q = q0 + j;
    const int64_t source = a.tokens == 1 ? q : q / a.tokens;
    const int64_t token = q - source * a.tokens;
    at[j] = source * repeat_size + (d * a.tokens + token) * a.out + row;
  }
  for (int64_t repeat = 0; repeat < a.repeats; repeat += a.sources) {
    S value[kSources][4];
#pragma unroll
    for (int j = 0; j < kSources; ++j) {
      if (q0 + j >= a.sources * a.tokens) continue;
      load4(value[j], static_cast<const T*>(a.y) + at[j], valid, a.y_aligned);
    }
#pragma unroll
    for (int j = 0; j < kSources; ++j) {
      if (q0 + j >= a.sources * a.tokens) continue;
      const bool negative = a.antithetic && at[j] >= half;
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] += negative ? -step[j][i] : step[j][i];
      store4(static_cast<T*>(a.y) + at[j], value[j], valid, a.y_aligned);
      at[j] += a.sources * repeat_size;
    }
  }
}

// The body of both kernels. `products`: shared, kExpandTile * kSources sums. Every thread of the
// block calls fill(place, first, count), which must leave products[place.base + q * kSources + j] =
// t[first + q] of source j for q < count, with a barrier before its first write there and one after
// its last. It may write up to the next multiple of kFactorRows rows.
template <class Noise, int kSources, class T, class Products, class Fill>
PT_DEVICE void expand(const ExpandArgs& a, const ExpandPlan& plan, const NoiseKey& noise,
                      const PhiloxSchedule& keys, Products& products, Fill&& fill) {
  using S = sum_t<T>;
  const NoiseMatrix factor = Noise::matrix(a.factor_counter, noise, a.out);
  const S sigma = static_cast<S>(*a.sigma);
  const S scale = static_cast<S>(a.scale);
  ExpandPlace<kSources, T> place;
  place.threads = 1 << plan.group_log2;
  place.thread = static_cast<int>(threadIdx.x) & (place.threads - 1);
  place.group = static_cast<int>(threadIdx.x) >> plan.group_log2;
  const int groups = kExpandThreads >> plan.group_log2;
  const int tile = kExpandTile / groups;
  place.base = place.group * tile * kSources;

  const int64_t own = static_cast<int64_t>(blockIdx.x) * groups + place.group;
  // A group past the last direction works along with the others, for their barriers.
  const bool live = own < a.directions;
  const int64_t d = smaller(own, a.directions - 1);
  place.c3 = noise.first_direction + static_cast<uint32_t>(d);
  const PhiloxDirection direction = philox_direction(factor.launch, place.c3);
  const int64_t chunk_rows = int64_t{4} * place.threads;

  for (int64_t q0 = static_cast<int64_t>(blockIdx.z) * kSources; q0 < a.sources * a.tokens;
       q0 += static_cast<int64_t>(gridDim.z) * kSources) {
    find_sources(place.x, a, d, q0);
    for (int64_t start = blockIdx.y * chunk_rows; start < a.out; start += gridDim.y * chunk_rows) {
      const int64_t row = start + int64_t{4} * place.thread;
      const uint32_t quad = static_cast<uint32_t>(row / 4);
      const bool used = live && row < a.out;
      S step[kSources][4] = {};
      for (int64_t first = 0; first < a.rank; first += tile) {
        const int count = static_cast<int>(smaller(a.rank - first, tile));
        // Products that fit are made once; more are made again for every chunk of outputs.
        if (a.rank > tile || start == blockIdx.y * chunk_rows) fill(place, first, count);
        if (!used) continue;
        for (int q = 0; q < count; q += kFactorRows) {
          Noise::template rows<kFactorRows>(
              factor, keys, direction, static_cast<uint32_t>(first + q), count - q, quad,
              [&](int k, const float (&e)[4]) {
#pragma unroll
                for (int j = 0; j < kSources; ++j) {
                  const S t = products[place.base + (q + k) * kSources + j];
#pragma unroll
                  for (int i = 0; i < 4; ++i) {
                    step[j][i] = fused_multiply_add(static_cast<S>(e[i]), t, step[j][i]);
                  }
                }
              });
        }
      }
      if (!used) continue;
      float bias[4] = {};
      if (a.bias) {
        const NoiseMatrix vector = Noise::matrix(a.bias_counter, noise, a.out);
        const PhiloxDirection at = philox_direction(vector.launch, place.c3);
        Noise::template rows<1>(vector, keys, at, 0, 1, quad, [&](int, const float (&e)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) bias[i] = e[i];
        });
      }
#pragma unroll
      for (int j = 0; j < kSources; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          step[j][i] = sigma * fused_multiply_add(scale, step[j][i], static_cast<S>(bias[i]));
        }
      }
      add_steps<kSources, T>(a, d, q0, row, step);
    }
  }
}

// ---- geometry -----------------------------------------------------------------------------------

// Groups as large as the longer side that they walk along, `walked` elements. Neither the number of
// directions nor that of sources enters, so a shard has the bits of the whole, and a shared row
// those of the row written out.
template <class T>
ExpandPlan plan_expand(const ExpandArgs& a, int64_t walked) {
  const int64_t quads = ceil_div<int64_t>(a.out > walked ? a.out : walked, 4);
  ExpandPlan plan;
  plan.group_log2 = 5;
  while (1 << plan.group_log2 < power_of_two_at_least(quads, kExpandThreads)) ++plan.group_log2;
  plan.sources_per_pass = power_of_two_at_least(a.sources * a.tokens, kExpandSources<T>);
  return plan;
}

// Outputs are cut among blocks, each of which makes the products anew, only where directions and
// passes alone are fewer blocks than a large card runs at a time (two for each SM of an H200). The
// bits do not depend on it.
inline GridShape expand_grid(const ExpandArgs& a, const ExpandPlan& plan) {
  const int64_t blocks = ceil_div<int64_t>(a.directions, kExpandThreads >> plan.group_log2);
  const int64_t passes = ceil_div<int64_t>(a.sources * a.tokens, plan.sources_per_pass);
  const int64_t chunks = ceil_div<int64_t>(a.out, int64_t{4} << plan.group_log2);
  const int64_t wanted = ceil_div<int64_t>(2 * 132, blocks * passes);
  return grid_shape(blocks, wanted < chunks ? wanted : chunks, passes);
}

}  // namespace perturbed
