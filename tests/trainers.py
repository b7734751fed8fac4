"""Small runs of every trainer, for the tests of checkpoints: made, stepped, saved and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perturbed
from perturbed import PerturbedModel
from perturbed.description import digest
from perturbed.optim import VARIANTS
from perturbed.rl import ObservationNorm

D = 4


class Run:
    """Objects with a state, by name, and a step that changes them all and returns a loss."""

    def __init__(self, step: Callable[[], Tensor], **parts: Any) -> None:
        self.step, self.parts = step, parts

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self

    def state(self) -> str:
        """Return a digest of all parts' states: equal if and only if they are, bit for bit."""
        states = {
            name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            for name, part in self.parts.items()
        }
        return digest(states)


class Count:
    """An object with a state: a number.

    ``refuses`` makes load_state_dict fail after it has changed it.
    """

    def __init__(self, number: int = 0, refuses: Exception | None = None) -> None:
        self.number, self.refuses = number, refuses

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]
        if self.refuses is not None:
            raise self.refuses


def network(seed: int, hidden: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """3 inputs, one output; the weights are of the seed."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return net


def loss(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (net(x).squeeze(-1) - 1).square()


def nes(
    seed: int = 0,
    *,
    noise: perturbed.noise.NoiseFamily | None = None,
    directions: int = D,
    antithetic: bool | None = True,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    hidden: int = 4,
    dtype: torch.dtype = torch.float32,
    maximize: bool = False,
    chunk: int | None = None,
) -> Run:
    """NES with a torch optimizer, a scheduler and minibatches of a generator."""
    net = perturbed.convert(network(seed, hidden, dtype), directions, noise or perturbed.Dense())
    pm = PerturbedModel(net, directions, antithetic, sigma=0.1, seed=seed)
    inner = optimizer(net.parameters(), lr=0.05)
    trainer = perturbed.NES(pm, inner, maximize=maximize, chunk=chunk)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, 20)
    generator = torch.Generator().manual_seed(seed)

    def step() -> Tensor:
        x = torch.randn(5, 3, generator=generator).to(dtype)
        mean = trainer.step(lambda: loss(pm, pm.replicate(x)))
        scheduler.step()
        return mean

    return Run(step, net=net, nes=trainer, scheduler=scheduler, generator=generator)


def ars(seed: int = 0) -> Run:
    """ARS V2-t, whose normalizer belongs to its state."""
    net = perturbed.convert(network(seed), D)
    pm = PerturbedModel(net, D, True, sigma=0.1, seed=seed)
    norm = ObservationNorm(3)
    trainer = perturbed.ARS(pm, top=2, normalizer=norm)
    generator = torch.Generator().manual_seed(seed)

    def step() -> Tensor:
        x = torch.randn(5, 3, generator=generator)
        norm.update(x)
        rows = pm.replicate(norm(x))
        mean = trainer.step(lambda: loss(pm, rows))
        norm.sync()
        return mean

    return Run(step, net=net, ars=trainer, generator=generator)


def members(name: str, seed: int = 0, **options: Any) -> Run:
    """SNES, PGPE or PSO, on members in one forward."""
    net = perturbed.convert(network(seed), D, perturbed.Explicit())
    pm = PerturbedModel(net, D)
    trainer = getattr(perturbed, name)(pm, seed=seed, **options)
    x = pm.replicate(torch.randn(5, 3, generator=torch.Generator().manual_seed(7)))
    return Run(lambda: trainer.step(lambda: loss(pm, x)), net=net, trainer=trainer)


def clipup(seed: int = 0) -> Run:
    """A torch optimizer of this package, on gradients, with a scheduler that counts milestones."""
    net = network(seed)
    optimizer = perturbed.ClipUp(net.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))

    def step() -> Tensor:
        optimizer.zero_grad()
        mean = loss(net, x).mean()
        mean.backward()
        optimizer.step()
        scheduler.step()
        return mean.detach()

    return Run(step, net=net, optimizer=optimizer, scheduler=scheduler)


def walk(seed: int = 0) -> Run:
    """A search with one loss, of a plain network."""
    net = network(seed)
    search = perturbed.optim.RandomWalk(net.parameters(), 0.05, order=2, best_of=2, seed=seed)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(search, 0.9)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))

    def step() -> Tensor:
        mean = search.step(lambda: loss(net, x).mean())
        scheduler.step()
        return mean

    return Run(step, net=net, search=search, scheduler=scheduler)


def spsa(seed: int = 0) -> Run:
    """A search with one loss whose candidates are one forward, and an optimizer in it."""
    net = perturbed.convert(network(seed), D, perturbed.Dense("rademacher"))
    pm = PerturbedModel(net, D, True, seed=seed)
    inner = torch.optim.Adam(net.parameters(), lr=0.05)
    search = perturbed.optim.SPSA(pm, opt=inner)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))
    return Run(lambda: search.step(lambda: loss(pm, pm.replicate(x))), net=net, search=search)


# Everything that trains, by name: seed -> run.
TRAINERS: dict[str, Callable[[int], Run]] = {
    "nes": nes,
    "nes-low-rank-sgd": lambda seed: nes(
        seed, noise=perturbed.LowRank(1), optimizer=torch.optim.SGD
    ),
    "nes-clipup-float64": lambda seed: nes(seed, optimizer=perturbed.ClipUp, dtype=torch.float64),
    "nes-bfloat16": lambda seed: nes(seed, dtype=torch.bfloat16),
    "ars-v2": ars,
    "snes": lambda seed: members("SNES", seed),
    "pgpe": lambda seed: members("PGPE", seed),
    "clipup": clipup,
    "random-walk": walk,
    "spsa": spsa,
    **{
        f"pso-{variant}": lambda seed, variant=variant: members("PSO", seed, variant=variant)
        for variant in VARIANTS
    },
}

each_trainer = pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS)
