"""Classic control in torch: whole batches of gymnasium's environments on any device.

Equations, constants, start distributions and step limits are those of gymnasium 1.x (Towers et al.,
2024), which the tests compare with. Start states come from the episode's seed by an integer hash,
so they are the same on every device, but not those that gymnasium draws from the same number.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_entries
from .env import BatchEnv, kind
from .seeds import uniforms


class ClassicEnv(BatchEnv):
    """What the environments of this module share: state, clock, start.

    Args:
        lanes: B, environments that step together.
        device: where they are.
        dtype: of the state; observations are float32 whatever it is.
        max_steps: steps of an episode; default: gymnasium's.

    Attributes:
        state: (lanes, n), the physical state in gymnasium's order.
        time: (lanes,) int64, steps since the lane's start.

    Raises:
        ValueError: lanes or max_steps below 1; RuntimeError: a step before the first reset.
        TypeError: a dtype that is not floating point.
    """

    sizes: ClassVar[tuple[int, int]]  # of observation and action
    is_discrete: ClassVar[bool]
    steps_limit: ClassVar[int]
    action_bound: ClassVar[float | None] = None
    # Of the uniform distribution that an element of the state starts from.
    start_low: ClassVar[tuple[float, ...]]
    start_high: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        lanes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_steps: int | None = None,
    ) -> None:
        """Make the lanes; they wait for a reset."""
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
        bound = self.action_bound
        super().__init__(
            lanes,
            *self.sizes,
            self.is_discrete,
            self.steps_limit if max_steps is None else max_steps,
            None if bound is None else -bound,
            bound,
            device,
        )
        low, high = (
            torch.tensor(ends, dtype=torch.float64, device=self.device)
            for ends in (self.start_low, self.start_high)
        )
        self._low, self._range = low[:, None], (high - low)[:, None]
        # (n, lanes), so that the lanes of one element are next to each other.
        self._columns = torch.zeros(len(low), self.lanes, dtype=dtype, device=self.device)
        self.time = torch.zeros(self.lanes, dtype=torch.int64, device=self.device)
        self._started = False

    @property
    def state(self) -> Tensor:
        """The physical state, (lanes, n); write to it to start somewhere else."""
        return self._columns.T

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start lanes anew; see :meth:`BatchEnv.reset`."""
        seeds, mask = self.check_reset(seeds, mask)
        start = self._low + self._range * uniforms(seeds, len(self._columns)).T
        self._columns = torch.where(mask, start.to(self._columns.dtype), self._columns)
        self.time = torch.where(mask, 0, self.time)
        self._started = True
        return self._observations()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advance all lanes by one step; see :meth:`BatchEnv.step`."""
        if not self._started:
            raise RuntimeError("step: the lanes have not started; call reset(seeds) first")
        actions = self.check_actions(actions)
        columns, rewards, terminated = self.advance(self._columns.unbind(), actions)
        self._columns = torch.stack(columns)
        self.time = self.time + 1
        return self._observations(), rewards, terminated, self.time >= self.max_steps

    def _observations(self) -> Tensor:
        return torch.stack(self.observe(self._columns.unbind()), 1).to(torch.float32)

    @abc.abstractmethod
    def advance(
        self, state: tuple[Tensor, ...], actions: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return the next state, rewards and terminated; every tensor (lanes,)."""

    def observe(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the observation's elements, (lanes,) each; default: the state."""
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all lanes."""
        return {"state": self.state.clone(), "time": self.time, "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            TypeError: no dictionary of tensors.
            ValueError: a state of another number of lanes or elements, an entry that is missing.
        """
        check_entries("state", state, ("state", "time", "started"))
        for name in ("state", "time"):
            if not isinstance(state[name], Tensor):
                raise TypeError(f"state[{name!r}] must be a tensor, got {kind(state[name])}")
        if state["state"].shape != self.state.shape:
            raise ValueError(
                f"state must have shape (lanes, n) = {tuple(self.state.shape)}, got "
                f"{tuple(state['state'].shape)}"
            )
        if state["time"].shape != self.time.shape:
            raise ValueError(
                f"state['time'] must have shape (lanes,) = {tuple(self.time.shape)}, got "
                f"{tuple(state['time'].shape)}"
            )
        self._columns = state["state"].T.to(self._columns).contiguous()
        self.time = state["time"].to(self.device)
        self._started = bool(state["started"])


class CartPole(ClassicEnv):
    """CartPole-v1: balance a pole on a cart by pushing left (0) or right (1); 500 is perfect.

    Observation: position m, velocity m/s, angle rad, angular velocity rad/s. Reward 1 per step.
    Ends where the cart leaves +-2.4 m or the pole +-12 degrees. Barto, Sutton, Anderson,
    "Neuronlike Adaptive Elements That Can Solve Difficult Learning Control Problems" (1983).

    Args:
        lanes, device, dtype, max_steps: see :class:`ClassicEnv`; 500 steps.

    Example:
        >>> import torch
        >>> from perturbed.rl import CartPole
        >>> env = CartPole(lanes=3)
        >>> env.reset(torch.tensor([1, 2, 2])).shape
        torch.Size([3, 4])
        >>> observations, rewards, terminated, truncated = env.step(torch.tensor([0, 1, 1]))
        >>> rewards
        tensor([1., 1., 1.])
    """

    sizes = 4, 2
    is_discrete = True
    steps_limit = 500
    start_low, start_high = (-0.05,) * 4, (0.05,) * 4

    def advance(
        self, state: tuple[Tensor, ...], actions: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Take an explicit Euler step of 20 ms with a force of 10 N."""
        x, x_dot, theta, theta_dot = state
        gravity, mass_pole, mass, half_length, tau = 9.8, 0.1, 1.1, 0.5, 0.02
        force = 20.0 * actions.to(x.dtype) - 10.0
        cosine, sine = theta.cos(), theta.sin()
        push = (force + mass_pole * half_length * theta_dot.square() * sine) / mass
        theta_acc = (gravity * sine - cosine * push) / (
            half_length * (4.0 / 3.0 - mass_pole * cosine.square() / mass)
        )
        x_acc = push - mass_pole * half_length * theta_acc * cosine / mass
        x, x_dot = x + tau * x_dot, x_dot + tau * x_acc
        theta, theta_dot = theta + tau * theta_dot, theta_dot + tau * theta_acc
        terminated = (x.abs() > 2.4) | (theta.abs() > 12 * 2 * math.pi / 360)
        return (x, x_dot, theta, theta_dot), torch.ones_like(x), terminated


class Acrobot(ClassicEnv):
    """Acrobot-v1: swing the end of a double pendulum above the bar, by torque at the elbow.

    Observation: cosine and sine of both angles, both angular velocities. Actions 0, 1, 2: torque
    -1, 0, 1 Nm. Reward -1 per step, 0 at the goal. Sutton, "Generalization in Reinforcement
    Learning" (1996), with the equations of the book.

    Args:
        lanes, device, dtype, max_steps: see :class:`ClassicEnv`; 500 steps.

    Example:
        >>> import torch
        >>> from perturbed.rl import Acrobot
        >>> env = Acrobot(lanes=2)
        >>> env.reset(torch.tensor([1, 2])).shape
        torch.Size([2, 6])
    """

    sizes = 6, 3
    is_discrete = True
    steps_limit = 500
    start_low, start_high = (-0.1,) * 4, (0.1,) * 4

    def advance(
        self, state: tuple[Tensor, ...], actions: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Take a Runge-Kutta step of fourth order over 0.2 s."""
        torque, dt = actions.to(state[0].dtype) - 1.0, 0.2
        start = torch.stack(state)
        k1 = self._slope(start, torque)
        k2 = self._slope(start + dt / 2 * k1, torque)
        k3 = self._slope(start + dt / 2 * k2, torque)
        k4 = self._slope(start + dt * k3, torque)
        after = start + dt / 6.0 * (k1 + 2 * (k2 + k3) + k4)
        angles = after[:2] - 2 * math.pi * (after[:2] / (2 * math.pi)).round()
        theta1, theta2 = angles
        terminated = -theta1.cos() - (theta1 + theta2).cos() > 1.0
        rewards = terminated.to(torque.dtype) - 1.0
        speed1 = after[2].clamp(-4 * math.pi, 4 * math.pi)
        speed2 = after[3].clamp(-9 * math.pi, 9 * math.pi)
        return (theta1, theta2, speed1, speed2), rewards, terminated

    @staticmethod
    def _slope(state: Tensor, torque: Tensor) -> Tensor:
        """Time derivative of (4, lanes).

        The links are 1 m and 1 kg with their centre of mass in the middle and a moment of inertia
        of 1 kg m^2; g = 9.8. With these numbers in, gymnasium's terms are what is left here.
        """
        theta1, theta2, speed1, speed2 = state
        cosine, sine = theta2.cos(), theta2.sin()
        d1, d2 = 3.5 + cosine, 1.25 + 0.5 * cosine
        phi2 = 4.9 * (theta1 + theta2).sin()
        phi1 = 14.7 * theta1.sin() + phi2 - sine * speed2 * (0.5 * speed2 + speed1)
        ratio = d2 / d1
        acc2 = (torque + ratio * phi1 - 0.5 * speed1.square() * sine - phi2) / (1.25 - d2 * ratio)
        acc1 = -(d2 * acc2 + phi1) / d1
        return torch.stack((speed1, speed2, acc1, acc2))

    def observe(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return cosine and sine of the angles, and the velocities."""
        theta1, theta2, speed1, speed2 = state
        return theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin(), speed1, speed2


class Pendulum(ClassicEnv):
    """Pendulum-v1: swing a pendulum up and hold it there; rewards are at most 0.

    Observation: cosine and sine of the angle (0 is upright), angular velocity. Action: a torque in
    [-2, 2] Nm. It never terminates.

    Args:
        lanes, device, dtype, max_steps: see :class:`ClassicEnv`; 200 steps.

    Example:
        >>> import torch
        >>> from perturbed.rl import Pendulum
        >>> env = Pendulum(lanes=2)
        >>> env.reset(torch.tensor([1, 2])).shape
        torch.Size([2, 3])
        >>> bool((env.step(torch.zeros(2, 1))[1] <= 0).all())
        True
    """

    sizes = 3, 1
    is_discrete = False
    steps_limit = 200
    action_bound = 2.0
    start_low, start_high = (-math.pi, -1.0), (math.pi, 1.0)

    def advance(
        self, state: tuple[Tensor, ...], actions: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Take a semi-implicit Euler step of 50 ms; 1 m, 1 kg, g = 10."""
        theta, speed = state
        torque, dt = actions[:, 0].to(theta.dtype).clamp(-2.0, 2.0), 0.05
        angle = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
        cost = angle.square() + 0.1 * speed.square() + 0.001 * torque.square()
        speed = (speed + (15.0 * theta.sin() + 3.0 * torque) * dt).clamp(-8.0, 8.0)
        return (theta + speed * dt, speed), -cost, torch.zeros_like(theta, dtype=torch.bool)

    def observe(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return cosine and sine of the angle, and the velocity."""
        theta, speed = state
        return theta.cos(), theta.sin(), speed


class MountainCarContinuous(ClassicEnv):
    """MountainCarContinuous-v0: drive a weak car out of a valley.

    Observation: position, velocity. Action: a force in [-1, 1]. Reward 100 at the goal, minus a
    tenth of the squared force in every step: doing nothing is a local optimum. Moore (1990).

    Args:
        lanes, device, dtype, max_steps: see :class:`ClassicEnv`; 999 steps.

    Example:
        >>> import torch
        >>> from perturbed.rl import MountainCarContinuous
        >>> env = MountainCarContinuous(lanes=2)
        >>> env.reset(torch.tensor([1, 2])).shape
        torch.Size([2, 2])
    """

    sizes = 2, 1
    is_discrete = False
    steps_limit = 999
    action_bound = 1.0
    start_low, start_high = (-0.6, 0.0), (-0.4, 0.0)

    def advance(
        self, state: tuple[Tensor, ...], actions: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Add force and slope to the velocity, and the velocity to the position."""
        position, velocity = state
        action = actions[:, 0].to(position.dtype)
        force = 0.0015 * action.clamp(-1.0, 1.0)
        velocity = (velocity + force - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
        position = (position + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((position <= -1.2) & (velocity < 0), 0.0, velocity)  # the left wall
        terminated = (position >= 0.45) & (velocity >= 0)
        rewards = 100.0 * terminated.to(action.dtype) - 0.1 * action.square()
        return (position, velocity), rewards, terminated
