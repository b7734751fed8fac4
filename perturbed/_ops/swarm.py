"""Particle swarms: one step of all particles, and uniform numbers of the noise contract."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import ops, refuse_grad

# What happens at the walls: the values of `bounds` of swarm_move_.
UNBOUNDED, CLIP, REFLECT = 0, 1, 2


def uniforms(
    key: Tensor, stream: int, first: int, count: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """Return uniform numbers strictly between 0 and 1: (count, cols).

    They are odd multiples of 2^-24, the same on every device and in both dtypes; 1 - u is exact.

    Args:
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        stream: Philox counter word.
        first: first direction (row of the result), counted from the key's own first one.
        count: directions.
        cols: numbers of a direction.
        dtype: float32 or float64.
    """
    return ops.uniforms.default(key, stream, first, count, cols, dtype)


def swarm_move_(
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
) -> None:
    """Do one step of particle swarm optimisation, all particles in one pass over memory.

    First ``best[p] = position[p]`` where ``improved[p]``. Then, for every element, with (r1, r2) in
    (0, 1) drawn for it:

        v = w v + c1 r1 (best[p] - x) + c2 r2 (best[guide[p]] - x), |v| at most limit
        x = x + v

    A NaN of one particle reaches others only by way of ``best`` and ``guide``. The result does not
    depend on threads, instruction set or device.

    Args:
        position: (P, N) contiguous, float32 or float64; no memory in common with the next two.
        velocity: the same.
        best: the same, the best position of each particle.
        improved: (P,) bool, rows whose position, as it comes in, becomes their best.
        guide: (P,) int64, from 0 to P - 1: whose best attracts this particle. A CPU checks that; a
            GPU takes the nearest particle.
        key: (3,) int64: seed after splitmix64, generation, global index of the first particle.
        coefficients: (3,) float64: inertia w, c1, c2.
        limit: (1,) or (N,) in the position's dtype: largest size of v, inf for none.
        lower: (1,) or (N,): wall below; None for none.
        upper: the wall above.
        stream: Philox counter word.
        per_dimension: draw (r1, r2) for every element; else that of element 0 serves its particle.
        antithetic: particle p >= P / 2 takes 1 - r1 and 1 - r2 of particle p - P / 2.
        bounds: 0 for none, without walls; 1 clips x and sets v = 0 where it was clipped; 2 mirrors
            x at the wall that it crossed, once, clips it, and negates v where it was mirrored.

    Raises:
        RuntimeError: an argument does not fit, or a gradient is asked for.
    """
    ops.swarm_move_.default(
        position,
        velocity,
        best,
        improved,
        guide,
        key,
        coefficients,
        limit,
        lower,
        upper,
        stream,
        per_dimension,
        antithetic,
        bounds,
    )


# ---- fake kernels ------------------------------------------------------------------------------


@torch.library.register_fake("perturbed::uniforms")
def _(key, stream, first, count, cols, dtype):
    return key.new_empty((count, cols), dtype=dtype)


@torch.library.register_fake("perturbed::swarm_move_")
def _(
    position,
    velocity,
    best,
    improved,
    guide,
    key,
    coefficients,
    limit,
    lower,
    upper,
    stream,
    per_dimension,
    antithetic,
    bounds,
):
    return None


refuse_grad("swarm_move_", "call it under torch.no_grad()")
