// Rows of dense noise on the CPU: what an embedding adds for the indices it looks up. Only these
// rows are drawn, each where it is written. Limit: drawing cols elements per entry.
#include "bind/lookup.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "bind/dispatch.h"
#include "cpu/noise_rows.h"

namespace perturbed {

namespace {

// Elements that a task draws at least, so that handing it to a thread is worth it.
constexpr int64_t kTaskElements = 1 << 13;

Tensor dense_lookup_cpu(const Tensor index, const Tensor key, int64_t stream, int64_t directions,
                        int64_t rows, int64_t cols, bool rademacher, ScalarType dtype) {
  const char* op = "dense_lookup";
  const LookupSizes s =
      check_dense_lookup(op, index, key, stream, directions, rows, cols, rademacher);
  const int64_t* indices = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < s.entries; ++i) {
    PT_CHECK(indices[i] >= 0 && indices[i] < rows, op, "index must be between 0 and ", rows - 1,
             ", got ", indices[i]);
  }
  Tensor out = torch::stable::new_empty(key, {index.size(0), s.tokens, cols}, dtype);
  dispatch_float(dtype, op, "dtype", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (out.numel() == 0) return;
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const TensorNoise noise(key, stream, 0, directions);
    const int64_t grain = ceil_div(kTaskElements, cols);
    torch::stable::parallel_for(0, s.entries, grain, [&](int64_t begin, int64_t end) {
      NoiseRows row(noise, cols, rademacher);
      std::vector<float> drawn(row.capacity(1));
      for (int64_t i = begin; i < end; ++i) {
        row.draw_part(i / s.tokens % s.directions, indices[i], 0, cols, drawn.data());
        for (int64_t c = 0; c < cols; ++c) to[i * cols + c] = static_cast<T>(drawn[c]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(perturbed, CPU, m) {
  m.impl("dense_lookup", TORCH_BOX(&dense_lookup_cpu));
}

}  // namespace perturbed
