"""How rows of a batch map to directions, repeats and signs, for every reference twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements of noise that are materialised at a time; bounds the memory of a call to some 100 MB.
CHUNK_ELEMENTS = 1 << 20


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(directions: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, count) that cover all directions, each of bounded size."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    for first in range(0, directions, step):
        yield first, min(step, directions - first)


def repeats_of(op: str, name: str, rows: int, directions: int, antithetic: bool) -> int:
    """Return R for a batch of ``rows`` rows.

    Raises:
        ValueError: the rows are no multiple of D, or R is odd with ``antithetic``.
    """
    if directions <= 0:
        raise ValueError(f"{op}: directions must be positive, got {directions}")
    if rows % directions:
        raise ValueError(
            f"{op}: {name} must have a multiple of directions = {directions} rows, got {rows}"
        )
    repeats = rows // directions
    if antithetic and repeats % 2:
        raise ValueError(f"{op}: antithetic needs an even number of repeats, got {repeats}")
    return repeats


def row_signs(repeats: int, antithetic: bool, like: Tensor) -> Tensor:
    """s_b by repeat, in the accumulator's dtype of ``like``: [R, 1, 1, 1]."""
    signs = torch.ones(repeats, 1, 1, 1, dtype=accumulator(like.dtype), device=like.device)
    if antithetic:
        signs[repeats // 2 :] = -1
    return signs


def spread(op: str, x: Tensor, rows: int, directions: int) -> Tensor:
    """What every row of y reads of ``x``: [R, D, T, n].

    ``x`` is [B, T, n], or [N, T, n] with N dividing R: then row b reads ``x[b // D % N]``.

    Raises:
        ValueError: x has neither number of rows.
    """
    repeats = rows // directions
    if x.shape[0] == rows:
        return x.reshape(repeats, directions, *x.shape[1:])
    if x.shape[0] and repeats % x.shape[0] == 0:
        return x.repeat(repeats // x.shape[0], 1, 1)[:, None].expand(-1, directions, -1, -1)
    raise ValueError(
        f"{op}: x must have as many rows as y ({rows}) or a divisor of the repeats "
        f"({repeats}), got {x.shape[0]}"
    )


def cycle(op: str, name: str, z: Tensor, rows: int, directions: int) -> Tensor:
    """Row ``b % M`` of ``z`` for every row b of y: [M, T, q] -> [R, D, T, q].

    Raises:
        ValueError: M is no multiple of D, or does not divide B.
    """
    if z.shape[0] % directions or (rows and (z.shape[0] == 0 or rows % z.shape[0])):
        raise ValueError(
            f"{op}: {name} must have a multiple of directions = {directions} rows that divides "
            f"y's {rows}, got {z.shape[0]}"
        )
    copies = rows // z.shape[0] if rows else 0
    return z.repeat(copies, 1, 1).reshape(rows // directions, directions, *z.shape[1:])


def add_noise(
    y: Tensor,
    sigma: Tensor,
    directions: int,
    antithetic: bool,
    elements: int,
    delta: Callable[[int, int], Tensor],
) -> Tensor:
    """Return y + s_b sigma delta, a bounded number of directions at a time.

    Args:
        y: [B, T, m].
        sigma: [] float64.
        directions: D.
        antithetic: s_b = -1 in the second half of the repeats.
        elements: noise that a direction materialises, in elements.
        delta: function of (first, count) that returns [R, count, T, m] in the accumulator's dtype.
    """
    repeats = y.shape[0] // directions
    scale = row_signs(repeats, antithetic, y) * sigma.to(accumulator(y.dtype))
    base = y.reshape(repeats, directions, *y.shape[1:])
    parts = [base[:, :0]]
    for first, count in chunks(directions, elements):
        here = base[:, first : first + count]
        parts.append((here.to(scale.dtype) + scale * delta(first, count)).to(y.dtype))
    return torch.cat(parts, 1).reshape(y.shape)


def weighted_sum(
    grad: Tensor,
    weights: Tensor,
    scale: Tensor,
    accumulate: bool,
    draw: Callable[[int, int], Tensor],
) -> Tensor:
    """Return (accumulate ? grad : 0) + scale * sum_d weights[d] E_d, shaped like ``grad``.

    Args:
        grad: [m, n].
        weights: [D] in the accumulator's dtype of ``grad``.
        scale: [] float64.
        accumulate: add to ``grad``.
        draw: function of (first, count) that returns E_d as [count, m, n].
    """
    acc = accumulator(grad.dtype)
    total = torch.zeros(grad.numel(), dtype=acc, device=grad.device)
    for first, count in chunks(weights.shape[0], grad.numel()):
        total += weights[first : first + count].to(acc) @ draw(first, count).flatten(1)
    total = scale.to(acc) * total.reshape(grad.shape)
    return (grad.to(acc) + total if accumulate else total).to(grad.dtype)
