// Convolutions with kernels of every direction's own on the CPU.
//
// Direct: outputs of 12 pixels and up to 64 channels are summed in registers over all taps, one after the
// other. A tap of a pixel is two offsets into x added up, so that x can lie in any way and no
// windows are copied; pixels of all repeats follow each other, so that small images fill panels.
// Each output is summed by one thread in the order of channel, row and column of the kernel: results
// depend neither on threads, nor on the batch, nor on the layout of x and y. Limit: multiply-adds.
#include "bind/conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "noise/counters.h"

namespace perturbed {

namespace {

// Multiplications of a task, about: enough that packing a kernel again costs little.
constexpr int64_t kTaskProducts = 1 << 20;
// Multiplications below which a second thread does not pay.
constexpr int64_t kThreadProducts = 1 << 17;

// Offsets of the taps of a pixel into x, in the order of the kernel.
std::vector<int64_t> tap_offsets(const ConvSizes& s) {
  std::vector<int64_t> taps;
  taps.reserve(s.taps());
  for (int64_t c = 0; c < s.in; ++c) {
    for (int64_t i = 0; i < s.kernel_height; ++i) {
      for (int64_t j = 0; j < s.kernel_width; ++j) {
        taps.push_back(c * s.x_strides[2] + i * s.dilation_height * s.x_strides[3] +
                       j * s.dilation_width * s.x_strides[4]);
      }
    }
  }
  return taps;
}

int64_t panel_width(int64_t channels) {
  return std::min(kConvChannels, ceil_div(channels, kConvStep) * kConvStep);
}

// A direction's kernel, channels innermost: [blocks of kConvChannels][taps][panel_width].
void pack_kernel(const float* kernel, int64_t out, int64_t taps, float* packed) {
  constexpr int64_t kLine = 16;  // floats of a cache line, read and left once
  for (int64_t first = 0; first < out; first += kConvChannels) {
    const int64_t here = std::min(kConvChannels, out - first), width = panel_width(here);
    const float* rows = kernel + first * taps;
    for (int64_t t = 0; t < taps; t += kLine) {
      const int64_t end = std::min(t + kLine, taps);
      for (int64_t o = 0; o < here; ++o) {
        for (int64_t i = t; i < end; ++i) packed[i * width + o] = rows[o * taps + i];
      }
    }
    packed += taps * width;
  }
}

// Twelve pixels that follow each other: where they are in x and in y (their first channel).
struct Panel {
  int64_t in[kConvPixels], out[kConvPixels];
  int64_t count;

  // Beyond the last pixel it is repeated.
  Panel(const ConvSizes& s, int64_t first, int64_t last) : count(last - first) {
    int64_t w = first % s.width, rest = first / s.width;
    int64_t h = rest % s.height, r = rest / s.height;
    const int64_t step = s.channels_last ? s.out : 1;
    for (int64_t p = 0; p < kConvPixels; ++p) {
      in[p] = r * s.x_strides[0] + h * s.stride_height * s.x_strides[3] +
              w * s.stride_width * s.x_strides[4];
      out[p] = r * s.y_strides[0] + (h * s.width + w) * step;
      if (p + 1 >= count) continue;
      if (++w == s.width) {
        w = 0;
        if (++h == s.height) h = 0, ++r;
      }
    }
  }
};

// Writes `channels` channels of a panel to y, beginning at its first of them.
void store_panel(const ConvSizes& s, const CpuKernels& k, const Panel& at, const float* panel,
                 int64_t channels, float* y) {
  if (s.channels_last) {
    for (int64_t p = 0; p < at.count; ++p) {
      const float* from = panel + p * kConvChannels;
      int64_t o = 0;  // whole steps are copies of constant size, which need no call
      for (; o + kConvStep <= channels; o += kConvStep) {
        std::memcpy(y + at.out[p] + o, from + o, kConvStep * sizeof(float));
      }
      std::memcpy(y + at.out[p] + o, from + o, (channels - o) * sizeof(float));
    }
    return;
  }
  float planes[kConvChannels * kConvPixels];
  k.conv_transpose(panel, panel_width(channels), planes);
  const int64_t plane = s.height * s.width;
  for (int64_t p = 0, end; p < at.count; p = end) {  // runs of pixels of one image
    for (end = p + 1; end < at.count && at.out[end] == at.out[end - 1] + 1;) ++end;
    for (int64_t o = 0; o < channels; ++o) {
      std::memcpy(y + at.out[p] + o * plane, planes + o * kConvPixels + p,
                  (end - p) * sizeof(float));
    }
  }
}

void conv_members_cpu_(Tensor y, const Tensor x, const Tensor kernels_of,
                       const std::optional<Tensor> bias, int64_t stride_height,
                       int64_t stride_width, int64_t dilation_height, int64_t dilation_width) {
  const char* op = "conv_members_";
  const ConvSizes s = check_conv_members(op, y, x, kernels_of, bias, stride_height, stride_width,
                                         dilation_height, dilation_width);
  if (y.numel() == 0) return;
  float* to = y.mutable_data_ptr<float>();
  const float* from = x.const_data_ptr<float>();
  const float* kernel = kernels_of.const_data_ptr<float>();
  const float* offsets = bias ? bias->const_data_ptr<float>() : nullptr;
  const CpuKernels& k = kernels();
  const std::vector<int64_t> taps = tap_offsets(s);
  const int64_t count = s.taps(), products = s.pixels() * std::max<int64_t>(1, count) * s.out;
  const int64_t chunks =
      std::clamp<int64_t>(products / kTaskProducts, 1, ceil_div(s.pixels(), kConvPixels));
  const int64_t chunk = ceil_div(ceil_div(s.pixels(), chunks), kConvPixels) * kConvPixels;
  const int64_t padded = ceil_div(s.out, kConvStep) * kConvStep;
  const int64_t grain = ceil_div(kThreadProducts, std::max<int64_t>(1, products / chunks));
  torch::stable::parallel_for(0, s.directions * chunks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(padded * count), start(padded);  // zeros beyond the last channel
    float panel[kConvPixels * kConvChannels];
    int64_t of = -1;  // the direction whose kernel is packed
    for (int64_t task = begin; task < end; ++task) {
      const int64_t d = task / chunks, first = task % chunks * chunk;
      const int64_t last = std::min(first + chunk, s.pixels());
      if (first >= last) continue;
      if (d != of) {
        pack_kernel(kernel + d * s.kernel_stride, s.out, count, packed.data());
        if (offsets) std::copy_n(offsets + d * s.bias_stride, s.out, start.begin());
        of = d;
      }
      const float* block = packed.data();
      for (int64_t o = 0; o < s.out; o += kConvChannels) {
        const int64_t channels = std::min(kConvChannels, s.out - o);
        const int64_t width = panel_width(channels);
        float* here = to + d * s.y_strides[1] + o * (s.channels_last ? 1 : s.height * s.width);
        for (int64_t p = first; p < last; p += kConvPixels) {
          const Panel at(s, p, std::min(p + kConvPixels, last));
          k.conv_panel(from + d * s.x_strides[1], at.in, taps.data(), count, block, width,
                       start.data() + o, panel);
          store_panel(s, k, at, panel, channels, here);
        }
        block += count * width;
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("conv_members_", TORCH_BOX(&conv_members_cpu_));
}

}  // namespace perturbed
