"""ARS: augmented random search, for policies that are scored by noisy returns.

Mania, Guy, Recht: "Simple random search of static linear policies is competitive for reinforcement
learning" (NeurIPS 2018). Finite differences along N random directions; only the ``top`` directions
count, and the step is divided by the standard deviation of the returns that it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import as_int, check_number
from ..model import PerturbedModel
from .base import check_model
from .strategy import EvolutionStrategy, Stateful, perturbed_parameters

LEARNING_RATE = 0.02  # the paper's usual alpha


class ARS(EvolutionStrategy):
    """Train a :class:`~perturbed.PerturbedModel` by augmented random search.

    With losses ``L+`` and ``L-`` of the members ``W + sigma delta_d`` and ``W - sigma delta_d``,
    the b directions with the lowest ``min(L+, L-)`` give

        W <- W - lr / (b std) sum_d (L+_d - L-_d) delta_d

    where ``std`` is the standard deviation (divisor 2 b) of the 2 b losses in the sum. N is the
    model's number of directions, ``nu`` of the paper is its sigma. The four versions of the paper:

    - V1: ``top=None``, all directions count
    - V1-t: ``top=b``
    - V2: observations of the policy are normalised by running statistics that all members share;
      pass the object that holds them as ``normalizer``
    - V2-t: both

    The division makes the length of a step independent of the scale of the returns, and so steps
    do not shrink near a solution: put a learning-rate scheduler on ``optimizer`` to let them.
    Values are losses, as everywhere; returns to be raised need ``maximize=True``.

    A direction with a loss that is NaN or infinite on either side does not count; if fewer than b
    are left, b is their number. Equal directions count in their order. Where the losses in use are
    all equal, or none is left, the estimate is zero.

    Args:
        pm: the model and its population. Antithetic pairs are needed: R even, or
            ``antithetic=True``.
        optimizer: over its parameters, as for :class:`~perturbed.NES`; default: plain gradient
            descent, ``torch.optim.SGD``, with rate ``lr``, the paper's update.
        top: b, how many directions count, 1 to D; default: all.
        maximize: whether values are to be raised instead of lowered.
        lr: rate of the default optimizer, the paper's alpha; default 0.02.
        sigma_schedule: step number (0 for the first) -> sigma of that step; default: the model's.
        reuse: steps that share their random numbers, see :class:`~perturbed.NES`.
        normalizer: whose ``state_dict`` belongs to this one's: the statistics of V2. An
            :class:`~perturbed.rl.ObservationNorm` counts what all members have seen, in all
            forwards and processes, from the next step on.
        chunk, max_memory, distributed, estimate: of populations too large for one forward or one
            process, see :class:`~perturbed.NES`.

    Raises:
        TypeError: arguments of another type.
        ValueError: top outside 1 .. D, a model without antithetic pairs, lr not positive or given
            beside an optimizer, an optimizer without any perturbed parameter.

    Example:
        >>> import torch, perturbed
        >>> policy = perturbed.convert(torch.nn.Linear(4, 2, bias=False), directions=8)
        >>> pm = perturbed.PerturbedModel(policy, directions=8, antithetic=True, sigma=0.1)
        >>> ars = perturbed.ARS(pm, top=4, lr=0.05, maximize=True)
        >>> observations = torch.ones(16, 4)  # an environment for each of the 16 members
        >>> mean_return = ars.step(lambda: -pm(observations).square().sum(1))
        >>> ars.stats["evaluations"]
        16
    """

    def __init__(
        self,
        pm: PerturbedModel,
        optimizer: torch.optim.Optimizer | None = None,
        top: int | None = None,
        maximize: bool = False,
        lr: float | None = None,
        sigma_schedule: Callable[[int], float] | None = None,
        reuse: int = 1,
        normalizer: Stateful | None = None,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
        distributed: torch.distributed.ProcessGroup | bool | None = None,
        estimate: str = "full",
    ) -> None:
        """Check and store the arguments; nothing is drawn yet."""
        check_model(pm)
        if optimizer is None:
            rate = check_number("lr", LEARNING_RATE if lr is None else lr, above=True)
            optimizer = torch.optim.SGD(perturbed_parameters(pm), lr=rate)
        elif lr is not None:
            raise ValueError(f"lr must be None beside an optimizer, which has its own, got {lr}")
        super().__init__(
            pm,
            optimizer,
            maximize,
            sigma_schedule,
            reuse,
            normalizer,
            chunk,
            max_memory,
            distributed,
            estimate,
        )
        directions = pm.population
        self.top = directions if top is None else as_int("top", top)
        if not 1 <= self.top <= directions:
            raise ValueError(
                f"top must be between 1 and the model's directions, D = {directions}, got {top}"
            )
        if pm.state.antithetic is False:
            raise ValueError(
                "pm must have antithetic pairs, whose losses ARS compares; got a PerturbedModel "
                "with antithetic=False"
            )

    def _members(self, values: Any) -> Tensor:
        members = super()._members(values)
        if len(members) != 2:
            raise ValueError(
                f"values must be of antithetic pairs, (2, D) = (2, {self.pm.population}) or rows "
                f"of them, got {tuple(members.shape)}; evaluate an even number of repeats"
            )
        return members

    def _estimate(self, losses: Tensor) -> None:
        # E_d is sigma delta_d.
        self._set_grad(ars_weights(losses, self.top) / self._sigma(losses.device))


def ars_weights(losses: Tensor, top: int) -> Tensor:
    """Return the weights of the directions in the ARS update, ``(L+ - L-) / (b std)`` or 0.

    Nothing here waits for a GPU.

    Args:
        losses: (2, D) floating point, of the antithetic pairs.
        top: b, 1 to D.

    Returns:
        (D,) of the same dtype; at most ``top`` of them are not 0.
    """
    usable = losses.isfinite().all(0)
    best = losses.amin(0).masked_fill_(~usable, torch.inf)
    chosen = torch.zeros_like(usable).scatter_(0, best.argsort(stable=True)[:top], True)
    dropped = ~chosen.logical_and_(usable)
    # Weights know neither offset nor scale of the losses: in [0, 1] no square leaves the range of a
    # double. Halves, so that no difference does.
    wide = losses.to(torch.float64) / 2
    low = wide.masked_fill(dropped, torch.inf).amin()
    high = wide.masked_fill(dropped, -torch.inf).amax()
    unit = (wide - low).div_(high - low).masked_fill_(dropped, 0.0)
    count = chosen.sum()
    members = 2 * count
    centred = (unit - unit.sum() / members).masked_fill_(dropped, 0.0)
    std = (centred.square_().sum() / members).sqrt_()
    weights = (unit[0] - unit[1]).div_(count * std)
    return weights.masked_fill_(dropped.logical_or_(high <= low), 0.0).to(losses.dtype)
