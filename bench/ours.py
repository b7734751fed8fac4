"""What this package does, as rows beside the others: a layer or a network with each noise family.

View       what a row times
forward    a new draw, and the perturbed forward with its noise made in the call
update     the estimate sum_d w_d E_d of every parameter, its noise made again
step       all of it
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bench.common import Row, assert_close, estimate_rtol, rtol
from bench.roofline import Layer
from bench.timing import Rotating
from perturbed import Dense, LowRank, Permuted, PerturbedModel, SignFlip, Sparse, convert
from perturbed.noise import NoiseFamily

SIGMA = 0.02


def families(full: bool = False) -> tuple[NoiseFamily, ...]:
    """The families in the order of the tables; --full adds ranks, columns and sides."""
    most: tuple[NoiseFamily, ...] = (
        Dense(),
        Dense("rademacher"),
        LowRank(1),
        LowRank(1, "rademacher"),
        LowRank(4),
        Sparse(1),
        Permuted("in"),
        Permuted("both"),
        SignFlip("in"),
        SignFlip("both"),
    )
    more = (LowRank(8), Sparse(4), Permuted("out"), SignFlip("out"), SignFlip("in", bases=4))
    return most + more if full else most


class Population:
    """A perturbed copy of a module, and the proof that it is what it claims to be.

    Args:
        module: a layer or a network of layers; left as it is.
        noise: the family.
        directions: D.
        x: (R * D, in), a row of the batch for each row; antithetic if R is even.
        weights: (D,) of the estimate.
    """

    def __init__(
        self, module: nn.Module, noise: NoiseFamily, directions: int, x: Tensor, weights: Tensor
    ) -> None:
        self.noise, self.directions, self.x, self.weights = noise, directions, x, weights
        self.module, self.rotating = module, Rotating(x)
        self.net = convert(copy.deepcopy(module), directions, noise)
        self.model = PerturbedModel(self.net, directions, sigma=SIGMA)
        self.model.set_noise()
        self.probes = sorted({0, directions // 2, directions - 1})

    def forward(self) -> Tensor:
        self.model.set_noise()
        return self.model(self.rotating())

    def update(self) -> None:
        self.model.set_grad(self.weights)

    def step(self) -> None:
        self.forward()
        self.update()

    def row(self, view: str) -> Row:
        """The work of a view."""
        work = None
        if isinstance(self.module, (nn.Linear, nn.Conv2d)):
            work = Layer.of(self.module, self.x, self.directions).perturbed(self.noise, view)
        held = held_bytes(self.model)
        return Row(repr(self.noise), getattr(self, view), self.check, held, work=work)

    def check(self) -> None:
        """Compares rows and an estimate with the members, ordinary modules of torch."""
        y = self.forward()
        parameters = list(self.net.parameters())
        expected = [torch.zeros_like(p) for p in parameters]
        chosen = torch.zeros_like(self.weights)
        repeats = len(self.x) // self.directions
        for d in self.probes:
            for r in range(repeats):
                b = r * self.directions + d
                member = self.model.member(d, -1 if 2 * r >= repeats > 1 else 1)
                what = f"{self.noise!r}, row {b}"
                assert_close(y[b], member(self.x[b : b + 1])[0], what, rtol(self.x))
            chosen[d] = self.weights[d]
            networks = zip(expected, self.model.member(d).parameters(), parameters, strict=True)
            for total, own, centre in networks:
                total += self.weights[d].to(total.dtype) * (own - centre)
        self.model.set_grad(chosen)
        for parameter, total in zip(parameters, expected, strict=True):
            what = f"{self.noise!r}, estimate of a {tuple(parameter.shape)} parameter"
            assert_close(parameter.grad, total, what, estimate_rtol(self.x))


def rows(
    view: str,
    module: nn.Module,
    directions: int,
    x: Tensor,
    weights: Tensor,
    chosen: Sequence[NoiseFamily],
) -> Iterator[tuple[str, int, Callable[[], Row]]]:
    """Name, bytes of noise to allocate (none of ours does), and how to make the row."""
    for noise in chosen:
        make = functools.partial(Population, module, noise, directions, x, weights)
        yield repr(noise), 0, lambda make=make: make().row(view)


def held_bytes(model: PerturbedModel) -> int:
    """Bytes of noise, keys and scales that the model holds once the noise is drawn and used."""
    noise = sum(layer.held_bytes() for layer in model.layers())
    device = next(model.parameters()).device
    return noise + sum(part.nbytes for part in model.state.tensors(device))
