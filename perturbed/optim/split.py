"""How a population is cut: over processes, and into forwards that fit in memory."""

from __future__ import annotations

import itertools

from ..checks import as_int


class Split:
    """Which directions this process evaluates, and in which forwards.

    Directions are cut into chunks, of which every process takes a run of neighbours. The cut
    decides nothing about a member's noise. Chunks of one size give forwards of one shape, and so
    bits that do not depend on the number of processes.

    Args:
        population: directions of all processes together.
        chunk: directions of a forward, at most; None for all that a process has.
        rank: number of this process.
        size: number of processes.

    Attributes:
        sizes: directions of each process.
        first: number of this process's first direction.
        count: how many it has.
        chunk: directions of a forward, at most.

    Raises:
        ValueError: chunk below 1, more processes than directions.
    """

    def __init__(
        self, population: int, chunk: int | None = None, rank: int = 0, size: int = 1
    ) -> None:
        """Cut."""
        if size > population:
            raise ValueError(
                f"there must be a direction for every process, got {size} processes for a "
                f"population of {population} directions"
            )
        self.population = population
        if chunk is not None and (chunk := as_int("chunk", chunk)) < 1:
            raise ValueError(f"chunk must be at least 1 direction, got {chunk}")
        # Whole chunks for every process, unless there are fewer chunks than processes.
        unit = 1 if chunk is None or -(-population // chunk) < size else chunk
        units = -(-population // unit)
        starts = [min(population, r * units // size * unit) for r in range(size + 1)]
        self.sizes = [end - start for start, end in itertools.pairwise(starts)]
        self.first, self.count = starts[rank], self.sizes[rank]
        self.chunk = self.count if chunk is None else min(chunk, self.count)
