"""Teach a swimmer of three links to swim, without a gradient: augmented random search.

Gymnasium's Swimmer-v5 with a linear policy of 16 weights that starts at zero, trained by ARS V1
(Mania, Guy, Recht, 2018): 8 directions, all of them used, step 0.05, noise 0.1. The 16 members of
the population swim side by side in MuJoCo; one forward of the batched layer acts for all of them. A
seed has reached the task when the mean of 8 episodes, from starts it did not train on, is 325 or
more; its policy is then tried in plain gymnasium. Seeds 0 to 9 take 144 to 384 episodes.

    python docs/examples/ars_swimmer.py --seeds 10
    python docs/examples/ars_swimmer.py --resume runs/ars_swimmer-0.pt  # goes on with that seed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import perturbed
from perturbed.checkpoint import CheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from perturbed.rl import MujocoEnv, ObservationNorm, evaluate, rollout

JUDGES = 8  # episodes of an evaluation
TRIALS = 5  # episodes in plain gymnasium at the end


class Run:
    """One seed's training; all it does is a function of its options and the number of generations.

    A subclass may train another task (ars_cheetah.py).
    """

    name = "ars_swimmer"  # of the files it writes
    task = "Swimmer-v5"
    target: float | None = 325.0  # return at which a seed is done
    every = 3  # generations between two evaluations
    defaults: ClassVar[dict[str, Any]] = {
        "directions": 8,
        "top": 8,
        "sigma": 0.1,
        "lr": 0.05,
        "horizon": 1000,  # steps of an episode
    }
    norm: ObservationNorm | None = None

    def __init__(self, options: dict[str, Any], seed: int, threads: int) -> None:
        self.options, self.seed = options, seed
        d, horizon = options["directions"], options["horizon"]
        self.env = MujocoEnv(self.task, 2 * d, threads, horizon)
        self.judges = MujocoEnv(self.task, JUDGES, threads, horizon)
        self.net = self.make_policy()
        self.pm = perturbed.PerturbedModel(self.net, d, True, options["sigma"], seed)
        self.optimizer = self.make_optimizer()
        self.seconds = 0.0  # spent on this seed, over all calls
        self.env_steps = 0  # of training
        self.curve: list[list[float]] = []  # episodes, env steps, seconds, mean, std of returns

    def make_policy(self) -> nn.Module:
        d = self.options["directions"]
        policy = perturbed.PerturbedLinear(
            self.env.observation_size, self.env.action_size, d, bias=False
        )
        nn.init.zeros_(policy.weight)
        return policy

    def make_optimizer(self) -> perturbed.ARS | perturbed.NES:
        lr, top = self.options["lr"], self.options["top"]
        return perturbed.ARS(self.pm, top=top, lr=lr, maximize=True, normalizer=self.norm)

    @property
    def episodes(self) -> int:
        """Episodes of training so far, one a member and generation."""
        return self.optimizer.evaluations

    @property
    def reached(self) -> bool:
        return self.target is not None and bool(self.curve) and self.curve[-1][3] >= self.target

    def step(self) -> None:
        """Run one generation: an episode of every member, all from the same start."""

        def returns() -> Tensor:
            nonlocal steps
            result = rollout(self.pm, self.env, seed=self.seed, norm=self.norm)
            steps = result.cost.steps
            return result.returns

        steps = 0
        self.optimizer.step(returns)
        self.env_steps += steps

    def judge(self) -> tuple[float, float]:
        """Return mean and standard deviation of the policy's return, without noise."""
        result = evaluate(self.net, self.judges, JUDGES, seed=self.seed, norm=self.norm)
        return result.mean, result.std

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """Return the action for one observation of gymnasium's, as arrays."""
        x = torch.as_tensor(observation, dtype=torch.float32)[None]
        x = x if self.norm is None else self.norm(x)
        return self.net(x)[0].clamp(self.env.action_low, self.env.action_high).numpy()

    def try_in_gymnasium(self) -> list[float]:
        """Return the returns of whole episodes in gymnasium itself."""
        import gymnasium

        env = gymnasium.make(self.task, max_episode_steps=self.options["horizon"])
        found = []
        for seed in range(TRIALS):
            observation, _ = env.reset(seed=seed)
            total, over = 0.0, False
            while not over:
                observation, reward, terminated, truncated, _ = env.step(self.act(observation))
                total, over = total + float(reward), terminated or truncated
            found.append(total)
        env.close()
        return found

    def save(self, file: Path) -> None:
        kept = {key: getattr(self, key) for key in ("name", "options", "seed", *PROGRESS)}
        save_checkpoint(file, net=self.net, optimizer=self.optimizer, **kept)

    def load(self, file: Path) -> None:
        kept = load_checkpoint(file, net=self.net, optimizer=self.optimizer)
        for key in PROGRESS:
            setattr(self, key, kept[key])

    def close(self) -> None:
        self.env.close()
        self.judges.close()


PROGRESS = ("seconds", "env_steps", "curve")


def train(run: Run, seconds: float, episodes: int | None, file: Path) -> None:
    """Train until the target, or until the seconds of this call or the episodes are up."""
    bar = tqdm(
        total=seconds,
        bar_format="{desc} |{bar}| {n:.0f}/{total:.0f} s{postfix}",
        desc=f"seed {run.seed}",
        leave=False,
    )
    start, before = time.perf_counter(), run.seconds

    def look() -> None:
        mean, std = run.judge()
        run.seconds = before + time.perf_counter() - start
        run.curve.append([run.episodes, run.env_steps, run.seconds, mean, std])
        run.save(file)
        bar.n = min(seconds, run.seconds - before)
        bar.set_postfix_str(f"{run.episodes} episodes, return {mean:.0f}")

    def up() -> bool:
        late = time.perf_counter() - start >= seconds
        return run.reached or late or (episodes is not None and run.episodes >= episodes)

    while not up():
        run.step()
        if run.optimizer.steps % run.every == 0:
            look()
    if not run.curve or run.curve[-1][0] < run.episodes:
        look()
    bar.close()


# ---- report ------------------------------------------------------------------------------------


def report(runs: Sequence[Run], trials: Sequence[list[float]]) -> str:
    """Return a table, a line a seed, and how many have reached the target."""
    target = runs[0].target
    lines = [
        f"{'seed':>4}{'episodes':>10}{'env steps':>11}{'seconds':>9}{'return':>16}"
        f"{'in gymnasium':>18}" + ("" if target is None else f"{f'{target:.0f} reached':>13}")
    ]
    for run, found in zip(runs, trials, strict=True):
        episodes, steps, seconds, mean, std = run.curve[-1]
        tried = f"{statistics.mean(found):.1f} +- {statistics.pstdev(found):.1f}"
        reached = "" if target is None else f"{'yes' if run.reached else 'no':>13}"
        lines.append(
            f"{run.seed:>4}{episodes:>10,.0f}{steps:>11,.0f}{seconds:>9.1f}"
            f"{f'{mean:.1f} +- {std:.1f}':>16}{tried:>18}{reached}"
        )
    if target is not None:
        good = [run for run in runs if run.reached]
        line = f"{len(good)} of {len(runs)} seeds reached {target:.0f}"
        if good:
            seconds = [run.seconds for run in good]
            line += f" in {min(seconds):.0f} to {max(seconds):.0f} s, evaluations included"
        lines.append(line)
    return "\n".join(lines)


def plot(runs: Sequence[Run], file: Path) -> None:
    """Draw the returns of all seeds over episodes and over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, column, label in ((axes[0], 0, "episodes"), (axes[1], 2, "seconds")):
        for run in runs:
            points = list(zip(*run.curve, strict=True))
            axis.plot(points[column], points[3], linewidth=1, marker=".", label=f"seed {run.seed}")
        if runs[0].target is not None:
            axis.axhline(runs[0].target, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"return, mean of {JUDGES} episodes")
    axes[1].legend(fontsize=6)
    figure.suptitle(f"{runs[0].task}: {type(runs[0].optimizer).__name__}, no gradients")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ---- command line ------------------------------------------------------------------------------


def positive(kind: type) -> Callable[[str], Any]:
    """Return an argparse type for numbers above zero."""

    def convert(text: str) -> Any:
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return kind(text)

    return convert


def parser(kind: type[Run], *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser of the options of a call and of a run; the latter have no defaults."""
    made = argparse.ArgumentParser(
        parents=parents,
        description=f"Train a policy for {kind.task} without gradients.",
        argument_default=argparse.SUPPRESS,
    )
    call = made.add_argument_group("this call")
    call.add_argument("--seeds", type=positive(int), default=1, help="how many to train (1)")
    call.add_argument("--seed", type=int, default=0, help="the first of them (0)")
    call.add_argument("--seconds", type=positive(float), default=60.0, help="of each seed (60)")
    call.add_argument("--episodes", type=positive(int), default=None, help="stop a seed here")
    call.add_argument("--threads", type=positive(int), default=2, help="of the simulation (2)")
    call.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (runs)")
    call.add_argument("--resume", type=Path, metavar="FILE", default=None, help="a checkpoint")
    run = made.add_argument_group("the run (kept in its checkpoints)")
    described = {
        "directions": (int, "half the population"),
        "top": (int, "directions that count in an update"),
        "sigma": (float, "noise scale"),
        "lr": (float, "step size"),
        "horizon": (int, "steps of an episode"),
    }
    for name in kind.defaults:
        number, text = described[name]
        run.add_argument(f"--{name}", type=positive(number), help=f"{text} ({kind.defaults[name]})")
    return made


def main(
    argv: Sequence[str] | None = None,
    kind: type[Run] = Run,
    *parents: argparse.ArgumentParser,
) -> list[Run]:
    """Train, report and return the runs."""
    options = parser(kind, *parents).parse_args(argv)
    given = {name: getattr(options, name) for name in kind.defaults if hasattr(options, name)}
    settings = {**kind.defaults, **given}
    seeds = range(options.seed, options.seed + options.seeds)
    if options.resume is not None:
        try:
            saved = read_checkpoint(options.resume)["parts"]
        except (FileNotFoundError, CheckpointError) as error:
            sys.exit(f"--resume: {error}")
        if saved["name"] != kind.name:
            sys.exit(f"--resume: {options.resume} is of {saved['name']}, not {kind.name}")
        settings, seeds = saved["options"], range(saved["seed"], saved["seed"] + 1)
        changed = {key: value for key, value in given.items() if value != settings[key]}
        if changed:
            sys.exit(f"--resume: the run in {options.resume} has other options than {changed}")
    print(f"{kind.task}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    threads, torch_threads = options.threads, torch.get_num_threads()
    torch.set_num_threads(1)  # the policy is too small to share
    runs, trials = [], []
    try:
        for seed in seeds:
            file = options.out / f"{kind.name}-{seed}.pt"
            run = kind(settings, seed, threads)
            if options.resume is not None:
                run.load(options.resume)
                print(f"seed {seed}: resumed at {run.episodes} episodes, {run.seconds:.0f} s")
            train(run, options.seconds, options.episodes, file)
            trials.append(run.try_in_gymnasium())
            run.close()
            runs.append(run)
    finally:
        torch.set_num_threads(torch_threads)
    print(report(runs, trials))
    drawn = options.out / f"{kind.name}.png"
    plot(runs, drawn)
    print(f"learning curves: {drawn}\ncheckpoints:     {options.out}/{kind.name}-*.pt")
    return runs


if __name__ == "__main__":
    main()
