// Every operator of the package, in the one place that defines them. Kernels register themselves
// for a device beside their code (csrc/cpu, csrc/cuda); fake kernels and derivatives are in
// perturbed/_ops. Shapes use the alphabet of docs/conventions.md:
//
//   D directions   R repeats   B = R * D rows   T tokens   m = out   n = in
//   key      [3] int64: seed after splitmix64, generation, global index of the first direction
//   sigma    [] float64: noise scale
//   stream   Philox counter word c0 (layer id << 8 | stream); -1: this tensor is not perturbed
//   rademacher  false: standard normals, true: signs
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(perturbed, m) {
  // ---- dense -------------------------------------------------------------------------------------

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

  // Row index[b, t] of E_d without sigma, d = b % D: [B, T, cols]. index: [B, T] int64 contiguous, from
  // 0 to rows - 1, which a CPU checks and a GPU does not.
  m.def(
      "dense_lookup(Tensor index, Tensor key, int stream, int directions, int rows, int cols, "
      "bool rademacher, ScalarType dtype) -> Tensor");

  // ---- convolutions with given kernels ----------------------------------------------------------------

  // y[r, d] = bias[d] + the convolution of x[r, d] with kernels[d], without padding. y: [R, D, O, H',
  // W'], rows contiguous or channels-last; x: [R, D, C, H, W], any strides, also 0; kernels: [D, O,
  // C, kh, kw], contiguous in a direction; bias: [D, O]. float32. No memory in common with y.
  m.def(
      "conv_members_(Tensor(a!) y, Tensor x, Tensor kernels, Tensor? bias, int stride_height, "
      "int stride_width, int dilation_height, int dilation_width) -> ()");

  // ---- low rank: E_d = A_d^T B_d / sqrt(rank), A_d: [rank, m], B_d: [rank, n] ---------------------

  // y[b, t] += s_b * sigma * (E_d x[b, t] + e_d); y, x and its shared form as in dense_linear_. With
  // b_stream = -1 x holds the products B_d x already: [M, T, rank], M a multiple of D that divides
  // B, and row b of y reads x[b % M].
  m.def(
      "low_rank_linear_(Tensor(a!) y, Tensor x, Tensor key, Tensor sigma, int a_stream, "
      "int b_stream, int bias_stream, int directions, int rank, bool antithetic, bool rademacher) "
      "-> ()");
  m.def(
      "low_rank_linear(Tensor y, Tensor x, Tensor key, Tensor sigma, int a_stream, int b_stream, "
      "int bias_stream, int directions, int rank, bool antithetic, bool rademacher) -> Tensor");

  // ---- selections (noise/permutation.h): pi_d of every direction ---------------------------------

  // Entries 0 .. count - 1 of pi_d for the directions first ..: [directions, count] int64. `replace`:
  // draws with replacement instead of a permutation of 0 .. size - 1.
  m.def(
      "selections(Tensor key, int stream, int first, int directions, int size, int count, "
      "bool replace) -> Tensor");
  // out[b, t, j] = s_b x[b, t, pi_d(j)], j < count. x: [B, T, n] -> [B, T, count]; `shared`: x is
  // [N, T, n], N rows that every direction sees -> [N * D, T, count], row b from x[b / D].
  m.def(
      "select(Tensor x, Tensor key, int stream, int directions, int count, bool antithetic, "
      "bool shared, bool replace) -> Tensor");
  // y[b, t, i] += s_b z[b % M, t, pi_d(i)] wherever pi_d(i) < q. y: [B, T, m]; z: [M, T, q], M a
  // multiple of D that divides B.
  m.def(
      "select_add_(Tensor(a!) y, Tensor z, Tensor key, int stream, int directions, "
      "bool antithetic, bool replace) -> ()");
  m.def(
      "select_add(Tensor y, Tensor z, Tensor key, int stream, int directions, bool antithetic, "
      "bool replace) -> Tensor");
  // S[j, k] = sum_d weights[d] [pi_d(first + j) = k]: [rows, size], dtype of weights, summed in the
  // order of d.
  m.def(
      "selection_sum(Tensor weights, Tensor key, int stream, int first, int rows, int size, "
      "bool replace) -> Tensor");

  // ---- permuted: E_d[i, :] = sum_j base[out_d(i), j] in row i, column in_d(j) --------------------

  // grad[i, in_d(j)] += weights[d] * base[out_d(i), j] for all d, i and j, where out_d(i) < q; from
  // zero unless accumulate. grad: [m, n]; base: [q, p], dtype of weights: float64 for a float64
  // grad, else float32. A stream of -1 stands for the identity.
  m.def(
      "permuted_estimate_(Tensor(a!) grad, Tensor base, Tensor weights, Tensor key, int in_stream, "
      "int out_stream, bool accumulate) -> ()");

  // ---- sparse: E_d[:, pi_d(j)] = sqrt(n / count) V_d[j], V_d: [count, m] -------------------------

  // y[b, t] += s_b * sigma * (E_d x[b, t] + e_d); y, x and its shared form as in dense_linear_.
  m.def(
      "sparse_linear_(Tensor(a!) y, Tensor x, Tensor key, Tensor sigma, int column_stream, "
      "int value_stream, int bias_stream, int directions, int count, bool antithetic, "
      "bool rademacher) -> ()");
  m.def(
      "sparse_linear(Tensor y, Tensor x, Tensor key, Tensor sigma, int column_stream, "
      "int value_stream, int bias_stream, int directions, int count, bool antithetic, "
      "bool rademacher) -> Tensor");
  // grad[m, n] = (accumulate ? grad : 0) + sigma * sum_d weights[d] E_d, summed in the order of d.
  m.def(
      "sparse_estimate_(Tensor(a!) grad, Tensor weights, Tensor key, Tensor sigma, "
      "int column_stream, int value_stream, int count, bool rademacher, bool accumulate) -> ()");

  // ---- sign-flip: E_d = diag(out_d) base diag(in_d), signs [1, m] and [1, n] of the contract ------

  // out[b, t, i] = s_b sign_d[i] x[b, t, i]. x: [B, T, n] -> [B, T, n]; `shared`: [N, T, n] ->
  // [N * D, T, n], row b from x[b / D].
  m.def(
      "flip(Tensor x, Tensor key, int stream, int directions, bool antithetic, bool shared) "
      "-> Tensor");
  // y[b, t, i] += s_b sign_d[i] z[b % M, t, i]. y: [B, T, m]; z: [M, T, m], M a multiple of D that
  // divides B.
  m.def(
      "flip_add_(Tensor(a!) y, Tensor z, Tensor key, int stream, int directions, bool antithetic) "
      "-> ()");
  m.def(
      "flip_add(Tensor y, Tensor z, Tensor key, int stream, int directions, bool antithetic) "
      "-> Tensor");

  // ---- particle swarms: P particles of N numbers each ----------------------------------------------

  // Uniform numbers strictly between 0 and 1 of the directions first .. first + count - 1:
  // [count, cols], float32 or (the same numbers) float64.
  m.def(
      "uniforms(Tensor key, int stream, int first, int count, int cols, ScalarType dtype) "
      "-> Tensor");
  // One step of particle swarm optimisation. For every particle p, with d = key[2] + p, the best
  // positions first,
  //   best[p] = position[p] where improved[p],
  // then, elementwise and with (r1, r2) the pair of uniform numbers of (d, element),
  //   v = w v + c1 r1 (best[p] - x) + c2 r2 (best[guide[p]] - x),  |v| at most limit,  x = x + v.
  // position, velocity, best: [P, N] contiguous, float32 or float64, no memory in common; improved:
  // [P] bool; guide: [P] int64, 0 .. P - 1, which a CPU checks and a GPU clamps; coefficients: [3]
  // float64: w, c1, c2; limit, lower, upper: [1] or [N], dtype of position.
  // per_dimension: false: the pair of element 0 serves all of a particle. antithetic: particle
  // p >= P / 2 has 1 - r1 and 1 - r2 of particle p - P / 2; P even.
  // bounds: 0: none, and lower and upper are None; 1: x is clamped, and v = 0 where it was; 2: x is
  // mirrored at the wall that it crossed, then clamped, and v negated where it was mirrored. A
  // missing wall is at infinity.
  m.def(
      "swarm_move_(Tensor(a!) position, Tensor(b!) velocity, Tensor(c!) best, Tensor improved, "
      "Tensor guide, Tensor key, Tensor coefficients, Tensor limit, Tensor? lower, Tensor? upper, "
      "int stream, bool per_dimension, bool antithetic, int bounds) -> ()");
}
