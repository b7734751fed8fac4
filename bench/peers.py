"""How others train a small network with evolution strategies, for the suite ``network``.

torch rank 1       low-rank noise in plain torch, as short and as fast as we could write it
EvoX VirtualLoRA   VirtualLoRAES of EvoX (rank 1): noise of every member drawn twice in a step
EvoTorch PGPE      all perturbed networks in memory, evaluated by vmap

EvoX and EvoTorch are optional. Both do what their own examples do, with the same population,
learning rate and loss. EvoX shows all members one input, since it has no inputs of their own; its
rank-r classes (version 1.4) are imported from their files, because ``evox.algorithms`` and
``evox.problems.neuroevolution`` export the full-rank ones under their names.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Row, assert_close
from bench.ours import SIGMA
from perturbed.optim.shaping import centered_rank

LR = 1e-3


@dataclasses.dataclass
class Task:
    """One input and one label for each member, the second half of them the first's partners.

    Attributes:
        x: (2 * D, in).
        labels: (2 * D,).
        losses: (2, D), some losses of members.
        weights: (D,), of an estimate.
    """

    x: Tensor
    labels: Tensor
    losses: Tensor
    weights: Tensor

    @classmethod
    def random(cls, members: int, inputs: int, classes: int, device: torch.device) -> Task:
        """Inputs and labels without meaning: time does not depend on them."""
        generator = torch.Generator().manual_seed(members)
        x = torch.rand(members, inputs, generator=generator)
        labels = torch.randint(classes, (members,), generator=generator)
        losses = torch.rand(2, members // 2, generator=generator)
        parts = x, labels, losses, losses[0] - losses[1]
        return cls(*(part.to(device) for part in parts))

    @property
    def directions(self) -> int:
        return len(self.weights)

    def loss(self, scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, self.labels, reduction="none")


class TorchLowRank:
    """Rank-1 noise for weights, full noise for biases, antithetic; centred ranks, Adam."""

    def __init__(self, net: nn.Sequential, task: Task) -> None:
        self.net, self.task = copy.deepcopy(net), task
        self.adam = torch.optim.Adam(self.net.parameters(), LR, fused=True)
        self.linear = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        self.noise: dict[nn.Linear, tuple[Tensor, Tensor, Tensor]] = {}
        self.scale = torch.tensor([SIGMA, -SIGMA], device=task.x.device).view(2, 1, 1)

    def draw(self) -> None:
        d = self.task.directions
        for layer in self.linear:
            sizes = layer.out_features, layer.in_features, layer.out_features
            a, b, e = (torch.randn(d, n, device=self.task.x.device) for n in sizes)
            self.noise[layer] = a, b, e

    def forward(self) -> Tensor:
        self.draw()
        x = self.task.x.view(2, self.task.directions, -1)
        for layer in self.net:
            if not isinstance(layer, nn.Linear):
                x = layer(x)
                continue
            a, b, e = self.noise[layer]
            part = (x * b).sum(-1, keepdim=True) * a + e
            x = layer(x).addcmul_(part, self.scale)
        return x.flatten(0, 1)

    def update(self, folded: Tensor) -> None:
        weights = folded / (2 * self.task.directions * SIGMA)
        for layer in self.linear:
            a, b, e = self.noise[layer]
            layer.weight.grad = (a * weights[:, None]).t() @ b
            layer.bias.grad = weights @ e

    def step(self) -> None:
        plus, minus = centered_rank(self.task.loss(self.forward()).view(2, -1))
        self.update(plus - minus)
        self.adam.step()

    def check(self) -> None:
        y = self.forward()
        for b in (0, len(y) - 1):
            sign, d = divmod(b, self.task.directions)
            x = self.task.x[b]
            for layer in self.net:
                if not isinstance(layer, nn.Linear):
                    x = layer(x)
                    continue
                a, factor, e = (part[d] for part in self.noise[layer])
                scale = -SIGMA if sign else SIGMA
                weight = layer.weight + scale * torch.outer(a, factor)
                x = F.linear(x, weight, layer.bias + scale * e)
            assert_close(y[b], x, f"torch rank 1, row {b}", 1e-3)

    def held_bytes(self) -> int:
        self.draw()
        return sum(part.nbytes for parts in self.noise.values() for part in parts)


def _evox(view: str, net: nn.Sequential, task: Task) -> Row:
    """EvoX's algorithm and problem, joined as its StdWorkflow does, but without its bookkeeping."""
    from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
    from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem

    device, parameters = task.x.device, list(net.parameters())
    members = 2 * task.directions
    problem = VirtualLoRAProblem(
        copy.deepcopy(net),
        [(task.x[:1], task.labels[:1])],
        nn.CrossEntropyLoss(reduction="none"),
        lora_rank=1,
        device=device,
    )
    centre = torch.cat([p.flatten() for p in parameters])
    algorithm = VirtualLoRAES(
        [tuple(p.shape) for p in parameters],
        1,
        members,
        centre.clone(),
        LR,
        SIGMA,
        "adam",
        device,
    )
    algorithm.evaluate = problem.evaluate

    def check() -> None:
        losses = problem.evaluate((centre, algorithm.seeds, 0.0))
        plain = F.cross_entropy(net(task.x[:1]), task.labels[:1])
        assert_close(losses, plain.expand(members), "EvoX without noise", 1e-4)
        before = algorithm.center.clone()
        algorithm.step()
        if torch.equal(before, algorithm.center):
            raise AssertionError("EvoX: the step changed nothing")

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: problem.evaluate((algorithm.center, algorithm.seeds, SIGMA)),
        "step": algorithm.step,
    }
    held = 4 * members * sum(sum(p.shape) for p in parameters)  # its factors, of all layers at once
    return Row("EvoX VirtualLoRA", calls[view], check, held)


def _evotorch(view: str, net: nn.Sequential, task: Task) -> Row:
    from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell
    from evotorch.neuroevolution.net import ModuleExpectingFlatParameters

    function = ModuleExpectingFlatParameters(copy.deepcopy(net), disable_autograd_tracking=True)
    centre = torch.cat([p.flatten() for p in net.parameters()])
    state = pgpe(
        center_init=centre,
        center_learning_rate=LR,
        stdev_learning_rate=0.0,
        objective_sense="min",
        ranking_method="centered",
        optimizer="adam",
        stdev_init=SIGMA,
    )

    def forward() -> tuple[Tensor, Tensor]:
        members = pgpe_ask(state, popsize=2 * task.directions)
        return members, torch.func.vmap(function)(members, task.x)

    def step() -> None:
        nonlocal state
        members, scores = forward()
        state = pgpe_tell(state, members, task.loss(scores))

    def check() -> None:
        members, scores = forward()
        member = copy.deepcopy(net)
        torch.nn.utils.vector_to_parameters(members[-1], member.parameters())
        assert_close(scores[-1], member(task.x[-1]), "EvoTorch", 1e-4)
        step()

    held = 4 * 2 * task.directions * len(centre)
    return Row("EvoTorch PGPE", {"forward": forward, "step": step}[view], check, held)


def rows(view: str, net: nn.Sequential, task: Task) -> tuple[list[Row], list[str]]:
    """Everybody's rows of a view, "forward" or "step", and remarks on those who are missing."""
    torch_row = TorchLowRank(net, task)
    call = getattr(torch_row, view)
    found = [Row("torch rank 1", call, torch_row.check, torch_row.held_bytes())]
    notes = []
    for package, make in (("evox", _evox), ("evotorch", _evotorch)):
        try:
            found.append(make(view, net, task))
        except ImportError as error:
            notes.append(
                f"network: no row of {package}, which is optional: pip install "
                f'"perturbed[bench-peers]" ({error}).'
            )
    return found, notes
