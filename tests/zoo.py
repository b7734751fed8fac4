"""Kinds of models that PerturbedModel must serve; tests over all of them run over KINDS."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perturbed
from perturbed import PerturbedModel

D = 4


class Tied(nn.Module):
    """Two layers, one weight; each has its own bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    """One module called twice, and registered under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Keywords(nn.Module):
    """Keyword arguments, one of them with rows; a dictionary as output."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9, bias=False), nn.Linear(9, 2)

    def forward(self, x, *, gate: Tensor, scale: float = 1.0):
        hidden = torch.relu(self.up(x)) * gate
        return {"logits": scale * self.down(hidden), "hidden": (hidden,)}


class Batch(nn.Module):
    """A dictionary as input; rows do not come first in the argument list."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, temperature, batch):
        return self.head(self.table[batch["ids"]].mean(1) + batch["x"]) / temperature


class Policy(nn.Module):
    """A method other than forward, and parts that are no perturbed layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def act(self, x, greedy=False):
        out = self.head(torch.relu(self.norm(self.body(self.conv(x)))))
        return out.argmax(-1) if greedy else torch.tanh(out)

    def forward(self, x):
        raise AssertionError("only act is called")


class OwnForward(nn.Linear):
    """A subclass of a torch layer: its forward may be anything, so it is left alone."""

    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


class Heads(nn.Module):
    """A frozen layer, a frozen weight, and one parameter used as it is."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.partly = nn.Linear(6, 6)
        self.partly.weight.requires_grad_(False)
        self.own = OwnForward(6, 6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.own(torch.tanh(self.partly(torch.tanh(self.frozen(x))))) + self.shift


@dataclass(frozen=True)
class Kind:
    """One kind of model: how to make it, what it is called with, and the method that is called."""

    make: Callable[[], nn.Module]
    arguments: Callable[[int], tuple[tuple, dict]] = field(
        default=lambda rows: ((torch.randn(rows, 6).double(),), {})
    )
    method: str = "__call__"

    def convert(self, **options) -> tuple[nn.Module, PerturbedModel]:
        """Make the model and its population, with noise drawn."""
        net = perturbed.convert(self.make().double().eval(), D, options.pop("noise", None))
        pm = PerturbedModel(net, D, **{"sigma": 0.3, "seed": 7, **options})
        pm.set_noise()
        return net, pm

    def call(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Evaluate with the method in question."""
        return getattr(model, self.method)(*args, **kwargs)


def _rows(*shape: int) -> Callable[[int], tuple[tuple, dict]]:
    return lambda rows: ((torch.randn(rows, *shape).double(),), {})


def mlp() -> nn.Module:
    """Two layers and a tanh."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def convnet() -> nn.Module:
    """Convolutions with padding, stride, groups and a pointwise one."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Tanh(),
        nn.Conv2d(6, 3, 1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 3)),
    "mlp": Kind(mlp),
    "nested": Kind(lambda: nn.Sequential(mlp(), nn.ModuleList([nn.Linear(3, 2)])[0])),
    "tied": Kind(Tied),
    "twice": Kind(Twice),
    "layer_norm": Kind(lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))),
    "tokens": Kind(mlp, _rows(5, 6)),
    "grid": Kind(mlp, _rows(3, 4, 6)),
    "transformer": Kind(lambda: nn.TransformerEncoderLayer(6, 2, 9, batch_first=True), _rows(5, 6)),
    "keywords": Kind(
        Keywords,
        lambda rows: (
            (torch.randn(rows, 6).double(),),
            {"gate": torch.rand(rows, 1).double(), "scale": 2.0},
        ),
    ),
    "batch": Kind(
        Batch,
        lambda rows: (
            (
                torch.tensor([2.0]).double(),
                {"ids": torch.randint(10, (rows, 5)), "x": torch.randn(rows, 6).double()},
            ),
            {},
        ),
    ),
    "convnet": Kind(convnet, _rows(2, 6, 6)),
    "method": Kind(Policy, _rows(1, 4, 4), "act"),
    "heads": Kind(Heads),
}


def population(**options) -> tuple[nn.Module, PerturbedModel]:
    """Make the MLP of the zoo and its population, for tests that need no other."""
    return KINDS["mlp"].convert(**options)


def inputs(repeats: int = 2) -> Tensor:
    """Random rows for it."""
    return torch.randn(repeats * D, 6, dtype=torch.float64)


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    """Assert equality up to the order of float64 sums."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
