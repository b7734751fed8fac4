"""Several optimizers that take turns, or average their steps, after torchzero's wrappers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..checks import as_int, check_like, check_number
from ..noise.state import as_seed, check_seed
from .composite import (
    Closure,
    CompositeOptimizer,
    Mode,
    Optimizer,
    check_mode,
    checked,
    clones,
    per_member,
    run,
)
from .zeroth.closure import to_loss
from .zeroth.samplers import Source


class _Runner(CompositeOptimizer):
    """Members that are run in a mode each."""

    def __init__(self, optimizers: Sequence[Optimizer], mode: Mode | Sequence[Mode]) -> None:
        super().__init__(optimizers)
        self.modes = [check_mode(m) for m in per_member("mode", mode, len(self.optimizers))]

    def _run(self, i: int, closure: Closure | None) -> Any:
        return run(self.optimizers[i], self.modes[i], checked(closure))


class SequentialOpt(_Runner):
    """Step all optimizers one after the other, each from where the one before it went.

    Each is given the closure. Where one leaves gradients for the next, that one's mode is
    ``lambda opt, closure: opt.step()``, which leaves the closure alone.

    Args:
        optimizers: the members, of the same parameters or of others.
        mode: "closure" (``opt.step(closure)``), "step" (the closure is called here once, with
            gradients, then ``opt.step()``), a function (opt, closure) -> loss, or a list of these.

    Raises:
        TypeError: what is no list of optimizers.
        ValueError: no optimizer, an unknown mode.

    Example:
        >>> import torch
        >>> from perturbed.optim import RandomSearch, SequentialOpt
        >>> p = torch.nn.Parameter(torch.tensor([4.0]))
        >>> both = SequentialOpt([RandomSearch([p]), torch.optim.SGD([p], lr=0.1)])
        >>> def closure():
        ...     both.zero_grad()
        ...     loss = p.square().sum()
        ...     if torch.is_grad_enabled():  # the search evaluates without gradients
        ...         loss.backward()
        ...     return loss
        >>> for _ in range(30):
        ...     loss = both.step(closure)
        >>> bool(loss < 0.01)
        True
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], mode: Mode | Sequence[Mode] = "closure"
    ) -> None:
        """Check the arguments."""
        super().__init__(optimizers, mode)

    def step(self, closure: Closure | None = None) -> Any:
        """Step every optimizer; return the loss of the last."""
        loss = None
        for i in range(len(self.optimizers)):
            loss = self._run(i, closure)
        return loss


class AlternatingOpt(_Runner):
    """Let optimizers take turns, round and round.

    Args:
        optimizers: the members.
        steps: of a turn: one number or one for each.
        mode: as of :class:`SequentialOpt`.

    Raises:
        TypeError: what is no list of optimizers, steps that are no integers.
        ValueError: no optimizer, steps below 1, an unknown mode.

    Example:
        >>> import torch
        >>> from perturbed.optim import AlternatingOpt
        >>> p = torch.nn.Parameter(torch.tensor([4.0]))
        >>> turns = AlternatingOpt([torch.optim.SGD([p], lr=1.0), torch.optim.SGD([p], lr=0.1)])
        >>> for _ in range(3):
        ...     p.grad = torch.ones(1)
        ...     turns.step()
        >>> p.data
        tensor([1.9000])
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        steps: int | Sequence[int] = 1,
        mode: Mode | Sequence[Mode] = "closure",
    ) -> None:
        """Check the arguments."""
        super().__init__(optimizers, mode)
        given = per_member("steps", steps, len(self.optimizers))
        self.turns = [as_int("steps", n) for n in given]
        if min(self.turns) < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.progress = {"member": 0, "done": 0}

    def step(self, closure: Closure | None = None) -> Any:
        """Step the optimizer whose turn it is; return its loss."""
        i = self.progress["member"]
        loss = self._run(i, closure)
        self.progress["done"] += 1
        if self.progress["done"] >= self.turns[i]:
            self.progress = {"member": (i + 1) % len(self.optimizers), "done": 0}
        return loss

    def _check_progress(self, progress: dict[str, Any]) -> None:
        super()._check_progress(progress)
        if progress["member"] >= len(self.optimizers):
            raise ValueError(
                f"progress['member'] must be below {len(self.optimizers)}, the number of "
                f"optimizers, got {progress['member']}"
            )


class RandomOpt(_Runner):
    """Step one optimizer, drawn anew each time.

    Args:
        optimizers: the members.
        weights: chances in proportion; default: all alike.
        mode: as of :class:`SequentialOpt`.
        seed: of the draws; None takes one from the operating system.

    Raises:
        TypeError: what is no list of optimizers, weights that are no numbers.
        ValueError: no optimizer, weights that are negative or all 0, an unknown mode.

    Example:
        >>> import torch
        >>> from perturbed.optim import RandomOpt
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> members = [torch.optim.SGD([p], lr=1.0), torch.optim.SGD([p], lr=1000.0)]
        >>> drawn = RandomOpt(members, weights=[3, 1])
        >>> for _ in range(400):
        ...     p.grad = -torch.ones(1)
        ...     drawn.step()
        >>> 80 < int(p) // 1000 < 120
        True
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        weights: Sequence[float] | None = None,
        mode: Mode | Sequence[Mode] = "closure",
        seed: int | None = 0,
    ) -> None:
        """Check the arguments."""
        super().__init__(optimizers, mode)
        self.weights = _check_weights(weights, len(self.optimizers))
        self.seed = check_seed(seed)
        self.progress = {"draws": 0}

    def step(self, closure: Closure | None = None) -> Any:
        """Step one optimizer; return its loss. If the closure raises, the draw stays."""
        (u,) = Source(self.seed, self.progress["draws"], 0).numbers(1)
        left = u * sum(self.weights)
        usable = [i for i, weight in enumerate(self.weights) if weight > 0]
        chosen = usable[-1]
        for i in usable:
            left -= self.weights[i]
            if left < 0:
                chosen = i
                break
        loss = self._run(chosen, closure)
        self.progress["draws"] += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the members, and the position in the draws."""
        state = super().state_dict()
        return {**state, "progress": {**state["progress"], "seed": self.seed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises as that of other composite optimizers."""
        before = self.progress
        self.progress = {**before, "seed": self.seed}  # what a state must have
        try:
            super().load_state_dict(state_dict)
            before, self.seed = {"draws": self.progress["draws"]}, self.progress["seed"]
        finally:
            self.progress = before

    def _check_progress(self, progress: dict[str, Any]) -> None:
        check_like("progress['draws']", progress["draws"], 0)
        as_seed(progress["seed"], "progress['seed']")


class OptimizerAverage(_Runner):
    """Let all optimizers step from the same point, and move by the weighted mean of their steps.

    Args:
        optimizers: the members.
        weights: of their steps, in proportion; default: all alike. A parameter moves by the mean
            over all members, those that do not have it included.
        nbest: only that many take part, those with the lowest loss where they arrive; takes one
            more call of the closure for each. A loss that is NaN or infinite never does, and where
            all are nothing moves.
        mode: as of :class:`SequentialOpt`.

    Raises:
        TypeError: what is no list of optimizers, weights that are no numbers.
        ValueError: no optimizer, weights that are negative or all 0, nbest out of range, an unknown
            mode.

    Example:
        >>> import torch
        >>> from perturbed.optim import OptimizerAverage
        >>> p = torch.nn.Parameter(torch.tensor([4.0]))
        >>> members = [torch.optim.SGD([p], lr=0.1), torch.optim.SGD([p], lr=0.4)]
        >>> average = OptimizerAverage(members, weights=[1, 2])
        >>> p.grad = torch.ones(1)
        >>> average.step()
        >>> p.data  # 4 - (1 * 0.1 + 2 * 0.4) / 3
        tensor([3.7000])
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        weights: Sequence[float] | None = None,
        nbest: int | None = None,
        mode: Mode | Sequence[Mode] = "closure",
    ) -> None:
        """Check the arguments."""
        super().__init__(optimizers, mode)
        count = len(self.optimizers)
        self.weights = _check_weights(weights, count)
        self.nbest = None if nbest is None else as_int("nbest", nbest)
        if self.nbest is not None and not 1 <= self.nbest <= count:
            raise ValueError(f"nbest must be from 1 to {count}, got {nbest}")

    def step(self, closure: Closure | None = None) -> Any:
        """Step from the same point, and move by the mean.

        Args:
            closure: returns the loss; needed for ``nbest``.

        Returns:
            The first optimizer's loss.

        Raises:
            ValueError: nbest without a closure.
        """
        if self.nbest is not None and closure is None:
            raise ValueError("closure must be given with nbest, which compares losses, got None")
        parameters = list(self._held())
        start = clones(parameters)
        grads = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        losses, ends, arrived = [], [], []
        try:
            for i in range(len(self.optimizers)):
                losses.append(self._run(i, closure))
                ends.append(clones(parameters))
                if self.nbest is not None:
                    function = checked(closure)
                    assert function is not None
                    arrived.append(to_loss(function()))
                self._put(parameters, start)
                if closure is None:  # a member may have changed the gradients that others share
                    for p, grad in zip(parameters, grads, strict=True):
                        p.grad = grad if grad is None else grad.clone()
        except BaseException:
            self._put(parameters, start)
            raise
        self._put(parameters, self._mean(start, ends, self._chosen(arrived)))
        return losses[0]

    def _chosen(self, arrived: list[float]) -> list[int]:
        """Return who takes part."""
        if self.nbest is None:
            return list(range(len(self.optimizers)))
        finite = [i for i, loss in enumerate(arrived) if math.isfinite(loss)]
        return sorted(finite, key=arrived.__getitem__)[: self.nbest]

    @torch.no_grad()
    def _mean(
        self, start: list[torch.Tensor], ends: list[list[torch.Tensor]], chosen: list[int]
    ) -> list[torch.Tensor]:
        total = sum(self.weights[i] for i in chosen)
        mean = clones(start)
        if total == 0:  # nobody, or only members of weight 0
            return mean
        for i in chosen:
            for m, end, first in zip(mean, ends[i], start, strict=True):
                m.add_(end - first, alpha=self.weights[i] / total)
        return mean

    @staticmethod
    @torch.no_grad()
    def _put(parameters: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    checked_weights = [check_number("weights", w) for w in per_member("weights", weights, count)]
    if sum(checked_weights) == 0:
        raise ValueError("weights must not all be 0")
    return checked_weights
