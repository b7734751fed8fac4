"""A process's share of a population."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Processes
from ..noise.turn import Turn
from .split import Split


class Share:
    """What this process scores of a population, and how it comes by the losses of the others.

    Args:
        population: members, or directions where members have signs, of all processes together.
        chunk: directions of a forward, at most; None for no bound.
        distributed: whether to share the population with other processes: a process group, None for
            the default group if there is one, False for no.

    Attributes:
        processes: those that share the population, or None.
        split: what of it is scored here.
        turn: the block that a thread is in while it steps.

    Raises:
        TypeError: arguments of another type.
        ValueError: chunk below 1, more processes than directions.
    """

    def __init__(
        self,
        population: int,
        chunk: int | None,
        distributed: torch.distributed.ProcessGroup | bool | None,
    ) -> None:
        """Cut the population."""
        self.processes = _processes(distributed)
        rank, size = (self.processes.rank, self.processes.size) if self.processes else (0, 1)
        self.split = Split(population, chunk, rank, size)
        self.turn = Turn()

    @property
    def here(self) -> slice:
        """The members of the population that this process scores."""
        return slice(self.split.first, self.split.first + self.split.count)

    def gather(self, members: Tensor) -> Tensor:
        """Join the member values of all processes: (S, count) -> (S, population)."""
        if self.processes is None:
            return members
        return self.processes.gather(members, self.split.sizes)

    def memory_state(self) -> dict[str, int]:
        """Return what has been learnt of memory: nothing where members are scored one by one."""
        return {}

    def load_memory_state(self, state: dict[str, int]) -> None:
        """Go on from :meth:`memory_state`."""


def _processes(distributed: torch.distributed.ProcessGroup | bool | None) -> Processes | None:
    """Return those that share the population; None if there are no others."""
    if distributed is False:
        return None
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed is None or distributed is True:
        if distributed is None and not available:
            return None
        return Processes()
    if not available or not isinstance(distributed, torch.distributed.ProcessGroup):
        raise TypeError(
            "distributed must be a process group, True, False or None, got "
            f"{type(distributed).__name__}"
        )
    return Processes(distributed)
