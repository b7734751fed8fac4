"""The classic moves, fused into one pass over memory: constriction and inertia weight.

``v = w v + c1 r1 (own best - x) + c2 r2 (best of the neighbours - x);  x = x + v``
with r1 and r2 uniform in (0, 1). Kennedy and Eberhart, "Particle Swarm Optimization" (ICNN 1995).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from ... import _ops
from ...checks import check_number
from ...noise.base import OPTIMIZER_ID, STREAM_SWARM, stream_word
from .variant import Flight, Schedule, Variant, check_schedule, scheduled


class Classic(Variant):
    """Inertia, and attraction by the own best and that of the best neighbour."""

    @abstractmethod
    def numbers(self, step: int) -> tuple[float, ...]:
        """Return w, c1 and c2 of a step."""

    def move(self, flight: Flight) -> None:
        """Keep bests and move, in one operator."""
        coefficients, numbers = flight.extra["coefficients"], self.numbers(flight.step)
        if numbers != flight.told:
            for i, value in enumerate(numbers):
                coefficients[i].fill_(value)  # a fill needs no synchronisation
            flight.told = numbers
        space = flight.space
        # Never scored: the own best is where the particle is, which does not attract it.
        keep = flight.best_values.isposinf().logical_or_(flight.improved)
        _ops.swarm_move_(
            flight.positions,
            flight.velocities,
            flight.bests,
            keep,
            flight.guides().contiguous(),
            flight.key,
            coefficients,
            space.limit,
            space.lower,
            space.upper,
            stream_word(OPTIMIZER_ID, STREAM_SWARM),
            flight.per_dimension,
            flight.mirrored,
            space.mode,
        )

    def extra(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return where the operator reads the coefficients."""
        return {"coefficients": positions.new_zeros(3, dtype=torch.float64)}


@dataclass(frozen=True)
class Constriction(Classic):
    """Constriction: coefficients that provably converge without a largest velocity.

    ``v = chi (v + c1 r1 (..) + c2 r2 (..))``, ``chi = 2 / |2 - phi - sqrt(phi^2 - 4 phi)|``, phi =
    c1 + c2; 0.7298 for the default. Clerc and Kennedy, "The Particle Swarm: Explosion, Stability,
    and Convergence in a Multidimensional Complex Space" (IEEE TEC 6, 2002).

    Args:
        c1: attraction by the own best.
        c2: attraction by the best neighbour; c1 + c2 must be greater than 4.

    Example:
        >>> from perturbed.optim import Constriction
        >>> round(Constriction().factor, 4)
        0.7298
    """

    c1: float = 2.05
    c2: float = 2.05

    def __post_init__(self) -> None:
        """Check the coefficients."""
        phi = check_number("c1", self.c1) + check_number("c2", self.c2)
        if phi <= 4:
            raise ValueError(f"c1 + c2 must be greater than 4 for a constriction, got {phi:g}")

    @property
    def factor(self) -> float:
        """The constriction chi."""
        phi = self.c1 + self.c2
        return 2 / abs(2 - phi - math.sqrt(phi * phi - 4 * phi))

    def numbers(self, step: int) -> tuple[float, ...]:
        """Return w, c1 and c2 with the factor in them."""
        chi = self.factor
        return chi, chi * self.c1, chi * self.c2


@dataclass(frozen=True)
class Inertia(Classic):
    """Inertia weight: a number, or a schedule from exploring to exploiting.

    Shi and Eberhart, "A Modified Particle Swarm Optimizer" (CEC 1998). The defaults are those of
    Eberhart and Shi (CEC 2000), which equal the constriction's.

    Args:
        weight: w, or a function step -> w; ``lambda step: 0.9 - 0.5 * step / 1000`` is the usual
            line over 1000 steps.
        c1: attraction by the own best.
        c2: attraction by the best neighbour.
    """

    weight: Schedule = 0.7298
    c1: float = 1.49618
    c2: float = 1.49618

    def __post_init__(self) -> None:
        """Check the coefficients."""
        check_schedule("inertia", self.weight)
        check_number("c1", self.c1)
        check_number("c2", self.c2)

    def numbers(self, step: int) -> tuple[float, ...]:
        """Return w, c1 and c2."""
        return scheduled("inertia", self.weight, step), self.c1, self.c2
