"""SNES: natural evolution strategies that learn a standard deviation for every parameter.

Schaul, Glasmachers, Schmidhuber: "High Dimensions and Heavy Tails for Natural Evolution Strategies"
(GECCO 2011); Wierstra, Schaul, Glasmachers, Sun, Peters, Schmidhuber: "Natural Evolution
Strategies" (JMLR 15, 2014), algorithm 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..model import PerturbedModel
from .distribution import SeparableSearch
from .shaping import check_comparable, nes_utilities


class SNES(SeparableSearch):
    """Separable natural evolution strategies.

    With the utilities u of the ranks, which add up to 0, and members ``mean + std * eps``,

        mean <- mean + lr std sum_p u_p eps_p
        std  <- std exp(std_lr / 2 sum_p u_p (eps_p^2 - 1))

    so that directions in which the better members lie far out get longer steps. Needs no tuning for
    problems of up to some hundred parameters; the scale of every parameter is found on the way,
    from any start. Beyond that :class:`~perturbed.NES` makes better use of a population.

    The members are a matrix of P * N numbers, and ``std`` one more: P times the model. Losses that
    are NaN or infinite count as the worst; where none is finite, nothing moves.

    Args:
        model: a PerturbedModel of :class:`~perturbed.Explicit` layers, whose members are evaluated
            in one forward, or any module, whose members are evaluated one after the other, or by
            ``step(pool)`` in a :class:`~perturbed.WorkerPool`. Its own parameters are the mean.
        members: P; default: the directions of a PerturbedModel. Needed for a plain module;
            the papers take ``4 + 3 ln N``.
        sigma: standard deviation to start from, one for all parameters or (N,): the distance at
            which a solution may lie.
        optimizer: over the model's parameters; default: plain gradient descent with rate 1, the
            papers' update. Another rate is that of another optimizer, such as
            ``torch.optim.SGD(net.parameters(), lr=0.5)``; schedulers are put on it.
        std_lr: default ``(3 + ln N) / (5 sqrt N)``, the papers'.
        std_bounds: least and largest standard deviation.
        mirrored: whether the second half of the members mirrors the first.
        maximize: whether values are to be raised instead of lowered.
        seed: of the noise; None takes one from the operating system.
        chunk: members of a forward, at most: the closure is then called several times a step, each
            time for others (``pm.directions`` of them), with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.
        distributed: whether to share the members with other processes, each scoring its part of
            them: a process group of torch.distributed, True or None for the default group (None: if
            there is one), False for no.

    Raises:
        TypeError: arguments of another type.
        ValueError: numbers out of range, an odd number of mirrored members, layers of other noise,
            an optimizer without any of the parameters.

    Example:
        >>> import torch, perturbed
        >>> net = torch.nn.Linear(3, 1)
        >>> snes = perturbed.SNES(net, members=8, sigma=0.5)
        >>> x = torch.randn(20, 3)
        >>> for _ in range(5):  # a plain module: the closure scores one member, which net then is
        ...     loss = snes.step(lambda net: (net(x) - 1).square().mean().item())
        >>> snes.std.shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: PerturbedModel | nn.Module,
        members: int | None = None,
        sigma: float | Tensor = 0.1,
        optimizer: torch.optim.Optimizer | None = None,
        std_lr: float | None = None,
        std_bounds: tuple[float, float] = (1e-10, math.inf),
        mirrored: bool = False,
        maximize: bool = False,
        seed: int | None = 0,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
        distributed: torch.distributed.ProcessGroup | bool | None = None,
    ) -> None:
        """Check and store the arguments; nothing is drawn yet."""
        super().__init__(
            model,
            members,
            optimizer,
            sigma,
            std_bounds,
            mirrored,
            maximize,
            seed,
            chunk,
            max_memory,
            distributed,
        )
        check_comparable(nes_utilities, self.swarm.particles)
        size = self.std.numel()
        default = (3 + math.log(size)) / (5 * math.sqrt(size))
        self.std_lr = default if std_lr is None else check_number("std_lr", std_lr)

    def _default_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def _learn(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        utilities = nes_utilities(losses)  # of losses: lower for the better
        mean, spread = self._moments(utilities, utilities)
        return self.std * mean, self.std * torch.exp(-0.5 * self.std_lr * spread)
