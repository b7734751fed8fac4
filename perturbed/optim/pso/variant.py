"""What a way of moving a swarm sees, and the one thing it has to say."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ... import _ops
from ...checks import check_number
from ...noise.base import OPTIMIZER_ID, STREAM_SWARM_OTHER, per_scratch, stream_word
from .space import Space


@dataclass
class Flight:
    """A swarm between two moves; P particles, N parameters.

    The tensors are changed in place and never replaced. A particle that has not had a finite loss
    yet has a best value of infinity, and its position in ``bests`` from the next move on.

    Attributes:
        positions: (P, N), what was evaluated; what is to be evaluated next after the move.
        velocities: (P, N), or (0, N) for a variant without.
        bests: (P, N), every particle's own best position, or (0, N) for a variant without.
        best_values: (P,) float64, losses of ``bests``; infinity where there was none.
        record: (N,), the best position known.
        record_value: () float64, its loss.
        losses: (P,) float64, of ``positions``; infinity where not finite.
        improved: (P,) bool, particles whose position is their best now. ``bests`` does not hold it
            yet: that is the move's part, see :meth:`keep`.
        key: (3,) int64, of the random numbers of this step.
        space: walls and the largest velocity.
        mirrored: whether the second half of the swarm has the mirrored numbers of the first.
        per_dimension: whether elements have random coefficients of their own.
        step: steps before this one.
        neighbours: (P, K) int64, or None for everybody.
        extra: tensors of the variant's own, by name; saved with the rest.
        told: numbers that a variant has written into ``extra``; () if others may be there now.
    """

    positions: Tensor
    velocities: Tensor
    bests: Tensor
    best_values: Tensor
    record: Tensor
    record_value: Tensor
    losses: Tensor
    improved: Tensor
    key: Tensor
    space: Space
    mirrored: bool
    per_dimension: bool
    step: int = 0
    neighbours: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    told: tuple[float, ...] = ()
    # The particles twice over, (2 P,) int64, of which strangers are a part.
    _circle: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Number the particles."""
        self._circle = torch.arange(self.particles, device=self.positions.device).repeat(2)

    @property
    def particles(self) -> int:
        """P."""
        return self.positions.shape[0]

    def strangers(self) -> Tensor:
        """Return another particle for each, (P,) int64; another one every step.

        Whom to follow where nobody has had a finite loss: random moves among the positions.
        """
        p = self.particles
        shift = 1 + self.step % (p - 1) if p > 1 else 0
        return self._circle[shift : shift + p]

    def guides(self) -> Tensor:
        """Return the neighbour with the best value of each particle, (P,) int64."""
        if self.neighbours is None:
            value, guide = self.best_values.min(0)
        else:
            value, nearest = self.best_values[self.neighbours].min(1, keepdim=True)
            value, guide = value[:, 0], self.neighbours.gather(1, nearest)[:, 0]
        return torch.where(value.isposinf(), self.strangers(), guide)

    def keep(self) -> None:
        """Bring ``bests`` up to date: the positions of ``improved`` particles."""
        if len(self.bests):
            torch.where(self.improved[:, None], self.positions, self.bests, out=self.bests)

    # ---- random numbers ------------------------------------------------------------------------

    def chunks(self, rows_of_scratch: int, count: int | None = None) -> Iterator[slice]:
        """Split the particles so that the scratch stays bounded; not across the mirrored halves.

        Args:
            rows_of_scratch: vectors of N numbers that a particle needs.
            count: how many to split; default: all particles.
        """
        count = self.particles if count is None else count
        size = self.positions.shape[1] * self.positions.element_size()
        most = per_scratch(self.positions.device, rows_of_scratch * size)
        halves = (0, count // 2, count) if self.mirrored else (0, count)
        for begin, end in itertools.pairwise(halves):
            for first in range(begin, end, most):
                yield slice(first, min(end, first + most))

    def uniforms(self, rows: slice, draws: int, every: bool = False) -> tuple[Tensor, ...]:
        """Draw ``draws`` independent uniform numbers in (0, 1) for elements of some particles.

        The first are the same whatever ``draws``.

        Args:
            rows: of the particles, one of :meth:`chunks`.
            draws: how many.
            every: one for each element, even without ``per_dimension``.

        Returns:
            ``draws`` tensors, each (rows, N), or (rows, 1) without ``per_dimension``.
        """
        first, mirror = self._drawn(rows)
        cols = self.positions.shape[1] if self.per_dimension or every else 1
        count = rows.stop - rows.start
        word = stream_word(OPTIMIZER_ID, STREAM_SWARM_OTHER)
        u = _ops.uniforms(self.key, word, first, count, draws * cols, self.positions.dtype)
        return (1 - u if mirror else u).view(count, draws, cols).unbind(1)

    def normals(self, rows: slice, draws: int = 1) -> tuple[Tensor, ...]:
        """Draw standard normal numbers; as :meth:`uniforms`, always of every element."""
        first, mirror = self._drawn(rows)
        cols = self.positions.shape[1]
        count = rows.stop - rows.start
        word = stream_word(OPTIMIZER_ID, STREAM_SWARM_OTHER)
        dtype = self.positions.dtype
        z = _ops.dense_materialise(self.key, word, first, count, draws, cols, False, dtype)
        return (-z if mirror else z).unbind(1)

    def shuffled(self) -> Tensor:
        """Return the particles in random order, (P,) int64."""
        p = self.particles
        word = stream_word(OPTIMIZER_ID, STREAM_SWARM_OTHER)
        # The numbers of particle P, which does not exist.
        u = _ops.uniforms(self.key, word, p, 1, p, torch.float32)[0]
        return u.argsort(stable=True)

    def _drawn(self, rows: slice) -> tuple[int, bool]:
        """Whose numbers a chunk has, and whether mirrored."""
        half = self.particles // 2
        mirror = self.mirrored and rows.start >= half
        return rows.start - half if mirror else rows.start, mirror


class Variant(ABC):
    """A way to move a swarm. It is a value: what it remembers is in ``Flight.extra``.

    Attributes:
        velocities: whether particles have velocities (class attribute).
        bests: whether they remember their own best positions.
        social: whether they hear of each other through the topology.
        topology: the default one.
        mirrors: whether mirrored random numbers make sense.
    """

    velocities: ClassVar[bool] = True
    bests: ClassVar[bool] = True
    social: ClassVar[bool] = True
    topology: ClassVar[str] = "global"
    mirrors: ClassVar[bool] = True

    @abstractmethod
    def move(self, flight: Flight) -> None:
        """Bring the bests up to date (:meth:`Flight.keep`) and move; waits for no device."""

    def numbers(self, step: int) -> tuple[float, ...]:
        """Return what schedules say of a step, checked; called before anything changes."""
        return ()

    def extra(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the variant's own tensors as they are before the first step."""
        return {}


Schedule = float | Callable[[int], float]


def scheduled(name: str, value: Schedule, step: int) -> float:
    """Return the number of a step, of a schedule or a constant; at least 0 and finite."""
    return check_number(name, value(step) if callable(value) else value)


def check_schedule(name: str, value: Schedule) -> None:
    """Raise unless ``value`` is a number of at least 0, or a function of the step."""
    if not callable(value):
        check_number(name, value)
