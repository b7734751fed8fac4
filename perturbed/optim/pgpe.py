"""PGPE: policy gradients with parameter-based exploration, symmetric sampling.

Sehnke, Osendorfer, Rückstiess, Graves, Peters, Schmidhuber: "Parameter-exploring Policy Gradients"
(Neural Networks 23, 2010); with ranks, ClipUp and a limit to the change of the standard deviations
as in Toklu, Liskowski, Srivastava: "ClipUp: A Simple and Powerful Optimizer for Distribution-based
Policy Evolution" (PPSN 2020).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..model import PerturbedModel
from .clipup import ClipUp
from .distribution import SeparableSearch
from .shaping import Shaping, resolve_shaping


class PGPE(SeparableSearch):
    """Policy gradients with parameter-based exploration.

    For mirrored members ``mean + std * eps_p`` and ``mean - std * eps_p``, p = 1 .. P / 2, with the
    shaped losses ``u+`` and ``u-``, whose mean over all members is b,

        gradient  = 2 / P  std sum_p (u+_p - u-_p) / 2  eps_p
        std      <- std - std_lr 2 / P  std sum_p ((u+_p + u-_p) / 2 - b) (eps_p^2 - 1)

    and ``optimizer`` descends along the gradient.

    The members are a matrix of P * N numbers, and ``std`` one more: P times the model. Losses that
    are NaN or infinite count as the worst; where none is finite, the gradient is zero.

    Args:
        model: a PerturbedModel of :class:`~perturbed.Explicit` layers, whose members are evaluated
            in one forward, or any module, whose members are evaluated one after the other, or by
            ``step(pool)`` in a :class:`~perturbed.WorkerPool`. Its own parameters are the mean.
        members: P, even; default: the directions of a PerturbedModel. Needed for a plain module.
        sigma: standard deviation to start from, one for all parameters or (N,).
        optimizer: over the model's parameters; default: :class:`~perturbed.ClipUp` after its
            paper, the longest step being a 15th of the length of ``sigma``, and the rate half of
            that. Steps do not shrink near a solution: put a scheduler on it to let them. Another
            rate is that of another optimizer, such as ``perturbed.ClipUp(net.parameters(),
            lr=0.1)``.
        std_lr: rate of the standard deviations.
        max_change: largest change of a standard deviation in a step, as a fraction of it.
        std_bounds: least and largest standard deviation.
        shaping: name in ``perturbed.optim.SHAPINGS``, or a function of the (P,) losses.
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
        ValueError: numbers out of range, an odd number of members, an unknown shaping, layers of
            other noise, an optimizer without any of the parameters.

    Example:
        >>> import torch, perturbed
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> perturbed.convert(net, directions=32, noise=perturbed.Explicit())  # doctest: +ELLIPSIS
        Sequential(...
        >>> pm = perturbed.PerturbedModel(net, directions=32)
        >>> pgpe = perturbed.PGPE(pm, sigma=0.1)
        >>> x = pm.replicate(torch.randn(20, 3))
        >>> loss = pgpe.step(lambda: (pm(x) - 1).square().mean(1))  # one value per row
        >>> pgpe.stats["evaluations"]
        32
    """

    def __init__(
        self,
        model: PerturbedModel | nn.Module,
        members: int | None = None,
        sigma: float | Tensor = 0.1,
        optimizer: torch.optim.Optimizer | None = None,
        std_lr: float = 0.1,
        max_change: float = 0.2,
        std_bounds: tuple[float, float] = (1e-10, math.inf),
        shaping: str | Shaping = "centered_rank",
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
            True,
            maximize,
            seed,
            chunk,
            max_memory,
            distributed,
        )
        self.std_lr = check_number("std_lr", std_lr)
        self.max_change = check_number("max_change", max_change, high=1.0)
        self.shaping = resolve_shaping(shaping)

    def _default_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return ClipUp(parameters, lr=float(self.std.norm()) / 30)

    def _learn(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.shaping(losses) / losses.numel()
        mean, spread = self._moments(weights, weights - weights.mean())
        change = (-self.std_lr * spread).clamp(-self.max_change, self.max_change)
        return self.std * mean, self.std * (1 + change)
