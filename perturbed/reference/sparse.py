"""Reference twins of the sparse family: E_d has ``count`` columns that are not zero."""

from __future__ import annotations

import torch
from torch import Tensor

from . import noise
from .dense import bias_noise
from .rows import accumulator, add_noise, repeats_of, spread, weighted_sum
from .selection import selections


def _materialise(
    key: Tensor,
    column_stream: int,
    value_stream: int,
    first: int,
    directions: int,
    shape: tuple[int, int],
    count: int,
    rademacher: bool,
    dtype: torch.dtype,
    exact: bool,
) -> Tensor:
    """E_d[:, pi_d(j)] = sqrt(n / count) V_d[j] for j < count, without sigma: [directions, m, n]."""
    out, cols = shape
    values = noise.dense_materialise(
        key, value_stream, first, directions, count, out, rademacher, dtype, exact=exact
    )
    index = selections(key, column_stream, first, directions, cols, count, False)
    weight = torch.zeros(directions, cols, out, dtype=dtype, device=key.device)
    weight.scatter_(1, index[..., None].expand(values.shape), values * (cols / count) ** 0.5)
    return weight.mT


def sparse_linear(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    column_stream: int,
    value_stream: int,
    bias_stream: int,
    directions: int,
    count: int,
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
        column_stream: counter word c0 of the permutation pi_d of the columns.
        value_stream: counter word c0 of V_d, [count, m].
        bias_stream: counter word c0 of e_d, -1 for none.
        directions: D.
        count: columns of a direction.
        antithetic: s_b = -1 in the second half of the repeats.
        rademacher: signs instead of normals.
        exact: see :mod:`.noise`.

    Raises:
        ValueError: the rows of y or x do not fit D, R is odd with ``antithetic``, or ``count``
            exceeds n.
    """
    rows, _, out = y.shape
    repeats_of("sparse_linear", "y", rows, directions, antithetic)
    x = spread("sparse_linear", x, rows, directions)
    acc, cols = accumulator(y.dtype), x.shape[-1]

    def delta(first: int, number: int) -> Tensor:
        weight = _materialise(
            key,
            column_stream,
            value_stream,
            first,
            number,
            (out, cols),
            count,
            rademacher,
            acc,
            exact,
        )
        product = x[:, first : first + number].to(acc) @ weight.mT
        return product + bias_noise(y, key, bias_stream, first, number, rademacher, exact)

    return add_noise(y, sigma, directions, antithetic, out * max(1, cols), delta)


def sparse_estimate(
    grad: Tensor,
    weights: Tensor,
    key: Tensor,
    sigma: Tensor,
    column_stream: int,
    value_stream: int,
    count: int,
    rademacher: bool,
    accumulate: bool,
    *,
    exact: bool = True,
) -> Tensor:
    """(accumulate ? grad : 0) + sigma * sum_d weights[d] E_d, shaped [m, n] like ``grad``.

    ``weights`` is [D] in the accumulator's dtype: float64 for a float64 grad, float32 otherwise.
    """
    acc, shape = accumulator(grad.dtype), (grad.shape[0], grad.shape[1])

    def draw(first: int, number: int) -> Tensor:
        return _materialise(
            key, column_stream, value_stream, first, number, shape, count, rademacher, acc, exact
        )

    return weighted_sum(grad, weights, sigma, accumulate, draw)
