"""What searches share that learn a standard deviation for every parameter beside the mean."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .. import _ops
from ..checks import check_flag, check_number, check_tensor, undone_by
from ..model import PerturbedModel
from ..noise.base import OPTIMIZER_ID, STREAM_WEIGHT, per_scratch, stream_word
from ..noise.state import NoiseState
from .base import PopulationOptimizer
from .strategy import check_optimizer
from .swarm import Swarm

STREAM = stream_word(OPTIMIZER_ID, STREAM_WEIGHT)


class SeparableSearch(PopulationOptimizer):
    """Base of searches with a normal distribution whose covariance is diagonal.

    Member p of a generation is ``mean + std * eps_p``, elementwise; mirrored members are ``mean +
    std * eps_p`` and ``mean - std * eps_p``. The mean is the model's own parameters: the estimate
    goes to their ``.grad``, and ``optimizer`` moves them. A subclass says what both, mean and
    ``std``, learn (:meth:`_learn`).

    The members are a matrix of P * N numbers, P times the model: of use for small networks, where a
    scale for every parameter pays. The eps are drawn again where they are needed.

    Args:
        model: a PerturbedModel of :class:`~perturbed.Explicit` layers, whose members are evaluated
            in one forward, or any module, whose members are evaluated one after the other or in a
            pool of processes; see :class:`~perturbed.optim.Swarm`.
        members: P; default: the directions of a PerturbedModel. Needed for a plain module.
        optimizer: over the model's parameters.
        sigma: standard deviation to start from, one for all parameters or (N,).
        std_bounds: least and largest standard deviation.
        mirrored: whether the second half of the members mirrors the first.
        maximize: whether values are to be raised instead of lowered.
        seed: of the noise; None takes one from the operating system.
        chunk: members of a forward, at most; see :class:`~perturbed.optim.Swarm`, as for what
            follows.
        max_memory: bytes that a forward may take.
        distributed: whether to share the members with other processes.

    Attributes:
        swarm: the members.
        std: (N,) standard deviations, in the members' dtype.

    Raises:
        TypeError: arguments of another type.
        ValueError: a sigma outside of the bounds or of another shape, bounds in the wrong order, an
            odd number of mirrored members, an optimizer without any of the parameters.
    """

    def __init__(
        self,
        model: PerturbedModel | nn.Module,
        members: int | None,
        optimizer: torch.optim.Optimizer | None,
        sigma: float | Tensor,
        std_bounds: tuple[float, float],
        mirrored: bool,
        maximize: bool,
        seed: int | None,
        chunk: int | None,
        max_memory: int | float | str | None,
        distributed: torch.distributed.ProcessGroup | bool | None,
    ) -> None:
        """Check and store the arguments; nothing is drawn yet."""
        super().__init__(maximize)
        self.mirrored = check_flag("mirrored", mirrored)
        self.swarm = Swarm(model, members, chunk, max_memory, distributed, "members")
        self.evaluation = self.swarm.evaluation
        if mirrored and self.swarm.particles % 2 == 1:
            raise ValueError(f"members must be even to be mirrored, got {self.swarm.particles}")
        self.std_bounds = _check_bounds(std_bounds)
        self.std = self._check_std(sigma)
        parameters = list(self.swarm.parameters.values())
        if optimizer is None:
            optimizer = self._default_optimizer(parameters)
        self.optimizer = check_optimizer(optimizer, parameters)
        # The draw: what its directions are is said here, by _epsilon.
        self._noise = NoiseState(self.swarm.particles, antithetic=False, seed=seed)

    @abstractmethod
    def _default_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer that the method's paper has."""

    @abstractmethod
    def _learn(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient at the mean and the new ``std``, both (N,), from (P,) losses."""

    def _module(self) -> nn.Module:
        return self.swarm.module

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self._noise.seed

    def _check_std(self, sigma: object) -> Tensor:
        """Return standard deviations for every parameter, (N,)."""
        like = self.swarm.positions[0]
        low, high = self.std_bounds
        if isinstance(sigma, Tensor):
            if sigma.shape != like.shape or not sigma.is_floating_point():
                raise ValueError(
                    f"sigma must be a number or a floating-point tensor (N,) = ({like.numel()},), "
                    f"got {sigma.dtype} {tuple(sigma.shape)}"
                )
            std = sigma.detach().to(like, copy=True)
        else:
            std = torch.full_like(like, check_number("sigma", sigma, above=True))
        if not bool(((std >= low) & (std <= high) & std.isfinite()).all()):
            raise ValueError(f"sigma must be finite and within std_bounds {self.std_bounds}")
        return std

    # ---- one generation ------------------------------------------------------------------------

    def _epsilon(self, first: int, count: int) -> Tensor:
        """Draw eps of independent members ``first`` .. ``first + count - 1``: (count, N)."""
        positions = self.swarm.positions
        key = self._noise.tensors(positions.device)[0]
        size = positions.shape[1]
        eps = _ops.dense_materialise(key, STREAM, first, count, 1, size, False, positions.dtype)
        return eps.view(count, size)

    def _chunks(self) -> list[tuple[int, int]]:
        """First and count of independent members that are drawn together."""
        positions = self.swarm.positions
        count = self.swarm.particles // 2 if self.mirrored else self.swarm.particles
        each = per_scratch(positions.device, positions.shape[1] * positions.element_size())
        return [(first, min(each, count - first)) for first in range(0, count, each)]

    def ask(self) -> Swarm:
        """Draw the next members; return the swarm, which shows them to a PerturbedModel."""
        return super().ask()

    def _draw(self) -> Swarm:
        self._noise.next_generation()
        self._fill()
        return self.swarm

    @torch.no_grad()
    def _fill(self) -> None:
        """Set the swarm to the members of the current draw."""
        positions = self.swarm.positions
        mean = self.swarm.read().to(positions.dtype)
        for first, count in self._chunks():
            step = self._epsilon(first, count).mul_(self.std)
            torch.add(mean, step, out=positions[first : first + count])
            if self.mirrored:
                other = first + self.swarm.particles // 2
                torch.sub(mean, step, out=positions[other : other + count])
        self.swarm.publish()

    def _score(self, closure: Any) -> Any:
        return self.swarm.score(closure)

    def _members(self, values: Any) -> Tensor:
        return self.swarm.gather(self.swarm.values(values))

    def _update(self, losses: Tensor) -> None:
        gradient, std = self._learn(losses)
        # What overflowed stays as it was.
        std = torch.where(std.isfinite(), std, self.std).clamp(*self.std_bounds)
        parameters = self.swarm.parameters.values()
        for parameter, part in zip(parameters, self.swarm._split(gradient), strict=True):
            parameter.grad = part.to(parameter.dtype)
        self.optimizer.step()
        self.std = std

    def _moments(self, weights: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sum_p weights[p] eps_p`` and ``sum_p squares[p] (eps_p^2 - 1)``, both (N,).

        Args:
            weights: (P,) of the members; a mirrored member's eps is the negative one.
            squares: (P,) of the members.
        """
        weights, squares = weights.to(self.std.dtype), squares.to(self.std.dtype)
        if self.mirrored:
            weights = weights.view(2, -1)[0] - weights.view(2, -1)[1]
            squares = squares.view(2, -1).sum(0)
        first_moment, second_moment = torch.zeros_like(self.std), torch.zeros_like(self.std)
        for first, count in self._chunks():
            eps = self._epsilon(first, count)
            mine = slice(first, first + count)
            first_moment.addmv_(eps.t(), weights[mine])
            second_moment.addmv_(eps.square_().sub_(1).t(), squares[mine])
        return first_moment, second_moment

    def _snapshot(self) -> Any:
        return self._noise.generation

    def _restore(self, snapshot: Any) -> None:
        self._noise.move(self.seed, snapshot, self._noise.sigma)
        if self._noise.drawn:
            self._fill()

    # ---- resuming ------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "noise": {"seed": self.seed, "generation": self._noise.generation},
            "std": self.std,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, bit for bit; load the model's parameters before.

        Raises:
            TypeError: no dictionary.
            ValueError: entries missing or unknown, or those of another kind of run.
        """
        super().load_state_dict(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        std = state["std"]
        check_tensor("state['std']", std, self.std)
        held = copy.deepcopy(self.optimizer.state_dict())
        with undone_by(lambda: self.optimizer.load_state_dict(held)):
            self.optimizer.load_state_dict(state["optimizer"])
        self.std = std.detach().to(self.std, copy=True)
        noise = state["noise"]
        self._noise.move(noise["seed"], noise["generation"], self._noise.sigma)
        if state["asked"]:
            self._fill()


def _check_bounds(bounds: object) -> tuple[float, float]:
    """Return std_bounds as two numbers."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"std_bounds must be two numbers (least, largest), got {bounds!r}")
    low, high = bounds
    low = check_number("std_bounds[0]", low)
    if high != math.inf:
        high = check_number("std_bounds[1]", high, low=low)
    return low, high
