"""NES: evolution strategies with an isotropic search distribution, on any torch optimizer.

The gradient of the smoothed loss ``E[L(theta + sigma eps)]`` is estimated from the losses of a
population, ``1 / (S D sigma) sum_{s,d} s u_{s,d} eps_d``, and handed to the optimizer as ``.grad``.
Wierstra et al., "Natural Evolution Strategies" (JMLR 15, 2014); in the form of Salimans, Ho, Chen,
Sidor, Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import PerturbedModel
from .shaping import Shaping, resolve_shaping


class NES:
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
        if not isinstance(pm, PerturbedModel):
            raise TypeError(f"pm must be a PerturbedModel, got {type(pm).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not isinstance(maximize, bool):
            raise TypeError(f"maximize must be True or False, got {maximize!r}")
        if sigma_schedule is not None and not callable(sigma_schedule):
            raise TypeError(
                f"sigma_schedule must be a function of the step number, got {sigma_schedule!r}"
            )
        if isinstance(weight_decay, bool) or not isinstance(weight_decay, (int, float)):
            raise TypeError(f"weight_decay must be a number, got {weight_decay!r}")
        if not math.isfinite(weight_decay) or weight_decay < 0:
            raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")
        self.pm = pm
        self.optimizer = optimizer
        self.shaping = resolve_shaping(shaping)
        self.maximize = maximize
        self.sigma_schedule = sigma_schedule
        self.weight_decay = float(weight_decay)
        self.steps = 0
        self.evaluations = 0
        self._asked = False
        # Of the last step, then of all steps; on the model's device, so that tell() waits for
        # nothing.
        self._last: dict[str, Tensor] = {}
        self._nonfinite_total: Tensor | int = 0
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
        sigma = None if self.sigma_schedule is None else self.sigma_schedule(self.steps)
        self._check_sigma(self.pm.sigma if sigma is None else sigma)
        self.pm.set_noise(sigma)
        self._asked = True
        return self.pm

    @torch.no_grad()
    def tell(self, values: Any) -> Tensor:
        """Update the parameters from what the population of the last ``ask`` scored.

        Args:
            values: losses, one per row, (B,), which are averaged per member; or one per member, (S,
                D), as ``pm.member_mean`` gives. A tensor or what ``torch.as_tensor`` takes;
                integers and booleans are converted, so counts of errors will do.

        Returns:
            () mean over the finite members, in the sign of ``values``; NaN if there is none.

        Raises:
            RuntimeError: no ``ask`` since the last ``tell``.
            ValueError: another number of values, or sigma set to 0 since.
            TypeError: values that are no real numbers.
        """
        if not self._asked:
            raise RuntimeError("tell: there is no population to score; call ask() first")
        sigma = self._check_sigma(self.pm.sigma)
        members = self._members(values)
        finite = members.isfinite()
        losses = -members if self.maximize else members
        weights = self.shaping(losses)
        folded = weights[0] - weights[1] if len(weights) == 2 else weights[0]
        # set_grad's E_d includes sigma: one sigma makes eps of it, the other is the estimator's
        # own.
        self.pm.set_grad(folded / (members.numel() * sigma**2))
        if self.weight_decay:
            for parameter in self._parameters():
                parameter.grad.add_(parameter, alpha=self.weight_decay)  # type: ignore[union-attr]
        self.optimizer.step()
        self._asked = False
        self.steps += 1
        self.evaluations += members.numel()
        return self._record(members, finite)

    def step(self, closure: Callable[[], Any]) -> Tensor:
        """Ask, score with ``closure`` and tell; without recording gradients.

        If ``closure`` raises, the draw goes back to where it was and nothing else has changed: the
        next step uses the noise that this one would have used.

        Args:
            closure: returns the values that :meth:`tell` takes, usually row losses of ``pm(x)``.

        Returns:
            () mean over the finite members, as :meth:`tell`.
        """
        before, asked, steps = self.pm.get_extra_state(), self._asked, self.steps
        try:
            self.ask()
            with torch.no_grad():
                values = closure()
            return self.tell(values)
        except BaseException:
            if self.steps == steps:  # the parameters have not moved
                self.pm.set_extra_state(before)
                self._asked = asked
            raise

    # ---- its parts -----------------------------------------------------------------------------

    @staticmethod
    def _check_sigma(sigma: float) -> float:
        if sigma == 0:
            raise ValueError("sigma must be greater than 0 to estimate a gradient, got 0")
        return sigma

    def _members(self, values: Any) -> Tensor:
        """Bring values to (S, D) floating-point member values on the parameters' device."""
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"values must be a tensor of numbers, got {type(values).__name__} ({error})"
            ) from None
        if values.is_complex():
            raise TypeError(f"values must be real numbers, got {values.dtype}")
        # Wide enough to average without overflow, and for counts to stay exact.
        if not values.is_floating_point():
            values = values.to(torch.float64)
        elif values.itemsize < 4:
            values = values.to(torch.float32)
        values = values.detach().to(self._parameters()[0].device)
        d, antithetic = self.pm.directions, self.pm.state.antithetic
        signs = {None: (1, 2), True: (2,), False: (1,)}[antithetic]
        if values.dim() == 2 and values.shape[1] == d and values.shape[0] in signs:
            return values
        if values.dim() == 1 and values.numel() > 0 and values.numel() % d == 0:
            return self.pm.member_mean(values)
        raise ValueError(
            f"values must be one per row, (B,) with B a multiple of D = {d} directions, or one per "
            f"member, (S, D) with S = {' or '.join(map(str, signs))}, got {tuple(values.shape)}"
        )

    def _record(self, members: Tensor, finite: Tensor) -> Tensor:
        """Keep the numbers of :attr:`stats`; return the mean."""
        count = finite.sum()
        mean = torch.where(finite, members, 0).sum() / count
        worst = -torch.inf if self.maximize else torch.inf
        usable = torch.where(finite, members, worst)
        best = usable.max() if self.maximize else usable.min()
        nonfinite = members.numel() - count
        self._last = {"mean": mean, "best": best, "nonfinite": nonfinite}
        self._nonfinite_total = self._nonfinite_total + nonfinite
        return mean

    # ---- what happened so far ------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, float | int]:
        """Numbers for a log. Reading them waits for the device; ``tell`` does not.

        ``steps`` and ``evaluations`` (members scored) so far; ``mean`` and ``best`` member value of
        the last step, in the sign of the values, over its finite members; ``nonfinite``, how many
        were not, and ``nonfinite_total`` of all steps.
        """
        return {
            "steps": self.steps,
            "evaluations": self.evaluations,
            "mean": float(self._last.get("mean", math.nan)),
            "best": float(self._last.get("best", math.nan)),
            "nonfinite": int(self._last.get("nonfinite", 0)),
            "nonfinite_total": int(self._nonfinite_total),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the parameters: optimizer, draw, counters.

        Plain numbers and tensors, which ``torch.load(weights_only=True)`` takes. A learning-rate
        scheduler has a ``state_dict`` of its own.
        """
        return {
            "optimizer": self.optimizer.state_dict(),
            "noise": self.pm.get_extra_state(),
            "asked": self._asked,
            "stats": self.stats,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the parameters are restored as well.

        Raises:
            TypeError: no dictionary.
            ValueError: entries missing or unknown, or an optimizer with other parameter groups.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict from NES.state_dict, got {type(state).__name__}")
        expected = {"optimizer", "noise", "asked", "stats"}
        if set(state) != expected:
            raise ValueError(f"state must have the entries {sorted(expected)}, got {sorted(state)}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.pm.set_extra_state(state["noise"])
        self._asked = bool(state["asked"])
        stats = state["stats"]
        self.steps = int(stats["steps"])
        self.evaluations = int(stats["evaluations"])
        self._nonfinite_total = int(stats["nonfinite_total"])
        self._last = {name: torch.as_tensor(stats[name]) for name in ("mean", "best", "nonfinite")}
