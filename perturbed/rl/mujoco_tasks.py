"""What gymnasium 1.4's MuJoCo v5 environments add to the physics, for many lanes at once.

A task is how an episode starts, what is observed, what is rewarded and when it ends. The physics
and their constants (file, time step, frame skip, step limit) are read from gymnasium itself; what
is written here are the defaults of its environment classes, and the tests hold every task to their
trajectories. The tasks go back to Brockman et al., "OpenAI Gym" (2016).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Physics:
    """The state of some lanes after a step or a reset, one lane a row.

    Attributes:
        qpos: (lanes, nq) positions.
        qvel: (lanes, nv) velocities.
        extra: (lanes, task.extra_size) what else the task reads from the engine.
    """

    qpos: Array
    qvel: Array
    extra: Array

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(lanes,) whether positions and velocities are all finite."""
        both = np.concatenate((self.qpos, self.qvel), axis=1)
        return np.logical_and.reduce(np.isfinite(both), axis=1)


@dataclasses.dataclass(frozen=True)
class Runner:
    """Run forward along x: Swimmer, HalfCheetah, Hopper, Walker2d.

    The reward of a step is the mean velocity of x during it, in m/s, plus ``alive`` while healthy,
    minus ``control_cost`` times the sum of squared actions.

    Attributes:
        reset_noise: scale of the start's noise about the initial positions and velocities.
        normal_velocities: whether the noise of velocities is normal instead of uniform.
        hidden: leading positions that are not observed.
        velocity_limit: observed velocities are clipped to +- this.
        control_cost: of an action's sum of squares.
        alive: reward of a healthy step.
        height: open interval of qpos[1] that is healthy, in m.
        angle: open interval of qpos[2] that is healthy, in rad.
        state_limit: open bound of the size of all later positions and velocities.
        ends: whether an unhealthy lane terminates.
    """

    reset_noise: float
    hidden: int
    control_cost: float
    normal_velocities: bool = False
    velocity_limit: float = np.inf
    alive: float = 0.0
    height: tuple[float, float] = (-np.inf, np.inf)
    angle: tuple[float, float] = (-np.inf, np.inf)
    state_limit: float = np.inf
    ends: bool = False

    extra_size = 0

    def start(self, rng: np.random.Generator, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        """Return positions and velocities of an episode's start, drawn as gymnasium draws them."""
        noise = self.reset_noise
        qpos = qpos + rng.uniform(-noise, noise, qpos.size)
        if self.normal_velocities:
            return qpos, qvel + noise * rng.standard_normal(qvel.size)
        return qpos, qvel + rng.uniform(-noise, noise, qvel.size)

    def read(self, engine: Any, model: Any, data: Any, out: Array, started: bool) -> None:
        """Write (extra_size,) numbers that the state does not hold, after a step or a start."""

    def observe(self, now: Physics) -> Array:
        """Return what the policy sees, (lanes, observation_size)."""
        limit = self.velocity_limit
        velocities = now.qvel if limit == np.inf else now.qvel.clip(-limit, limit)
        return np.concatenate((now.qpos[:, self.hidden :], velocities), 1)

    def healthy(self, now: Physics) -> NDArray[np.bool_]:
        """Return which lanes may go on, (lanes,)."""
        if not self.ends:
            return np.ones(len(now.qpos), dtype=bool)
        ok = _between(now.qpos[:, 1], self.height) & _between(now.qpos[:, 2], self.angle)
        if self.state_limit < np.inf:
            limits = -self.state_limit, self.state_limit
            ok &= _between(now.qpos[:, 2:], limits).all(1) & _between(now.qvel, limits).all(1)
        return ok

    def position(self, now: Physics) -> Array:
        """Return the x whose velocity is rewarded, (lanes,), in m."""
        return now.qpos[:, 0]

    def reward(self, velocity: Array, now: Physics, actions: Array, ok: NDArray[np.bool_]) -> Array:
        """Return the reward of a step, (lanes,); ``velocity`` is that of :meth:`position`."""
        return velocity + self.alive * ok - self.control_cost * np.square(actions).sum(1)


@dataclasses.dataclass(frozen=True)
class Ant(Runner):
    """Run along x on four legs; contact forces, clipped to +- 1, are observed and cost."""

    contact_cost: float = 5e-4

    extra_size = 1 + 14 * 6  # x of the torso, forces on each body

    def read(self, engine: Any, model: Any, data: Any, out: Array, started: bool) -> None:
        """Note where the torso is and the forces on the bodies."""
        if not started:  # at the start forces count as zero
            engine.mj_rnePostConstraint(model, data)
        out[0] = data.xpos[1, 0]
        np.clip(data.cfrc_ext.ravel(), -1, 1, out=out[1:])

    def observe(self, now: Physics) -> Array:
        """See the forces too, except those on the world."""
        return np.concatenate((super().observe(now), now.extra[:, 7:]), 1)  # not of the world

    def healthy(self, now: Physics) -> NDArray[np.bool_]:
        """Go on while the torso is neither low nor high and all numbers are finite."""
        low, high = self.height
        z = now.qpos[:, 2]
        return now.finite & (low <= z) & (z <= high)

    def position(self, now: Physics) -> Array:
        """Return the torso's x, where the engine last computed it."""
        return now.extra[:, 0]

    def reward(self, velocity: Array, now: Physics, actions: Array, ok: NDArray[np.bool_]) -> Array:
        """Subtract the cost of contacts."""
        contact = self.contact_cost * np.square(now.extra[:, 1:]).sum(1)
        return super().reward(velocity, now, actions, ok) - contact


@dataclasses.dataclass(frozen=True)
class Pendulum(Runner):
    """Keep a pole upright on a cart: 1 for each step within 0.2 rad."""

    def healthy(self, now: Physics) -> NDArray[np.bool_]:
        """Go on while the pole is upright."""
        return now.finite & (np.abs(now.qpos[:, 1]) <= 0.2)

    def reward(self, velocity: Array, now: Physics, actions: Array, ok: NDArray[np.bool_]) -> Array:
        """Count healthy steps."""
        return ok.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Reacher(Runner):
    """Reach a target with the tip of a two-joint arm; minus their distance in m is rewarded."""

    extra_size = 3  # from the target to the fingertip

    def start(self, rng: np.random.Generator, qpos: Array, qvel: Array) -> tuple[Array, Array]:
        """Draw the arm and a target within 0.2 m."""
        qpos = rng.uniform(-0.1, 0.1, qpos.size) + qpos
        goal = rng.uniform(-0.2, 0.2, 2)
        while np.linalg.norm(goal) >= 0.2:
            goal = rng.uniform(-0.2, 0.2, 2)
        qvel = qvel + rng.uniform(-0.005, 0.005, qvel.size)
        qpos[-2:], qvel[-2:] = goal, 0
        return qpos, qvel

    def read(self, engine: Any, model: Any, data: Any, out: Array, started: bool) -> None:
        """Note the way from the target to the fingertip."""
        np.subtract(data.body("fingertip").xpos, data.body("target").xpos, out=out)

    def observe(self, now: Physics) -> Array:
        """See the joints, the target and the way to it."""
        angles = now.qpos[:, :2]
        parts = np.cos(angles), np.sin(angles), now.qpos[:, 2:], now.qvel[:, :2], now.extra[:, :2]
        return np.concatenate(parts, 1)

    def reward(self, velocity: Array, now: Physics, actions: Array, ok: NDArray[np.bool_]) -> Array:
        """Return minus distance and cost; there is no velocity to reward."""
        return -np.linalg.norm(now.extra, axis=1) - np.square(actions).sum(1)


def _between(values: Array, limits: tuple[float, float]) -> NDArray[np.bool_]:
    """Return where values lie in the open interval; NaN does not."""
    return (limits[0] < values) & (values < limits[1])


_walker = Runner(
    reset_noise=5e-3, hidden=1, control_cost=1e-3, velocity_limit=10.0, alive=1.0, ends=True
)

TASKS: dict[str, Runner] = {
    "Swimmer-v5": Runner(reset_noise=0.1, hidden=2, control_cost=1e-4),
    "HalfCheetah-v5": Runner(reset_noise=0.1, hidden=1, control_cost=0.1, normal_velocities=True),
    "Hopper-v5": dataclasses.replace(
        _walker, height=(0.7, np.inf), angle=(-0.2, 0.2), state_limit=100.0
    ),
    "Walker2d-v5": dataclasses.replace(_walker, height=(0.8, 2.0), angle=(-1.0, 1.0)),
    "Ant-v5": Ant(
        reset_noise=0.1,
        hidden=2,
        control_cost=0.5,
        normal_velocities=True,
        alive=1.0,
        height=(0.2, 1.0),
        ends=True,
    ),
    "InvertedPendulum-v5": Pendulum(reset_noise=0.01, hidden=0, control_cost=0.0, ends=True),
    "Reacher-v5": Reacher(reset_noise=0.1, hidden=2, control_cost=1.0),
}
