"""Suite ``variance``: how well a population's estimate points along the true gradient.

A 196-32-10 network (tanh) on MNIST digits, averaged over 2 x 2 pixels; trained for a few steps, so
that its gradient has structure. For a batch, the true gradient of the cross entropy comes from
autograd, the estimate from antithetic pairs that all see that batch: what is left is the noise of
the directions. Printed is the cosine of the two over all parameters, mean and standard deviation
over seeds, and the time of an estimate.

Independent normal noise has a theory: of P parameters, D directions see a random part, and

    cosine^2 ~ D / (D + P + 1)

A family's ``worth`` is the number of independent normal directions that would reach its cosine,
divided by its own. Families with a shared base matrix draw it anew with every ``set_noise``; rows
"in draws of 64" add up estimates of as many draws as the population needs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import ours
from bench.common import Options
from bench.ours import SIGMA
from perturbed import Dense, LowRank, Permuted, PerturbedModel, SignFlip, Sparse, convert
from perturbed.noise import NoiseFamily

WIDTHS = (196, 32, 10)
BATCH = 64
DIRECTIONS = (16, 64, 256, 1024, 4096)
SEEDS = 5
DRAW = 64  # directions of one draw in the rows that add up several
ROWS = 1 << 18  # of one forward; more would only take memory

FAMILIES: tuple[tuple[NoiseFamily, bool], ...] = (
    (Dense(), False),
    (Dense("rademacher"), False),
    (LowRank(1), False),
    (LowRank(1, "rademacher"), False),
    (LowRank(4), False),
    (Sparse(1), False),
    (Sparse(8), False),
    (Permuted("in"), False),
    (Permuted("in"), True),
    (Permuted("out"), False),
    (Permuted("both"), False),
    (SignFlip("in"), False),
    (SignFlip("in"), True),
    (SignFlip("in", bases=16), False),
    (SignFlip("both"), False),
    (SignFlip("both"), True),
    (SignFlip("both", distribution="rademacher"), False),
)


@dataclasses.dataclass
class Cosine:
    """Cosine between estimate and gradient of one family and population; in JSON as it stands."""

    method: str
    directions: int
    mean: float
    std: float
    seeds: int
    seconds: float
    worth: float


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The digits of the demo as (5000, 196) in [0, 1], and their labels."""
    from docs.examples.nes_mnist import load_digits

    images, labels, *rest = load_digits()
    images = torch.cat((images, rest[0])).view(-1, 1, 28, 28)
    return F.avg_pool2d(images, 2).flatten(1), torch.cat((labels, rest[1]))


class Problem:
    """A network, a batch, and the gradient that is to be estimated."""

    def __init__(self, widths: Sequence[int] = WIDTHS, device: torch.device | None = None) -> None:
        images, labels = (part.to(device) for part in digits())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs, hidden, classes = widths
            self.net = nn.Sequential(
                nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)
            ).to(device)
        with torch.enable_grad():
            adam = torch.optim.Adam(self.net.parameters(), 3e-3)
            for first in range(0, 2560, BATCH):
                part = slice(first, first + BATCH)
                adam.zero_grad()
                F.cross_entropy(self.net(images[part]), labels[part]).backward()
                adam.step()
            self.x, self.labels = images[-BATCH:], labels[-BATCH:]
            loss = F.cross_entropy(self.net(self.x), self.labels)
            self.gradient = flat(torch.autograd.grad(loss, list(self.net.parameters())))

    def population(self, noise: NoiseFamily, directions: int) -> PerturbedModel:
        net = convert(copy.deepcopy(self.net), directions, noise)
        return PerturbedModel(net, directions, antithetic=True, sigma=SIGMA)

    @torch.no_grad()
    def estimate(self, model: PerturbedModel, seed: int, draws: int) -> tuple[Tensor, float]:
        """The estimate of the gradient, (P,), and the seconds that it took.

        Args:
            model: from :meth:`population`.
            seed: of the noise.
            draws: how many draws of all its directions to add up.
        """
        model.set_seed(seed)
        started = time.perf_counter()
        for draw in range(draws):
            model.set_noise()
            plus, minus = self.losses(model)
            model.set_grad(plus - minus, accumulate=draw > 0)
        total = flat([p.grad for p in model.parameters()])
        if total.is_cuda:
            torch.cuda.synchronize()
        return total, time.perf_counter() - started

    def losses(self, model: PerturbedModel) -> Tensor:
        """Loss of every member on the whole batch, (2, D)."""
        each = max(1, ROWS // (2 * model.directions))
        total = 0
        for x, labels in zip(self.x.split(each), self.labels.split(each), strict=True):
            scores = model(model.replicate(x))
            labels = model.replicate(labels).full()
            losses = F.cross_entropy(scores, labels, reduction="none")
            total = total + model.member_mean(losses) * (len(x) / BATCH)
        return total

    def cosine(self, estimate: Tensor) -> float:
        return F.cosine_similarity(estimate.double(), self.gradient.double(), dim=0).item()


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def theory(directions: int, parameters: int) -> float:
    """Cosine that independent normal directions reach; exact for the mean of its square."""
    return (directions / (directions + parameters + 1)) ** 0.5


def worth(cosine: float, directions: int, parameters: int) -> float:
    """Independent normal directions of the same cosine, for each of the family's own."""
    return cosine**2 * (parameters + 1) / (1 - cosine**2) / directions


def run(
    options: Options,
    directions: Sequence[int] = DIRECTIONS,
    families: Sequence[tuple[NoiseFamily, bool]] = FAMILIES,
) -> tuple[list[Cosine], list[str]]:
    """Runs the suite; returns its results, and remarks. Twice the seeds with --full."""
    problem = Problem(device=options.device)
    count = len(problem.gradient)
    seeds = SEEDS * (2 if options.full else 1)
    results: list[Cosine] = []
    for noise, split in families:
        options.progress(f"variance: {noise!r}{f', draws of {DRAW}' if split else ''}")
        # Rows, estimate and members agree before anything is said about them.
        check = ours.Population(
            problem.net, noise, 4, problem.x[:8].contiguous(), torch.ones(4).to(options.device)
        )
        with torch.no_grad():
            check.check()
        for d in directions:
            if split and d <= DRAW:
                continue
            model = problem.population(noise, DRAW if split else d)
            draws = d // DRAW if split else 1
            taken = [problem.estimate(model, seed, draws) for seed in range(seeds)]
            cosines = [problem.cosine(estimate) for estimate, _ in taken]
            mean = statistics.fmean(cosines)
            results.append(
                Cosine(
                    method=f"{noise!r}{f', draws of {DRAW}' if split else ''}",
                    directions=d,
                    mean=mean,
                    std=statistics.stdev(cosines),
                    seeds=seeds,
                    seconds=statistics.median(seconds for _, seconds in taken),
                    worth=worth(mean, d, count),
                )
            )
    note = (
        f"variance: {count:,} parameters, batch of {BATCH} digits, sigma {SIGMA}, {seeds} seeds; "
        "D antithetic pairs; theory for independent normals: "
        + ", ".join(f"{theory(d, count):.3f} at D = {d}" for d in directions)
        + "."
    )
    return results, [note]
