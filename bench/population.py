"""One layer over a population of perturbed networks, computed in every way that is compared.

Base     the unperturbed layer on the whole batch: the time no perturbed layer can beat
Naive    the unperturbed layer on one row, as often as the batch has rows. So NESgpu times it:
         it draws no noise and has no estimate, in the step view too
Loop     an honest loop: draw E_d, add, apply, add to the estimate; it runs 1 direction in 16,
         and its time is multiplied
Stored   NESgpu's scheme in torch: E of all directions in memory, a batched product, and w @ E
vmap     torch.func.vmap over materialised networks W + E_d (and W - E_d if antithetic)
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bench import ours
from bench.common import Row, assert_close, rtol
from bench.ours import SIGMA
from bench.roofline import Layer
from bench.timing import Rotating
from perturbed.noise import NoiseFamily

LOOP_PART = 16
# Directions that are drawn and repeated: normal_ takes seconds for gigabytes, and time does not
# depend on values. With 13 the probed directions of all sizes still differ.
DRAWN = 13


class Repeats:
    """R repeats of D directions; antithetic if R is even. Cases of layers derive from it."""

    directions: int
    repeats: int

    @property
    def antithetic(self) -> bool:
        return self.repeats % 2 == 0

    @property
    def signs(self) -> int:
        return 2 if self.antithetic else 1

    def population(self) -> str:
        """The part of a case's label that tells of rows and directions."""
        pairs = ", antithetic" if self.antithetic else ""
        return f"R={self.repeats} D={self.directions}{pairs}"


@dataclasses.dataclass(frozen=True)
class Case(Repeats):
    """A linear layer, R repeats of D directions."""

    inputs: int
    outputs: int
    directions: int
    repeats: int = 1

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs}, {self.population()}"


class Buffers:
    """Memory that one case after the other uses: gigabytes take seconds to get and first touch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}

    def missing(self, name: str, numel: int) -> int:
        """Bytes that :meth:`take` would have to allocate."""
        return 0 if name in self._held and len(self._held[name]) >= numel else 4 * numel

    def take(self, name: str, *shape: int) -> Tensor:
        """A float32 tensor, its values undefined, that is good until the name is taken again."""
        numel = math.prod(shape)
        if self.missing(name, numel):
            self._held.pop(name, None)
            self._held[name] = torch.empty(numel, device=self.device)
        return self._held[name][:numel].view(shape)


class LayerProblem(ABC):
    """Inputs of a layer and its work done in each way; what is stored depends on the layer.

    Args:
        layer: with weight and bias.
        case: repeats and directions.
        x: (B, ...), a row for every member and repeat.
        weights: (D,) of the estimate.
        buffers: for the noise.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        case: Repeats,
        x: Tensor,
        weights: Tensor,
        buffers: Buffers,
    ) -> None:
        self.layer, self.case, self.x, self.weights = layer, case, x, weights
        self.buffers = buffers
        self.device = buffers.device
        self.rotating = Rotating(x)
        self.rtol = rtol(x)
        self.probes = sorted({0, case.directions // 2, case.directions - 1})
        self.numbers = Layer.of(layer, x, case.directions)
        self._noise: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def add_stored(self, y: Tensor, x: Tensor) -> None:
        """Add s E_d x and s e_d to the base products of all rows, in place."""

    # ---- without noise ------------------------------------------------------------------------

    def base(self) -> Row:
        expected = self.layer(self.x[:1])

        def check() -> None:
            assert_close(self.layer(self.x)[:1], expected, "Base", self.rtol)

        call = lambda: self.layer(self.rotating())  # noqa: E731
        return Row("Base", call, check, 0, work=self.numbers.base())

    def naive(self) -> Row:
        row = self.x[:1]
        expected = self.layer(self.x)[:1]

        def call() -> None:
            for _ in range(len(self.x)):
                self.layer(row)

        def check() -> None:
            call()
            assert_close(self.layer(row), expected, "Naive", self.rtol)

        return Row("Naive", call, check, 0)

    # ---- noise in memory ----------------------------------------------------------------------

    def noise(self) -> tuple[Tensor, Tensor]:
        """E and e of all directions; Stored and vmap share them, as they never run together."""
        if self._noise is None:
            shape = (self.case.directions, *self.layer.weight.shape)
            self._noise = self.buffers.take("noise", *shape), self.x.new_empty(shape[:2])
            for part in self._noise:
                drawn = part[:DRAWN].normal_(0, SIGMA)
                for chunk in part.split(DRAWN):
                    chunk.copy_(drawn[: len(chunk)])
        return self._noise

    def draw(self) -> None:
        for part in self.noise():
            part.normal_(0, SIGMA)

    def noise_bytes(self) -> int:
        return 4 * self.case.directions * sum(p.numel() for p in self.layer.parameters())

    def estimate(self) -> tuple[Tensor, Tensor]:
        big, small = self.noise()
        grad = self.weights @ big.view(self.case.directions, -1)
        return grad.view_as(self.layer.weight), self.weights @ small

    def check_forward(self, y: Tensor, name: str) -> None:
        """Compares rows of the probed directions with the networks that they should be."""
        big, small = self.noise()
        directions = self.case.directions
        for b in (r * directions + d for r in range(self.case.repeats) for d in self.probes):
            sign = -1 if self.case.antithetic and b >= len(self.x) // 2 else 1
            network = {
                "weight": self.layer.weight + sign * big[b % directions],
                "bias": self.layer.bias + sign * small[b % directions],
            }
            expected = functional_call(self.layer, network, (self.x[b : b + 1],))[0]
            assert_close(y[b], expected, f"{name}, row {b}", self.rtol)

    def check_estimate(self, name: str) -> None:
        """Compares one row of the weight's estimate, and the bias's, with sums written out."""
        big, small = self.noise()
        grads = [grad.double() for grad in self.estimate()]
        weights = self.weights.double()
        for grad, noise in ((grads[0][-1], big[:, -1]), (grads[1], small)):
            expected = torch.tensordot(weights, noise.double(), 1)
            assert_close(grad, expected, f"{name}, estimate", self.rtol)

    def stored(self, view: str) -> Row:
        self.noise()

        def forward() -> Tensor:
            x = self.rotating()
            y = self.layer(x)
            self.add_stored(y, x)
            return y

        def whole() -> None:
            self.draw()
            forward()
            self.estimate()

        def check() -> None:
            self.check_forward(forward(), "Stored")
            self.check_estimate("Stored")

        calls = {"forward": forward, "update": self.estimate, "step": whole}
        return Row("Stored", calls[view], check, self.noise_bytes(), work=self.numbers.stored(view))

    def vmap(self, view: str) -> Row:
        c, layer = self.case, self.layer
        noise, members = self.noise(), c.signs * c.directions
        networks = (
            self.buffers.take("networks", members, *layer.weight.shape),
            torch.empty(members, len(layer.weight), device=self.device),
        )
        x = self.x.view(c.signs, -1, c.directions, *self.x.shape[1:]).transpose(1, 2).flatten(0, 1)

        def materialise() -> None:
            for own, part, name in zip(networks, noise, ("weight", "bias"), strict=True):
                torch.add(getattr(layer, name), part, out=own[: c.directions])
                if c.antithetic:
                    torch.sub(getattr(layer, name), part, out=own[c.directions :])

        def one(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
            return functional_call(layer, {"weight": weight, "bias": bias}, (rows,))

        def forward() -> Tensor:
            return vmap(one)(*networks, x)

        def whole() -> None:
            self.draw()
            materialise()
            forward()
            self.estimate()

        def check() -> None:
            materialise()
            y = forward().unflatten(0, (c.signs, c.directions)).transpose(1, 2)
            self.check_forward(y.flatten(0, 2), "vmap")

        held = (1 + c.signs) * self.noise_bytes()
        work = self.numbers.stored(view, networks=members)
        return Row("vmap", {"forward": forward, "step": whole}[view], check, held, work=work)

    def loop(self) -> Row:
        c = self.case
        directions = range(max(1, c.directions // LOOP_PART))
        sources = self.x.view(c.repeats, c.directions, *self.x.shape[1:])
        signs = [-1 if c.antithetic and r >= c.repeats // 2 else 1 for r in range(c.repeats)]
        parameters = dict(self.layer.named_parameters())
        grads = {name: torch.zeros_like(p) for name, p in parameters.items()}
        weights = self.weights.tolist()

        def one(d: int) -> dict[str, Tensor]:
            noise = {name: torch.randn_like(p) * SIGMA for name, p in parameters.items()}
            for r, sign in enumerate(signs):
                member = {name: p + sign * noise[name] for name, p in parameters.items()}
                functional_call(self.layer, member, (sources[r, d : d + 1],))
            for name, grad in grads.items():
                grad.add_(noise[name], alpha=weights[d])
            return noise

        def call() -> None:
            for d in directions:
                one(d)

        def check() -> None:
            for grad in grads.values():
                grad.zero_()
            noise = one(0)
            for name, grad in grads.items():
                assert_close(grad, weights[0] * noise[name], "Loop", self.rtol)

        scale = c.directions / len(directions)
        return Row("Loop", call, check, self.noise_bytes() // c.directions, scale)

    # ---- all of them --------------------------------------------------------------------------

    def rows(
        self, view: str, families: Sequence[NoiseFamily]
    ) -> Iterator[tuple[str, int, Callable[[], Row]]]:
        """Name, bytes that the row has still to allocate, and how to make it."""
        numel = self.case.directions * self.layer.weight.numel()
        yield "Base", 0, self.base
        if view != "update":
            yield "Naive", 0, self.naive
        if view == "step":
            yield "Loop", 0, self.loop
        needed = self.buffers.missing("noise", numel)
        yield "Stored", needed, lambda: self.stored(view)
        if view != "update":
            needed = self.buffers.missing("noise", numel)  # none if Stored found its room
            needed += self.buffers.missing("networks", self.case.signs * numel)
            yield "vmap", needed, lambda: self.vmap(view)
        yield from ours.rows(view, self.layer, self.case.directions, self.x, self.weights, families)


class Problem(LayerProblem):
    """A linear layer."""

    def __init__(self, case: Case, buffers: Buffers) -> None:
        generator = torch.Generator().manual_seed(case.inputs)
        shape = (case.repeats * case.directions, case.inputs)
        x = torch.rand(shape, generator=generator).to(buffers.device)
        weights = torch.randn(case.directions, generator=generator).to(buffers.device)
        layer = nn.Linear(case.inputs, case.outputs, device=buffers.device)
        super().__init__(layer, case, x, weights, buffers)

    def add_stored(self, y: Tensor, x: Tensor) -> None:
        """See :meth:`LayerProblem.add_stored`."""
        c, (big, small) = self.case, self.noise()
        grouped = x.view(c.repeats, c.directions, -1).transpose(0, 1)
        part = torch.baddbmm(small.unsqueeze(1), grouped, big.mT)
        if c.antithetic:
            part[:, c.repeats // 2 :].neg_()
        y.view(c.repeats, c.directions, -1).add_(part.transpose(0, 1))
