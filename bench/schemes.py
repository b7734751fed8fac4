"""NESgpu's other layers in plain torch (Amand, 2020), forward alone, as its table times them.

NESgpu is no package that could be installed, so its schemes are written anew: whole tensors of
noise made beforehand, and the torch operations that use them. One row for each direction (R = 1).
Its Stored scheme, for independent noise, is in bench/population.py.

torch sparse k    k columns of each direction: gather k inputs, then a batched product
torch permuted    one matrix N for all: permute inputs, one product, permute outputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.common import Row, assert_close
from bench.ours import SIGMA
from bench.population import LayerProblem

Candidates = Iterator[tuple[str, int, Callable[[], Row]]]


def linear_rows(view: str, problem: LayerProblem) -> Candidates:
    """Rows of a linear layer; none for other views, or with several rows for each direction."""
    if view == "forward" and problem.case.repeats == 1:
        d, (m, _) = problem.case.directions, problem.layer.weight.shape
        for k in (1, 2):
            yield f"torch sparse {k}", 4 * d * k * m, lambda k=k: sparse(problem, k)
        yield "torch permuted", 0, lambda: permuted_linear(problem)


def conv_rows(view: str, problem: LayerProblem) -> Candidates:
    """The row of a convolution."""
    if view == "forward" and problem.case.repeats == 1:
        yield "torch permuted", 0, lambda: permuted_conv(problem)


def sparse(problem: LayerProblem, k: int) -> Row:
    """NESgpu's SparsePerturbedLinear."""
    d, layer, device = problem.case.directions, problem.layer, problem.device
    m, n = layer.weight.shape
    columns = torch.randint(n, (d, k), device=device)
    noise = SIGMA * (n / k) ** 0.5 * torch.randn(d, m, k, device=device)
    offsets = SIGMA * torch.randn(d, m, device=device)

    def call() -> Tensor:
        x = problem.rotating()
        part = torch.baddbmm(offsets.unsqueeze(2), noise, x.gather(1, columns).unsqueeze(2))
        return layer(x) + part.squeeze(2)

    def check() -> None:
        y = call()
        for row in problem.probes:
            member = torch.zeros_like(layer.weight)
            member.index_add_(1, columns[row], noise[row])
            expected = (layer.weight + member) @ problem.x[row] + layer.bias + offsets[row]
            assert_close(y[row], expected, f"torch sparse {k}, row {row}", problem.rtol)

    held = columns.nbytes + noise.nbytes + offsets.nbytes
    return Row(f"torch sparse {k}", call, check, held)


def _permutations(count: int, size: int, device: torch.device) -> Tensor:
    """One for each direction, (count, size); sorted random numbers, all directions at once."""
    return torch.rand(count, size, device=device).argsort(1)


def permuted_linear(problem: LayerProblem) -> Row:
    """NESgpu's PermutedLinear with permutation="both", which its table has."""
    d, layer, device = problem.case.directions, problem.layer, problem.device
    m, n = layer.weight.shape
    base = SIGMA * torch.randn(m, n, device=device)
    offsets = SIGMA * torch.randn(d, m, device=device)
    of_inputs, of_outputs = _permutations(d, n, device), _permutations(d, m, device)

    def call() -> Tensor:
        x = problem.rotating()
        part = (x.gather(1, of_inputs) @ base.t()).gather(1, of_outputs)
        return layer(x).add_(part).add_(offsets)

    def check() -> None:
        y = call()
        for row in problem.probes:
            member = torch.empty_like(base)
            member[:, of_inputs[row]] = base[of_outputs[row]]
            expected = (layer.weight + member) @ problem.x[row] + layer.bias + offsets[row]
            assert_close(y[row], expected, f"torch permuted, row {row}", problem.rtol)

    held = sum(part.nbytes for part in (base, offsets, of_inputs, of_outputs))
    return Row("torch permuted", call, check, held)


def permuted_conv(problem: LayerProblem) -> Row:
    """NESgpu's PermutedConv2d with permutation="out", which its table has."""
    d, layer, device = problem.case.directions, problem.layer, problem.device
    base = SIGMA * torch.randn_like(layer.weight)
    offsets = SIGMA * torch.randn(d, len(base), device=device)
    of_outputs = _permutations(d, len(base), device)

    def call() -> Tensor:
        x = problem.rotating()
        part = torch.conv2d(x, base, None, 1, layer.padding)
        index = of_outputs[:, :, None, None].expand_as(part)
        return layer(x).add_(part.gather(1, index)).add_(offsets[:, :, None, None])

    def check() -> None:
        y = call()
        for row in problem.probes:
            member, x = base[of_outputs[row]], problem.x[row : row + 1]
            bias = layer.bias + offsets[row]
            expected = torch.conv2d(x, layer.weight + member, bias, 1, layer.padding)[0]
            assert_close(y[row], expected, f"torch permuted, row {row}", problem.rtol)

    held = base.nbytes + offsets.nbytes + of_outputs.nbytes
    return Row("torch permuted", call, check, held)
