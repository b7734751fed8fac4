"""Train twelve networks by gradients and let them learn from each other: ``make demo-hybrid``.

The hybrid training of Nytorch (2024): particles take a step of SGD on every batch; every 16 batches
a random subset of 6 of the 12 looks at its losses on that batch, and each W_i of the subset moves
to (1 - a) W_i + a W_best. Beside the swarm run the same twelve networks on the same batches without
that move, so that the table shows what it adds.

All particles are trained in one forward and one backward: the layers are perturbed.Explicit, their
members' parameters are tensors (12, *shape) that require grad, and one SGD steps all of them. The
same training one network after the other, with perturbed.particles.assign_ for the move, is timed
at the end. Data: the 5,000 MNIST digits of nes_mnist.py, 4,000 to train on, 1,000 held out.

    python docs/examples/hybrid_swarm.py --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nes_mnist  # beside this file
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import perturbed
from perturbed.particles import TensorList, assign_, product

PARTICLES, SUBSET, INTERVAL, ALPHA = 12, 6, 16, 0.5
BATCH, LR, BATCHES = 64, 0.01, 256
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels
SHOWN = 0, 15, 63, 111, 175, 255  # batches of the table
TEST_IMAGES = 200  # at a time: bounds the memory of a forward of all particles

Digits = Sequence[Tensor]


def make_network(seed: int) -> nn.Sequential:
    """Return a network of 22,090 parameters: (B, 784) pixels -> (B, 10) scores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 10, 5),  # (B, 10, 24, 24)
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(10, 20, 3),  # (B, 20, 10, 10)
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2000, 10),
        )


def minibatch(digits: Digits, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch; every pass over the data has its own order."""
    images, labels = digits[:2]
    per_pass = len(images) // BATCH
    turn, at = divmod(number, per_pass)
    generator = torch.Generator().manual_seed(1_000_003 * seed + turn)
    chosen = torch.randperm(len(images), generator=generator)[at * BATCH : (at + 1) * BATCH]
    return images[chosen], labels[chosen]


def draw_subset(seed: int, number: int) -> list[int]:
    """Return who takes part in a move, none twice."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 500_000 + number)
    return torch.randperm(PARTICLES, generator=generator)[:SUBSET].tolist()


def best_of(subset: list[int], losses: Sequence[float]) -> int:
    """Return the one with the lowest loss; NaN is never the lowest."""
    return min(subset, key=lambda i: losses[i] if losses[i] == losses[i] else float("inf"))


# ---- twelve networks in one forward --------------------------------------------------------------


class Together:
    """All particles as stacked parameters, (P, *shape) each."""

    def __init__(self, seed: int) -> None:
        nets = [make_network(PARTICLES * seed + i) for i in range(PARTICLES)]
        names = [name for name, _ in nets[0].named_parameters()]
        columns = zip(*(net.parameters() for net in nets), strict=True)
        self.stack = {
            name: torch.stack([p.detach() for p in column]).requires_grad_()
            for name, column in zip(names, columns, strict=True)
        }
        net = perturbed.convert(nets[0], PARTICLES, perturbed.Explicit())
        self.pm = perturbed.PerturbedModel(net, PARTICLES)
        self.pm.set_members(self.stack)  # read where they are: SGD's steps and moves are seen
        self.sgd = torch.optim.SGD(self.stack.values(), LR)

    def train(self, images: Tensor, labels: Tensor) -> list[float]:
        """Step all particles on a batch; return their losses on it, before the step."""
        scores = self.pm(self.pm.replicate(images))
        rows = F.cross_entropy(scores, labels.repeat_interleave(PARTICLES), reduction="none")
        losses = self.pm.member_mean(rows)[0]
        self.sgd.zero_grad()
        losses.sum().backward()  # the gradient of a particle is that of its own loss
        self.sgd.step()
        return losses.tolist()

    def particle(self, i: int) -> TensorList:
        """Return the parameters of particle i: views, in which what is written stays."""
        return TensorList(t.detach()[i] for t in self.stack.values())

    def move(self, subset: list[int], losses: Sequence[float]) -> None:
        """Move a subset towards its best."""
        best = best_of(subset, losses)
        for i in subset:
            if i != best:
                self.particle(i).lerp_(self.particle(best), ALPHA)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return what every particle says of every image: (P, n, 10)."""
        parts = [
            self.pm(self.pm.replicate(part)).unflatten(0, (-1, PARTICLES)).transpose(0, 1)
            for part in images.split(TEST_IMAGES)
        ]
        return torch.cat(parts, 1)

    @torch.no_grad()
    def average(self) -> nn.Module:
        """Return the network whose parameters are the particles' mean."""
        net = make_network(0)
        for parameter, t in zip(net.parameters(), self.stack.values(), strict=True):
            parameter.copy_(t.mean(0))
        return net


# ---- one after the other -------------------------------------------------------------------------


class Apart:
    """The same training as a list of ordinary modules with an optimizer each."""

    def __init__(self, seed: int) -> None:
        self.nets = [make_network(PARTICLES * seed + i) for i in range(PARTICLES)]
        self.sgds = [torch.optim.SGD(net.parameters(), LR) for net in self.nets]

    def train(self, images: Tensor, labels: Tensor) -> list[float]:
        """As :meth:`Together.train`."""
        losses = []
        for net, sgd in zip(self.nets, self.sgds, strict=True):
            loss = F.cross_entropy(net(images), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        return losses

    def move(self, subset: list[int], losses: Sequence[float]) -> None:
        """As :meth:`Together.move`; the optimizers stay valid."""
        best = product(self.nets[best_of(subset, losses)])
        for i in subset:
            assign_(self.nets[i], (1 - ALPHA) * product(self.nets[i]) + ALPHA * best)

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """As :meth:`Together.scores`."""
        return torch.stack([net(images) for net in self.nets])


# ---- a run -------------------------------------------------------------------------------------


class Result:
    """What a run left: accuracies over batches, and of the twelve together at the end."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.accuracies: list[list[float]] = []  # of every particle, after each of these batches
        self.vote = self.average = 0.0  # of the mean of their probabilities, of their mean network


def train(digits: Digits, seed: int, swarm: bool, batches: int = BATCHES) -> Result:
    """Train twelve particles; the swarm moves after every 16th batch, the others never."""
    pool, result = Together(seed), Result()
    images, labels = digits[2:]
    for number in range(batches):
        losses = pool.train(*minibatch(digits, seed, number))
        if swarm and number % INTERVAL == INTERVAL - 1:
            pool.move(draw_subset(seed, number), losses)
        if number in SHOWN or number % INTERVAL == INTERVAL - 1:
            right = pool.scores(images).argmax(2) == labels
            result.batches.append(number)
            result.accuracies.append(right.float().mean(1).tolist())
    vote = pool.scores(images).softmax(2).mean(0)
    result.vote = accuracy(vote, labels)
    with torch.no_grad():
        result.average = accuracy(pool.average()(images), labels)
    return result


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def time_batches(digits: Digits, batches: int = 8) -> dict[str, float]:
    """Return the processor seconds of a batch, moves included, together and one by one.

    Processor time, so that others who use the machine do not count.
    """
    pools: dict[str, Together | Apart] = {"together": Together(0), "one by one": Apart(0)}
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(batches + 1):
        images, labels = minibatch(digits, 0, number)
        for name, pool in pools.items():
            start = time.process_time()
            losses = pool.train(images, labels)
            if number % INTERVAL == INTERVAL - 1:
                pool.move(draw_subset(0, number), losses)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


# ---- report ------------------------------------------------------------------------------------


def table(results: dict[str, list[Result]]) -> str:
    """Show the least, mean and largest accuracy of twelve particles, averaged over seeds."""
    runs = next(iter(results.values()))
    rows = []
    for at, number in enumerate(runs[0].batches):
        if number not in SHOWN and number != runs[0].batches[-1]:
            continue
        row = [f"{number + 1}"]
        for runs in results.values():
            for pick in (min, statistics.fmean, max):
                value = statistics.fmean(pick(run.accuracies[at]) for run in runs)
                row.append(f"{value:.3f}")
        rows.append(row)
    headers = [
        "batches",
        *(f"{name}: {what}" for name in results for what in ("min", "mean", "max")),
    ]
    return tabulate(rows, headers, disable_numparse=True, colalign=["right"] * len(headers))


def summary(results: dict[str, list[Result]]) -> str:
    """Show what the twelve are worth together at the end, averaged over seeds."""
    rows = [
        (
            name,
            f"{statistics.fmean(run.vote for run in runs):.3f}",
            f"{statistics.fmean(run.average for run in runs):.3f}",
            f"{min(min(run.accuracies[-1]) for run in runs):.3f}",
        )
        for name, runs in results.items()
    ]
    headers = ["", "vote of the 12", "mean of their weights", "worst particle of all seeds"]
    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * 3)


def plot(results: dict[str, list[Result]], file: Path) -> None:
    """Draw the mean and the spread of the particles of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, runs in results.items():
        run = runs[0]
        x = [number + 1 for number in run.batches]
        axis.plot(x, [100 * statistics.fmean(a) for a in run.accuracies], label=name)
        low, high = ([100 * pick(a) for a in run.accuracies] for pick in (min, max))
        axis.fill_between(x, low, high, alpha=0.2)
    axis.set(xlabel="batches", ylabel="held-out accuracy, %: mean, min, max")
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    """Train, report and return the results by name and seed."""
    parser = argparse.ArgumentParser(description="Hybrid training of a swarm of twelve networks.")
    parser.add_argument("--seeds", type=int, default=1, help="how many (1)")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of {BATCH} ({BATCHES})")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (runs)")
    parser.add_argument("--no-costs", action="store_true", help="skip the timings")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.batches < 1:
        parser.error("--seeds and --batches must be at least 1")
    digits = nes_mnist.load_digits()
    digits = [(part - MEAN) / STD if part.is_floating_point() else part for part in digits]
    ways: dict[str, Callable[[int], Result]] = {
        "swarm": lambda seed: train(digits, seed, True, options.batches),
        "independent": lambda seed: train(digits, seed, False, options.batches),
    }
    results = {name: [way(seed) for seed in range(options.seeds)] for name, way in ways.items()}
    print(f"held-out accuracy of {PARTICLES} particles, mean of {options.seeds} seeds")
    print(table(results))
    print(f"\nafter {options.batches} batches")
    print(summary(results))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "hybrid_swarm.png"
    plot(results, file)
    print(f"\nlearning curves: {file}")
    if not options.no_costs:
        seconds = time_batches(digits)
        together, apart = seconds["together"], seconds["one by one"]
        print(
            f"a batch of all {PARTICLES}: {1e3 * together:.0f} ms of processor time together, "
            f"{1e3 * apart:.0f} ms one by one ({apart / together:.2f}x)"
        )
    return results


if __name__ == "__main__":
    main()
