"""Reference twins of the particle swarm operators."""

from __future__ import annotations

import torch
from torch import Tensor

from . import noise


def _words(key: Tensor, stream: int, first: int, count: int, cols: int) -> Tensor:
    """Words of one row per direction, [count, cols] int64: word j % 4 of block j // 4."""
    blocks = noise.words(key, stream, first, count, 0, -(-cols // 4))
    return blocks.reshape(count, -1)[:, :cols]


def uniforms(
    key: Tensor, stream: int, first: int, count: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """(2 (word >> 9) + 1) 2^-24: [count, cols], float32 or float64.

    Raises:
        ValueError: another dtype, in which some numbers would round to 1.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    words = _words(key, stream, first, count, cols)
    return (2 * (words >> 9) + 1).to(dtype) * 2.0**-24


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute a * b + c, rounded once in float32 and twice in float64, which has nothing wider."""
    if a.dtype == torch.float64:
        return a * b + c
    return noise._fma(*torch.broadcast_tensors(a, b, c))


def swarm_move(
    position: Tensor,
    velocity: Tensor,
    best: Tensor,
    improved: Tensor,
    guide: Tensor,
    key: Tensor,
    coefficients: Tensor,
    limit: Tensor,
    lower: Tensor | None,
    upper: Tensor | None,
    stream: int,
    per_dimension: bool,
    antithetic: bool,
    bounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Position, velocity and best after one step of particle swarm optimisation.

    In float32 these are the bits of the operator.

    Args:
        position: [P, N], float32 or float64.
        velocity: [P, N].
        best: [P, N].
        improved: [P] bool, rows whose position becomes their best before the move.
        guide: [P] int64, whose best attracts each particle.
        key: [3] int64: mixed seed, generation, global index of the first particle.
        coefficients: [3] float64: inertia, c1, c2.
        limit: [1] or [N]: largest absolute velocity.
        lower: [1] or [N], or None.
        upper: [1] or [N], or None.
        stream: counter word c0.
        per_dimension: a pair of random numbers for each element, not for each particle.
        antithetic: the second half of the particles has 1 - r of the first.
        bounds: 0 none, 1 clip, 2 reflect.
    """
    particles, cols = position.shape
    own = particles // 2 if antithetic else particles
    words = _words(key, stream, 0, own, cols if per_dimension else 1)
    if antithetic:
        words = torch.cat([words, words ^ noise.MASK])
    r1, r2 = (
        (2 * half + 1).to(position.dtype) * 2.0**-17 for half in (words >> 16, words & 0xFFFF)
    )
    inertia, own_pull, social_pull = coefficients.to(position.dtype).unbind()

    x, best = position, torch.where(improved[:, None], position, best)
    v = inertia * velocity
    v = _fma(own_pull * r1, best - x, v)
    v = _fma(social_pull * r2, best[guide] - x, v)
    v = torch.where(v > limit, limit, v)
    v = torch.where(v < -limit, -limit, v)
    x = x + v
    if bounds != 0:
        infinity = torch.full_like(limit, float("inf"))
        low = -infinity if lower is None else lower
        high = infinity if upper is None else upper
        below, above = x < low, x > high
        if bounds == 2:
            mirrored = torch.where(below, low + (low - x), x)
            x = torch.where(above, high - (mirrored - high), mirrored)
            v = torch.where(below | above, -v, v)
        else:
            v = torch.where(below | above, torch.zeros_like(v), v)
        x = torch.where(x < low, low, x)
        x = torch.where(x > high, high, x)
    return x, v, best
