"""Reference twin of the low-rank family: E_d = A_d^T B_d / sqrt(rank)."""

from __future__ import annotations

from torch import Tensor

from . import noise
from .dense import bias_noise
from .rows import accumulator, add_noise, cycle, repeats_of, spread


def low_rank_linear(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    a_stream: int,
    b_stream: int,
    bias_stream: int,
    directions: int,
    rank: int,
    antithetic: bool,
    rademacher: bool,
    *,
    exact: bool = True,
) -> Tensor:
    """y[b, t] + s_b * sigma * (E_d x[b, t] + e_d) with d = b % D.

    Args:
        y: [B, T, m].
        x: [B, T, n], or [N, T, n] with N dividing R: then row b reads ``x[b // D % N]``. If
            ``b_stream`` is -1, the products B_d x: [M, T, rank], row b reading ``x[b % M]``.
        key: [3] int64: mixed seed, generation, global index of the first direction.
        sigma: [] float64.
        a_stream: counter word c0 of A_d, [rank, m].
        b_stream: counter word c0 of B_d, [rank, n], or -1.
        bias_stream: counter word c0 of e_d, -1 for none.
        directions: D.
        rank: r.
        antithetic: s_b = -1 in the second half of the repeats.
        rademacher: signs instead of normals.
        exact: see :mod:`.noise`.

    Raises:
        ValueError: the rows of y or x do not fit D, or R is odd with ``antithetic``.
    """
    op, (rows, _, out) = "low_rank_linear", y.shape
    repeats_of(op, "y", rows, directions, antithetic)
    projected = b_stream < 0
    if projected and x.shape[-1] != rank:
        raise ValueError(f"{op}: x must have rank = {rank} products, got {x.shape[-1]}")
    x = cycle(op, "x", x, rows, directions) if projected else spread(op, x, rows, directions)
    acc, cols = accumulator(y.dtype), x.shape[-1]

    def delta(first: int, count: int) -> Tensor:
        def factor(stream: int, size: int) -> Tensor:
            return noise.dense_materialise(
                key, stream, first, count, rank, size, rademacher, acc, exact=exact
            )

        weight = factor(a_stream, out).mT / rank**0.5
        if not projected:
            weight = weight @ factor(b_stream, cols)
        product = x[:, first : first + count].to(acc) @ weight.mT
        return product + bias_noise(y, key, bias_stream, first, count, rademacher, exact)

    return add_noise(y, sigma, directions, antithetic, out * max(1, cols), delta)
