"""GymEnv: gymnasium's environments as a batch, through its vector API."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import as_count
from .env import BatchEnv

MODES = ("sync", "async")


class GymEnv(BatchEnv):
    """A batch of gymnasium environments, one a lane.

    They run in Python, one after the other or in a process each, so this serves every environment
    and is fast with none. :class:`~perturbed.rl.MujocoEnv` and the environments of
    ``perturbed.rl.classic`` are many times faster where they apply.

    Box observations are flattened, Discrete ones become one-hot. A lane's episode starts with
    ``reset(seed=...)``. Lanes that have ended are not stepped until their next reset.

    Args:
        source: an environment's name, a function that returns a new environment, or a
            ``gymnasium.vector.VectorEnv`` whose autoreset mode is DISABLED. The last starts ended
            lanes anew by itself and steps them unseen, as it knows no lane that rests.
        lanes: B; of a VectorEnv its own number.
        vectorization_mode: "sync", or "async" for a process per lane; the latter pays off for
            environments that take milliseconds a step.
        max_steps: of an episode; default: the environment's time limit.
        device: where the tensors are.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: spaces that are neither Box nor Discrete; no ``max_steps`` for an environment
            without a limit; a VectorEnv that restarts by itself; later, negative seeds.
        TypeError: arguments of another type.
        RuntimeError: later, an environment that raises or leaves its observation space; it names
            the lane. The batch is of no use after that.

    Example:
        >>> import torch
        >>> from perturbed.rl import GymEnv
        >>> env = GymEnv("CartPole-v1", lanes=2)
        >>> env.reset(torch.tensor([1, 2])).shape
        torch.Size([2, 4])
        >>> env.step(torch.tensor([0, 1]))[1]
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        source: Any,
        lanes: int | None = None,
        vectorization_mode: str = "sync",
        max_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the environments; they have no state before their first reset."""
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError(
                f'GymEnv needs gymnasium: pip install "perturbed[rl]" ({error})'
            ) from error
        if max_steps is not None:
            max_steps = as_count("max_steps", max_steps)
        self._owned = not isinstance(source, gymnasium.vector.VectorEnv)
        if self._owned:
            if lanes is None:
                raise ValueError("lanes must be given, except for a VectorEnv")
            lanes = as_count("lanes", lanes)
            if vectorization_mode not in MODES:
                raise ValueError(
                    f"vectorization_mode must be one of {MODES}, got {vectorization_mode!r}"
                )
            make = _factory(source, max_steps)
            build = functools.partial(_vector, make, lanes, vectorization_mode)
            probe = make()
            observed, action, spec = probe.observation_space, probe.action_space, probe.spec
            probe.close()
        else:
            _check_vector(source, lanes)
            observed, action = source.single_observation_space, source.single_action_space
            spec = source.spec
        size, action_size, discrete = _sizes(observed, action)
        if max_steps is None:
            max_steps = spec.max_episode_steps if spec else None
        if max_steps is None:
            raise ValueError("max_steps must be given: the environment has no time limit")
        self._observed, self._action = observed, action
        self._vector = build() if self._owned else source
        super().__init__(
            self._vector.num_envs,
            size,
            action_size,
            discrete,
            max_steps,
            None if discrete else torch.from_numpy(action.low.ravel()),
            None if discrete else torch.from_numpy(action.high.ravel()),
            device,
        )
        self._seeds = [0] * self.lanes
        self._steps = np.zeros(self.lanes, dtype=np.int64)
        self._terminated = np.zeros(self.lanes, dtype=bool)
        self._truncated = np.zeros(self.lanes, dtype=bool)
        self._seen: NDArray | None = None  # (lanes, observation_size) once there was a reset

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start the lanes of ``mask``; the first reset starts all, with seed 0 where none is asked.

        Raises:
            ValueError: other shapes, a negative seed.
            TypeError: other dtypes.
            RuntimeError: an environment raised.
        """
        seeds, mask = self.check_reset(seeds, mask)
        chosen = mask.cpu().numpy()
        given = seeds.cpu().numpy()
        if (given[chosen] < 0).any():
            raise ValueError(f"seeds must be at least 0, got {given[chosen].min()}")
        for lane in chosen.nonzero()[0].tolist():
            self._seeds[lane] = int(given[lane])
        for held in (self._steps, self._terminated, self._truncated):
            held[chosen] = 0
        if self._seen is None:
            self._seen = self._flat(self._vector.reset(seed=list(self._seeds))[0])
        elif chosen.any():
            self._seen[chosen] = self._restart(chosen)[chosen]
        return self._observations()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step the lanes that are running, see :class:`BatchEnv`; rewards are float64.

        Raises:
            ValueError: actions of another shape.
            TypeError: actions of another dtype.
            RuntimeError: an environment raised; before the first reset.
        """
        if self._seen is None:
            raise RuntimeError("step: the environments have no state yet; call reset() first")
        wanted = self.check_actions(actions).detach().cpu().numpy()
        if self.discrete:
            wanted = wanted + self._action.start
        else:
            wanted = wanted.reshape(self.lanes, *self._action.shape)
        resting = self._terminated | self._truncated
        if resting.any() and not self._owned:
            self._restart(resting)
        results = self._vector.step(wanted.astype(self._action.dtype))
        observations, rewards, terminated, truncated, infos = results
        if self._owned and "lane_terminated" in infos:  # see Lane
            terminated, truncated = infos["lane_terminated"], infos["lane_truncated"]
        running = ~resting
        self._seen[running] = self._flat(observations)[running]
        self._steps[running] += 1
        self._terminated[running] = terminated[running]
        late = self._steps >= self.max_steps
        self._truncated[running] = (truncated | late)[running]
        rewards = np.where(running, rewards, 0.0)
        parts = (rewards, self._terminated.copy(), self._truncated.copy())
        reward, ended, cut = (torch.from_numpy(part).to(self.device) for part in parts)
        return self._observations(), reward, ended, cut

    def close(self) -> None:
        """Close the environments, unless they came as a VectorEnv."""
        if self._owned:
            self._vector.close()

    def _restart(self, lanes: NDArray) -> NDArray:
        """Reset some lanes with the seeds they have; return the observations of all."""
        options = {"reset_mask": lanes.copy()}
        return self._flat(self._vector.reset(seed=list(self._seeds), options=options)[0])

    def _flat(self, observations: NDArray) -> NDArray:
        """Return what the environments returned as (lanes, observation_size) float32."""
        if hasattr(self._observed, "n"):  # Discrete
            index = np.asarray(observations) - self._observed.start
            return np.eye(self.observation_size, dtype=np.float32)[index]
        return np.asarray(observations, dtype=np.float32).reshape(self.lanes, -1)

    def _observations(self) -> Tensor:
        assert self._seen is not None
        return torch.from_numpy(self._seen.copy()).to(self.device)


def _sizes(observed: Any, action: Any) -> tuple[int, int, bool]:
    """Return observation_size, action_size and whether actions are discrete."""
    from gymnasium.spaces import Box, Discrete

    for name, space in (("observation", observed), ("action", action)):
        if not isinstance(space, (Box, Discrete)):
            raise ValueError(f"{name} space must be Box or Discrete, got {space}")
    size = int(observed.n) if isinstance(observed, Discrete) else int(np.prod(observed.shape))
    if isinstance(action, Discrete):
        return size, int(action.n), True
    return size, int(np.prod(action.shape)), False


def _factory(source: Any, max_steps: int | None) -> Callable[[], Any]:
    """Return a function that makes one environment."""
    import gymnasium

    if isinstance(source, str):
        limit = {} if max_steps is None else {"max_episode_steps": max_steps}
        return lambda: gymnasium.make(source, disable_env_checker=True, **limit)
    if not callable(source) or isinstance(source, gymnasium.Env):
        raise TypeError(
            "source must be a name, a function that makes an environment, or a VectorEnv, got "
            f"{type(source).__name__}"
        )
    return source


def _vector(make: Callable[[], Any], lanes: int, mode: str) -> Any:
    """Return a vector environment whose lanes rest when they have ended."""
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    from .gym_lane import Lane

    def maker(number: int) -> Callable[[], Any]:
        return lambda: Lane(make(), number)

    makers = [maker(number) for number in range(lanes)]
    kind = SyncVectorEnv if mode == "sync" else AsyncVectorEnv
    return kind(makers, autoreset_mode=AutoresetMode.DISABLED)


def _check_vector(vector: Any, lanes: int | None) -> None:
    """Refuse a caller's VectorEnv that restarts by itself or has other lanes than asked for."""
    from gymnasium.vector import AutoresetMode

    mode = vector.metadata.get("autoreset_mode")
    if mode != AutoresetMode.DISABLED:
        raise ValueError(
            f"source must be a VectorEnv with autoreset_mode=AutoresetMode.DISABLED, got {mode}"
        )
    if lanes not in (None, vector.num_envs):
        raise ValueError(f"lanes must be the VectorEnv's {vector.num_envs} or None, got {lanes}")
