"""The evaluation of a population too large for one forward or for one process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import PeakMemory, is_out_of_memory, to_bytes
from ..model import PerturbedModel
from .base import member_values
from .share import Share

ESTIMATES = ("full", "sharded", "auto")

# Directions of the first forward where only a limit of memory is given: few, to learn what one
# takes. No forward grows by more than this factor over what has been measured.
FIRST_CHUNK = 2
GROWTH = 8


class Evaluation(Share):
    """Scores a population in forwards of bounded size, and its share of one in each process.

    Args:
        pm: the model and its population.
        chunk: directions of a forward, at most; None for no bound.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.
        distributed: whether to share the population with other processes: a process group, None for
            the default group if there is one, False for no.
        estimate: how processes come by the estimate: "full", every process draws all directions;
            "sharded", every process draws its own and the sums travel; "auto", what takes less time
            at the first step.

    Raises:
        TypeError: arguments of another type.
        ValueError: chunk below 1 or given beside max_memory, an unknown estimate, more processes
            than directions.
    """

    def __init__(
        self,
        pm: PerturbedModel,
        chunk: int | None,
        max_memory: int | float | str | None,
        distributed: torch.distributed.ProcessGroup | bool | None,
        estimate: str,
    ) -> None:
        """Cut the population; from now on the model shows this process's share of it."""
        if chunk is not None and max_memory is not None:
            raise ValueError("chunk and max_memory must not both be given: each decides the other")
        if estimate not in ESTIMATES:
            raise ValueError(f"estimate must be one of {ESTIMATES}, got {estimate!r}")
        self.pm = pm
        self.max_memory = None if max_memory is None else to_bytes("max_memory", max_memory)
        super().__init__(pm.population, chunk, distributed)
        self.estimate = estimate
        if self.max_memory is not None:
            self.split.chunk = min(FIRST_CHUNK, self.split.count)
        pm.state.show(self.split.first, self.split.count)

    # ---- scoring -------------------------------------------------------------------------------

    @property
    def bounded(self) -> bool:
        """Whether the share may take several forwards."""
        return self.split.chunk < self.split.count or self.max_memory is not None

    def windows(self) -> Iterator[PerturbedModel]:
        """Iterate over the forwards of this process's share; the model shows one's directions."""
        done = 0
        while done < self.split.count:
            count = min(self.split.chunk, self.split.count - done)
            with self.pm.window(self.split.first + done, count):
                yield self.pm
            done += count

    def score(self, closure: Callable[[], Any], device: torch.device) -> Any:
        """Return what ``closure`` says of the whole share: member values, (S, count).

        Where one forward is all, what it returned as it is.
        """
        if not self.bounded:
            return self._call(closure)
        parts = []
        for shown in self.windows():
            values = self._measure(closure, device) if self.max_memory else self._call(closure)
            parts.append(member_values(values, shown, device))
        if any(len(part) != len(parts[0]) for part in parts):
            raise ValueError(
                "closure must return values of the same signs in every forward of a generation, "
                f"got S = {' and '.join(str(len(part)) for part in parts)}"
            )
        return torch.cat(parts, 1)

    def _call(self, closure: Callable[[], Any]) -> Any:
        try:
            return closure()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise type(error)(
                f"{error}\nThe closure ran out of memory with {self.pm.directions} directions in a "
                "forward. Evaluate a generation in several: pass chunk= (directions of a forward) "
                'or max_memory= (bytes, or a text such as "4 GB") to the optimizer, and call '
                "pm.replicate inside the closure. Memory of activations grows with the rows; "
                "noise takes none unless storage='stored'."
            ) from error

    def _measure(self, closure: Callable[[], Any], device: torch.device) -> Any:
        """Score a window, and set the next ones to what fits."""
        assert self.max_memory is not None
        shown = self.pm.directions
        with PeakMemory(device) as memory:
            values = self._call(closure)
        each = max(1, memory.peak // shown)
        if memory.peak > self.max_memory and shown == 1:
            warnings.warn(
                f"max_memory is {self.max_memory:,} bytes, but one direction alone takes "
                f"{memory.peak:,}",
                stacklevel=2,
            )
        fits = max(1, self.max_memory // each)
        self.split.chunk = min(fits, GROWTH * shown, self.split.count)
        return values

    # ---- the estimate --------------------------------------------------------------------------

    def set_grad(self, weights: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Set ``.grad`` to the estimate of the whole population, from (population,) weights."""
        if self.estimate == "auto":
            self.estimate = self._choose(weights, parameters)
        if self.processes is None or self.estimate == "full":
            with self.pm.window(0, self.split.population):
                self.pm.set_grad(weights)
        else:
            self._set_sharded(weights, parameters)

    def _set_sharded(self, weights: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        assert self.processes is not None
        first, count = self.split.first, self.split.count
        with self.pm.window(first, count):
            self.pm.set_grad(weights[first : first + count])
        self.processes.add_up(p.grad for p in parameters if p.grad is not None)

    def _choose(self, weights: Tensor, parameters: Iterable[nn.Parameter]) -> str:
        """Time both ways to the estimate; the slowest process counts."""
        if self.processes is None:
            return "full"
        seconds = {}
        for way in ("full", "sharded"):
            self.estimate = way
            taken = []
            for _ in range(2):  # the first makes tensors and warms up
                start = time.perf_counter()
                self.set_grad(weights, parameters)
                if weights.device.type == "cuda":
                    torch.cuda.synchronize(weights.device)
                taken.append(time.perf_counter() - start)
            slowest = self.processes.maximum(torch.tensor(min(taken), dtype=torch.float64))
            seconds[way] = float(slowest)
        return min(seconds, key=lambda way: seconds[way])
