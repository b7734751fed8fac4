"""Finite differences along random directions: SPSA and RDSA.

Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation" (IEEE Transactions on Automatic Control 37, 1992); for RDSA, Kushner, Clark,
"Stochastic Approximation Methods for Constrained and Unconstrained Systems" (1978), in the form of
Nesterov, Spokoiny, "Random gradient-free minimization of convex functions" (2017).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...checks import as_count, check_flag, check_number
from ...noise.dense import Dense
from .base import Point, Trial
from .gradient import GradientSearch
from .population import Batched
from .samplers import Sampler

FORMULAS = ("spsa", "rdsa")


class SPSA(GradientSearch):
    """Estimate the gradient from the losses on both sides of the parameters, along random signs.

    With ``q = (L(p + c z) - L(p - c z)) / (2 c)`` the estimate is ``q / z`` elementwise (formula
    "spsa", Spall 1992), or ``q z`` (formula "rdsa", unbiased to first order for every z with
    uncorrelated elements of variance 1). For signs both are the same. It is averaged over ``n``
    draws; a draw of which one loss is not finite does not count.

    The step is ``p - a g``, or ``opt``'s, or none (``grad=True``, the estimate stays in ``.grad``
    for the caller). At step k, from 0, ``a = lr ((1 + stability) / (k + 1 + stability))^lr_decay``
    and ``c = magn / (k + 1)^magn_decay``. Spall recommends lr_decay 0.602, magn_decay 0.101 and
    a stability of a tenth of the steps; the defaults keep both constant.

    ``2 n`` evaluations a step; a step returns the lowest of their losses, NaN if none is finite.
    Given a :class:`~perturbed.PerturbedModel` all of them are one forward, in which D antithetic
    pairs take the place of ``n`` and ``sampler``; "spsa" then needs noise of signs,
    ``Dense("rademacher")``, and "rdsa" takes any.

    Args:
        params: parameters, groups of them, or a PerturbedModel with antithetic sampling.
        lr: of the step; with ``grad`` or ``opt`` without effect.
        magn: c, the distance of the points.
        n: draws of a step; None: 1, or the directions of the PerturbedModel.
        formula: "spsa" or "rdsa".
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor; None:
            "rademacher" for "spsa", which allows no other name (1 / z of others has no variance),
            "normal" for "rdsa".
        grad: leave the estimate in ``.grad`` and do not step.
        opt: a torch optimizer of the same parameters, which steps along the estimate.
        accumulate: add to what is in ``.grad`` instead of replacing it.
        lr_decay: exponent of a.
        magn_decay: exponent of c, at most 10.
        stability: Spall's A.
        seed: of the random numbers.
        chunk: directions of a forward of the PerturbedModel, at most: the closure is then called
            several times, each time for others and with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.

    Raises:
        TypeError: arguments of another type.
        ValueError: numbers out of range, an unknown formula or sampler, a sampler that the formula
            does not allow, no parameter that requires grad, an optimizer of other parameters, grad
            beside opt; n or sampler beside a PerturbedModel, or one without antithetic pairs;
            chunk below 1, beside max_memory, or either without a PerturbedModel.

    Example:
        >>> import torch
        >>> from perturbed.optim import SPSA
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = SPSA([x], lr=0.1)
        >>> for _ in range(100):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 1e-4), search.evaluations
        (True, 200)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        magn: float = 1e-3,
        n: int | None = None,
        formula: str = "spsa",
        sampler: Sampler | None = None,
        grad: bool = False,
        opt: torch.optim.Optimizer | None = None,
        accumulate: bool = False,
        lr_decay: float = 0.0,
        magn_decay: float = 0.0,
        stability: float = 0.0,
        seed: int | None = 0,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        if not isinstance(formula, str) or formula not in FORMULAS:
            raise ValueError(f"formula must be one of {FORMULAS}, got {formula!r}")
        self.formula = formula
        self.grad = check_flag("grad", grad)
        if grad and opt is not None:
            raise ValueError("grad leaves the step to the caller: give grad or opt, not both")
        self.lr_decay = check_number("lr_decay", lr_decay)
        self.magn_decay = check_number("magn_decay", magn_decay, high=10.0)
        self.stability = check_number("stability", stability)
        count = 1 if n is None else as_count("n", n)
        usual = "rademacher" if formula == "spsa" else "normal"
        chosen = usual if sampler is None else sampler
        super().__init__(
            params,
            {"lr": lr, "magn": magn, "sampler": chosen},
            opt,
            accumulate,
            seed,
            count,
            chunk,
            max_memory,
        )
        self._refuse({"n": n, "sampler": sampler})
        if self.pm is not None:
            self._check_noise()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        sampler = group["sampler"]
        if self.formula == "spsa" and isinstance(sampler, str) and sampler != "rademacher":
            raise ValueError(
                "sampler must be 'rademacher' or a function for the formula 'spsa', which divides "
                f"by its numbers, got {sampler!r}; the formula 'rdsa' takes any"
            )
        if self.formula == "rdsa" and sampler in ("constant", "randrect"):
            raise ValueError(
                f"sampler must have uncorrelated elements for the formula 'rdsa', got {sampler!r}"
            )

    def _check_noise(self) -> None:
        """Raise ValueError if the noise of the PerturbedModel does not suit."""
        assert self.pm is not None
        if self.pm.state.antithetic is False:
            raise ValueError(
                "params: a PerturbedModel must have antithetic=True, for losses on both sides"
            )
        for layer in self.pm.layers():
            if self.formula == "spsa" and layer.noise != Dense("rademacher"):
                raise ValueError(
                    "params: the formula 'spsa' needs layers with noise=Dense('rademacher'), got "
                    f"{layer.noise}; RDSA takes any"
                )

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        k = self.progress["steps"]
        spread = [m / (k + 1) ** self.magn_decay for m in self._option("magn")]
        batched = self.pm is not None
        lowest, estimate = self._batched(home, spread) if batched else self._looped(home, spread)
        if estimate is None or self.opt is not None or self.grad:
            self._estimate = estimate
            return home, lowest
        fade = ((1 + self.stability) / (k + 1 + self.stability)) ** self.lr_decay
        torch._foreach_mul_(estimate, [-lr * fade for lr in self._option("lr")])
        torch._foreach_add_(estimate, home)
        return estimate, lowest

    def _looped(self, home: Point, spread: list[float]) -> tuple[float, Point | None]:
        """Return the lowest loss and the estimate of draws one after the other."""
        draw = self._next_draw()
        total: Point | None = None
        seen, used = [math.inf], 0
        for i in range(self.count):
            z = self._sample(home, draw, i)
            move = torch._foreach_mul(z, spread)
            sides = [
                self.tries.single(list(side))
                for side in (torch._foreach_add(home, move), torch._foreach_sub(home, move))
            ]
            seen += [loss for loss in sides if math.isfinite(loss)]
            if not all(map(math.isfinite, sides)):
                continue
            used += 1
            q = [(sides[0] - sides[1]) / (2 * c) for c in spread]
            part = torch._foreach_reciprocal(z) if self.formula == "spsa" else z
            part = torch._foreach_mul(part, q)
            total = list(part if total is None else torch._foreach_add(total, part))
        if total is not None:
            torch._foreach_div_(total, used)
        lowest = min(seen)
        return (lowest if len(seen) > 1 else math.nan), total

    def _batched(self, home: Point, spread: list[float]) -> tuple[float, Point | None]:
        """Return the lowest loss and the estimate of all members of the PerturbedModel."""
        assert self.pm is not None
        assert isinstance(self.tries, Batched)
        losses = self.tries.losses(home, spread)
        d = self.pm.population
        if len(losses) != 2 * d:
            raise ValueError(
                f"closure must return losses of antithetic pairs, 2 D = {2 * d} members, got "
                f"{len(losses)}"
            )
        finite = [loss for loss in losses if math.isfinite(loss)]
        pairs = torch.tensor(losses, dtype=torch.float64).view(2, d)
        usable = pairs.isfinite().all(0)
        if not usable.any():
            return (min(finite) if finite else math.nan), None
        q = torch.where(usable, pairs[0] - pairs[1], 0) / (2 * spread[0] * usable.sum())
        return min(finite), self.tries.weighted_sum(q / spread[0])

    def _finish(self) -> None:
        """Write the estimate, unless the step has been done."""
        if self.opt is not None or self.grad:
            super()._finish()


class RDSA(SPSA):
    """:class:`SPSA` with the formula "rdsa" and normal directions.

    Args:
        params: parameters, groups of them, or a PerturbedModel with antithetic sampling and noise
            of any family.
        lr: as all others, see :class:`SPSA`.
        magn: c, the distance of the points.
        n: draws of a step; None: 1, or the directions of the PerturbedModel.
        sampler: None: "normal".
        **options: of :class:`SPSA`.

    Raises:
        TypeError: arguments of another type.
        ValueError: as :class:`SPSA`.

    Example:
        >>> import torch, perturbed
        >>> from perturbed.optim import RDSA
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), 16, perturbed.LowRank(1))
        >>> pm = perturbed.PerturbedModel(net, directions=16, antithetic=True)
        >>> search = RDSA(pm, lr=0.05)
        >>> x = torch.randn(4, 8)
        >>> for _ in range(100):
        ...     loss = search.step(lambda: (pm(pm.replicate(x)) - 2).square().mean(1))
        >>> bool(loss < 0.1), search.evaluations
        (True, 3200)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        magn: float = 1e-3,
        n: int | None = None,
        sampler: Sampler | None = None,
        **options: Any,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        if "formula" in options:
            raise TypeError("formula is that of RDSA; SPSA has the choice")
        super().__init__(params, lr, magn, n, "rdsa", sampler, **options)
