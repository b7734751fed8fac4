"""MujocoEnv: gymnasium's MuJoCo tasks for many lanes, stepped by threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import as_count
from .env import BatchEnv
from .mujoco_tasks import TASKS, Physics

_HUGE = 1e10  # mjMAXVAL: controls beyond it are no numbers to MuJoCo


class MujocoEnv(BatchEnv):
    """A MuJoCo task of gymnasium 1.4, one copy a lane: the same numbers, several times faster.

    Observations, rewards, ends and starts are those of ``gymnasium.make(name)``: the trajectory of
    a lane that starts with seed s is, bit for bit in float64, what ``reset(seed=s)`` begins there.
    What is saved is Python's part of a step: lanes are rows of one array, and tasks are functions
    of arrays (``perturbed/rl/mujoco_tasks.py``).

    Each thread has one copy of the engine's workspace, into which it loads a lane, steps it and
    takes it out again, with the solver's warm start. ``mujoco.rollout`` works in the same way, but
    does not give back the warm start, without which trajectories with contacts drift away from
    gymnasium's (HalfCheetah: 1 m in 200 steps); it is a few per cent faster.

    Only lanes that are still running are simulated. Those that have ended return their last
    observation, reward 0 and the way they ended. Numbers do not depend on the number of threads.

    Actions outside the bounds of the actuators act as the bounds do but cost what they are, as in
    gymnasium; ``rollout`` clips before. A control that is NaN or infinite acts as none and makes
    the reward NaN, where actions cost something.

    Args:
        name: one of "Swimmer-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5",
            "InvertedPendulum-v5", "Reacher-v5". Others run in :class:`~perturbed.rl.GymEnv`.
        lanes: B.
        threads: that step the lanes.
        max_steps: of an episode; default: gymnasium's limit (Reacher 50, others 1000).
        device: where the tensors are; the engine itself runs on the CPU.

    Raises:
        ImportError: gymnasium or mujoco is not installed.
        ValueError: an unknown name, numbers below 1; later, negative seeds.
        TypeError: arguments of another type.

    Example:
        >>> import torch
        >>> from perturbed.rl import MujocoEnv
        >>> env = MujocoEnv("Swimmer-v5", lanes=4)
        >>> env.reset(torch.arange(4)).shape
        torch.Size([4, 8])
        >>> observations, rewards, terminated, truncated = env.step(torch.zeros(4, 2))
        >>> rewards.shape
        torch.Size([4])
    """

    def __init__(
        self,
        name: str,
        lanes: int,
        threads: int = 2,
        max_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the model; lanes have no state before their first reset."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        if not isinstance(name, str) or name not in TASKS:
            raise ValueError(
                f"name must be one of {tuple(TASKS)}, got {name!r}; GymEnv runs any environment"
            )
        try:
            import gymnasium
            import mujoco
        except ImportError as error:
            raise ImportError(
                f'MujocoEnv needs gymnasium and mujoco: pip install "perturbed[rl]" ({error})'
            ) from error
        with _quiet_loading(mujoco):
            made = gymnasium.make(name)
        plain: Any = made.unwrapped
        self._engine, self._model, self._task = mujoco, plain.model, TASKS[name]
        self._initial = plain.init_qpos.copy(), plain.init_qvel.copy()
        self._frames, self._seconds = int(plain.frame_skip), float(plain.dt)
        low, high = self._model.actuator_ctrlrange.T
        super().__init__(
            as_count("lanes", lanes),
            plain.observation_space.shape[0],
            self._model.nu,
            discrete=False,
            max_steps=made.spec.max_episode_steps if max_steps is None else max_steps,  # type: ignore[union-attr, arg-type]
            action_low=torch.from_numpy(low.copy()),
            action_high=torch.from_numpy(high.copy()),
            device=device,
        )
        made.close()
        self.name, self.threads = name, as_count("threads", threads)
        self._data = [mujoco.MjData(self._model) for _ in range(self.threads)]
        self._pool: ThreadPoolExecutor | None = None

        # A lane's row: time, positions, velocities, ..., warm start, controls.
        parts = mujoco.mjtState
        self._spec = int(parts.mjSTATE_FULLPHYSICS | parts.mjSTATE_WARMSTART | parts.mjSTATE_CTRL)
        self._state = np.zeros((lanes, mujoco.mj_stateSize(self._model, self._spec)))
        self._extra = np.zeros((lanes, self._task.extra_size))
        self._seen = np.zeros((lanes, self.observation_size), dtype=np.float32)
        self._position = np.zeros(lanes)  # whose velocity is rewarded
        self._steps = np.zeros(lanes, dtype=np.int64)
        self._terminated = np.zeros(lanes, dtype=bool)
        self._truncated = np.zeros(lanes, dtype=bool)
        self._idle = np.ones(lanes, dtype=bool)

    # ---- episodes ------------------------------------------------------------------------------

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start the lanes of ``mask`` as gymnasium's ``reset(seed=...)`` would, one generator each.

        Raises:
            ValueError: other shapes, a negative seed.
            TypeError: other dtypes.
        """
        seeds, mask = self.check_reset(seeds, mask)
        chosen = mask.cpu().numpy().nonzero()[0]
        drawn = seeds.cpu().numpy()[chosen]
        if (drawn < 0).any():
            raise ValueError(f"seeds must be at least 0, got {drawn.min()}")
        for lane, seed in zip(chosen.tolist(), drawn.tolist(), strict=True):
            self._start(lane, seed)
        self._look(chosen)
        self._steps[chosen] = 0
        for flag in (self._terminated, self._truncated, self._idle):
            flag[chosen] = False
        return self._observations()

    def _start(self, lane: int, seed: int) -> None:
        """Put a lane at the start of the episode of a seed."""
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        engine, model, data = self._engine, self._model, self._data[0]
        engine.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = self._task.start(rng, *self._initial)
        engine.mj_forward(model, data)
        engine.mj_getState(model, data, self._state[lane], self._spec)
        self._task.read(engine, model, data, self._extra[lane], True)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advance the lanes that are running, see :class:`BatchEnv`; rewards are float64."""
        wanted = self.check_actions(actions).detach().to("cpu", torch.float64).numpy()
        running = (~(self._terminated | self._truncated | self._idle)).nonzero()[0]
        rewards = np.zeros(self.lanes)
        if len(running):
            wanted = wanted[running]
            usable = (np.abs(wanted) <= _HUGE).all(1, keepdims=True)  # False for NaN
            self._state[running, -self.action_size :] = np.where(usable, wanted, 0)
            self._simulate(running)
            before = self._position[running]
            now = self._look(running)
            healthy = self._task.healthy(now)
            velocity = (self._position[running] - before) / self._seconds
            rewards[running] = self._task.reward(velocity, now, wanted, healthy)
            self._steps[running] += 1
            if self._task.ends:
                self._terminated[running] = ~healthy
            self._truncated[running] = self._steps[running] >= self.max_steps
        ends = (torch.from_numpy(flag.copy()) for flag in (self._terminated, self._truncated))
        terminated, truncated = (flag.to(self.device) for flag in ends)
        rewarded = torch.from_numpy(rewards).to(self.device)
        return self._observations(), rewarded, terminated, truncated

    def set_idle(self, mask: Tensor) -> None:
        """Leave lanes out of the steps until they are reset; (lanes,) bool."""
        self._idle |= mask.cpu().numpy()

    # ---- its parts -----------------------------------------------------------------------------

    def _simulate(self, lanes: NDArray[np.int64]) -> None:
        """Step lanes through the physics, shared out to the threads."""
        shares = np.array_split(lanes, min(self.threads, len(lanes)))
        if len(shares) > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="mujoco")
        waiting = [
            self._pool.submit(self._simulate_share, share, data)  # type: ignore[union-attr]
            for share, data in zip(shares[1:], self._data[1:], strict=False)
        ]
        try:
            self._simulate_share(shares[0], self._data[0])
        finally:
            for future in waiting:
                future.result()

    def _simulate_share(self, lanes: NDArray[np.int64], data: Any) -> None:
        """Step lanes one after the other in a workspace; the engine lets other threads run."""
        model, spec, frames = self._model, self._spec, self._frames
        load, step, save = (
            self._engine.mj_setState,
            self._engine.mj_step,
            self._engine.mj_getState,
        )
        read = self._task.read if self._task.extra_size else None
        for lane in lanes:
            row = self._state[lane]
            load(model, data, row, spec)
            step(model, data, frames)
            save(model, data, row, spec)
            if read is not None:
                read(self._engine, model, data, self._extra[lane], False)

    def _look(self, lanes: NDArray[np.int64]) -> Physics:
        """Return the state of lanes, after noting their positions and what they see."""
        rows, (nq, nv) = self._state[lanes], map(len, self._initial)
        now = Physics(rows[:, 1 : 1 + nq], rows[:, 1 + nq : 1 + nq + nv], self._extra[lanes])
        self._position[lanes] = self._task.position(now)
        self._seen[lanes] = self._task.observe(now)
        return now

    def _observations(self) -> Tensor:
        return torch.from_numpy(self._seen.copy()).to(self.device)

    # ---- the rest ------------------------------------------------------------------------------

    def _held(self) -> dict[str, NDArray]:
        """Return the arrays that make up the state of all lanes."""
        return {
            "state": self._state,
            "extra": self._extra,
            "seen": self._seen,
            "position": self._position,
            "steps": self._steps,
            "terminated": self._terminated,
            "truncated": self._truncated,
            "idle": self._idle,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all lanes as tensors; episodes continue from it bit for bit."""
        return {name: torch.from_numpy(array.copy()) for name, array in self._held().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` of the same task and number of lanes.

        Raises:
            ValueError: entries missing or unknown, or of another shape; nothing has changed then.
        """
        held = self._held()
        if set(state) != set(held):
            raise ValueError(f"state must have the entries {sorted(held)}, got {sorted(state)}")
        for name, array in held.items():
            if tuple(state[name].shape) != array.shape:
                raise ValueError(
                    f"state[{name!r}] must have shape {array.shape}, got {tuple(state[name].shape)}"
                )
        for name, array in held.items():
            array[...] = state[name].cpu().numpy()

    def close(self) -> None:
        """End the threads; a later step starts them again."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


@contextlib.contextmanager
def _quiet_loading(engine: Any) -> Iterator[None]:
    """Drop the warnings of a block, which MuJoCo would append to a file in the current directory.

    They are about gymnasium's own files (HalfCheetah: "settotalmass" is deprecated).
    """
    before = engine.get_mju_user_warning()
    engine.set_mju_user_warning(lambda _: None)
    try:
        yield
    finally:
        engine.set_mju_user_warning(before)
