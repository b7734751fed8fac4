"""Random search: independent points, or points around the best, nearer and nearer.

Rastrigin, "The convergence of the random search method in the extremal control of a many parameter
system" (1963), and its textbook forms; Appel, Labarre, Radulovic, "On accelerated random search"
(SIAM Journal on Optimization 14, 2004). Defaults and names are torchzero's.
"""

from __future__ import annotations

from typing import Any

import torch

from ...checks import as_count, check_flag, check_number
from .base import Point, ScalarOptimizer, Trial
from .checks import check_options, improves
from .domain import check_domain
from .samplers import Sampler, sample


class RandomSearch(ScalarOptimizer):
    """Draw independent points and keep the best.

    A point is ``lr * z`` with z from ``sampler``, or uniform in ``domain``. It does not depend on
    earlier ones, so this is the baseline that every other method should beat. After a step the
    parameters are the best point so far.

    The first step evaluates the parameters as they are, too: 2 evaluations, then 1 a step. A step
    returns the best loss so far.

    Args:
        params: parameters or groups of them.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor.
        domain: (low, high) of every element, instead of ``sampler``.
        lr: factor of what the sampler draws; without effect on a domain.
        seed: of the random numbers.

    Raises:
        TypeError: arguments of another type.
        ValueError: an unknown sampler, an empty domain, lr negative, no parameter that requires
            grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import RandomSearch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = RandomSearch([x], domain=(-4, 4))
        >>> for _ in range(200):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 0.5), search.evaluations
        (True, 201)
        >>> bool(loss == x.square().sum())
        True
    """

    def __init__(
        self,
        params: Any,
        sampler: Sampler = "normal",
        domain: tuple[float, float] | None = None,
        lr: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        super().__init__(params, {"lr": lr, "sampler": sampler, "domain": domain}, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr", "sampler")
        if group["domain"] is not None:
            check_domain(group["domain"])

    def _start(self) -> dict[str, Any]:
        return {"loss": None}

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        if self.progress["loss"] is None:
            self.progress["loss"] = trial(home)
        draw = self._next_draw()
        point: Point = []
        for g, part in self._of_groups():
            group, like = self.param_groups[g], home[part]
            if group["domain"] is None:
                point += torch._foreach_mul(
                    sample(group["sampler"], like, self._source(draw, 0, g)), group["lr"]
                )
            else:
                low, high = group["domain"]
                drawn = self._source(draw, 0, g).uniforms(like)
                point += [u.mul_(high - low).add_(low) for u in drawn]
        return _keep_better(self, home, point, trial)


class ShrinkingRandomSearch(ScalarOptimizer):
    """Draw points around the best so far, nearer and nearer.

    A point is ``best + lr_t z``, z from ``sampler``. With ``nsteps`` the scale falls linearly,
    ``lr_t = lr (nsteps - t) / nsteps`` at step t = 0, 1, ..., and the search is over after
    ``nsteps``: further steps evaluate the best again and do not move. Without it ``lr`` is what a
    learning-rate scheduler makes of it. After a step the parameters are the best point so far.

    The first step has 2 evaluations, others 1; with ``stochastic`` all have 2. A step returns the
    best loss so far.

    Args:
        params: parameters or groups of them.
        lr: scale of the draws.
        nsteps: steps until the scale is 0; None: no end.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor.
        stochastic: evaluate the best again at every step and compare with that, for losses that are
            of other data at each.
        seed: of the random numbers.

    Raises:
        TypeError: arguments of another type.
        ValueError: nsteps below 1, an unknown sampler, lr negative, no parameter that requires
            grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import ShrinkingRandomSearch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = ShrinkingRandomSearch([x], nsteps=200)
        >>> for _ in range(200):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 0.01)
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        nsteps: int | None = None,
        sampler: Sampler = "normal",
        stochastic: bool = False,
        seed: int | None = 0,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        self.nsteps = None if nsteps is None else as_count("nsteps", nsteps)
        self.stochastic = check_flag("stochastic", stochastic)
        super().__init__(params, {"lr": lr, "sampler": sampler}, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr", "sampler")

    def _start(self) -> dict[str, Any]:
        return {"loss": None}

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        if self.progress["loss"] is None or self.stochastic:
            self.progress["loss"] = trial(home)
        left = 1.0
        if self.nsteps is not None:
            left = max(0, self.nsteps - self.progress["steps"]) / self.nsteps
        noise = self._sample(home, self._next_draw())
        torch._foreach_mul_(noise, [lr * left for lr in self._option("lr")])
        return _keep_better(self, home, list(torch._foreach_add(home, noise)), trial)


class AcceleratedRandomSearch(ScalarOptimizer):
    """Draw points in a box around the best so far, which shrinks until one of them is better.

    The box is the part of ``domain`` within ``r (high - low)`` of the best point in every element,
    and a point is uniform in it. ``r`` begins at ``lr``, all of the domain by default; a point that
    is no better multiplies it by ``shrink``, and a better one, or ``restart`` in a row that are
    not, bring it back. After a step the parameters are the best point so far.

    The first step evaluates the parameters as they are, too: 2 evaluations, then 1 a step. A step
    returns the best loss so far.

    Args:
        params: parameters or groups of them.
        domain: (low, high) of every element.
        shrink: what r is multiplied by, above 0 and at most 1.
        restart: failures in a row after which r is ``lr`` again.
        lr: r at the beginning, at most 1 to be of use.
        seed: of the random numbers.

    Raises:
        TypeError: arguments of another type.
        ValueError: an empty domain, numbers out of range, no parameter that requires grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import AcceleratedRandomSearch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = AcceleratedRandomSearch([x], domain=(-4, 4))
        >>> for _ in range(200):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 1e-3), search.evaluations
        (True, 201)
    """

    def __init__(
        self,
        params: Any,
        domain: tuple[float, float],
        shrink: float = 0.9,
        restart: int = 100,
        lr: float = 1.0,
        seed: int | None = 0,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        self.shrink = check_number("shrink", shrink, high=1.0, above=True)
        self.restart = as_count("restart", restart)
        super().__init__(params, {"lr": lr, "domain": domain}, seed)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr")
        check_domain(group["domain"])

    def _start(self) -> dict[str, Any]:
        return {"loss": None, "failures": 0}

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        progress = self.progress
        if progress["loss"] is None:
            progress["loss"] = trial(home)
        draw, point = self._next_draw(), []
        for g, part in self._of_groups():
            low, high = self.param_groups[g]["domain"]
            reach = self.param_groups[g]["lr"] * self.shrink ** progress["failures"] * (high - low)
            drawn = self._source(draw, 0, g).uniforms(home[part])
            for u, t in zip(drawn, home[part], strict=True):
                centre = t.clamp(low, high)
                least, most = (centre - reach).clamp_min(low), (centre + reach).clamp_max(high)
                point.append(torch.lerp(least, most, u))
        best, loss = _keep_better(self, home, point, trial)
        failures = (progress["failures"] + 1) % self.restart
        progress["failures"] = failures if best is home else 0
        return best, loss


def _keep_better(
    search: ScalarOptimizer, home: Point, point: Point, trial: Trial
) -> tuple[Point, float]:
    """Evaluate a point; return it if it is better than home, else home, and the better loss."""
    loss, reference = trial(point), search.progress["loss"]
    if not improves(loss, reference):
        return home, reference
    search.progress["loss"] = loss
    return point, loss
