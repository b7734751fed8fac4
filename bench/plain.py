"""Training a small network with evolution strategies in plain torch, for the suite ``network``.

torch rank 1    low-rank noise, as short and as fast as we could write it
torch vmap      torch.func.vmap over all perturbed networks, materialised, noise of full rank
torch loop      one member after the other: draw, W + E, forward, W - E, forward, back to W; one
                pair in 16 runs, and the time is multiplied
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bench.common import Row, assert_close
from bench.ours import SIGMA
from bench.population import LOOP_PART
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


class TorchVmap:
    """Noise of full rank for every pair, all networks in memory; centred ranks, Adam."""

    def __init__(self, net: nn.Sequential, task: Task) -> None:
        self.net, self.task = copy.deepcopy(net), task
        self.adam = torch.optim.Adam(self.net.parameters(), LR, fused=True)
        self.noise: dict[str, Tensor] = {}

    def forward(self) -> Tensor:
        shapes = self.net.named_parameters()
        d = self.task.directions
        self.noise = {name: p.new_empty(d, *p.shape).normal_(0, SIGMA) for name, p in shapes}
        members = {
            name: torch.cat([p + self.noise[name], p - self.noise[name]])
            for name, p in self.net.named_parameters()
        }
        return vmap(lambda own, row: functional_call(self.net, own, (row,)))(members, self.task.x)

    def step(self) -> None:
        plus, minus = centered_rank(self.task.loss(self.forward()).view(2, -1))
        weights = (plus - minus) / (2 * self.task.directions * SIGMA**2)
        for name, p in self.net.named_parameters():
            p.grad = (weights @ self.noise[name].flatten(1)).view_as(p)
        self.adam.step()

    def check(self) -> None:
        y = self.forward()
        for b in (0, len(y) - 1):
            half, d = divmod(b, self.task.directions)
            own = {
                name: p + (-1 if half else 1) * self.noise[name][d]
                for name, p in self.net.named_parameters()
            }
            expected = functional_call(self.net, own, (self.task.x[b],))
            assert_close(y[b], expected, f"torch vmap, row {b}", 1e-3)
        self.step()

    def held_bytes(self) -> int:
        each = sum(p.nbytes for p in self.net.parameters())
        return 3 * self.task.directions * each  # the noise, and both signs' networks


class TorchLoop:
    """The same, one member after the other."""

    def __init__(self, net: nn.Sequential, task: Task) -> None:
        self.net, self.task = copy.deepcopy(net), task
        self.parameters = list(self.net.parameters())
        self.grads = [torch.zeros_like(p) for p in self.parameters]
        self.pairs = range(max(1, task.directions // LOOP_PART))

    def pair(self, d: int) -> tuple[list[Tensor], Tensor, Tensor]:
        noise = [SIGMA * torch.randn_like(p) for p in self.parameters]
        torch._foreach_add_(self.parameters, noise)
        plus = self.net(self.task.x[d])
        torch._foreach_sub_(self.parameters, noise, alpha=2)
        minus = self.net(self.task.x[d + self.task.directions])
        torch._foreach_add_(self.parameters, noise)
        return noise, plus, minus

    def forward(self) -> None:
        for d in self.pairs:
            self.pair(d)

    def step(self) -> None:
        # Ranks and Adam are left out: once for a population, they cost next to nothing here.
        for d in self.pairs:
            noise, _, _ = self.pair(d)
            torch._foreach_add_(self.grads, noise, alpha=0.5)

    def check(self) -> None:
        before = [p.clone() for p in self.parameters]
        noise, _, minus = self.pair(0)
        for p, old in zip(self.parameters, before, strict=True):
            assert_close(p, old, "torch loop, weights afterwards", 1e-5)
        member = copy.deepcopy(self.net)
        torch._foreach_sub_(list(member.parameters()), noise)
        expected = member(self.task.x[self.task.directions])
        assert_close(minus, expected, "torch loop, the first pair's second member", 1e-4)

    def held_bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)


def rows(view: str, net: nn.Sequential, task: Task) -> list[Row]:
    """All of them, of a view, "forward" or "step"."""
    low, stacked, loop = TorchLowRank(net, task), TorchVmap(net, task), TorchLoop(net, task)
    scale = task.directions / len(loop.pairs)
    return [
        Row("torch rank 1", getattr(low, view), low.check, low.held_bytes()),
        Row("torch vmap", getattr(stacked, view), stacked.check, stacked.held_bytes()),
        Row("torch loop", getattr(loop, view), loop.check, loop.held_bytes(), scale),
    ]
