"""Reference twins of the sign-flip family's operators."""

from __future__ import annotations

from torch import Tensor

from . import noise
from .rows import accumulator, cycle, repeats_of, row_signs
from .selection import spread_rows


def _signs(key: Tensor, stream: int, directions: int, like: Tensor) -> Tensor:
    """Signs of every direction, [D, 1, n] for a ``like`` of [.., n]."""
    return noise.dense_materialise(
        key, stream, 0, directions, 1, like.shape[-1], True, accumulator(like.dtype)
    )


def flip(
    x: Tensor, key: Tensor, stream: int, directions: int, antithetic: bool, shared: bool
) -> Tensor:
    """out[b, t, i] = s_b sign_d[i] x[b, t, i].

    Args:
        x: [B, T, n]; with ``shared`` [N, T, n], rows that every direction sees.
        key: [3] int64: mixed seed, generation, global index of the first direction.
        stream: counter word c0 of the signs, a matrix [1, n] of the contract.
        directions: D.
        antithetic: s_b = -1 in the second half of the repeats; not with ``shared``.
        shared: write row N out for every direction.

    Returns:
        [B, T, n]; with ``shared`` [N * D, T, n], row b from ``x[b // D]``.

    Raises:
        ValueError: the rows of x do not fit, or ``antithetic`` and ``shared``.
    """
    each = spread_rows("flip", x, directions, antithetic, shared)
    signs = row_signs(each.shape[0], antithetic, x) * _signs(key, stream, directions, x)
    return (signs.to(x.dtype) * each).flatten(0, 1)


def flip_add(
    y: Tensor, z: Tensor, key: Tensor, stream: int, directions: int, antithetic: bool
) -> Tensor:
    """y[b, t, i] + s_b sign_d[i] z[b % M, t, i].

    Args:
        y: [B, T, m].
        z: [M, T, m], M a multiple of D that divides B.
        key: as in :func:`flip`.
        stream: counter word c0 of the signs, a matrix [1, m] of the contract.
        directions: D.
        antithetic: s_b = -1 in the second half of the repeats.

    Raises:
        ValueError: the rows of y or z do not fit.
    """
    repeats = repeats_of("flip_add", "y", y.shape[0], directions, antithetic)
    acc = accumulator(y.dtype)
    signs = row_signs(repeats, antithetic, y) * _signs(key, stream, directions, y)
    added = signs * cycle("flip_add", "z", z, y.shape[0], directions).to(acc)
    return (y.to(acc) + added.reshape(y.shape)).to(y.dtype)
