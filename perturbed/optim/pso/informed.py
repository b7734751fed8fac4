"""Moves with several teachers: all neighbours at once, or another one for every dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import check_number
from .classic import Constriction
from .variant import Flight, Schedule, Variant, check_schedule, scheduled


@dataclass(frozen=True)
class FullyInformed(Variant):
    """Fully informed: every neighbour's best attracts, not the best neighbour's alone.

    ``v = chi (v + sum_k U(0, phi / K) (best_k - x))`` over the K neighbours. Mendes, Kennedy and
    Neves, "The Fully Informed Particle Swarm: Simpler, Maybe Better" (IEEE TEC 8, 2004). Meant for
    sparse topologies; with everybody as neighbour it hardly moves, and draws P^2 N numbers a step.

    A neighbour that has not had a finite loss yet is replaced by the particle itself.

    Args:
        phi: sum of the attractions, greater than 4; chi is the constriction's.
    """

    topology = "ring"
    phi: float = 4.1

    def __post_init__(self) -> None:
        """Check phi."""
        check_number("phi", self.phi)
        Constriction(self.phi / 2, self.phi / 2)

    def move(self, flight: Flight) -> None:
        """Keep bests and move."""
        known = flight.best_values.isfinite()
        flight.improved |= ~known  # a best that is the position does not attract
        flight.keep()
        p = flight.particles
        own = torch.arange(p, device=known.device)[:, None]
        neighbours = flight.neighbours
        if neighbours is None:
            neighbours = own.T.expand(p, p)
        finite = known[neighbours]
        neighbours = torch.where(finite, neighbours, own)
        # Nobody to learn from: anybody.
        neighbours = torch.where(
            finite.any(1, keepdim=True), neighbours, flight.strangers()[:, None]
        )
        teachers = neighbours.shape[1]
        chi = Constriction(self.phi / 2, self.phi / 2).factor
        for rows in flight.chunks(teachers + 3):
            x, v = flight.positions[rows], flight.velocities[rows]
            v.mul_(chi)
            for k, u in enumerate(flight.uniforms(rows, teachers)):
                pull = flight.bests.index_select(0, neighbours[rows, k]).sub_(x)
                v.addcmul_(pull, u, value=chi * self.phi / teachers)
            flight.space.advance(x, v)


@dataclass(frozen=True)
class ComprehensiveLearning(Variant):
    """Comprehensive learning (CLPSO): every dimension has a teacher of its own.

    ``v = w v + c r (best_t(d) - x)`` in dimension d, whose teacher t(d) is the particle itself or,
    with probability Pc, the better of two others. Particle i of P has ``Pc = 0.05 + 0.45 (e^(10 i /
    (P - 1)) - 1) / (e^10 - 1)``. Teachers are chosen anew when a particle has not improved for
    ``patience`` steps. Slow, and good at landscapes of many optima. Liang, Qin, Suganthan and
    Baskar, "Comprehensive Learning Particle Swarm Optimizer for Global Optimization of Multimodal
    Functions" (IEEE TEC 10, 2006).

    Teachers take another 4 bytes a parameter and particle.

    Args:
        weight: inertia w, or a function step -> w; the paper has 0.9 to 0.4 over the run.
        c: attraction by the teacher.
        patience: steps without improvement after which teachers change; the refreshing gap m.
    """

    social = False
    weight: Schedule = 0.7298
    c: float = 1.49445
    patience: int = 7

    def __post_init__(self) -> None:
        """Check the options."""
        check_schedule("weight", self.weight)
        check_number("c", self.c)
        check_number("patience", self.patience, low=1)

    def numbers(self, step: int) -> tuple[float, ...]:
        """Return w."""
        return (scheduled("weight", self.weight, step),)

    def extra(self, positions: Tensor) -> dict[str, Tensor]:
        """Return teachers, chosen in the first step, and steps without improvement."""
        own = torch.arange(len(positions), device=positions.device, dtype=torch.int32)
        return {
            "waited": torch.zeros_like(own),
            "teachers": own[:, None].repeat(1, positions.shape[1]),
        }

    def move(self, flight: Flight) -> None:
        """Keep bests, choose teachers where it is time to, and move."""
        known = flight.best_values.isfinite()
        waited, teachers = flight.extra["waited"], flight.extra["teachers"]
        waited.add_(1).masked_fill_(flight.improved, 0)
        due = (waited >= self.patience) | ~known
        if flight.step == 0:
            due.fill_(True)
        flight.improved |= ~known
        flight.keep()
        (weight,) = self.numbers(flight.step)
        for rows in flight.chunks(12):
            if due.device.type != "cpu" or bool(due[rows].any()):  # reading waits for a GPU
                fresh = self._choose(flight, rows)
                kept = teachers[rows]
                kept.copy_(torch.where(due[rows, None], fresh, kept))
            (u,) = flight.uniforms(rows, 1)
            x, v = flight.positions[rows], flight.velocities[rows]
            pull = flight.bests.gather(0, teachers[rows].long()).sub_(x)
            v.mul_(weight).addcmul_(pull, u, value=self.c)
            flight.space.advance(x, v)
        waited.masked_fill_(due, 0)

    @staticmethod
    def _choose(flight: Flight, rows: slice) -> Tensor:
        """Choose a teacher for every element of some particles, (rows, N) int64."""
        p = flight.particles
        own = torch.arange(rows.start, rows.stop, device=flight.positions.device)[:, None]
        if p == 1:
            return own.expand(-1, flight.positions.shape[1])
        # The first is the step's coefficient with per_dimension.
        _, choice, one, other = flight.uniforms(rows, 4, every=True)
        curve = torch.expm1(10 * own.to(torch.float64) / (p - 1)) / math.expm1(10)
        learns = choice < (0.05 + 0.45 * curve)
        # At least one dimension learns from somebody else.
        learns = learns | (choice <= choice.amin(1, keepdim=True))

        def somebody(u: Tensor) -> Tensor:  # any but the particle itself
            index = (u * (p - 1)).long().clamp_(max=p - 2)
            return index + (index >= own)

        first, second = somebody(one), somebody(other)
        values = flight.best_values
        best = torch.where(values[second] < values[first], second, first)
        useful = values[best].isfinite() | ~values[own].isfinite()
        return torch.where(learns & useful, best, own)
