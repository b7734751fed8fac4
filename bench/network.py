"""Suite ``network``: a whole training step of a small policy network, and what it is made of.

MLP 64-256-256-10 (tanh), 1024 members in antithetic pairs, one input each, cross entropy. Base is
the plain forward of the 1024 rows. Views:

step       perturbed.NES: new noise, forward, loss, centred ranks, estimate, Adam
forward    new noise and the perturbed forward
update     the estimate of all parameters
optimizer  centred ranks and Adam, the same for all families

On a GPU, a row has its step in a CUDA graph (perturbed.GraphedStep).
bench/plain.py has three programs in plain torch; bench/peers.py EvoX and EvoTorch, where they are
installed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench import ours, peers, plain
from bench.common import Options, Result, Row, assert_close, rtol
from bench.plain import LR
from bench.timing import measure
from perturbed import NES, GraphedStep, LowRank
from perturbed.noise import NoiseFamily
from perturbed.optim.shaping import centered_rank

WIDTHS = (64, 256, 256, 10)
MEMBERS = 1024
VIEWS = ("step", "forward", "update", "optimizer")


def mlp(widths: tuple[int, ...], device: torch.device) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, device=device), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Trainer(ours.Population):
    """A population that trains with the package's own NES."""

    def __init__(self, net: nn.Module, noise: NoiseFamily, task: plain.Task) -> None:
        super().__init__(net, noise, task.directions, task.x, task.weights)
        self.task = task
        # One pass over each parameter, where a loop of torch operations costs more than the rest.
        # Capturable: fit for CUDA graphs, with its count of steps on the GPU.
        on_gpu = task.x.is_cuda
        self.adam = torch.optim.Adam(self.net.parameters(), LR, fused=True, capturable=on_gpu)
        self.nes = NES(self.model, self.adam)

    def step(self) -> None:
        self.nes.step(lambda: self.task.loss(self.model(self.x)))

    def optimizer(self) -> None:
        centered_rank(self.task.losses)
        self.adam.step()

    def check(self) -> None:
        super().check()
        before = [p.clone() for p in self.net.parameters()]
        self.step()
        for parameter, old in zip(self.net.parameters(), before, strict=True):
            # Adam's first step moves every element with a gradient by the learning rate.
            moved = (parameter - old).abs()
            if not (moved > LR / 2).any() or not (moved < 2 * LR).all():
                raise AssertionError(
                    f"{self.noise!r}: Adam moved by {moved.min()} to {moved.max()}"
                )


class GraphedTrainer(Trainer):
    """The same, its step replayed from a CUDA graph; an ordinary step on a CPU."""

    def __init__(self, net: nn.Module, noise: NoiseFamily, task: plain.Task) -> None:
        super().__init__(net, noise, task)
        self.graphed = GraphedStep(self.nes, lambda: self.task.loss(self.model(self.x)), warmup=1)

    def step(self) -> None:
        self.graphed()

    def check(self) -> None:
        super().check()  # an ordinary step
        self.step()  # recorded here
        if self.x.is_cuda and self.graphed.captures != 1:
            raise AssertionError(f"GraphedStep: {self.graphed.captures} graphs recorded, not 1")
        before = [p.clone() for p in self.net.parameters()]
        self.step()
        if all(torch.equal(p, old) for p, old in zip(self.net.parameters(), before, strict=True)):
            raise AssertionError("GraphedStep: a replay changed no parameter")


@torch.no_grad()
def run(
    options: Options, members: int = MEMBERS, widths: tuple[int, ...] = WIDTHS
) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    net = mlp(widths, options.device)
    task = plain.Task.random(members, widths[0], widths[-1], options.device)
    expected = net(task.x)
    case = f"{'-'.join(map(str, widths))}, {members} members, antithetic"
    families = ours.families(options.full)
    results: list[Result] = []
    for view in options.chosen(("step", "forward") if options.only_peers else VIEWS):
        options.progress(f"network, {view}: {case}")
        rows: list[Row] = []
        if not options.only_peers:
            rows += _own_rows(view, net, task, expected, families)
        if view in ("step", "forward"):
            rows += peers.rows(view, net, task)
        results += measure("network", view, case, rows, options.device, options.seconds)
    return results, []


def _own_rows(
    view: str,
    net: nn.Sequential,
    task: plain.Task,
    expected: Tensor,
    families: Sequence[NoiseFamily],
) -> list[Row]:
    """Base, ours, and programs in plain torch."""
    check = lambda: assert_close(net(task.x), expected, "Base", rtol(expected))  # noqa: E731
    base = Row("Base", lambda: net(task.x), check, 0)
    if view == "optimizer":
        trainer = Trainer(net, families[0], task)
        return [base, Row("centred ranks, Adam", trainer.optimizer, trainer.check, 0)]
    rows = [base, *(Trainer(net, noise, task).row(view) for noise in families)]
    if view == "step" and task.x.is_cuda:
        graphed = GraphedTrainer(net, LowRank(1), task).row(view)
        rows.append(dataclasses.replace(graphed, name=f"{graphed.name}, GraphedStep"))
    return rows + (plain.rows(view, net, task) if view in ("step", "forward") else [])
