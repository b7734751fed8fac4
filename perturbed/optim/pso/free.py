"""Moves that need less: no velocities, no memory of the particles, or neither."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...checks import check_number
from .variant import Flight, Variant


@dataclass(frozen=True)
class BareBones(Variant):
    """Bare bones: no velocity; positions are drawn between the two bests.

    ``x ~ N((own best + best neighbour) / 2, |own best - best neighbour|)`` in every dimension.
    Kennedy, "Bare Bones Particle Swarms" (SIS 2003). A particle that is its own best neighbour
    stays.
    """

    velocities = False

    def move(self, flight: Flight) -> None:
        """Keep bests and draw positions."""
        flight.improved |= ~flight.best_values.isfinite()
        flight.keep()
        guide = flight.guides()
        for rows in flight.chunks(4):
            x, own = flight.positions[rows], flight.bests[rows]
            other = flight.bests.index_select(0, guide[rows])
            (z,) = flight.normals(rows)
            torch.lerp(own, other, 0.5, out=x)
            x.addcmul_(z, other.sub_(own).abs_())
            flight.space.place(x)


@dataclass(frozen=True)
class CompetitiveSwarm(Variant):
    """Competitive swarm: in random pairs the loser learns from the winner; nobody remembers.

    ``v = r1 v + r2 (x_winner - x) + phi r3 (mean of the swarm - x);  x = x + v`` for losers;
    winners stay, and are scored again in the next step. Two vectors a particle instead of three,
    and made for many parameters. Cheng and Jin, "A Competitive Swarm Optimizer for Large Scale
    Optimization" (IEEE Transactions on Cybernetics 45, 2015), who advise phi = 0 for up to 100
    particles and up to 0.3 for many.

    With an odd number of particles one sits out, another one every step.

    Args:
        phi: attraction by the mean position.
    """

    bests = False
    social = False
    mirrors = False  # pairs change: a particle has no partner
    phi: float = 0.1

    def __post_init__(self) -> None:
        """Check phi."""
        check_number("phi", self.phi)

    def move(self, flight: Flight) -> None:
        """Move the losers."""
        pairs = flight.particles // 2
        if pairs == 0:
            return
        order = flight.shuffled()
        first, second = order[:pairs], order[pairs : 2 * pairs]
        first_wins = flight.losses[first] <= flight.losses[second]
        winner = torch.where(first_wins, first, second)
        loser = torch.where(first_wins, second, first)
        mean = flight.positions.mean(0) if self.phi else None
        for rows in flight.chunks(8, pairs):
            x = flight.positions.index_select(0, loser[rows])
            v = flight.velocities.index_select(0, loser[rows])
            r1, r2, r3 = flight.uniforms(rows, 3)
            v.mul_(r1).addcmul_(r2, flight.positions.index_select(0, winner[rows]).sub_(x))
            if mean is not None:
                v.addcmul_(r3, mean - x, value=self.phi)
            flight.space.advance(x, v)
            flight.positions.index_copy_(0, loser[rows], x)
            flight.velocities.index_copy_(0, loser[rows], v)


@dataclass(frozen=True)
class Accelerated(Variant):
    """Accelerated: drawn to the best of all, with noise that dies away; one vector a particle.

    ``x = (1 - beta) x + beta best + alpha decay^step z``, z standard normal. Yang, "Engineering
    Optimization: An Introduction with Metaheuristic Applications" (2010); Yang, Deb and Fong
        (2011).

    Args:
        beta: attraction, from 0 to 1.
        alpha: noise in the first step, in units of the parameters.
        decay: of the noise, per step, from 0 to 1.
    """

    velocities = False
    bests = False
    social = False
    beta: float = 0.5
    alpha: float = 0.2
    decay: float = 0.97

    def __post_init__(self) -> None:
        """Check the options."""
        check_number("beta", self.beta, high=1.0)
        check_number("alpha", self.alpha)
        check_number("decay", self.decay, high=1.0)

    def move(self, flight: Flight) -> None:
        """Move to the best, and a random step."""
        known = flight.record_value.isfinite()
        for rows in flight.chunks(3):
            x = flight.positions[rows]
            (z,) = flight.normals(rows)
            x.lerp_(torch.where(known, flight.record, x), self.beta)
            x.add_(z, alpha=self.alpha * self.decay**flight.step)
            flight.space.place(x)
