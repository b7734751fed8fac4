"""Fit a small network by particle swarm optimisation: ``make demo-pso``.

The task of PyTorch-PSO, a program that trains one network per process: f(x1, x2) = x1 + (x2 - 2)^2
at 100 points of [-5, 5]^2, a network 2-5-5-1 of 51 parameters, 20 particles, 30 epochs of 13
batches of 8, one update each. Its demo printed 7 of the 30 epochs in four minutes on two cores, and
the loss fell from 209 to 178. Here all particles are rows of one forward, on all 100 points.

Every seed has points, a start and a swarm of its own. The report has the mean squared error of the
best network after the first step and at the end, that of Adam with as many steps, and the number of
seeds that end below 4. Afterwards the network itself is the best one that was seen: its loss is
compared with the recorded value.

    python docs/examples/pso_demo.py --seeds 10
    python docs/examples/pso_demo.py --variant inertia --topology ring --particles 64
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

import perturbed
from perturbed.optim import TOPOLOGIES, VARIANTS

POINTS, UPDATES = 100, 13  # points of the data; updates of an epoch
GOOD = 4.0  # mean squared error; the points' own variance is about 200


def make_data(seed: int) -> tuple[Tensor, Tensor]:
    """Return the points, (100, 2), and their values, (100, 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = 10 * torch.rand(POINTS, 2, generator=generator) - 5
    return x, x[:, :1] + (x[:, 1:] - 2).square()


def make_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))


@dataclass
class Run:
    """One seed's run.

    Attributes:
        seed: of points, start and swarm.
        net: the converted network; after a step it is the best one so far.
        curve: best loss after every step.
        seconds: of all steps.
        adam: what Adam reaches in as many steps.
    """

    seed: int
    net: nn.Module
    pso: perturbed.PSO
    curve: list[float] = field(default_factory=list)
    seconds: float = 0.0
    adam: float = float("nan")


def train(seed: int, particles: int, steps: int, **options: object) -> Run:
    """Run a swarm of ``particles`` for some steps; options are those of PSO."""
    net = perturbed.convert(make_network(seed), particles, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, particles)
    # Weights in +-1 / sqrt(fan_in), biases 0, as in the original. Velocities of this size carry the
    # first flight through the tens that the weights need: the values go up to 54.
    options = {"start": "fan_in", "velocity_spread": 3.0, "seed": seed, **options}
    run = Run(seed, net, perturbed.PSO(pm, **options))  # type: ignore[arg-type]
    x, y = make_data(seed)
    rows, targets = pm.replicate(x), y.repeat_interleave(particles, 0)

    def errors() -> torch.Tensor:
        return (pm(rows) - targets).square().squeeze(1)  # one per row

    for record in perturbed.train(run.pso, errors, steps):
        run.curve.append(record["best_value"])
        run.seconds = record["seconds"]
    return run


def loss_of(net: nn.Module, seed: int) -> float:
    """Mean squared error of a network at a seed's points."""
    x, y = make_data(seed)
    with torch.no_grad():
        return (net(x) - y).square().mean().item()


def adam(seed: int, steps: int) -> float:
    """Loss after as many steps with gradients, of the usual kind."""
    net, (x, y) = make_network(seed), make_data(seed)
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return loss_of(net, seed)


# ---- report ------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    rows = [
        (
            run.seed,
            f"{run.curve[0]:.1f}",
            f"{run.curve[-1]:.3f}",
            f"{loss_of(run.net, run.seed):.3f}",
            f"{run.adam:.3f}",
            f"{run.seconds:.2f} s",
        )
        for run in runs
    ]
    headers = ["seed", "first step", "best recorded", "of the network", "Adam", "time"]
    return tabulate(rows, headers, disable_numparse=True, stralign="right")


def plot(runs: Sequence[Run], file: Path) -> None:
    """Draw every seed's best loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for run in runs:
        axis.plot(range(1, len(run.curve) + 1), run.curve, color="tab:blue", alpha=0.6)
    axis.set(xlabel="updates", ylabel="mean squared error of the best", yscale="log")
    axis.set_title(f"{runs[0].pso.swarm.particles} particles, {len(runs)} seeds")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train, report and return the runs."""
    parser = argparse.ArgumentParser(description="Fit x1 + (x2 - 2)^2 with a particle swarm.")
    parser.add_argument("--particles", type=positive, default=20, help="(20)")
    parser.add_argument("--epochs", type=positive, default=30, help="of 13 updates (30)")
    parser.add_argument("--seeds", type=positive, default=5, help="how many (5)")
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="constriction")
    parser.add_argument("--topology", choices=tuple(TOPOLOGIES), help="default: the variant's")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (runs)")
    options = parser.parse_args(argv)
    kind = VARIANTS[options.variant]
    if options.topology is not None and not kind.social:
        parser.error(f"--topology: {options.variant} has none")
    flight = {} if kind.velocities else {"velocity_spread": 0.0}
    steps = options.epochs * UPDATES
    runs = []
    for seed in range(options.seeds):
        given = {"variant": options.variant, "topology": options.topology, **flight}
        run = train(seed, options.particles, steps, **given)
        run.adam = adam(seed, steps)
        runs.append(run)
    print(table(runs))
    final = [run.curve[-1] for run in runs]
    good = sum(value < GOOD for value in final)
    print(
        f"{options.variant}, {options.particles} particles, {steps} updates: median "
        f"{statistics.median(final):.3f}; below {GOOD:g} in {good} of {len(runs)} seeds"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    plot(runs, options.out / "pso_demo.png")
    best = min(runs, key=lambda run: run.curve[-1])
    torch.save(best.pso.best_model().state_dict(), options.out / "pso_demo.pt")
    print(f"{options.out}/pso_demo.png, pso_demo.pt (the network of seed {best.seed})")
    return runs


if __name__ == "__main__":
    main()
