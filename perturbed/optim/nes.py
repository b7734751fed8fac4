"""NES: evolution strategies with an isotropic search distribution, on any torch optimizer.

The gradient of the smoothed loss ``E[L(theta + sigma eps)]`` is estimated from the losses of a
population, ``1 / (S D sigma) sum_{s,d} s u_{s,d} eps_d``, and handed to the optimizer as ``.grad``.
Wierstra et al., "Natural Evolution Strategies" (JMLR 15, 2014); in the form of Salimans, Ho, Chen,
Sidor, Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (2017).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_number
from ..model import PerturbedModel
from .shaping import Shaping, check_comparable, resolve_shaping
from .strategy import EvolutionStrategy, Stateful


class NES(EvolutionStrategy):
    """Train a :class:`~perturbed.PerturbedModel` from the losses of its members.

    ``step(closure)`` does all of it; ``ask()`` and ``tell(values)`` are its two halves, for losses
    that come from elsewhere. Learning-rate schedulers are put on ``optimizer`` as usual. Gradients
    of parameters that are not perturbed are left to the caller.

    Losses that are NaN or infinite never win and never poison an update (see
    ``perturbed.optim.shaping``); where no member is finite the estimate is zero. ``stats`` counts
    them.

    Args:
        pm: the model and its population.
        optimizer: over its parameters; descends along the estimate. One whose ``step`` needs no
            closure.
        shaping: name in ``perturbed.optim.SHAPINGS``, or a function of the (S, D) losses.
        maximize: whether values are to be raised instead of lowered; the sign is flipped on
            arrival.
        sigma_schedule: step number (0 for the first) -> sigma of that step; default: the model's
            sigma.
        weight_decay: adds ``weight_decay * parameter`` to the estimate (L2, as Salimans et al.).
        reuse: steps that share their random numbers while the parameters move on, for episodes
            that are scored a window of ``T / reuse`` of their T time steps at a time (Li, Harrison,
            Sohl-Dickstein, Smith, Metz: "Noise-Reuse in Online Evolution Strategies", 2023).
            Fresh noise is drawn where ``nes.steps % reuse == 0``: begin new episodes there.
        normalizer: whose ``state_dict`` belongs to this one's, such as the running statistics of
            observations that the closure updates; a step that raises restores it. An
            :class:`~perturbed.rl.ObservationNorm` counts what all members have seen, in all
            forwards and processes, from the next step on.
        chunk: directions of a forward, at most: the closure is then called several times a step,
            each time for others (``pm.directions`` of them) and with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.
        distributed: whether to share the population with other processes, each evaluating its part
            of the directions: a process group of torch.distributed, True or None for the default
            group (None: if there is one), False for no. See ``perturbed.distributed``.
        estimate: how processes come by the estimate: "full", every process draws the noise of all
            directions again, and parameters do not depend on the number of processes; "sharded",
            each draws its own part and the sums travel; "auto", what takes less time at the first
            step.

    Raises:
        TypeError: arguments of another type.
        ValueError: an unknown shaping or estimate, weight_decay negative or not finite, reuse or
            chunk below 1, chunk beside max_memory, an optimizer without any perturbed parameter,
            more processes than directions.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> x = pm.replicate(torch.ones(4, 8))
        >>> loss = nes.step(lambda: pm(x).square().mean(-1))  # one value per row
        >>> nes.stats["evaluations"]
        32
    """

    def __init__(
        self,
        pm: PerturbedModel,
        optimizer: torch.optim.Optimizer,
        shaping: str | Shaping = "centered_rank",
        maximize: bool = False,
        sigma_schedule: Callable[[int], float] | None = None,
        weight_decay: float = 0.0,
        reuse: int = 1,
        normalizer: Stateful | None = None,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
        distributed: torch.distributed.ProcessGroup | bool | None = None,
        estimate: str = "full",
    ) -> None:
        """Check and store the arguments; nothing is drawn yet."""
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
        self.shaping = resolve_shaping(shaping)
        if pm.state.antithetic is False:  # else the rows say how many members there are
            check_comparable(self.shaping, pm.population)
        self.weight_decay = check_number("weight_decay", weight_decay)

    def _estimate(self, losses: Tensor) -> None:
        check_comparable(self.shaping, losses.numel())
        weights = self.shaping(losses)
        folded = weights[0] - weights[1] if len(weights) == 2 else weights[0]
        # set_grad's E_d includes sigma: one sigma makes eps of it, the other is the estimator's
        # own.
        self._set_grad(folded / (losses.numel() * self._sigma(losses.device) ** 2))
        if self.weight_decay:
            for parameter in self._parameters():
                parameter.grad.add_(parameter, alpha=self.weight_decay)  # type: ignore[union-attr]
