"""Rollout: all members of a population act at once, one lane a member and episode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checks import as_count, check_entries, check_flag, check_number
from ..model import PerturbedModel
from ..noise.state import as_seed, check_seed
from .actor import Actor, leaves
from .env import BatchEnv, kind
from .lanes import Lanes
from .moments import Moments, merged, moments
from .normalize import ObservationNorm
from .results import Cost, Episodes, Window

# Observations go into the norm in blocks of this many steps, which is cheaper than one by one.
_NORM_BLOCK = 32
# Entries of the state of lanes that have started.
_ENTRIES = (
    "env", "observations", "total", "length", "episode", "begun", "generation", "policy"
)  # fmt: skip


class Rollout:
    """Act in an environment with every member of a population, one forward a step.

    Lane b of the environment is row b of the flat batch. A member has R / S lanes; one whose
    episode has ended is refilled with the member's next. :meth:`episodes` runs whole episodes,
    :meth:`run` a number of steps and leaves the lanes where they are, for truncated windows with
    the same noise: with ``NES(..., reuse=K)``, call :meth:`restart` where fresh noise is drawn, and
    have the closure return ``run(steps).returns``.

    Anything that raises drops the lanes, which then start anew; the norm is as it was before.

    Args:
        policy: a PerturbedModel, or any function of observations (lanes, observation_size). Its
            output is read as logits, (lanes, action_size), of which the largest wins, or indices
            (lanes,) int64, where actions are discrete; else as the actions, clipped to the
            environment's bounds. A return is NaN where the output is.
        env: with R * D lanes; any number for a function without ``pm``.
        pm: the population, where ``policy`` is a function around one. Default: the policy, if it is
            a PerturbedModel, else none: all lanes are one member's.
        seed: of the episodes.
        generation: also of the episodes; default: that of the population's draw, so that every
            generation meets fresh ones, else 0. Read when lanes start.
        seeds: which members share episodes: "common", "pairs" or "members"; or the seeds, int64,
            (E,) or (S, D, E). See :class:`~perturbed.rl.lanes.Lanes`.
        norm: normalises observations, and sees those of active lanes unless it is in evaluation
            mode.
        sync: whether the end of :meth:`episodes` and :meth:`run` syncs the norm. Without, what it
            has seen waits for ``norm.collect()``.
        state: of a recurrent policy at the start of an episode, a tensor or a nest of tensors with
            lanes first. The policy is then called as ``policy(observations, state)`` and returns
            ``(output, state)``.
        act: makes actions, or logits, of the policy's output.
        reward_shift: taken from every reward of ``returns``, such as an alive bonus (Mania et al.,
            2018, section 3); returns without it are reported too.
        max_steps: ends episodes earlier than the environment's ``max_steps``.

    Raises:
        ValueError: lanes that are no R * D, unknown seeds, a state without lanes first, max_steps
            below 1, a shift that is not finite; later, observations, rewards or outputs of another
            shape.
        TypeError: arguments of another type.
        RuntimeError: from an environment that raises, with the error as its cause.

    Example:
        >>> import perturbed
        >>> from perturbed.rl import CartPole, Rollout
        >>> pm = perturbed.PerturbedModel(perturbed.PerturbedLinear(4, 2, 8), 8, sigma=0.5)
        >>> pm.set_noise()
        >>> lanes = Rollout(pm, CartPole(lanes=16))  # 8 antithetic pairs
        >>> window = lanes.run(steps=10)
        >>> window.returns.shape, window.cost.steps
        (torch.Size([2, 8]), 160)
        >>> lanes.episodes(3).lengths.shape
        torch.Size([2, 8, 3])
    """

    def __init__(
        self,
        policy: Callable[..., Any],
        env: BatchEnv,
        *,
        pm: PerturbedModel | None = None,
        seed: int = 0,
        generation: int | None = None,
        seeds: str | Tensor = "common",
        norm: ObservationNorm | None = None,
        sync: bool = True,
        state: Any = None,
        act: Callable[[Any], Tensor] | None = None,
        reward_shift: float = 0.0,
        max_steps: int | None = None,
    ) -> None:
        """Check the arguments; nothing runs yet."""
        if not isinstance(env, BatchEnv):
            raise TypeError(f"env must be a BatchEnv, got {type(env).__name__}")
        if pm is None and isinstance(policy, PerturbedModel):
            pm = policy
        if pm is not None and not isinstance(pm, PerturbedModel):
            raise TypeError(f"pm must be a PerturbedModel, got {type(pm).__name__}")
        limit = env.max_steps if max_steps is None else as_count("max_steps", max_steps)
        self.env, self.pm, self.norm, self.sync = env, pm, norm, check_flag("sync", sync)
        self.seed = check_seed(seed)
        self.generation = None if generation is None else as_seed(generation, "generation")
        self.reward_shift = check_number("reward_shift", reward_shift, low=-math.inf)
        self.max_steps = min(limit, env.max_steps)
        self._actor = Actor(policy, policy if pm is None else pm, env, norm, state, act)
        self._lanes = Lanes(env.lanes, pm, seeds, env.device)
        self._observations: Tensor | None = None  # None: the lanes have not started
        self._total = torch.zeros(env.lanes, dtype=torch.float64, device=env.device)
        self._length = torch.zeros(env.lanes, dtype=torch.int64, device=env.device)
        self._over = torch.zeros(env.lanes, dtype=torch.bool, device=env.device)
        self._seen: list[tuple[Tensor, Tensor]] = []  # not yet in the moments
        self._moments: Moments | None = None  # of every lane, not yet in the norm
        self._cost = Cost()

    # ---- what callers run ----------------------------------------------------------------------

    def restart(self) -> None:
        """Have the next :meth:`run` start all lanes anew, with the generation's episodes."""
        self._observations = None

    @torch.no_grad()
    def episodes(self, count: int) -> Episodes:
        """Run ``count`` whole episodes of each member, from their start.

        Raises:
            ValueError: count below 1, or more than seeds were given for.
        """
        count = as_count("episodes", count)
        signs, _, directions = self._lanes.shape
        returns = self._total.new_full((signs * directions, count), math.nan)
        lengths = self._length.new_zeros(signs * directions, count)
        with self._running():
            self._begin(count)
            while True:
                self._step()
                done, ended = self._ended()
                if len(ended):
                    where = self._lanes.member[ended], self._lanes.episode[ended]
                    returns[where], lengths[where] = self._total[ended], self._length[ended]
                    self._refill(done)
                    if not self._lanes.active.any():
                        break
        self.restart()
        returns, lengths = (table.view(signs, directions, count) for table in (returns, lengths))
        self._cost.steps, self._cost.episodes = int(lengths.sum()), lengths.numel()
        raw = returns.mean(2)
        shifted = raw - self.reward_shift * lengths.to(raw.dtype).mean(2)
        return Episodes(shifted, raw, returns, lengths, self._cost)

    @torch.no_grad()
    def run(self, steps: int) -> Window:
        """Run all lanes for ``steps`` steps from where they are; finished ones are refilled.

        Raises:
            ValueError: steps below 1, or seeds that were given as a tensor.
        """
        steps = as_count("steps", steps)
        earned = torch.zeros_like(self._total)
        found = []
        with self._running():
            if self._observations is None:
                self._begin(None)
            for _ in range(steps):
                earned += self._step()
                done, ended = self._ended()
                if len(ended):
                    found.append((ended, self._total[ended], self._length[ended]))
                    self._refill(done)
        none = self._length.new_zeros(0)
        found.insert(0, (none, self._total.new_zeros(0), none))
        ended, returns, lengths = (torch.cat(part) for part in zip(*found, strict=True))
        self._cost.steps, self._cost.episodes = steps * self.env.lanes, len(ended)
        raw = self._lanes.mean(earned)
        return Window(raw - steps * self.reward_shift, raw, ended, returns, lengths, self._cost)

    # ---- one step ------------------------------------------------------------------------------

    def _step(self) -> Tensor:
        """Act once in all lanes; return what was earned, (lanes,) float64, 0 in idle ones."""
        assert self._observations is not None
        active = self._lanes.active
        if self.norm is not None and self.norm.training:
            self._seen.append((self._observations, active))
            if len(self._seen) == _NORM_BLOCK:
                self._flush()
        start = time.perf_counter()
        actions, broken = self._actor(self._observations)
        middle = time.perf_counter()
        observations, rewards, terminated, truncated = self._call("step", actions)
        self._cost.policy_seconds += middle - start
        self._cost.env_seconds += time.perf_counter() - middle
        self._observations = self._check_observations(observations)
        for name, value in (
            ("rewards", rewards),
            ("terminated", terminated),
            ("truncated", truncated),
        ):
            self._check_lanes(name, value)
        rewards = rewards.to(self._total.dtype)
        if broken is not None:
            rewards = torch.where(broken, math.nan, rewards)
        rewards = torch.where(active, rewards, 0.0)
        self._total = self._total + rewards
        self._length = self._length + active
        self._over = active & (terminated | truncated | (self._length >= self.max_steps))
        return rewards

    def _ended(self) -> tuple[Tensor, Tensor]:
        """Return the lanes whose episode the last step ended: (lanes,) bool, and their numbers."""
        return self._over, self._over.nonzero().squeeze(1)

    def _refill(self, done: Tensor) -> None:
        """Start the next episodes in lanes that are done; lanes without one idle."""
        start = self._lanes.go_on(done)
        self._total = torch.where(start, 0.0, self._total)
        self._length = torch.where(start, 0, self._length)
        self._actor.clear(start)
        begin = time.perf_counter()
        if start.any():
            observations = self._call("reset", self._lanes.seeds(), start)
            self._observations = self._check_observations(observations)
        if not self._lanes.active.all():
            self._call("set_idle", ~self._lanes.active)
        self._cost.env_seconds += time.perf_counter() - begin

    def _begin(self, episodes: int | None) -> None:
        """Start all lanes."""
        generation = self.generation
        if generation is None:
            generation = 0 if self.pm is None else self.pm.state.generation
        self._lanes.begin(self.seed, generation, episodes)
        self._actor.begin()
        self._total = torch.zeros_like(self._total)
        self._length = torch.zeros_like(self._length)
        begin = time.perf_counter()
        self._observations = self._check_observations(self._call("reset", self._lanes.seeds()))
        self._call("set_idle", ~self._lanes.active)
        self._cost.env_seconds += time.perf_counter() - begin

    # ---- around it -----------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Count anew, read the norm and update it at the end; on an error it stays as it was."""
        self._check_window()
        self._cost = Cost()
        self._actor.refresh()
        try:
            yield
            self._flush()
            if self.norm is not None and self._moments is not None:
                self.norm.set_aside(*self._moments)
                if self.sync:
                    self.norm.sync()
        except BaseException:
            self._observations = None
            raise
        finally:
            self._seen.clear()
            self._moments = None

    def _check_window(self) -> None:
        """Refuse to mix up the shares of a population."""
        pm, norm = self.pm, self.norm
        if pm is None:
            return
        if self._observations is not None and self._lanes.first != pm.state.first_direction:
            raise ValueError(
                f"pm must show the directions that the lanes are at, from {self._lanes.first} on, "
                f"got those from {pm.state.first_direction} on; a Rollout for each window goes on "
                "where it was"
            )
        shared = pm.directions < pm.population
        if shared and norm is not None and norm.training and self.sync and not norm.held:
            raise ValueError(
                f"norm would be synced with {pm.directions} of {pm.population} directions: pass it "
                "to the optimizer (normalizer=norm), which syncs it in tell(), or sync=False"
            )

    def _flush(self) -> None:
        """Count what the policy has seen, for each lane on its own."""
        if self.norm is not None and self._seen:
            observations, masks = (torch.stack(part) for part in zip(*self._seen, strict=True))
            like = self.norm.mean
            block = moments(observations.to(like), masks.to(like.device))
            self._moments = block if self._moments is None else merged(self._moments, block)
        self._seen.clear()

    def _call(self, name: str, *args: Tensor) -> Any:
        """Call a method of the environment; say which and when if it raises."""
        try:
            return getattr(self.env, name)(*args)
        except Exception as error:
            step = int(self._length.max())
            raise RuntimeError(
                f"env.{name} of {type(self.env).__name__} raised {type(error).__name__} after "
                f"{step} steps of the longest episode under way: {error}"
            ) from error

    def _check_observations(self, observations: Any) -> Tensor:
        shape = self.env.lanes, self.env.observation_size
        if not isinstance(observations, Tensor) or observations.shape != shape:
            got = (
                tuple(observations.shape)
                if isinstance(observations, Tensor)
                else kind(observations)
            )
            raise ValueError(
                f"env must return observations of shape (lanes, observation_size) = {shape}, got "
                f"{got}"
            )
        return observations

    def _check_lanes(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or value.shape != (self.env.lanes,):
            got = tuple(value.shape) if isinstance(value, Tensor) else kind(value)
            raise ValueError(
                f"env must return {name} of shape (lanes,) = ({self.env.lanes},), got {got}"
            )

    # ---- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the lanes are between two calls of :meth:`run`, in tensors and numbers.

        The population and the norm have a ``state_dict`` of their own. Needs an environment that
        can save its lanes, unless these have not started.
        """
        if self._observations is None:
            return {"started": False}
        lanes = self._lanes
        return {
            "started": True,
            "env": self.env.state_dict(),
            "observations": self._observations,
            "total": self._total,
            "length": self._length,
            "episode": lanes.episode,
            "begun": lanes.begun,
            "generation": lanes.generation,
            "policy": leaves(self._actor.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit.

        Raises:
            TypeError: no dictionary.
            ValueError: a state of another number of lanes, an entry that is missing.
        """
        check_entries("state", state, ("started",))
        if not state["started"]:
            self.restart()
            return
        check_entries("state", state, _ENTRIES)
        observations = self._check_observations(state["observations"])
        self.env.load_state_dict(state["env"])
        self._lanes.begin(self.seed, int(state["generation"]), None)
        device = self.env.device
        self._lanes.episode = state["episode"].to(device)
        self._lanes.begun = state["begun"].to(device)
        self._total, self._length = state["total"].to(device), state["length"].to(device)
        self._actor.restore(state["policy"])
        self._observations = observations.to(device)
