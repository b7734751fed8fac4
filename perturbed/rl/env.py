"""What a rollout needs of environments: a batch of them, one a lane, tensors in and out."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor

from ..checks import as_count, check_flag


class BatchEnv(abc.ABC):
    """A batch of environments that step together; ``lanes`` of them, one a row.

    A subclass passes its sizes to ``super().__init__`` and writes :meth:`reset` and :meth:`step`.
    An episode's start is a function of its seed alone, so that members of a population that get the
    same seeds face the same episodes (common random numbers).

    Lanes do not restart by themselves: a lane that has ended stays as it is, and what it returns
    then means nothing, until it is reset.

    Args:
        lanes: B, environments that step together.
        observation_size: numbers in an observation.
        action_size: number of actions if ``discrete``, else numbers in an action.
        discrete: whether an action is an index.
        max_steps: steps after which :meth:`step` says truncated.
        action_low, action_high: bounds of a continuous action, numbers or (action_size,); default
            none. Rollouts clip to them.
        device: where the tensors are.

    The arguments are attributes of the same names.

    Attributes:
        action_low: (action_size,) float32 on ``device``, -inf without a bound; None if discrete.
        action_high: (action_size,) float32 on ``device``, inf without a bound; None if discrete.

    Raises:
        ValueError: sizes below 1, bounds for discrete actions, bounds of another length or crossed.
        TypeError: sizes that are no integers.

    Example:
        >>> import torch
        >>> from perturbed.rl import BatchEnv
        >>> class Walk(BatchEnv):  # go right to earn, five steps long
        ...     def __init__(self, lanes):
        ...         super().__init__(lanes, 1, 2, discrete=True, max_steps=5)
        ...         self.place, self.time = torch.zeros(lanes, 1), torch.zeros(lanes)
        ...     def reset(self, seeds, mask=None):
        ...         seeds, mask = self.check_reset(seeds, mask)
        ...         self.place[mask], self.time[mask] = 0.0, 0.0
        ...         return self.place.clone()
        ...     def step(self, actions):
        ...         move = 2.0 * self.check_actions(actions) - 1
        ...         self.place, self.time = self.place + move[:, None], self.time + 1
        ...         never = torch.zeros(self.lanes, dtype=torch.bool)
        ...         return self.place, move, never, self.time >= self.max_steps
        >>> env = Walk(2)
        >>> env.reset(torch.tensor([1, 2])).shape
        torch.Size([2, 1])
        >>> env.step(torch.tensor([0, 1]))[1]
        tensor([-1.,  1.])
    """

    def __init__(
        self,
        lanes: int,
        observation_size: int,
        action_size: int,
        discrete: bool,
        max_steps: int,
        action_low: float | Tensor | None = None,
        action_high: float | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Check and store the sizes."""
        self.lanes = as_count("lanes", lanes)
        self.observation_size = as_count("observation_size", observation_size)
        self.action_size = as_count("action_size", action_size)
        self.max_steps = as_count("max_steps", max_steps)
        if self.max_steps >= 2**63:
            raise ValueError(f"max_steps must be below 2^63, got {self.max_steps}")
        self.discrete = check_flag("discrete", discrete)
        self.device = torch.device(device)
        self.action_low = self.action_high = None
        if not discrete:
            self.action_low = self._bound("action_low", action_low, -math.inf)
            self.action_high = self._bound("action_high", action_high, math.inf)
            if (self.action_low > self.action_high).any():
                raise ValueError(
                    "action_low must not exceed action_high, got "
                    f"{self.action_low.tolist()} and {self.action_high.tolist()}"
                )
        elif action_low is not None or action_high is not None:
            raise ValueError("action_low and action_high are for continuous actions, not discrete")

    def _bound(self, name: str, value: float | Tensor | None, default: float) -> Tensor:
        bound = torch.as_tensor(default if value is None else value, dtype=torch.float32)
        if bound.shape not in ((), (self.action_size,)) or bound.isnan().any():
            raise ValueError(
                f"{name} must be a number or have shape ({self.action_size},), without NaN, got "
                f"{bound.tolist()}"
            )
        return bound.to(self.device).expand(self.action_size)

    @abc.abstractmethod
    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start lanes anew.

        Args:
            seeds: (lanes,) int64, of the episodes; those of lanes that go on are not read.
            mask: (lanes,) bool, the lanes to start; None for all. A mask with none is fine.

        Returns:
            (lanes, observation_size) float32, observations of all lanes; the caller may keep it.
        """

    @abc.abstractmethod
    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advance all lanes by one step.

        Args:
            actions: (lanes,) int64 if discrete, else (lanes, action_size) floating point.

        Returns:
            Observations (lanes, observation_size) float32, of the state reached; rewards (lanes,)
            floating point; terminated (lanes,) bool, the task has ended; truncated (lanes,) bool,
            time is up. The caller may keep them.
        """

    def set_idle(self, mask: Tensor) -> None:  # noqa: B027 (optional)
        """Hear which lanes nobody looks at until their next reset; (lanes,) bool.

        An environment that pays for each lane may leave these out of its steps. Default: no matter.
        """

    def close(self) -> None:  # noqa: B027 (optional)
        """Release what the environments hold outside Python; nothing by default."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all lanes, for runs that resume within an episode."""
        raise NotImplementedError(f"{type(self).__name__} cannot save the state of its lanes")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        raise NotImplementedError(f"{type(self).__name__} cannot restore the state of its lanes")

    # ---- checks for subclasses -----------------------------------------------------------------

    def check_reset(self, seeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return seeds and mask of :meth:`reset` on this device, a mask in place of None.

        Raises:
            TypeError: seeds that are no int64 tensor, a mask that is no bool tensor.
            ValueError: other shapes than (lanes,).
        """
        if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
            raise TypeError(f"seeds must be an int64 tensor of shape (lanes,), got {kind(seeds)}")
        if mask is None:
            mask = torch.ones(self.lanes, dtype=torch.bool, device=self.device)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor of shape (lanes,), got {kind(mask)}")
        for name, value in (("seeds", seeds), ("mask", mask)):
            if value.shape != (self.lanes,):
                raise ValueError(
                    f"{name} must have shape (lanes,) = ({self.lanes},), got {tuple(value.shape)}"
                )
        return seeds.to(self.device), mask.to(self.device)

    def check_actions(self, actions: Tensor) -> Tensor:
        """Return the actions of :meth:`step` on this device.

        Values are not looked at, which would wait for a GPU.

        Raises:
            TypeError: no tensor; floating point where actions are indices, or the other way round.
            ValueError: another shape than (lanes,) for indices, (lanes, action_size) for numbers.
        """
        shape = (self.lanes,) if self.discrete else (self.lanes, self.action_size)
        sort = "an int64" if self.discrete else "a floating-point"
        good = isinstance(actions, Tensor) and (
            actions.dtype == torch.int64 if self.discrete else actions.is_floating_point()
        )
        if not good:
            raise TypeError(f"actions must be {sort} tensor of shape {shape}, got {kind(actions)}")
        if actions.shape != shape:
            name = "(lanes,)" if self.discrete else "(lanes, action_size)"
            raise ValueError(
                f"actions must have shape {name} = {shape}, got {tuple(actions.shape)}"
            )
        return actions.to(self.device)


def kind(value: object) -> str:
    """Return what an argument is, for an error: the dtype of a tensor, else the type."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
