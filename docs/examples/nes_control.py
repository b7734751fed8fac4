"""Balance a pole and swing up an acrobot by evolution strategies: ``make demo-control``.

The policy is one linear layer without anything hidden; the largest of its outputs is the action.
Every generation, all members of a population play the same episodes, all at once: a row of the
batch is an episode. Environments are gymnasium's CartPole-v1 and Acrobot-v1, written in torch, so
with ``--device cuda`` nothing leaves the GPU.

Every ``--every`` generations the unperturbed policy plays test episodes; once it reaches the target
it is tested on 200 others, which decide whether the run has succeeded.

    python docs/examples/nes_control.py --seeds 3
    python docs/examples/nes_control.py --tasks acrobot --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import perturbed
from perturbed.rl import Acrobot, BatchEnv, CartPole, evaluate, rollout

TEST = 200  # episodes that decide about success
CHECK = 100  # episodes that decide when to stop


@dataclass(frozen=True)
class Task:
    """An environment and how it is trained; tuned for seconds on one core."""

    env: Callable[..., BatchEnv]
    directions: int  # half the population
    episodes: int  # of each member in a generation
    sigma: float
    lr: float
    bias: bool
    target: float  # mean return that counts as success; gymnasium asks for 475 and -100
    stop: float  # mean return of the check that ends training, a little more


# CartPole's observations are a tenth and less: the noise of a bias would drown them.
TASKS = {
    "cartpole": Task(CartPole, 32, 4, sigma=0.1, lr=0.1, bias=False, target=490, stop=495),
    "acrobot": Task(Acrobot, 64, 4, sigma=0.5, lr=0.1, bias=True, target=-90, stop=-85),
}


@dataclass
class Run:
    """One training run and what it took."""

    task: str
    seed: int
    seconds: float = 0.0  # of training; checks and tests are not counted
    generations: int = 0
    env_steps: int = 0
    policy_share: float = 0.0  # of the time in rollouts
    test: float = float("nan")  # mean return of the test episodes
    success: bool = False
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, mean of a check


def train(name: str, seed: int, limit: int, every: int, device: torch.device) -> Run:
    """Train until a check reaches the task's stop, or for ``limit`` generations; then test."""
    task, run = TASKS[name], Run(name, seed)
    env = task.env(2 * task.directions * task.episodes, device)
    observing = task.env(CHECK, device)
    noise = perturbed.Dense(storage="stored")  # hundreds of forwards per draw
    policy = perturbed.PerturbedLinear(
        env.observation_size, env.action_size, task.directions, task.bias, noise, device=device
    )
    for parameter in policy.parameters():
        torch.nn.init.zeros_(parameter)
    pm = perturbed.PerturbedModel(policy, task.directions, True, task.sigma, seed)
    nes = perturbed.NES(pm, torch.optim.Adam(policy.parameters(), task.lr), maximize=True)
    policy_seconds = rollout_seconds = 0.0

    def score() -> torch.Tensor:
        nonlocal policy_seconds, rollout_seconds
        result = rollout(pm, env, task.episodes, seed=seed)
        run.env_steps += result.cost.steps
        policy_seconds += result.cost.policy_seconds
        rollout_seconds += result.cost.policy_seconds + result.cost.env_seconds
        return result.returns

    def check() -> float:
        # Seeds of evaluations are never those of training; the test has another seed yet.
        return evaluate(pm, observing, CHECK, seed=2 * seed).mean

    run.curve.append((0.0, check()))
    bar = tqdm(total=limit, desc=f"{name}, seed {seed}", unit="generation", leave=False)
    while run.generations < limit and run.curve[-1][1] < task.stop:
        start = time.perf_counter()
        nes.step(score)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        run.seconds += time.perf_counter() - start
        run.generations += 1
        bar.update()
        if run.generations % every == 0 or run.generations == limit:
            run.curve.append((run.seconds, check()))
            bar.set_postfix_str(f"return {run.curve[-1][1]:.0f}")
    bar.close()
    run.policy_share = policy_seconds / rollout_seconds if rollout_seconds else 0.0
    run.test = evaluate(pm, task.env(TEST, device), TEST, seed=2 * seed + 1).mean
    run.success = run.test >= task.target
    return run


def table(runs: Sequence[Run]) -> str:
    """Return a row per run, and per task the medians and the success rate."""
    rows = []
    for name in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == name]
        for run in own:
            rows.append(
                (
                    name,
                    run.seed,
                    f"{run.seconds:.1f}",
                    run.generations,
                    f"{run.env_steps:,}",
                    f"{run.policy_share:.0%}",
                    f"{run.test:.1f}",
                    "yes" if run.success else "no",
                )
            )
        middle = [
            statistics.median(getattr(run, key) for run in own)
            for key in ("seconds", "generations", "env_steps", "policy_share", "test")
        ]
        rows.append(
            (
                name,
                "median",
                f"{middle[0]:.1f}",
                f"{middle[1]:g}",
                f"{middle[2]:,.0f}",
                f"{middle[3]:.0%}",
                f"{middle[4]:.1f}",
                f"{sum(run.success for run in own)} of {len(own)}",
            )
        )
    head = ("task", "seed", "seconds", "generations", "steps", "in policy", "test", "success")
    return tabulate(rows, head, disable_numparse=True, colalign=("left",) + ("right",) * 7)


def plot(runs: Sequence[Run], file: Path) -> None:
    """Draw the mean return of the checks over the seconds of training, a panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(run.task for run in runs))
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        for run in runs:
            if run.task == name:
                axis.plot(*zip(*run.curve, strict=True), linewidth=1, label=f"seed {run.seed}")
        axis.axhline(TASKS[name].target, color="0.5", linestyle="--", linewidth=1)
        axis.set(
            title=name, xlabel="seconds of training", ylabel=f"mean return of {CHECK} episodes"
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train every task with every seed, print the table, write the curves."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(description="Classic control by evolution strategies.")
    parser.add_argument(
        "--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="(all)"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each task (3)")
    parser.add_argument("--generations", type=positive, default=100, help="at most (100)")
    parser.add_argument("--every", type=positive, default=5, help="generations per check (5)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (runs)")
    options = parser.parse_args(argv)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no CUDA device")
    runs = []
    for name in options.tasks:
        for seed in range(options.seeds):
            runs.append(train(name, seed, options.generations, options.every, options.device))
    for name in options.tasks:
        task = TASKS[name]
        print(
            f"{name}: {2 * task.directions} members x {task.episodes} episodes a generation, "
            f"success is a mean of {task.target:g} over {TEST} test episodes"
        )
    print(table(runs))
    drawn = options.out / "nes_control.png"
    plot(runs, drawn)
    print(f"learning curves: {drawn}")
    return runs


if __name__ == "__main__":
    main()
