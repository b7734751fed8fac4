"""Searches that also accept worse points, fewer and fewer of them.

Kirkpatrick, Gelatt, Vecchi, "Optimization by simulated annealing" (Science 220, 1983); Dueck,
Scheuer, "Threshold accepting" (Journal of Computational Physics 90, 1990). Names and defaults are
those of torchzero's later versions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch

from ...checks import as_count, check_flag, check_number
from .base import Point, ScalarOptimizer, Trial
from .checks import check_options
from .samplers import Sampler


class Annealing(ScalarOptimizer):
    """Base of both: a walk whose tolerance falls geometrically, and that may return to its best.

    Args:
        params: parameters or groups of them.
        lr: scale of a move.
        tolerance: of the first steps, in units of the loss.
        factor: what the tolerance is multiplied by.
        every: steps between two multiplications.
        patience: steps without a new best after which the walk goes on from the best point; None:
            it never does.
        stochastic: evaluate the present point again at every step.
        sampler: of moves.
        seed: of the random numbers.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        tolerance: tuple[str, float],
        factor: tuple[str, float],
        every: int,
        patience: int | None,
        stochastic: bool,
        sampler: Sampler,
        seed: int | None,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        self._first = check_number(*tolerance)
        self._factor = check_number(*factor, high=1.0)
        self._every = as_count("iter_per_cool", every)
        self._patience = None if patience is None else as_count("max_bad_iter", patience)
        self.stochastic = check_flag("stochastic", stochastic)
        super().__init__(params, {"lr": lr, "sampler": sampler}, seed)

    @abstractmethod
    def _accepts(self, rise: float, tolerance: float, draw: int) -> bool:
        """Whether to take a point that is worse by ``rise``, above 0."""

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr", "sampler")

    def _start(self) -> dict[str, Any]:
        return {"loss": None, "tries": 0, "without_best": 0}

    @property
    def tolerance(self) -> float:
        """The tolerance of the next step."""
        return self._first * self._factor ** (self.progress["tries"] // self._every)

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        progress = self.progress
        before = progress["best_loss"]
        if progress["loss"] is None or self.stochastic:
            progress["loss"] = trial(home)
        draw, tolerance = self._next_draw(), self.tolerance
        noise = self._sample(home, draw)
        point = list(torch._foreach_add(home, torch._foreach_mul(noise, self._option("lr"))))
        loss, rise = trial(point), math.nan
        if math.isfinite(loss):
            rise = loss - progress["loss"] if math.isfinite(progress["loss"]) else -math.inf
        progress["tries"] += 1
        progress["without_best"] += 1
        if progress["best_loss"] < before:
            progress["without_best"] = 0
        if rise <= 0 or (rise > 0 and self._accepts(rise, tolerance, draw)):
            progress["loss"] = loss
        else:
            point = home
        if progress["without_best"] == self._patience and progress["best"]:
            progress["without_best"] = 0
            progress["loss"] = progress["best_loss"]
            point = [b.to(h) for b, h in zip(progress["best"], home, strict=True)]
        return point, progress["loss"]


class SimulatedAnnealing(Annealing):
    """Accept a point that is worse by d with probability exp(-d / T), while T falls.

    The present point moves by ``lr z``; a loss that is not higher is always accepted. After a step
    the parameters are the present point: the best is :meth:`best`.

    The first step has 2 evaluations, others 1; with ``stochastic`` all have 2. A step returns the
    loss of the present point.

    Args:
        params: parameters or groups of them.
        lr: scale of a move.
        init_temp: T of the first steps, in units of the loss.
        temp_mul: factor of T, 0 to 1, ...
        iter_per_cool: ... after so many steps.
        max_bad_iter: steps without a new best after which the search goes on from the best point;
            None: it never does.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor.
        stochastic: evaluate the present point again at every step, for losses that are of other
            data at each.
        seed: of the random numbers.

    Raises:
        TypeError: arguments of another type.
        ValueError: numbers out of range, an unknown sampler, no parameter that requires grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import SimulatedAnnealing
        >>> x = torch.nn.Parameter(torch.tensor([2.9]))
        >>> waves = lambda: x.square().sum() + 3 * (1 - torch.cos(6 * x)).sum()  # many minima
        >>> search = SimulatedAnnealing([x], lr=0.5, init_temp=2.0, iter_per_cool=20)
        >>> for _ in range(600):
        ...     loss = search.step(waves)
        >>> search.best_loss < 0.1
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        init_temp: float = 0.1,
        temp_mul: float = 0.9,
        iter_per_cool: int = 500,
        max_bad_iter: int | None = 50,
        sampler: Sampler = "normal",
        stochastic: bool = False,
        seed: int | None = 0,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        super().__init__(
            params,
            lr,
            ("init_temp", init_temp),
            ("temp_mul", temp_mul),
            iter_per_cool,
            max_bad_iter,
            stochastic,
            sampler,
            seed,
        )

    def _accepts(self, rise: float, tolerance: float, draw: int) -> bool:
        (u,) = self._source(draw).numbers(1)
        return tolerance > 0 and u < math.exp(-rise / tolerance)


class ThresholdAccepting(Annealing):
    """Accept every point that is worse by less than a threshold, while the threshold falls.

    As :class:`SimulatedAnnealing` without chance.

    Args:
        params: parameters or groups of them.
        lr: scale of a move.
        init_threshold: of the first steps, in units of the loss.
        threshold_mul: factor of the threshold, 0 to 1, ...
        iter_per_cool: ... after so many steps.
        max_bad_iter: steps without a new best after which the search goes on from the best point;
            None: it never does.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor.
        stochastic: evaluate the present point again at every step.
        seed: of the random numbers.

    Raises:
        TypeError: arguments of another type.
        ValueError: numbers out of range, an unknown sampler, no parameter that requires grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import ThresholdAccepting
        >>> x = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
        >>> search = ThresholdAccepting([x], lr=0.3)
        >>> for _ in range(200):
        ...     loss = search.step(lambda: x.square().sum())
        >>> search.best_loss < 0.1
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        init_threshold: float = 0.1,
        threshold_mul: float = 0.9,
        iter_per_cool: int = 500,
        max_bad_iter: int | None = 50,
        sampler: Sampler = "normal",
        stochastic: bool = False,
        seed: int | None = 0,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        super().__init__(
            params,
            lr,
            ("init_threshold", init_threshold),
            ("threshold_mul", threshold_mul),
            iter_per_cool,
            max_bad_iter,
            stochastic,
            sampler,
            seed,
        )

    def _accepts(self, rise: float, tolerance: float, draw: int) -> bool:
        return rise < tolerance
