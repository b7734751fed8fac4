// The table of CPU inner loops. csrc/cpu/isa.h implements it once per instruction set; the
// operators (csrc/cpu/dense.cpp) call through `kernels()`, which is chosen at run time from what
// the processor offers. Every implementation draws the same bits; sums may differ in the last place
// between them.
#pragma once

#include <cstdint>

#include "noise/permutation.h"
#include "noise/philox.h"
#include "noise/swarm.h"

namespace perturbed {

// A row of x handed to a dot product is padded with zeros to a multiple of this many elements, and
// a noise buffer has as many readable elements behind its end.
constexpr int64_t kRowPadding = 32;

// Blocks are drawn in batches of this size; buffers of words or normals hold whole batches.
constexpr int64_t kBatchBlocks = 16;

// A sum of +-x is taken as twice the sum over the set bits less the sum of all. To keep that from
// cancelling, half the sum is subtracted every so many columns.
constexpr int64_t kHalfSumColumns = 256;
constexpr int64_t kHalfSumSize = 16;

// Rows of signs that one call of `lookup_rows` serves.
constexpr int64_t kLookupRows = 64;

// Rows of x that one pass of `sign_lookup` serves, and the size of its table.
constexpr int64_t kPanelRows = 32;
constexpr int64_t kSignTableSize = 8 * 16 * kPanelRows;

// Pixels and channels of one panel of a convolution's output; panels of fewer channels have a
// multiple of kConvStep.
constexpr int64_t kConvPixels = 12;
constexpr int64_t kConvChannels = 64;
constexpr int64_t kConvStep = 16;

// `PhiloxBlock`s of one batch in the order that an instruction set likes best.
struct alignas(64) PreparedBatch {
  uint32_t words[kBatchBlocks * 4];
};

// Some columns of a particle and what moves them; the arrays do not overlap, but for best and guide.
template <class T>
struct SwarmRow {
  T* position;
  T* velocity;
  const T* best;
  const T* guide;         // the best of the particle that attracts this one
  const uint32_t* words;  // of noise/uniform.h, mirrored already
  const T* limit;
  const T* lower;  // lower and upper: unread without bounds
  const T* upper;
  SwarmCoefficients<T> coefficients;
};

struct CpuKernels {
  const char* name;

  // Prepares `batches` batches of consecutive blocks starting at `first_block`: in the order of
  // `normals` (prepare_normal) or of `sign_bits` and `normal_dot` (prepare_linear).
  void (*prepare_normal)(const PhiloxLaunch&, uint32_t first_block, int64_t batches,
                         PreparedBatch*);
  void (*prepare_linear)(const PhiloxLaunch&, uint32_t first_block, int64_t batches,
                         PreparedBatch*);

  // One direction's normals of prepared blocks: out[4 * block + column].
  void (*normals)(const PhiloxLaunch&, const PreparedBatch*, int64_t batches, PhiloxDirection,
                  float* out);
  // out[4 * d + r] = sum_i z_i x[d * x_direction_stride + r * x_stride + i] over prepared
  // (prepare_linear) batches of one row of noise, for `count` directions and 1 <= rows <= 4. x is in
  // draw order: column 4 b + j of a batch at 16 j + b.
  void (*normal_dot)(const PhiloxLaunch&, const PreparedBatch*, int64_t batches,
                     const PhiloxDirection*, int64_t count, const float* x,
                     int64_t x_direction_stride, int64_t x_stride, int64_t rows, float* out);
  // One direction's words of prepared blocks: word j of block b at out[j * stride + b]. For signs
  // that is the bit string of row j of a block row.
  void (*sign_bits)(const PhiloxLaunch&, const PreparedBatch*, int64_t batches, PhiloxDirection,
                    int64_t stride, uint32_t* out);

  // out[r] = sum_i e[i] x[r * x_stride + i] over i < n, n a multiple of kRowPadding.
  void (*dot)(const float* e, const float* x, int64_t x_stride, int64_t rows, int64_t n,
              float* out);
  void (*dot_double)(const float* e, const double* x, int64_t x_stride, int64_t rows, int64_t n,
                     double* out);
  // out[4 * r + j] = sum_i (bit i of bit string j ? x : -x)[r * x_stride + i], i < n, a multiple of 32;
  // bit string j is at bits + j * bits_stride. `halves` holds x's half sums, see `half_sums`.
  void (*bit_sum)(const uint32_t* bits, int64_t bits_stride, const float* x, int64_t x_stride,
                  const float* halves, int64_t halves_stride, int64_t rows, int64_t n, float* out);
  void (*bit_sum_double)(const uint32_t* bits, int64_t bits_stride, const double* x,
                         int64_t x_stride, int64_t rows, int64_t n, double* out);
  // The same by lookup over the rows of signs, for kLookupRows of them at once: of the blocks
  // `block + l * per_row + b`, lane l < 16 and b < per_row. `tables` holds the signed sums (`row_tables`,
  // 4 n floats) of one or two rows of x: out[r * kLookupRows + 4 * l + j] = sum_i +-x_r[i].
  void (*row_tables)(const float* x, int64_t n, float* tables);
  void (*lookup_rows)(const PhiloxLaunch&, uint32_t block, int64_t per_row, PhiloxDirection,
                      const float* tables, int64_t rows, float* out);
  // Half the sum of every kHalfSumColumns columns of a row of x, lane by lane: kHalfSumSize each.
  void (*half_sums)(const float* x, int64_t n, float* out);

  // The same product for many rows of x by table lookup (see isa_signs.h). `x` holds 32 columns of a
  // panel: [32][kPanelRows]; `table` gets the signed sums of its groups of four columns.
  void (*sign_table)(const float* x, float* table);
  // sums[r * sums_stride + lane] += sum_i (bit i of bits[r * bits_stride] ? x : -x) of those
  // columns.
  void (*sign_lookup)(const float* table, const uint32_t* bits, int64_t bits_stride, int64_t rows,
                      float* sums, int64_t sums_stride);
  // y[r] += scale * sums[r * kPanelRows], r < rows.
  void (*add_column)(const float* sums, int64_t rows, float scale, float* y);

  // out[4 * block + column] = sum_d w[d] z_d over two prepared batches.
  void (*normal_estimate)(const PhiloxLaunch&, const PreparedBatch*, const PhiloxDirection*,
                          const float* w, int64_t directions, float* out);
  void (*normal_estimate_double)(const PhiloxLaunch&, const PreparedBatch*, const PhiloxDirection*,
                                 const double* w, int64_t directions, double* out);
  // out[128 * block + 32 * row + column] = sum_d +-w[d] over one prepared (prepare_linear) batch.
  // Directions come in groups of four; `tables` are the signed sums of their weights (`row_tables`).
  void (*sign_estimate)(const PhiloxLaunch&, const PreparedBatch*, const PhiloxDirection*,
                        const float* tables, int64_t groups, float* out);
  void (*sign_estimate_double)(const PhiloxLaunch&, const PreparedBatch*, const PhiloxDirection*,
                               const double* w, int64_t directions, double* out);

  // y[i] += (sum_k coefficients[k] noise[k * stride + i]), k < count, i < n.
  void (*add_rows)(float* y, const float* noise, int64_t stride, const float* coefficients,
                   int64_t count, int64_t n);
  void (*add_rows_double)(double* y, const float* noise, int64_t stride, const double* coefficients,
                          int64_t count, int64_t n);
  // Entries first .. first + count - 1 of a permutation.
  void (*permutation)(const PermutationShape&, const PermutationKey&, uint32_t first, int64_t count,
                      uint32_t* out);
  // out[i] = +-x[i], i < n: + for a set bit i of the bit string, the opposite if `negate`. May work
  // in place. `half` takes the words of half or bfloat16.
  void (*flip_signs)(const uint32_t* bits, bool negate, const float* x, int64_t n, float* out);
  void (*flip_signs_half)(const uint32_t* bits, bool negate, const uint16_t* x, int64_t n,
                          uint16_t* out);
  void (*flip_signs_double)(const uint32_t* bits, bool negate, const double* x, int64_t n,
                            double* out);

  // One direction's words of prepared (prepare_normal) blocks, XOR flips: out[4 * block + column].
  void (*element_words)(const PhiloxLaunch&, const PreparedBatch*, int64_t batches, PhiloxDirection,
                        uint32_t flips, uint32_t* out);
  // swarm_step of n elements.
  void (*swarm_move)(const SwarmRow<float>&, int64_t n, SwarmBounds);
  void (*swarm_move_double)(const SwarmRow<double>&, int64_t n, SwarmBounds);

  // panel[p * kConvChannels + o] = bias[o] + sum_t x[pixels[p] + taps[t]] kernel[t * width + o], the
  // sum in the order of t, for t < count, p < kConvPixels, o < width.
  void (*conv_panel)(const float* x, const int64_t* pixels, const int64_t* taps, int64_t count,
                     const float* kernel, int64_t width, const float* bias, float* panel);
  // out[o * kConvPixels + p] = panel[p * kConvChannels + o], o < width.
  void (*conv_transpose)(const float* panel, int64_t width, float* out);
};

extern const CpuKernels kPortableKernels;
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;

const CpuKernels& kernels();

// "portable", "avx2" or "avx512". Setting one that this processor lacks returns false.
bool cpu_supports(const char* name);
bool set_cpu_capability(const char* name);

}  // namespace perturbed
