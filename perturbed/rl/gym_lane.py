"""A gymnasium environment as a lane of GymEnv. Needs gymnasium, unlike the rest of the package."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Lane(gymnasium.Wrapper):
    """Stop at an episode's end until the next reset, and say in errors which lane it was.

    A vector environment steps all of its environments and refuses to if it knows that one has
    ended. Hence an end is not told by the flags of :meth:`step` but by its info, which holds
    ``lane_terminated`` and ``lane_truncated`` in an episode's last step and nothing else ever.

    Args:
        env: the environment.
        number: of the lane, for errors.
    """

    def __init__(self, env: gymnasium.Env, number: int) -> None:
        """Begin as one that has ended: it waits for its first reset."""
        super().__init__(env)
        self._number = number
        self._last: Any = None
        self._ended = True

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        """Start an episode."""
        try:
            observation, _ = self.env.reset(seed=seed, options=options)
            self._last = self._checked(observation)
        except Exception as error:
            raise self._failure("reset", error) from error
        self._ended = False
        return self._last, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """Step if the episode goes on; else return the last observation and 0."""
        if self._ended:
            return self._last, 0.0, False, False, {}
        try:
            observation, reward, terminated, truncated, _ = self.env.step(action)
            self._last = self._checked(observation)
        except Exception as error:
            raise self._failure("step", error) from error
        self._ended = bool(terminated or truncated)
        if not self._ended:
            return self._last, reward, False, False, {}
        ends = {"lane_terminated": bool(terminated), "lane_truncated": bool(truncated)}
        return self._last, reward, False, False, ends

    def _checked(self, observation: Any) -> Any:
        """Return an observation, which must have the shape of its space."""
        space = self.observation_space
        if np.shape(observation) != space.shape:
            raise ValueError(
                f"observation of shape {np.shape(observation)} where the space is {space}"
            )
        return observation

    def _failure(self, what: str, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"the environment of lane {self._number} failed in {what}: "
            f"{type(error).__name__}: {error}"
        )
