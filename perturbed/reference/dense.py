"""Reference twins of the dense family: every element of E_d drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor

from . import noise
from .rows import accumulator, add_noise, repeats_of, spread, weighted_sum


def dense_linear(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    weight_stream: int,
    bias_stream: int,
    directions: int,
    antithetic: bool,
    rademacher: bool,
    *,
    exact: bool = True,
) -> Tensor:
    """y[b, t] + s_b * sigma * (E_d x[b, t] + e_d) with d = b % D.

    Args:
        y: [B, T, m].
        x: [B, T, n], or [N, T, n] with N dividing R: then row b reads ``x[b // D % N]``.
        key: [3] int64: mixed seed, generation, global index of the first direction.
        sigma: [] float64.
        weight_stream: counter word c0 of E_d, -1 for none.
        bias_stream: counter word c0 of e_d, -1 for none.
        directions: D.
        antithetic: s_b = -1 in the second half of the repeats.
        rademacher: signs instead of normals.
        exact: see :mod:`.noise`.

    Raises:
        ValueError: the rows of y or x do not fit D, or R is odd with ``antithetic``.
    """
    rows, tokens, out = y.shape
    repeats = repeats_of("dense_linear", "y", rows, directions, antithetic)
    x = spread("dense_linear", x, rows, directions)
    acc, cols = accumulator(y.dtype), x.shape[-1]

    def delta(first: int, count: int) -> Tensor:
        total = torch.zeros(repeats, count, tokens, out, dtype=acc, device=y.device)
        if weight_stream >= 0:
            weight = noise.dense_materialise(
                key, weight_stream, first, count, out, cols, rademacher, acc, exact=exact
            )
            total = x[:, first : first + count].to(acc) @ weight.mT
        return total + bias_noise(y, key, bias_stream, first, count, rademacher, exact)

    return add_noise(y, sigma, directions, antithetic, out * max(1, cols), delta)


def bias_noise(
    y: Tensor, key: Tensor, stream: int, first: int, count: int, rademacher: bool, exact: bool
) -> Tensor | int:
    """Noise e_d of a bias, the same in every family: [count, 1, m], or 0 for a stream of -1."""
    if stream < 0:
        return 0
    acc, out = accumulator(y.dtype), y.shape[-1]
    return noise.dense_materialise(key, stream, first, count, 1, out, rademacher, acc, exact=exact)


def dense_estimate(
    grad: Tensor,
    weights: Tensor,
    key: Tensor,
    sigma: Tensor,
    stream: int,
    rademacher: bool,
    accumulate: bool,
    *,
    exact: bool = True,
) -> Tensor:
    """(accumulate ? grad : 0) + sigma * sum_d weights[d] E_d, shaped [m, n] like ``grad``.

    ``weights`` is [D] in the accumulator's dtype: float64 for a float64 grad, float32 otherwise.
    """
    acc, (rows, cols) = accumulator(grad.dtype), grad.shape

    def draw(first: int, count: int) -> Tensor:
        return noise.dense_materialise(
            key, stream, first, count, rows, cols, rademacher, acc, exact=exact
        )

    return weighted_sum(grad, weights, sigma, accumulate, draw)
