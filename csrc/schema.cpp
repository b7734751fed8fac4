// Every operator of the package, in the one place that defines them. Kernels register themselves
// for a device beside their code (csrc/cpu, csrc/cuda); fake kernels and derivatives are in
// perturbed/_ops.py. Shapes use the alphabet of docs/conventions.md:
//
//   D directions   R repeats   B = R * D rows   T tokens   m = out   n = in
//   key      [3] int64: seed after splitmix64, generation, global index of the first direction
//   sigma    [] float64: noise scale
//   stream   Philox counter word c0 (layer id << 8 | stream); -1: this tensor is not perturbed
//   rademacher  false: standard normals, true: signs
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(perturbed, m) {
  // y[b, t] += s_b * sigma * (E_d x[b, t] + e_d), d = b % D, s_b = -1 for the second half of the
  // repeats if antithetic. y: [B, T, m] contiguous; x: [B, T, n], last dimension contiguous. If
  // x has fewer rows than y it holds the N distinct rows that every member sees: [N, T, n], R % N
  // == 0, and row b reads x[b / D % N].
  m.def(
      "dense_linear_(Tensor(a!) y, Tensor x, Tensor key, Tensor sigma, int weight_stream, "
      "int bias_stream, int directions, bool antithetic, bool rademacher) -> ()");
  // The same as a function of y: what autograd and torch.func see.
  m.def(
      "dense_linear(Tensor y, Tensor x, Tensor key, Tensor sigma, int weight_stream, "
      "int bias_stream, int directions, bool antithetic, bool rademacher) -> Tensor");
  // grad[m, n] = (accumulate ? grad : 0) + sigma * sum_d weights[d] E_d. weights: [D]
  m.def(
      "dense_estimate_(Tensor(a!) grad, Tensor weights, Tensor key, Tensor sigma, int stream, "
      "bool rademacher, bool accumulate) -> ()");
  // E_d without sigma for the directions first .. first + count - 1: [count, rows, cols]
  m.def(
      "dense_materialise(Tensor key, int stream, int first, int count, int rows, int cols, "
      "bool rademacher, ScalarType dtype) -> Tensor");
}
