// Particle swarms on the CPU: one step of all particles in one pass over memory, and uniform numbers.
//
// A step has two phases, because a particle may follow any other's best: all bests are kept before
// the first move. Both go block by block of columns, a few particles at a time; random words are
// drawn row by row into a buffer in the cache. Every element is computed by itself, so results
// depend neither on the cutting nor on threads. Limit: memory, five numbers per element
// (docs/kernels.md).
#include "bind/swarm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/tensor_noise.h"

namespace perturbed {

namespace {

using torch::stable::parallel_for;

// Columns of a block: long enough that memory streams, which matters more than what stays in the
// cache (docs/kernels.md).
constexpr int64_t kBlockCols = 4096;
constexpr int64_t kBatchCols = kBatchBlocks * kWordBlockCols;
// Elements of a task: worth handing to a thread, and enough rows to share what a block prepares.
constexpr int64_t kTaskElements = 1 << 15;

// Words of the columns of one block, for one particle after the other.
class BlockWords {
 public:
  BlockWords(const TensorNoise& noise, int64_t col, int64_t cols)
      : noise_(noise), batches_(ceil_div(cols, kBatchCols)) {
    kernels().prepare_normal(noise.launch, static_cast<uint32_t>(col / kWordBlockCols), batches_,
                             prepared_);
  }

  void draw(int64_t direction, uint32_t flips, uint32_t* out) const {
    kernels().element_words(noise_.launch, prepared_, batches_, noise_.directions[direction], flips,
                            out);
  }

 private:
  const TensorNoise& noise_;
  int64_t batches_;
  PreparedBatch prepared_[kBlockCols / kBatchCols];
};

// ---- step --------------------------------------------------------------------------------------

// A limit as one number per column: one of all columns, spread over a block, or those of the block.
template <class T>
class BlockLimit {
 public:
  BlockLimit(T value, int64_t cols) : spread_(std::min(cols, kBlockCols), value) {}
  explicit BlockLimit(const T* values) : values_(values) {}
  const T* at(int64_t col) const { return values_ ? values_ + col : spread_.data(); }

 private:
  const T* values_ = nullptr;
  std::vector<T> spread_;
};

template <class T>
struct SwarmMove {
  SwarmSizes s;
  T *position, *velocity, *best;
  const bool* improved;
  const int64_t* guide;
  const TensorNoise&
      noise;  // of the P or, antithetic, P / 2 particles that have words of their own
  const BlockLimit<T>&limit, &lower, &upper;
  SwarmCoefficients<T> coefficients;
  bool per_dimension;

  void run() const {
    for_tiles(
        [&](int64_t p, int64_t p_end, int64_t col, int64_t cols) { keep(p, p_end, col, cols); });
    for_tiles(
        [&](int64_t p, int64_t p_end, int64_t col, int64_t cols) { move(p, p_end, col, cols); });
  }

 private:
  // Runs work(first particle, last, first column, columns) for all tiles, those of one block of
  // columns after the other: a best that many follow is then read from memory once.
  template <class Work>
  void for_tiles(Work work) const {
    const int64_t block = std::min(kBlockCols, s.cols);
    const int64_t rows = std::max<int64_t>(1, kTaskElements / block);
    const int64_t down = ceil_div(s.particles, rows), across = ceil_div(s.cols, block);
    parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t p = i % down * rows, col = i / down * block;
        work(p, std::min(p + rows, s.particles), col, std::min(block, s.cols - col));
      }
    });
  }

  void keep(int64_t p, int64_t p_end, int64_t col, int64_t cols) const {
    for (; p < p_end; ++p) {
      const int64_t at = p * s.cols + col;
      if (improved[p]) std::memcpy(best + at, position + at, static_cast<size_t>(cols) * sizeof(T));
    }
  }

  void move(int64_t p, int64_t p_end, int64_t col, int64_t cols) const {
    const CpuKernels& k = kernels();
    // Without a pair per dimension, one block's first word serves the row.
    const BlockWords block(noise, per_dimension ? col : 0, per_dimension ? cols : 1);
    uint32_t words[kBlockCols];
    const auto own = static_cast<int64_t>(noise.directions.size());
    for (; p < p_end; ++p) {
      // The complement of a word makes 1 - r of its pair.
      block.draw(p % own, p < own ? 0 : ~uint32_t{0}, words);
      if (!per_dimension) std::fill_n(words + 1, cols - 1, words[0]);
      const int64_t at = p * s.cols + col;
      const SwarmRow<T> row{
          position + at, velocity + at, best + at,     best + guide[p] * s.cols + col,
          words,         limit.at(col), lower.at(col), upper.at(col),
          coefficients};
      if constexpr (std::is_same_v<T, double>) {
        k.swarm_move_double(row, cols, s.bounds);
      } else {
        k.swarm_move(row, cols, s.bounds);
      }
    }
  }
};

template <class T>
BlockLimit<T> block_limit(const Tensor& values, int64_t cols) {
  const T* data = static_cast<const T*>(values.const_data_ptr());
  return values.numel() == 1 ? BlockLimit<T>(*data, cols) : BlockLimit<T>(data);
}

// A wall that is not there is at `infinity`.
template <class T>
BlockLimit<T> block_limit(const std::optional<Tensor>& values, int64_t cols, double infinity) {
  return values ? block_limit<T>(*values, cols) : BlockLimit<T>(static_cast<T>(infinity), cols);
}

void swarm_move_cpu_(Tensor position, Tensor velocity, Tensor best, const Tensor improved,
                     const Tensor guide, const Tensor key, const Tensor coefficients,
                     const Tensor limit, const std::optional<Tensor> lower,
                     const std::optional<Tensor> upper, int64_t stream, bool per_dimension,
                     bool antithetic, int64_t bounds) {
  const char* op = "swarm_move_";
  const SwarmSizes s =
      check_swarm_move(op, position, velocity, best, improved, guide, key, coefficients, limit,
                       lower, upper, stream, antithetic, bounds);
  const auto* guides = static_cast<const int64_t*>(guide.const_data_ptr());
  for (int64_t p = 0; p < s.particles; ++p) {
    PT_CHECK(guides[p] >= 0 && guides[p] < s.particles, op, "guide must be between 0 and ",
             s.particles - 1, ", got ", guides[p]);
  }
  dispatch_wide(position.scalar_type(), op, "position", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (position.numel() == 0) return;
    const TensorNoise noise(key, stream, 0, antithetic ? s.particles / 2 : s.particles);
    const auto* c = static_cast<const double*>(coefficients.const_data_ptr());
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    SwarmMove<T>{s,
                 static_cast<T*>(position.mutable_data_ptr()),
                 static_cast<T*>(velocity.mutable_data_ptr()),
                 static_cast<T*>(best.mutable_data_ptr()),
                 static_cast<const bool*>(improved.const_data_ptr()),
                 guides,
                 noise,
                 block_limit<T>(limit, s.cols),
                 block_limit<T>(lower, s.cols, -kInfinity),
                 block_limit<T>(upper, s.cols, kInfinity),
                 {static_cast<T>(c[0]), static_cast<T>(c[1]), static_cast<T>(c[2])},
                 per_dimension}
        .run();
  });
}

// ---- uniform numbers ---------------------------------------------------------------------------

template <class T>
void draw_uniforms(T* out, int64_t count, int64_t cols, const TensorNoise& noise) {
  const int64_t blocks = ceil_div(cols, kBlockCols);
  const int64_t grain = ceil_div(kTaskElements, std::min(cols, kBlockCols));
  parallel_for(0, count * blocks, grain, [&](int64_t begin, int64_t end) {
    uint32_t words[kBlockCols];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t d = task / blocks, col = task % blocks * kBlockCols;
      const int64_t here = std::min(kBlockCols, cols - col);
      BlockWords(noise, col, here).draw(d, 0, words);
      T* to = out + d * cols + col;
      for (int64_t i = 0; i < here; ++i) to[i] = static_cast<T>(uniform_from_word(words[i]));
    }
  });
}

Tensor uniforms_cpu(const Tensor key, int64_t stream, int64_t first, int64_t count, int64_t cols,
                    ScalarType dtype) {
  const char* op = "uniforms";
  check_uniforms(op, key, stream, first, count, cols);
  return dispatch_wide(dtype, op, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tensor out = torch::stable::new_empty(key, {count, cols}, dtype);
    if (out.numel() == 0) return out;
    draw_uniforms(static_cast<T*>(out.mutable_data_ptr()), count, cols,
                  TensorNoise(key, stream, first, count));
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("swarm_move_", TORCH_BOX(&swarm_move_cpu_));
  m.impl("uniforms", TORCH_BOX(&uniforms_cpu));
}

}  // namespace perturbed
