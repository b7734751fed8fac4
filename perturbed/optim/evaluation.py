"""The evaluation of a population too large for one forward or for one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import is_out_of_memory, to_bytes, with_advice
from ..model import PerturbedModel
from .base import member_values
from .budget import Budget
from .share import Share

ESTIMATES = ("full", "sharded", "auto")


def check_estimate(estimate: object) -> None:
    """Refuse what is no way to the estimate."""
    if not isinstance(estimate, str) or estimate not in ESTIMATES:
        raise ValueError(f"estimate must be one of {ESTIMATES}, got {estimate!r}")


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

    Attributes:
        budget: what is known of the memory that forwards take; None without max_memory.

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
        check_estimate(estimate)
        self.pm = pm
        limit = None if max_memory is None else to_bytes("max_memory", max_memory)
        super().__init__(pm.population, chunk, distributed)
        self.turn = pm.state.turn
        self.estimate = estimate
        self.budget = None if limit is None else Budget(limit, self.split.count)
        pm.state.show(self.split.first, self.split.count)

    # ---- scoring -------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Directions of the next forward, at most."""
        return self.split.chunk if self.budget is None else self.budget.chunk

    @property
    def bounded(self) -> bool:
        """Whether the share may take several forwards."""
        return self.split.chunk < self.split.count or self.budget is not None

    def windows(self) -> Iterator[PerturbedModel]:
        """Iterate over the forwards of this process's share; the model shows one's directions."""
        done = 0
        while done < self.split.count:
            with self._window(done) as count:
                yield self.pm
            done += count

    @contextmanager
    def _window(self, done: int) -> Iterator[int]:
        """Show, for a block, what comes after the first ``done`` directions of the share.

        Returns:
            How many directions that is.
        """
        count = min(self.chunk, self.split.count - done)
        with self.pm.window(self.split.first + done, count):
            if self.budget is None:
                yield count
            else:
                device = next(self.pm.model.parameters()).device
                with self.budget.watch(count, device):
                    yield count

    def score(self, closure: Callable[[], Any], device: torch.device) -> Any:
        """Return what ``closure`` says of the whole share: member values, (S, count).

        Where one forward is all, what it returned as it is. One that runs out of memory under
        max_memory is repeated with half its directions.
        """
        if not self.bounded:
            return self.call(closure)
        parts: list[Tensor] = []
        repeats: set[int] = set()
        done = 0
        while done < self.split.count:
            try:
                with self._window(done) as count:
                    values = self.call(closure)
                    parts.append(member_values(values, self.pm, device))
            except RuntimeError as error:
                shown = min(self.chunk, self.split.count - done)
                if self.budget is None or not is_out_of_memory(error):
                    raise
                if not self.budget.halve(shown):
                    raise
                continue
            done += count
            if isinstance(values, Tensor) and values.dim() == 1:
                repeats.add(len(values) // count)
        if len(repeats) > 1:
            raise ValueError(
                "closure must return as many values for a direction in every forward of a "
                f"generation, got {' and '.join(map(str, sorted(repeats)))}; rows that are each "
                "member's own must be those of the forward's members: pm.window_rows(x)"
            )
        if any(len(part) != len(parts[0]) for part in parts):
            raise ValueError(
                "closure must return values of the same signs in every forward of a generation, "
                f"got S = {' and '.join(str(len(part)) for part in parts)}"
            )
        return torch.cat(parts, 1)

    def call(self, closure: Callable[[], Any]) -> Any:
        """Return what ``closure`` says of the directions that are shown.

        Raises:
            ValueError: the closure draws other noise.
        """
        if not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        draw = None if self.pm.state.absolute else self.pm.get_extra_state()
        try:
            values = closure()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise with_advice(error, self._advice()) from error
        if draw is not None and self.pm.get_extra_state() != draw:
            raise ValueError(
                "closure must score the noise that the step has drawn, but it drew other noise: "
                "it needs no pm.set_noise(), set_seed() or set_noise_scale()"
            )
        return values

    def _advice(self) -> str:
        shown = self.pm.directions
        failed = f"The closure ran out of memory with {shown} directions in a forward."
        if shown == 1:
            return (
                f"{failed} It is the least there is: show every member fewer or shorter rows, or "
                "use layers in a narrower dtype."
            )
        if self.budget is not None or self.split.chunk < self.split.count:
            return f"{failed} Give the optimizer a smaller chunk= or max_memory=."
        return (
            f"{failed} Evaluate a generation in several: give the optimizer chunk= (directions of "
            'a forward) or max_memory= (bytes, or a text such as "4 GB"), and call pm.replicate '
            "inside the closure; the result is the same."
        )

    def memory_state(self) -> dict[str, int]:
        """Return what has been learnt of memory: forwards of the same sizes give the same bits."""
        return {} if self.budget is None else self.budget.state()

    def load_memory_state(self, state: dict[str, int]) -> None:
        """Go on from :meth:`memory_state`, where there is a limit and it is the same."""
        if self.budget is not None and state:
            self.budget.load(state)

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
