// Low-rank family on the CPU: y += s sigma (A_d^T B_d x / sqrt(rank) + e_d).
//
// Two steps per direction, both on noise in the cache: h = B_d x by dot products, then the rows of
// A_d and e_d are added to y with h as coefficients (cpu/expansion.h). Limit: drawing rank (n + m) + m
// elements per direction, then one pass over x and y. The estimate is a matrix product of
// materialised factors, from Python.
#include "bind/low_rank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "bind/dispatch.h"
#include "cpu/expansion.h"

namespace perturbed {

namespace {

// h = B_d x for the rows of x of one direction; one per thread.
template <class T>
class Projection {
 public:
  using A = accumulator_t<T>;

  Projection(const LowRankLinearSizes& s, const TensorNoise& noise, const T* x, bool rademacher)
      : s_(s),
        x_(x),
        rows_(noise, s.in, rademacher),
        width_(round_up(s.in, kRowPadding)),
        held_(held_rows(s.rank, rows_.stride())),
        noise_(rows_.capacity(held_) + kRowPadding),
        packed_(in_place() ? 0 : kPacked * width_) {}

  void operator()(int64_t d, int64_t i_begin, int64_t i_end, A* h) {
    for (int64_t q = 0; q < s_.rank; q += held_) {
      const int64_t count = std::min(held_, s_.rank - q);
      rows_.draw(d, q, q + count, noise_.data());
      for (int64_t i = i_begin; i < i_end;) {
        int64_t stride;
        int64_t run = i_end - i;
        const A* x = rows(d, i, run, stride);
        multiply(x, stride, run, count, h + (i - i_begin) * s_.rank + q);
        i += run;
      }
    }
  }

 private:
  static constexpr int64_t kPacked = 4;  // rows that the dot products take at once

  // Dot products read whole vectors, so that other rows are copied first and padded with zeros.
  bool in_place() const { return std::is_same_v<T, A> && s_.in == width_; }

  // Up to `run` rows of x from row i on; says how many, and how far apart.
  const A* rows(int64_t d, int64_t i, int64_t& run, int64_t& stride) {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place()) {
        const bool tokens = s_.tokens > 1;
        stride = tokens ? s_.x_token_stride : s_.x_row_stride * (s_.shared ? 1 : s_.directions);
        if (tokens) run = std::min(run, s_.tokens - i % s_.tokens);
        return source_row(x_, s_, d, i);
      }
    }
    run = std::min(run, kPacked);
    stride = width_;
    for (int64_t r = 0; r < run; ++r) {
      const T* from = source_row(x_, s_, d, i + r);
      A* to = packed_.data() + r * width_;
      for (int64_t k = 0; k < s_.in; ++k) to[k] = static_cast<A>(from[k]);
    }
    return packed_.data();
  }

  // h[r * rank + q] = B[q] . x[r] for the first `count` rows of B in the buffer.
  void multiply(const A* x, int64_t stride, int64_t rows, int64_t count, A* h) {
    const CpuKernels& k = kernels();
    const int64_t b_stride = rows_.stride();
    if constexpr (std::is_same_v<A, float>) {
      // One row of x: its loads are shared by the rows of B. The sums are the same bits either way.
      if (rows == 1) return k.dot(x, noise_.data(), b_stride, count, width_, h);
    }
    A products[kRowGroup];
    for (int64_t q = 0; q < count; ++q) {
      const float* b = noise_.data() + q * b_stride;
      if constexpr (std::is_same_v<A, double>) {
        k.dot_double(b, x, stride, rows, width_, products);
      } else {
        k.dot(b, x, stride, rows, width_, products);
      }
      for (int64_t r = 0; r < rows; ++r) h[r * s_.rank + q] = products[r];
    }
  }

  const LowRankLinearSizes& s_;
  const T* x_;
  NoiseRows rows_;
  int64_t width_;  // padded length of a row of x
  int64_t held_;   // rows of B at once
  std::vector<float> noise_;
  std::vector<A> packed_;
};

void low_rank_linear_cpu_(Tensor y, const Tensor x, const Tensor key, const Tensor sigma,
                          int64_t a_stream, int64_t b_stream, int64_t bias_stream,
                          int64_t directions, int64_t rank, bool antithetic, bool rademacher) {
  const char* op = "low_rank_linear_";
  const LowRankLinearSizes s =
      check_low_rank_linear(op, y, x, key, sigma, a_stream, b_stream, bias_stream, directions, rank,
                            antithetic, rademacher);
  if (y.numel() == 0) return;
  dispatch_float(y.scalar_type(), op, "y", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulator_t<T>;
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const double scale = *sigma.const_data_ptr<double>();
    const TensorNoise a(key, a_stream, 0, directions);
    const TensorNoise b(key, b_stream, 0, s.projected ? 0 : directions);
    const TensorNoise bias(key, bias_stream, 0, bias_stream < 0 ? 0 : directions);
    const Expansion<T> expansion{s,
                                 a,
                                 bias_stream < 0 ? nullptr : &bias,
                                 rank,
                                 rademacher,
                                 static_cast<T*>(y.mutable_data_ptr()),
                                 static_cast<A>(scale / std::sqrt(static_cast<double>(rank))),
                                 static_cast<A>(scale)};
    if (s.projected) {
      expansion.run([&] {
        return [&](int64_t d, int64_t i, int64_t i_end, A* h) {
          for (; i < i_end; ++i) {
            const T* products = source_row(in, s, d, i);
            for (int64_t q = 0; q < rank; ++q) *h++ = static_cast<A>(products[q]);
          }
        };
      });
    } else {
      expansion.run([&] { return Projection<T>(s, b, in, rademacher); });
    }
  });
}

Tensor low_rank_linear_cpu(const Tensor y, const Tensor x, const Tensor key, const Tensor sigma,
                           int64_t a_stream, int64_t b_stream, int64_t bias_stream,
                           int64_t directions, int64_t rank, bool antithetic, bool rademacher) {
  Tensor out = torch::stable::clone(y);
  low_rank_linear_cpu_(out, x, key, sigma, a_stream, b_stream, bias_stream, directions, rank,
                       antithetic, rademacher);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("low_rank_linear_", TORCH_BOX(&low_rank_linear_cpu_));
  m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear_cpu));
}

}  // namespace perturbed
