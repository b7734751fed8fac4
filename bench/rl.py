"""Suite ``rl``: environment steps per second of a population, and what its policy costs of them.

A call is a window of steps in all lanes, through perturbed.rl.Rollout. Policies are linear, or have
32 tanh units; noise is dense and stored, as one draw serves a whole episode. Rows of the tables:

Base      the environment alone: actions do not depend on observations
pm        the population in one forward a step
Naive     a forward for each member, on its own lanes, weights made beforehand

CartPole is torch's own (perturbed.rl.classic). Swimmer and HalfCheetah are MujocoEnv with one
thread where a row does not say otherwise; pm also runs with two, and in gymnasium's SyncVectorEnv
(GymEnv); those three give the same numbers, which is checked.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.common import Options, Result, Row, assert_close, rtol
from bench.timing import measure
from perturbed import Dense, PerturbedModel, convert
from perturbed.rl import BatchEnv, CartPole, GymEnv, MujocoEnv, Rollout

SIGMA = 0.1
HIDDEN = 32
MOST_MEMBERS = 512  # further rows of a member are further episodes
NOTES = [
    "rl: a row's time is that of a window of steps in all lanes; env steps/s count every lane's.",
    "rl: share of the policy is its part of the time, of this process and on the host.",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """An environment, lanes, and a policy."""

    task: str
    lanes: int
    policy: str
    steps: int = 20

    @property
    def directions(self) -> int:
        return min(self.lanes, MOST_MEMBERS) // 2

    def __str__(self) -> str:
        members = 2 * self.directions
        return f"{self.task}, {self.lanes} lanes, {members} members, {self.policy}"


def cases(options: Options) -> list[Case]:
    lanes = (64, 1024, 16384)
    found = [Case("CartPole-v1", n, policy) for n in lanes for policy in ("linear", "mlp")]
    tasks = ("Swimmer-v5", "HalfCheetah-v5", *(["Hopper-v5", "Ant-v5"] if options.full else []))
    found += [Case(task, 64, policy) for task in tasks for policy in ("linear", "mlp")]
    return found


def run(options: Options, chosen: list[Case] | None = None) -> tuple[list[Result], list[str]]:
    results: list[Result] = []
    missing = [name for name in ("gymnasium", "mujoco") if importlib.util.find_spec(name) is None]
    for case in cases(options) if chosen is None else chosen:
        if missing and case.task != "CartPole-v1":
            reason = f'{" and ".join(missing)} not installed: pip install "perturbed[rl]"'
            rows = [Row.missing(name, reason) for name in ("Base", "pm", "Naive")]
            results += measure("rl", "window", str(case), rows, options.device, options.seconds)
            continue
        options.progress(f"rl, {case}")
        problem = Problem(case, options.device)
        windows = problem.windows(with_gymnasium=not missing)
        rows = [Row(w.name, w.call, w.check, 0) for w in windows]
        measured = measure("rl", "window", str(case), rows, options.device, options.seconds)
        for result, window in zip(measured, windows, strict=True):
            result.noise_bytes = window.noise_bytes()
            result.steps_per_s = case.lanes * case.steps / result.median_s
            if result.timed:
                result.policy_share = window.policy_share()
            window.close()
        results += measured
    return results, list(NOTES)


class Problem:
    """A population and its environments."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        env = self.environment()
        sizes = env.observation_size, env.action_size
        env.close()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if case.policy == "linear":
                net: nn.Module = nn.Sequential(nn.Linear(*sizes, bias=False))
            else:
                net = nn.Sequential(
                    nn.Linear(sizes[0], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, sizes[1])
                )
        net = convert(net.to(device), case.directions, Dense(storage="stored"))
        self.pm = PerturbedModel(net, case.directions, True, SIGMA)
        self.pm.set_noise()
        self.pm.allocate_memory()
        self.loop = Loop(self.pm)
        repeats = case.lanes // case.directions
        self.fixed = torch.zeros(repeats * case.directions, sizes[1], device=device)

    def environment(self, kind: str = "", threads: int = 1) -> BatchEnv:
        if kind == "gymnasium":
            return GymEnv(self.case.task, self.case.lanes, device=self.device)
        if self.case.task == "CartPole-v1":
            return CartPole(self.case.lanes, device=self.device)
        return MujocoEnv(self.case.task, self.case.lanes, threads, device=self.device)

    def windows(self, with_gymnasium: bool) -> list[Window]:
        """All rows of the case."""
        found = [
            Window("Base", self, lambda _: self.fixed, self.environment()),
            Window("pm", self, self.pm, self.environment()),
            Window("Naive", self, self.loop, self.environment()),
        ]
        if self.case.task != "CartPole-v1":
            found.append(Window("pm, 2 threads", self, self.pm, self.environment(threads=2)))
        if with_gymnasium and self.case.lanes <= 64:
            found.append(Window("pm, gymnasium", self, self.pm, self.environment("gymnasium")))
        return found


class Loop:
    """The population as plain modules, one after the other."""

    def __init__(self, pm: PerturbedModel) -> None:
        self.directions = pm.directions
        self.members = [
            (half, d, pm.member(d, sign))
            for half, sign in enumerate((1, -1))
            for d in range(pm.directions)
        ]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        rows = x.view(2, -1, self.directions, x.shape[1])
        parts = [member(rows[half, :, d]) for half, d, member in self.members]
        y = torch.stack(parts).view(2, self.directions, -1, parts[0].shape[1])
        return y.transpose(1, 2).reshape(len(x), -1)


class Window:
    """A row: one policy in one environment, going on from call to call."""

    def __init__(
        self, name: str, problem: Problem, policy: Callable[[Tensor], Tensor], env: BatchEnv
    ) -> None:
        self.name, self.problem, self.policy, self.env = name, problem, policy, env
        self.rollout = Rollout(policy, env, pm=problem.pm, seeds="members")
        self.policy_seconds = self.env_seconds = 0.0

    def call(self) -> None:
        cost = self.rollout.run(self.problem.case.steps).cost
        self.policy_seconds += cost.policy_seconds
        self.env_seconds += cost.env_seconds

    def policy_share(self) -> float:
        """Of the time in policy and environment; bookkeeping of the rollout is neither's."""
        return self.policy_seconds / (self.policy_seconds + self.env_seconds)

    def noise_bytes(self) -> int:
        held = self.problem.pm.state.held.values()
        return sum(noise.nbytes for noise in held) if self.policy is self.problem.pm else 0

    def check(self) -> None:
        """Compare the policy with the members' modules, and the environment with the first row's.

        Raises:
            AssertionError: another output, or another trajectory under the same actions.
        """
        seeds = torch.arange(self.env.lanes, device=self.env.device)
        seen = self.env.reset(seeds)
        if self.problem.case.task != "CartPole-v1":  # torch's own draws other starts
            other = self.problem.environment()
            want = other.reset(seeds)
            generator = torch.Generator().manual_seed(0)
            for _ in range(3):
                assert_close(seen, want, f"{self.name}, observations", rtol(seen))
                actions = torch.rand(self.problem.fixed.shape, generator=generator)
                seen, want = (e.step(actions.to(e.device))[0] for e in (self.env, other))
            other.close()
        if self.name != "Base":
            with torch.no_grad():
                acted, expected = self.policy(seen), self.problem.loop(seen)
            assert_close(acted, expected, f"{self.name}, actions", rtol(seen))
        self.rollout.restart()
        self.call()
        self.policy_seconds = self.env_seconds = 0.0

    def close(self) -> None:
        self.env.close()
