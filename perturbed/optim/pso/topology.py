"""Who hears of whom: the neighbours whose bests a particle may follow.

A topology is a function (particles P, step) -> (P, K) int64, row p holding the neighbours of
particle p, itself usually among them; or None for everybody. Kennedy and Mendes, "Population
Structure and Particle Swarm Performance" (CEC 2002).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import as_count

Topology = Callable[[int, int], "Tensor | None"]


def everybody(particles: int, step: int = 0) -> None:
    """Let every particle follow the best of all: the fastest, and the first to be trapped."""


def ring(particles: int, step: int = 0, reach: int = 1) -> Tensor:
    """Return the ``reach`` next particles on both sides, and the particle itself.

    News of a good place travels ``reach`` particles a step: slower, and less easily trapped.

    Args:
        particles: P.
        step: not used.
        reach: neighbours on a side.

    Returns:
        (P, 2 reach + 1) int64. A swarm smaller than that has neighbours twice.

    Raises:
        ValueError: particles below 1 or a negative reach.
        TypeError: numbers that are no integers.

    Example:
        >>> from perturbed.optim import ring
        >>> ring(4)
        tensor([[3, 0, 1],
                [0, 1, 2],
                [1, 2, 3],
                [2, 3, 0]])
    """
    particles, reach = as_count("particles", particles), as_count("reach", reach, 0)
    offsets = torch.arange(-reach, reach + 1)
    return (torch.arange(particles)[:, None] + offsets) % particles


def von_neumann(particles: int, step: int = 0) -> Tensor:
    """Return the four neighbours on a torus, and the particle itself.

    The grid has as many rows as the largest divisor of P that is at most its square root; a prime P
    makes a ring. The best of the structures that Kennedy and Mendes (2002) compared.

    Args:
        particles: P.
        step: not used.

    Returns:
        (P, 5) int64: itself, left, right, up, down.

    Raises:
        ValueError: particles below 1.
        TypeError: particles that are no integer.
    """
    particles = as_count("particles", particles)
    grid = torch.arange(particles)  # first: nobody waits for the divisors of what has no room
    rows = next(r for r in range(math.isqrt(particles), 0, -1) if particles % r == 0)
    grid = grid.view(rows, -1)
    moves = [grid, grid.roll(1, 1), grid.roll(-1, 1), grid.roll(1, 0), grid.roll(-1, 0)]
    return torch.stack(moves, -1).flatten(0, 1)


TOPOLOGIES: dict[str, Topology] = {"global": everybody, "ring": ring, "von_neumann": von_neumann}
"""Names that ``topology=`` takes, and their functions."""


def resolve_topology(topology: str | Topology) -> Topology:
    """Return the function of a name in ``TOPOLOGIES``, or a caller's own."""
    if isinstance(topology, str):
        if topology not in TOPOLOGIES:
            raise ValueError(f"topology must be of {', '.join(TOPOLOGIES)}, got {topology!r}")
        return TOPOLOGIES[topology]
    if not callable(topology):
        raise TypeError(
            "topology must be a name or a function of the number of particles and the step, got "
            f"{topology!r}"
        )
    return topology


def check_neighbours(neighbours: object, particles: int) -> Tensor | None:
    """Return what a topology made, as int64 on the CPU, if it is a table of particles."""
    if neighbours is None:
        return None
    if not isinstance(neighbours, Tensor) or neighbours.dtype != torch.int64:
        got = neighbours.dtype if isinstance(neighbours, Tensor) else type(neighbours).__name__
        raise TypeError(f"topology must return an int64 tensor (P, K) or None, got {got}")
    if neighbours.dim() != 2 or len(neighbours) != particles or neighbours.shape[1] == 0:
        raise ValueError(
            f"topology must return (P, K) with P = {particles} and K at least 1, got "
            f"{tuple(neighbours.shape)}"
        )
    neighbours = neighbours.cpu()
    if neighbours.min() < 0 or neighbours.max() >= particles:
        raise ValueError(
            f"topology must return particles 0 to {particles - 1}, got {int(neighbours.min())} to "
            f"{int(neighbours.max())}"
        )
    return neighbours
