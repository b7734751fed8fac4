// What the forward passes of the low-rank and sparse families share:
//
//   y[row] += s scale sum_q h[row][q] V_d[q] + s sigma e_d,
//
// with V_d a few rows of noise of length m, e_d the bias noise, and coefficients h that depend on
// x. A task is one direction and up to kRowGroup of its rows of x: it draws V_d and e_d once, as one
// matrix whose last row is e_d, and every row of y is read and written once.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bind/dense.h"
#include "bind/dispatch.h"
#include "cpu/noise_rows.h"

namespace perturbed {

// Rows of x that share one draw. More would only matter to batches of very few directions, which
// could then not be spread over threads.
constexpr int64_t kRowGroup = 128;
// Rows of noise held at once, in floats: 128 KiB, a part of the second-level cache.
constexpr int64_t kHeldNoise = 1 << 15;

// Rows of `stride` floats that are held at once: whole blocks of signs.
inline int64_t held_rows(int64_t rows, int64_t stride) {
  const int64_t fit = kHeldNoise / std::max<int64_t>(stride, 1);
  return std::min(rows, std::max<int64_t>(fit - fit % kSignBlockRows, kSignBlockRows));
}

inline void add_noise_rows(float* y, const float* noise, int64_t stride, const float* coefficients,
                           int64_t count, int64_t n) {
  kernels().add_rows(y, noise, stride, coefficients, count, n);
}
inline void add_noise_rows(double* y, const float* noise, int64_t stride,
                           const double* coefficients, int64_t count, int64_t n) {
  kernels().add_rows_double(y, noise, stride, coefficients, count, n);
}

// Where row i (source * tokens + token) of direction d's rows of x starts.
template <class T>
const T* source_row(const T* x, const DenseLinearSizes& s, int64_t d, int64_t i) {
  const int64_t source = i / s.tokens;
  const int64_t row = s.shared ? source : source * s.directions + d;
  return x + row * s.x_row_stride + i % s.tokens * s.x_token_stride;
}

template <class T>
struct Expansion {
  using A = accumulator_t<T>;
  const DenseLinearSizes& s;
  const TensorNoise& values;  // V: [count, m]
  const TensorNoise* bias;    // e: [1, m], or none
  int64_t count;
  bool rademacher;
  T* y;
  A value_scale, bias_scale;

  // `make` gives each thread a function (d, i, i_end, h) that writes the `count` coefficients of each
  // of the rows [i, i_end) of direction d's rows of x.
  template <class Make>
  void run(const Make& make) const {
    const int64_t rows = s.sources * s.tokens, groups = ceil_div(rows, kRowGroup);
    // About 10 us of work: drawing an element costs as much as some eight of its uses.
    const int64_t work = (count * (s.in + s.out) + s.out) * (std::min(rows, kRowGroup) + 8);
    const int64_t grain = ceil_div<int64_t>(1 << 17, work);
    torch::stable::parallel_for(0, s.directions * groups, grain, [&](int64_t begin, int64_t end) {
      auto coefficients = make();
      Scratch scratch(*this, std::min(rows, kRowGroup));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t d = task / groups, i = task % groups * kRowGroup;
        const int64_t i_end = std::min(i + kRowGroup, rows);
        coefficients(d, i, i_end, scratch.h.data());
        expand(d, i, i_end, scratch);
      }
    });
  }

 private:
  struct Scratch {
    NoiseRows values, bias;
    int64_t held;              // rows of V at once
    std::vector<float> noise;  // those, and e behind the last
    std::vector<A> h;          // [rows of x, count]
    std::vector<A> scaled;     // the coefficients of one row of x
    std::vector<A> deltas;     // perturbations that do not go straight to y

    Scratch(const Expansion& e, int64_t rows)
        : values(e.values, e.s.out, e.rademacher),
          bias(e.bias ? *e.bias : e.values, e.s.out, e.rademacher),
          held(held_rows(e.count, values.stride())),
          noise(values.capacity(held) + bias.capacity(1)),
          h(rows * e.count),
          scaled(held + 1),
          deltas(e.straight(held) ? 0 : (held < e.count ? rows : 1) * e.s.out) {}
  };

  // Whether a row of x belongs to one row of y, of the type that sums are made in.
  bool straight(int64_t held) const {
    return std::is_same_v<T, A> && s.sources == s.repeats && held == count;
  }

  A sign(int64_t repeat) const { return s.antithetic && repeat >= s.repeats / 2 ? A(-1) : A(1); }

  T* y_row(int64_t repeat, int64_t d, int64_t i) const {
    return y + ((repeat * s.directions + d) * s.tokens + i % s.tokens) * s.out;
  }

  void expand(int64_t d, int64_t i_begin, int64_t i_end, Scratch& w) const {
    const int64_t stride = w.values.stride(), m = s.out;
    const bool pieces = w.held < count;
    if (pieces) std::fill(w.deltas.begin(), w.deltas.end(), A(0));
    for (int64_t q = 0; q < count; q += w.held) {
      const int64_t here = std::min(w.held, count - q);
      w.values.draw(d, q, q + here, w.noise.data());
      int64_t rows = here;
      if (bias && q + here == count) {
        w.bias.draw(d, 0, 1, w.noise.data() + here * stride);
        rows += 1;
      }
      for (int64_t i = i_begin; i < i_end; ++i) {
        const A* h = w.h.data() + (i - i_begin) * count + q;
        const bool direct = straight(w.held);
        const A s_b = direct ? sign(i / s.tokens) : A(1);
        for (int64_t k = 0; k < here; ++k) w.scaled[k] = s_b * value_scale * h[k];
        w.scaled[here] = s_b * bias_scale;
        if constexpr (std::is_same_v<T, A>) {
          if (direct) {
            add_noise_rows(y_row(i / s.tokens, d, i), w.noise.data(), stride, w.scaled.data(), rows,
                           m);
            continue;
          }
        }
        A* delta = w.deltas.data() + (pieces ? (i - i_begin) * m : 0);
        if (!pieces) std::fill(delta, delta + m, A(0));
        add_noise_rows(delta, w.noise.data(), stride, w.scaled.data(), rows, m);
        if (!pieces) add_delta(d, i, delta);
      }
    }
    if (!pieces) return;
    for (int64_t i = i_begin; i < i_end; ++i) add_delta(d, i, w.deltas.data() + (i - i_begin) * m);
  }

  // y += s_b delta for all rows of y that read row i of x.
  void add_delta(int64_t d, int64_t i, const A* delta) const {
    for (int64_t r = i / s.tokens; r < s.repeats; r += s.sources) {
      T* out = y_row(r, d, i);
      const A s_b = sign(r);
      for (int64_t o = 0; o < s.out; ++o) {
        out[o] = static_cast<T>(static_cast<A>(out[o]) + s_b * delta[o]);
      }
    }
  }
};

}  // namespace perturbed
