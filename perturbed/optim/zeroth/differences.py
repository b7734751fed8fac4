"""Other ways to finite differences than SPSA's: every element in turn, or one loss a step.

Kiefer, Wolfowitz, "Stochastic estimation of the maximum of a regression function" (Annals of
Mathematical Statistics 23, 1952), in the form of many parameters of Blum (1954); Zhang, Zhou, Ji,
Zavlanos, "A new one-point residual-feedback oracle for black-box learning and control" (Automatica
136, 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .base import Point
from .samplers import Sampler
from .spsa import SPSA


class FDSA(SPSA):
    """:class:`SPSA` along one element at a time: the gradient itself, for few parameters.

    Element i of the estimate is ``(L(p + c e_i) - L(p - c e_i)) / (2 c)``, 0 where one of both
    losses is not finite. Nothing is random.

    ``2 N`` evaluations a step, for N elements that move; a step returns the lowest of their losses,
    NaN if none is finite.

    Args:
        params: parameters or groups of them.
        lr: of the step; with ``grad`` or ``opt`` without effect.
        magn: c, the distance of the points.
        **options: ``grad``, ``opt``, ``accumulate``, ``lr_decay``, ``magn_decay`` and ``stability``
            of :class:`SPSA`.

    Raises:
        TypeError: arguments of another type; options of random draws.
        ValueError: as :class:`SPSA`; a PerturbedModel.

    Example:
        >>> import torch
        >>> from perturbed.optim import FDSA
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = FDSA([x], lr=0.25)
        >>> for _ in range(20):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 1e-4), search.evaluations
        (True, 80)
    """

    def __init__(self, params: Any, lr: float = 1e-2, magn: float = 1e-3, **options: Any) -> None:
        """Check the arguments; nothing is evaluated yet."""
        _refuse(options, "FDSA", "n", "formula", "sampler", "seed")
        super().__init__(params, lr, magn, **options)
        _refuse_population(self)

    def _looped(self, home: Point, spread: list[float]) -> tuple[float, Point | None]:
        """Return the lowest loss and the estimate."""
        point, estimate = [t.clone() for t in home], [torch.zeros_like(t) for t in home]
        seen, used = [math.inf], False
        for place, c in enumerate(spread):
            moved, slopes = point[place].view(-1), estimate[place].view(-1)
            for i, x in enumerate(home[place].flatten().tolist()):
                sides = []
                for side in (x + c, x - c):
                    moved[i] = side
                    sides.append(self.tries.single(point))
                moved[i] = x
                seen += [loss for loss in sides if math.isfinite(loss)]
                if all(map(math.isfinite, sides)):
                    slopes[i] = (sides[0] - sides[1]) / (2 * c)
                    used = True
        lowest = min(seen)
        return (lowest if math.isfinite(lowest) else math.nan), (estimate if used else None)


class ResidualFeedback(SPSA):
    """Estimate the gradient from one loss a step, compared with that of the step before.

    The estimate is ``(L_t - L_{t-1}) z_t / c`` with ``L_t = L(p_t + c z_t)``: the loss of the step
    before takes the place of a second evaluation. It is as right on average as any other loss
    would be, since it does not depend on z_t, and near enough to L_t to keep the variance low as
    long as steps are small. The first step, and one after a loss that is not finite, only look.

    1 evaluation a step; a step returns its loss.

    Args:
        params: parameters or groups of them.
        lr: of the step; with ``grad`` or ``opt`` without effect.
        magn: c, the distance of the points.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor; None: "normal".
        **options: ``grad``, ``opt``, ``accumulate``, ``lr_decay``, ``magn_decay``, ``stability``
            and ``seed`` of :class:`SPSA`.

    Raises:
        TypeError: arguments of another type; n or formula.
        ValueError: as :class:`SPSA`; a PerturbedModel.

    Example:
        >>> import torch
        >>> from perturbed.optim import ResidualFeedback
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = ResidualFeedback([x], lr=0.01, magn=0.1)
        >>> for _ in range(1000):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 0.1), search.evaluations
        (True, 1000)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        magn: float = 1e-2,
        sampler: Sampler | None = None,
        **options: Any,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        _refuse(options, "ResidualFeedback", "n", "formula")
        super().__init__(params, lr, magn, None, "rdsa", sampler, **options)
        _refuse_population(self)

    def _start(self) -> dict[str, Any]:
        return {"previous": None}

    def _looped(self, home: Point, spread: list[float]) -> tuple[float, Point | None]:
        """Return the loss, and the estimate if there is a loss to compare it with."""
        previous = self.progress["previous"]
        (loss,) = self.tries.losses(home, spread)
        self.progress["previous"] = loss if math.isfinite(loss) else None
        if previous is None or not math.isfinite(loss):
            return loss, None
        z = self.tries.move(0)  # c z
        torch._foreach_mul_(z, [(loss - previous) / (c * c) for c in spread])
        return loss, z


def _refuse(options: dict[str, Any], name: str, *unknown: str) -> None:
    """Raise TypeError for options of SPSA that a method does not have."""
    given = sorted(set(options) & {*unknown, "chunk", "max_memory"})
    if given:
        raise TypeError(f"{name} has no {', '.join(given)}; SPSA has")


def _refuse_population(search: SPSA) -> None:
    """Raise ValueError if a search was given a PerturbedModel."""
    if search.pm is not None:
        raise ValueError(
            f"params: {type(search).__name__} tries one point at a time; on a PerturbedModel use "
            "SPSA or RDSA"
        )
