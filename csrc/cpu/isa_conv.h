// The CPU inner loop of convolutions with kernels of their own. Part of isa.h.
#pragma once

#include "cpu/lanes.h"

namespace perturbed::PERTURBED_ISA {

// Sums of P pixels and V vectors of channels stay in registers: an element of x, broadcast, serves V
// of them, a vector of the kernel P.
template <int P, int V>
static void conv_sums(const float* x, const int64_t* pixels, const int64_t* taps, int64_t count,
                      const float* kernel, int64_t width, const float* bias, float* out) {
  for (int first = 0; first < kConvPixels; first += P, out += P * kConvChannels) {
    F sum[P][V];
    const float* at[P];
    PT_UNROLL for (int p = 0; p < P; ++p) {
      at[p] = x + pixels[first + p];
      PT_UNROLL for (int v = 0; v < V; ++v) sum[p][v] = Simd::load(bias + v * kLanes);
    }
    const float* k = kernel;
    for (int64_t t = 0; t < count; ++t, k += width) {
      const int64_t tap = taps[t];
      F weights[V];
      PT_UNROLL for (int v = 0; v < V; ++v) weights[v] = Simd::load(k + v * kLanes);
      PT_UNROLL for (int p = 0; p < P; ++p) {
        const F value = Simd::set1(at[p][tap]);
        PT_UNROLL for (int v = 0; v < V; ++v) sum[p][v] = Simd::fma(value, weights[v], sum[p][v]);
      }
    }
    PT_UNROLL for (int p = 0; p < P; ++p) {
      PT_UNROLL for (int v = 0; v < V; ++v) {
        Simd::store(out + p * kConvChannels + v * kLanes, sum[p][v]);
      }
    }
  }
}

static void conv_panel(const float* x, const int64_t* pixels, const int64_t* taps, int64_t count,
                       const float* kernel, int64_t width, const float* bias, float* panel) {
  // The largest blocks that 32 (AVX-512) or 16 registers hold, for the channels that are left.
  for (int64_t o = 0; o < width;) {
    const int64_t left = (width - o) / kLanes;
    const auto sums = [&](auto function, int vectors) {
      function(x, pixels, taps, count, kernel + o, width, bias + o, panel + o);
      o += vectors * kLanes;
    };
    if constexpr (kLanes == 16) {
      if (left >= 4) {
        sums(conv_sums<6, 4>, 4);
      } else if (left == 3) {
        sums(conv_sums<6, 3>, 3);
      } else if (left == 2) {
        sums(conv_sums<12, 2>, 2);
      } else {
        sums(conv_sums<12, 1>, 1);
      }
    } else if constexpr (kLanes == 8) {
      sums(conv_sums<6, 2>, 2);  // widths are multiples of two vectors
    } else {
      sums(conv_sums<4, 1>, 1);
    }
  }
}

// The panel's transpose, four pixels and 4 kLanes / 4 channels at a time.
static void conv_transpose(const float* panel, int64_t width, float* out) {
  for (int p = 0; p < kConvPixels; p += 4) {
    for (int64_t o = 0; o < width; o += kLanes) {
      F z[4];
      PT_UNROLL for (int j = 0; j < 4; ++j) {
        z[j] = Simd::load(panel + (p + j) * kConvChannels + o);
      }
      Simd::interleave(z);
      PT_UNROLL for (int k = 0; k < 4; ++k) {
        float quads[kLanes];  // of channels o + k, o + 4 + k, ..
        Simd::store(quads, z[k]);
        PT_UNROLL for (int l = 0; l < kLanes / 4; ++l) {
          std::memcpy(out + (o + 4 * l + k) * kConvPixels + p, quads + 4 * l, 4 * sizeof(float));
        }
      }
    }
  }
}

}  // namespace perturbed::PERTURBED_ISA
