// Where a CUDA operator launches: the device of its tensors and torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "bind/check.h"

namespace perturbed {

// Makes a tensor's device the current one while it lives; without it a kernel for cuda:1 would be
// launched on cuda:0.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// What starts the kernels of csrc/cuda/*_launch.cuh and *_kernels.cuh: launch(kernel, grid, threads,
// arguments...).
inline auto launcher(cudaStream_t stream) {
  return [stream](auto kernel, auto grid, int threads, auto... args) {
    kernel<<<dim3(grid.x, grid.y, grid.z), threads, 0, stream>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
}

// Whether rows that start `strides` elements apart from `data` can be read four elements at a time
// (Vector4 of csrc/cuda/device.cuh).
template <class... Strides>
bool rows_aligned(const void* data, int64_t element_size, Strides... strides) {
  const int64_t bytes = 4 * element_size < 16 ? 4 * element_size : 16;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && ((strides % 4 == 0) && ...);
}

}  // namespace perturbed
