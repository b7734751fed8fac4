// The extension module `perturbed._C`: loading it registers the operators; what it exports itself
// is free of torch: the noise contract as NumPy arrays, the choice of CPU kernels, and build facts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "noise/counters.h"
#include "noise/normal.h"

namespace py = pybind11;

namespace perturbed {

namespace {

using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// A key may come as the signed integer of a key tensor or as an unsigned one.
PhiloxKey key_from(const py::int_& key) {
  return philox_key(PyLong_AsUnsignedLongLongMask(key.ptr()));
}

// counters: [N, 4] uint32 -> [N, 4]
Words philox(const Words& counters, const py::int_& key_bits) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) {
    throw std::invalid_argument("philox: counters must have shape (N, 4)");
  }
  const PhiloxKey key = key_from(key_bits);
  Words out({counters.shape(0), py::ssize_t{4}});
  const uint32_t* c = counters.data();
  uint32_t* w = out.mutable_data();
  for (py::ssize_t i = 0; i < counters.shape(0); ++i, c += 4, w += 4) {
    const PhiloxWords words = philox4x32(c[0], c[1], c[2], c[3], key);
    std::copy(words.w, words.w + 4, w);
  }
  return out;
}

// Consecutive blocks of one tensor and direction, through the active CPU kernels.
struct Draw {
  const CpuKernels& k = kernels();
  PhiloxLaunch launch;
  PhiloxDirection direction;
  py::ssize_t count, batches;
  std::vector<PreparedBatch> prepared;

  Draw(const py::int_& key, uint32_t generation, uint32_t stream, uint32_t d, py::ssize_t blocks)
      : launch(philox_launch(stream, generation, key_from(key))),
        direction(philox_direction(launch, d)),
        count(checked(blocks)),
        batches(ceil_div<py::ssize_t>(count, kBatchBlocks)),
        prepared(batches) {}

  static py::ssize_t checked(py::ssize_t blocks) {
    if (blocks < 0) throw std::invalid_argument("count must not be negative");
    return blocks;
  }
};

// -> [count, 4]
Words words(const py::int_& key, uint32_t generation, uint32_t stream, uint32_t direction,
            uint32_t first_block, py::ssize_t count) {
  Draw draw(key, generation, stream, direction, count);
  draw.k.prepare_linear(draw.launch, first_block, draw.batches, draw.prepared.data());
  const int64_t stride = draw.batches * kBatchBlocks;
  std::vector<uint32_t> rows(4 * stride);
  draw.k.sign_bits(draw.launch, draw.prepared.data(), draw.batches, draw.direction, stride,
                   rows.data());
  Words out({count, py::ssize_t{4}});
  uint32_t* w = out.mutable_data();
  for (py::ssize_t b = 0; b < count; ++b) {
    for (int j = 0; j < 4; ++j) w[4 * b + j] = rows[j * stride + b];
  }
  return out;
}

// -> [count, 4]
py::array_t<float> normals(const py::int_& key, uint32_t generation, uint32_t stream,
                           uint32_t direction, uint32_t first_block, py::ssize_t count) {
  Draw draw(key, generation, stream, direction, count);
  draw.k.prepare_normal(draw.launch, first_block, draw.batches, draw.prepared.data());
  std::vector<float> z(draw.batches * kBatchBlocks * 4);
  draw.k.normals(draw.launch, draw.prepared.data(), draw.batches, draw.direction, z.data());
  py::array_t<float> out({count, py::ssize_t{4}});
  std::copy(z.begin(), z.begin() + 4 * count, out.mutable_data());
  return out;
}

// [N, 2] words -> [N, 2] normals by the scalar definition in noise/normal.h.
py::array_t<float> box_muller_pairs(const Words& pairs) {
  if (pairs.ndim() != 2 || pairs.shape(1) != 2) {
    throw std::invalid_argument("box_muller: words must have shape (N, 2)");
  }
  py::array_t<float> out({pairs.shape(0), py::ssize_t{2}});
  const uint32_t* w = pairs.data();
  float* z = out.mutable_data();
  for (py::ssize_t i = 0; i < pairs.shape(0); ++i) {
    const NormalPair pair = box_muller(w[2 * i], w[2 * i + 1]);
    z[2 * i] = pair.z0;
    z[2 * i + 1] = pair.z1;
  }
  return out;
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (cpu_supports(name)) names.push_back(name);
  }
  return names;
}

void choose_cpu_capability(const std::string& name) {
  if (!set_cpu_capability(name.c_str())) {
    throw std::invalid_argument("cpu capability must be one this processor has, got '" + name +
                                "'");
  }
}

py::dict build_info() {
  py::dict info;
  info["noise_contract"] = kNoiseContractVersion;
  info["compiler"] = __VERSION__;
  info["torch_target"] = static_cast<uint64_t>(TORCH_TARGET_VERSION);
#if defined(PERTURBED_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(PERTURBED_CUDA_ARCHS)
  info["cuda_archs"] = PERTURBED_CUDA_ARCHS;
#else
  info["cuda_archs"] = "";
#endif
#if defined(__OPTIMIZE__)
  info["optimised"] = true;
#else
  info["optimised"] = false;
#endif
  return info;
}

}  // namespace

}  // namespace perturbed

PYBIND11_MODULE(_C, m) {
  using namespace perturbed;
  m.def(
      "splitmix64",
      [](const py::int_& seed) {
        return static_cast<int64_t>(splitmix64(PyLong_AsUnsignedLongLongMask(seed.ptr())));
      },
      py::arg("seed"), "Key of a user seed, as the signed 64-bit integer that a key tensor holds.");
  m.def("philox", &philox, py::arg("counters"), py::arg("key"));
  m.def("words", &words, py::arg("key"), py::arg("generation"), py::arg("stream"),
        py::arg("direction"), py::arg("first_block"), py::arg("count"));
  m.def("normals", &normals, py::arg("key"), py::arg("generation"), py::arg("stream"),
        py::arg("direction"), py::arg("first_block"), py::arg("count"));
  m.def("box_muller", &box_muller_pairs, py::arg("words"));
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("cpu_capability", [] { return std::string(kernels().name); });
  m.def("set_cpu_capability", &choose_cpu_capability, py::arg("name"));
  m.def("build_info", &build_info);
}
