"""NES: evolution strategies with an isotropic search distribution, on any torch optimizer.

The gradient of the smoothed loss ``E[L(theta + sigma eps)]`` is estimated from the losses of a
population, ``1 / (S D sigma) sum_{s,d} s u_{s,d} eps_d``, and handed to the optimizer as ``.grad``.
Wierstra et al., "Natural Evolution Strategies" (JMLR 15, 2014); in the form of Salimans, Ho, Chen,
Sidor, Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import PerturbedModel
from .base import PopulationOptimizer, check_model, check_number, member_values
from .shaping import Shaping, resolve_shaping


class NES(PopulationOptimizer):
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

    Raises:
        TypeError: arguments of another type.
        ValueError: an unknown shaping, weight_decay negative or not finite, an optimizer without
            any perturbed parameter.

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
    ) -> None:
        """Check and store the arguments; nothing is drawn yet."""
        super().__init__(maximize)
        self.pm = check_model(pm)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if sigma_schedule is not None and not callable(sigma_schedule):
            raise TypeError(
                f"sigma_schedule must be a function of the step number, got {sigma_schedule!r}"
            )
        self.optimizer = optimizer
        self.shaping = resolve_shaping(shaping)
        self.sigma_schedule = sigma_schedule
        self.weight_decay = check_number("weight_decay", weight_decay)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self._parameters()):
            raise ValueError(
                "optimizer must hold parameters that the model perturbs, got none of them; make it "
                "from the parameters of the converted model"
            )

    def _parameters(self) -> list[nn.Parameter]:
        """Return the perturbed parameters, each once."""
        found = {
            id(p): p for layer in self.pm.layers() for p, _ in layer.perturbed_parameters().values()
        }
        return list(found.values())

    # ---- one step ------------------------------------------------------------------------------

    def ask(self) -> PerturbedModel:
        """Draw fresh noise and return the model, whose rows are now the next population.

        Raises:
            ValueError: sigma is 0 (the estimate divides by it), or what sigma_schedule returned is
                no valid sigma.
        """
        return super().ask()

    def _draw(self) -> PerturbedModel:
        sigma = None if self.sigma_schedule is None else self.sigma_schedule(self.steps)
        self._check_sigma(self.pm.sigma if sigma is None else sigma)
        self.pm.set_noise(sigma)
        return self.pm

    def _snapshot(self) -> dict:
        return self.pm.get_extra_state()

    def _restore(self, snapshot: dict) -> None:
        self.pm.set_extra_state(snapshot)

    def _members(self, values: Any) -> Tensor:
        self._check_sigma(self.pm.sigma)
        return member_values(values, self.pm, self._parameters()[0].device)

    def _update(self, losses: Tensor) -> None:
        weights = self.shaping(losses)
        folded = weights[0] - weights[1] if len(weights) == 2 else weights[0]
        # set_grad's E_d includes sigma: one sigma makes eps of it, the other is the estimator's
        # own.
        self.pm.set_grad(folded / (losses.numel() * self.pm.sigma**2))
        if self.weight_decay:
            for parameter in self._parameters():
                parameter.grad.add_(parameter, alpha=self.weight_decay)  # type: ignore[union-attr]
        self.optimizer.step()

    @staticmethod
    def _check_sigma(sigma: float) -> None:
        if sigma == 0:
            raise ValueError("sigma must be greater than 0 to estimate a gradient, got 0")

    # ---- resuming ------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "noise": self.pm.get_extra_state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.pm.set_extra_state(state["noise"])
