"""What evolution strategies share: a PerturbedModel's noise, an estimate, and a torch optimizer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..checks import as_count, undone_by
from ..distributed import Processes
from ..model import PerturbedModel
from .base import PopulationOptimizer, check_model, member_values
from .evaluation import Evaluation, check_estimate


@runtime_checkable
class Stateful(Protocol):
    """What has a state that a resumed run needs, such as running statistics of observations."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in plain numbers and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore it."""


@runtime_checkable
class Held(Protocol):
    """A normalizer that takes nothing in between hold and release."""

    def hold(self, on: bool = True) -> None:
        """Let nothing count until ``release``, or no longer."""

    def release(self, processes: Processes | None = None) -> None:
        """Take in what came since, in all processes."""


class EvolutionStrategy(PopulationOptimizer):
    """Base of optimizers that turn the losses of perturbed members into ``.grad``, and step.

    A subclass says how (:meth:`_estimate`). The search distribution is the model's noise around its
    parameters; ``optimizer`` moves them.

    Args:
        pm: the model and its population.
        optimizer: over its parameters; descends along the estimate. One whose ``step`` needs no
            closure. Learning-rate schedulers are put on it as usual.
        maximize: whether values are to be raised instead of lowered.
        sigma_schedule: step number (0 for the first) -> sigma of that step; default: the model's.
        reuse: steps that share their random numbers while the parameters move on: noise-reuse
            evolution strategies, for episodes that are scored a window at a time (Li, Harrison,
            Sohl-Dickstein, Smith, Metz: "Noise-Reuse in Online Evolution Strategies", 2023).
            Steps 0, ``reuse``, 2 ``reuse`` ... draw afresh: start new episodes where
            ``steps % reuse == 0``, and a member then sees the same perturbation throughout its
            episode.
        normalizer: whose ``state_dict`` belongs to this one's, such as running statistics of
            observations that the closure updates. A step that raises restores it. One with ``hold``
            and ``release`` (:class:`~perturbed.rl.ObservationNorm`) is held from ask to tell, so
            that all members see the same, and then takes in what all processes have seen.
        chunk: directions of a forward, at most: the closure is then called several times a step,
            each time for others (``pm.directions`` of them), with the same data. Default: all.
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
        ValueError: reuse or chunk below 1, chunk beside max_memory, an unknown estimate, an
            optimizer without any perturbed parameter, more processes than directions, a model of
            :class:`~perturbed.Explicit` layers, whose members are not drawn.
    """

    def __init__(
        self,
        pm: PerturbedModel,
        optimizer: torch.optim.Optimizer,
        maximize: bool,
        sigma_schedule: Callable[[int], float] | None,
        reuse: int,
        normalizer: Stateful | None,
        chunk: int | None,
        max_memory: int | float | str | None,
        distributed: torch.distributed.ProcessGroup | bool | None,
        estimate: str,
    ) -> None:
        """Check and store the arguments; nothing is drawn yet."""
        super().__init__(maximize)
        self.pm = check_model(pm)
        if pm.state.absolute:
            raise ValueError(
                "pm must have layers with noise, which is what members differ by; got one whose "
                "members are given"
            )
        if sigma_schedule is not None and not callable(sigma_schedule):
            raise TypeError(
                f"sigma_schedule must be a function of the step number, got {sigma_schedule!r}"
            )
        if normalizer is not None and not isinstance(normalizer, Stateful):
            raise TypeError(
                "normalizer must have state_dict and load_state_dict, got "
                f"{type(normalizer).__name__}"
            )
        self.optimizer = check_optimizer(optimizer, self._parameters())
        self.sigma_schedule = sigma_schedule
        self.reuse = as_count("reuse", reuse)
        self.normalizer = normalizer
        self.evaluation: Evaluation = Evaluation(pm, chunk, max_memory, distributed, estimate)
        # Weights and draw of the last estimate, for perturbed.optim.quality.
        self._estimated: tuple[Tensor, dict[str, Any]] | None = None

    @abstractmethod
    def _estimate(self, losses: Tensor) -> None:
        """Set ``.grad`` of the perturbed parameters from (S, D) losses, some maybe not finite."""

    @property
    def _held(self) -> Held | None:
        """The normalizer, if it can be held."""
        # Looking for a protocol's methods takes as long as an operation.
        if self.normalizer is None or not isinstance(self.normalizer, Held):
            return None
        return self.normalizer

    def _module(self) -> nn.Module:
        return self.pm.model

    def _parameters(self) -> list[nn.Parameter]:
        """Return the perturbed parameters, each once."""
        return perturbed_parameters(self.pm)

    def _sigma(self, device: torch.device) -> Tensor:
        """Return sigma as a () float64 tensor, which a recorded step finds changed in place."""
        return self.pm.state.tensors(device)[1]

    def _set_grad(self, weights: Tensor) -> None:
        """Set ``.grad`` to the estimate of the whole population, from (D,) weights."""
        self.evaluation.set_grad(weights, self._parameters())
        self._estimated = weights, self.pm.get_extra_state()

    # ---- one step ------------------------------------------------------------------------------

    def ask(self) -> PerturbedModel:
        """Draw noise and return the model, whose rows are now the next population.

        The noise is fresh unless ``reuse`` keeps it.

        Raises:
            ValueError: sigma is 0 (the estimate divides by it), or what sigma_schedule returned is
                no valid sigma.
            ProcessError: before the first step, processes that do not train the same thing.
        """
        return super().ask()

    def _draw(self) -> PerturbedModel:
        if self._held is not None:
            self._held.hold()
        sigma = self.pm.sigma if self.sigma_schedule is None else self.sigma_schedule(self.steps)
        self._check_sigma(sigma)
        if self.steps % self.reuse == 0 or not self.pm.state.drawn:
            self.pm.set_noise(sigma)
        else:
            self.pm.set_noise_scale(sigma)
        return self.pm

    def _snapshot(self) -> Any:
        return self.pm.get_extra_state(), self._normalizer_state(), self._asked

    def _restore(self, snapshot: Any) -> None:
        draw, normalizer, asked = snapshot
        self.pm.set_extra_state(draw)
        if self.normalizer is not None:
            self.normalizer.load_state_dict(normalizer)
            if self._held is not None:
                self._held.hold(asked)

    def windows(self) -> Iterator[PerturbedModel]:
        """Iterate over the forwards of this process's share, between ask and tell.

        For losses that come from elsewhere than a closure; ``tell`` takes the member values of all
        windows side by side, (S, directions of this process).
        """
        return self.evaluation.windows()

    def _score(self, closure: Callable[..., Any]) -> Any:
        return self.evaluation.score(closure, self._parameters()[0].device)

    def _members(self, values: Any) -> Tensor:
        self._check_sigma(self.pm.sigma)
        here = member_values(values, self.pm, self._parameters()[0].device)
        return self.evaluation.gather(here)

    def _update(self, losses: Tensor) -> None:
        if self._held is not None:
            self._held.release(self.evaluation.processes)
        self._estimate(losses)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:  # frozen since: its last gradient is still there
                    parameter.grad = None
        self.optimizer.step()

    @staticmethod
    def _check_sigma(sigma: float) -> None:
        if sigma == 0:
            raise ValueError("sigma must be greater than 0 to estimate a gradient, got 0")

    # ---- resuming ------------------------------------------------------------------------------

    def _normalizer_state(self) -> Any:
        """Copy the normalizer's state, whose tensors may change in place."""
        return None if self.normalizer is None else copy.deepcopy(self.normalizer.state_dict())

    def _state(self) -> dict[str, Any]:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "noise": self.pm.get_extra_state(),
            "estimate": self.evaluation.estimate,
        }
        if self.normalizer is not None:
            state["normalizer"] = self._normalizer_state()
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        check_estimate(state["estimate"])
        held = copy.deepcopy(self.optimizer.state_dict()), self._normalizer_state()
        with undone_by(lambda: self._load_objects(*held)):
            self._load_objects(state["optimizer"], state.get("normalizer"))
        self.pm.set_extra_state(state["noise"])
        self.evaluation.estimate = state["estimate"]
        if self._held is not None:
            self._held.hold(state["asked"])

    def _load_objects(self, optimizer: Any, normalizer: Any) -> None:
        self.optimizer.load_state_dict(optimizer)
        if self.normalizer is not None:
            self.normalizer.load_state_dict(normalizer)


def perturbed_parameters(pm: PerturbedModel) -> list[nn.Parameter]:
    """Return the perturbed parameters of a model, each once."""
    return [parameter for parameter, _ in pm._perturbed().values()]


def check_optimizer(
    optimizer: object, parameters: Sequence[nn.Parameter], name: str = "optimizer"
) -> torch.optim.Optimizer:
    """Return ``optimizer`` if it is one of torch that holds some of ``parameters``."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{name} must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in parameters):
        raise ValueError(
            "optimizer must hold parameters that the model perturbs, got none of them; make it "
            "from the parameters of the model"
        )
    return optimizer
