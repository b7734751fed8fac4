"""Gradients from the sign of a random move's effect: torchzero's RandomGrad and RandomBestGrad."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...checks import as_count, check_flag
from .base import Point, Trial
from .gradient import GradientSearch
from .samplers import Sampler


class RandomGrad(GradientSearch):
    """Point ``.grad`` along a random move if that raises the loss, against it if it lowers it.

    With z of ``sampler`` the losses of p and of ``p + magn z`` are compared, and the gradient is
    ``+z`` or ``-z``: its size says nothing of the slope, so optimizers that normalise (Adam) or go
    by signs (Lion, Rprop) suit. A loss that stays the same gives no gradient. NaN counts as raised.

    Where ``magn`` is so small that the losses differ by rounding alone, the sign is chance: with
    losses of float32 near 1 the smallest difference that means something is 1e-6 or so.

    2 evaluations a step; a step returns the loss of the parameters as they were before it.

    Args:
        params: parameters or groups of them.
        magn: scale of the move.
        opt: a torch optimizer of the same parameters, which steps along the gradient; None: the
            caller steps his own.
        step_opposite: whether moves that raise the loss give a gradient; else only those that lower
            it do.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor.
        lr: factor of the gradient.
        accumulate: add to what is in ``.grad`` instead of replacing it.
        seed: of the random numbers.

    Raises:
        TypeError: arguments of another type.
        ValueError: magn not above 0, lr negative, an unknown sampler, no parameter that requires
            grad, an optimizer of other parameters.

    Example:
        >>> import torch
        >>> from perturbed.optim import RandomGrad
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> search = RandomGrad([x], magn=1e-3, opt=torch.optim.AdamW([x], lr=0.05))
        >>> for _ in range(300):
        ...     loss = search.step(lambda: x.square().sum())
        >>> bool(loss < 0.5)
        True
    """

    def __init__(
        self,
        params: Any,
        magn: float = 1e-5,
        opt: torch.optim.Optimizer | None = None,
        step_opposite: bool = True,
        sampler: Sampler = "normal",
        lr: float = 1.0,
        accumulate: bool = False,
        seed: int | None = 0,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        self.step_opposite = check_flag("step_opposite", step_opposite)
        defaults = {"lr": lr, "magn": magn, "sampler": sampler}
        super().__init__(params, defaults, opt, accumulate, seed, 1)
        if self.pm is not None:
            raise ValueError(
                "params: RandomGrad tries one move at a time; on a PerturbedModel use "
                "RandomBestGrad or SPSA"
            )

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        before = trial(home)
        (after,) = self.tries.losses(home, self._option("magn"))
        rise = _order(after) - _order(before)
        if rise < 0 or (rise > 0 and self.step_opposite):
            factors = [math.copysign(lr, rise) / m for lr, m in self._factors()]
            self._estimate = list(torch._foreach_mul(self.tries.move(0), factors))
        return home, before

    def _factors(self) -> list[tuple[float, float]]:
        return list(zip(self._option("lr"), self._option("magn"), strict=True))


class RandomBestGrad(GradientSearch):
    """As :class:`RandomGrad` from the best of several random moves.

    With z_k of ``bestof`` moves ``magn z_k`` the gradient is ``-z`` of the move with the lowest
    loss, if that is lower than before; with ``avgbest`` the mean of ``-z`` over all moves that
    lower it. If none does, it is ``+z`` of the move with the highest loss (``negate_worst``), or
    zero. Losses that stay the same give no gradient; NaN counts as highest.

    ``bestof + 1`` evaluations a step; a step returns the loss of the parameters as they were before
    it. Given a :class:`~perturbed.PerturbedModel` all moves are one forward; its members, of both
    signs if the sampling is antithetic, take the place of ``bestof`` and ``sampler``.

    Args:
        params: parameters, groups of them, or a PerturbedModel.
        magn: scale of the moves.
        opt: a torch optimizer of the same parameters, which steps along the gradient; None: the
            caller steps his own.
        bestof: moves of a step; None: 10, or the members of the PerturbedModel.
        avgbest: average over all moves that lower the loss.
        negate_worst: whether to lead away from the worst move if none lowers the loss.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor; None: "normal".
        lr: factor of the gradient.
        accumulate: add to what is in ``.grad`` instead of replacing it.
        seed: of the random numbers.
        chunk: directions of a forward of the PerturbedModel, at most: the closure is then called
            several times, each time for others and with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.

    Raises:
        TypeError: arguments of another type.
        ValueError: bestof below 1, magn not above 0, lr negative, an unknown sampler, no parameter
            that requires grad, an optimizer of other parameters; bestof or sampler beside a
            PerturbedModel; chunk below 1, beside max_memory, or either without a PerturbedModel.

    Example:
        >>> import torch, perturbed
        >>> from perturbed.optim import RandomBestGrad
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, antithetic=False)
        >>> opt = torch.optim.Adam(net.parameters(), 0.02)
        >>> search = RandomBestGrad(pm, magn=1e-3, opt=opt)
        >>> x = torch.ones(4, 8)
        >>> for _ in range(100):
        ...     loss = search.step(lambda: (pm(pm.replicate(x)) - 2).square().mean(1))
        >>> bool(loss < 0.1), search.evaluations
        (True, 1700)
    """

    def __init__(
        self,
        params: Any,
        magn: float = 1e-5,
        opt: torch.optim.Optimizer | None = None,
        bestof: int | None = None,
        avgbest: bool = False,
        negate_worst: bool = True,
        sampler: Sampler | None = None,
        lr: float = 1.0,
        accumulate: bool = False,
        seed: int | None = 0,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        count = 10 if bestof is None else as_count("bestof", bestof)
        self.avgbest = check_flag("avgbest", avgbest)
        self.negate_worst = check_flag("negate_worst", negate_worst)
        defaults = {"lr": lr, "magn": magn, "sampler": "normal" if sampler is None else sampler}
        super().__init__(params, defaults, opt, accumulate, seed, count, chunk, max_memory)
        self._refuse({"bestof": bestof, "sampler": sampler})

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        before = trial(home)
        losses = [_order(x) for x in self.tries.losses(home, self._option("magn"))]
        present, numbers = _order(before), range(len(losses))
        lower = [k for k in numbers if losses[k] < present]
        if lower:
            chosen = lower if self.avgbest else [min(lower, key=losses.__getitem__)]
            self._estimate = self._mean(chosen, -1.0)
        elif self.negate_worst and max(losses) > present:
            self._estimate = self._mean([max(numbers, key=losses.__getitem__)], 1.0)
        return home, before

    def _mean(self, chosen: list[int], sign: float) -> Point:
        """Return the mean of some moves, in units of magn and with a sign."""
        total = self.tries.move(chosen[0])
        for k in chosen[1:]:
            torch._foreach_add_(total, self.tries.move(k))
        pairs = zip(self._option("lr"), self._option("magn"), strict=True)
        torch._foreach_mul_(total, [sign * lr / (m * len(chosen)) for lr, m in pairs])
        return total


def _order(loss: float) -> float:
    """Return a loss that compares: NaN and both infinities are higher than every number."""
    return loss if math.isfinite(loss) else math.inf
