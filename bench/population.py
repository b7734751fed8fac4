"""One linear layer over a population of perturbed networks, computed in every way that is compared.

Base     the unperturbed layer on the whole batch: the time no perturbed layer can beat
Naive    the unperturbed layer on one row, as often as the batch has rows. So NESgpu times it:
         it draws no noise and has no estimate, in the step view too
Loop     an honest loop: draw E_d, add, apply, add to the estimate; it runs 1 direction in 16,
         and its time is multiplied
Stored   NESgpu's scheme in torch: E of all directions in memory, baddbmm, and w @ E
vmap     torch.func.vmap over materialised networks W + E_d (and W - E_d if antithetic)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bench import ours
from bench.common import Row, assert_close, rtol
from bench.ours import SIGMA
from perturbed.noise import NoiseFamily

LOOP_PART = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, R repeats of D directions; antithetic if R is even."""

    inputs: int
    outputs: int
    directions: int
    repeats: int = 1

    @property
    def antithetic(self) -> bool:
        return self.repeats % 2 == 0

    @property
    def signs(self) -> int:
        return 2 if self.antithetic else 1

    def __str__(self) -> str:
        pairs = ", antithetic" if self.antithetic else ""
        return f"{self.inputs}x{self.outputs}, R={self.repeats} D={self.directions}{pairs}"


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


class Problem:
    """Inputs of one case, and its work done in each way."""

    def __init__(self, case: Case, buffers: Buffers) -> None:
        self.case = case
        self.buffers = buffers
        self.device = device = buffers.device
        generator = torch.Generator().manual_seed(case.inputs)
        shape = (case.repeats * case.directions, case.inputs)
        self.x = torch.rand(shape, generator=generator).to(device)
        self.rtol = rtol(self.x)
        self.weights = torch.randn(case.directions, generator=generator).to(device)
        self.layer = nn.Linear(case.inputs, case.outputs, device=device)
        self.probes = sorted({0, case.directions // 2, case.directions - 1})
        self._noise: tuple[Tensor, Tensor] | None = None

    # ---- without noise ------------------------------------------------------------------------

    def base(self) -> Row:
        expected = F.linear(self.x, self.layer.weight, self.layer.bias)
        call = lambda: self.layer(self.x)  # noqa: E731
        return Row("Base", call, lambda: assert_close(call(), expected, "Base", self.rtol), 0)

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
            c = self.case
            big = self.buffers.take("noise", c.directions, c.outputs, c.inputs)
            small = torch.empty(c.directions, c.outputs, device=self.device)
            self._noise = big, small
            # normal_ takes seconds for gigabytes, so few directions are drawn and repeated: time
            # does not depend on values. With 13 the probed directions of all sizes still differ.
            for part in self._noise:
                drawn = part[:13].normal_(0, SIGMA)
                for chunk in part.split(13):
                    chunk.copy_(drawn[: len(chunk)])
        return self._noise

    def draw(self) -> None:
        for part in self.noise():
            part.normal_(0, SIGMA)

    def noise_bytes(self) -> int:
        return 4 * self.case.directions * self.case.outputs * (self.case.inputs + 1)

    def estimate(self) -> tuple[Tensor, Tensor]:
        big, small = self.noise()
        grad = self.weights @ big.view(self.case.directions, -1)
        return grad.view_as(self.layer.weight), self.weights @ small

    def check_forward(self, y: Tensor, name: str) -> None:
        """Compares rows of the probed directions with the networks that they should be."""
        c = self.case
        big, small = self.noise()
        for b in (r * c.directions + d for r in range(c.repeats) for d in self.probes):
            sign = -1 if c.antithetic and b >= len(self.x) // 2 else 1
            d = b % c.directions
            network = self.layer.weight + sign * big[d], self.layer.bias + sign * small[d]
            assert_close(y[b], F.linear(self.x[b], *network), f"{name}, row {b}", self.rtol)

    def check_estimate(self, name: str) -> None:
        """Compares one row of the weight's estimate, and the bias's, with sums written out."""
        big, small = self.noise()
        grads = [grad.double() for grad in self.estimate()]
        weights = self.weights.double()[:, None]
        assert_close(grads[0][-1], (weights * big[:, -1]).sum(0), f"{name}, estimate", self.rtol)
        assert_close(grads[1], (weights * small).sum(0), f"{name}, bias estimate", self.rtol)

    def stored(self, view: str) -> Row:
        c = self.case
        big, small = self.noise()
        grouped = self.x.view(c.repeats, c.directions, -1).transpose(0, 1)

        def forward() -> Tensor:
            y = self.layer(self.x)
            part = torch.baddbmm(small.unsqueeze(1), grouped, big.mT)
            if c.antithetic:
                part[:, c.repeats // 2 :].neg_()
            y.view(c.repeats, c.directions, -1).add_(part.transpose(0, 1))
            return y

        def whole() -> None:
            self.draw()
            forward()
            self.estimate()

        def check() -> None:
            self.check_forward(forward(), "Stored")
            self.check_estimate("Stored")

        calls = {"forward": forward, "update": self.estimate, "step": whole}
        return Row("Stored", calls[view], check, self.noise_bytes())

    def vmap(self, view: str) -> Row:
        c = self.case
        noise = self.noise()
        members = c.signs * c.directions
        networks = (
            self.buffers.take("networks", members, c.outputs, c.inputs),
            torch.empty(members, c.outputs, device=self.device),
        )
        per_member = c.repeats // c.signs
        x = self.x.view(c.signs, per_member, c.directions, -1).transpose(1, 2)
        x = x.reshape(members, per_member, -1)
        names = ("weight", "bias")

        def materialise() -> None:
            for own, part, name in zip(networks, noise, names, strict=True):
                torch.add(getattr(self.layer, name), part, out=own[: c.directions])
                if c.antithetic:
                    torch.sub(getattr(self.layer, name), part, out=own[c.directions :])

        def one(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
            return functional_call(self.layer, {"weight": weight, "bias": bias}, (rows,))

        def forward() -> Tensor:
            return vmap(one)(*networks, x)

        def whole() -> None:
            self.draw()
            materialise()
            forward()
            self.estimate()

        def check() -> None:
            materialise()
            y = forward().view(c.signs, c.directions, per_member, -1).transpose(1, 2)
            self.check_forward(y.reshape(len(self.x), -1), "vmap")

        held = (1 + c.signs) * self.noise_bytes()
        return Row("vmap", {"forward": forward, "step": whole}[view], check, held)

    def loop(self) -> Row:
        c = self.case
        directions = range(max(1, c.directions // LOOP_PART))
        sources = self.x.view(c.repeats, c.directions, -1)
        signs = [-1 if c.antithetic and r >= c.repeats // 2 else 1 for r in range(c.repeats)]
        grads = [torch.zeros_like(p) for p in self.layer.parameters()]
        weights = self.weights.tolist()

        def one(d: int) -> list[Tensor]:
            noise = [torch.randn_like(p) * SIGMA for p in self.layer.parameters()]
            for r, sign in enumerate(signs):
                member = (p + sign * e for p, e in zip(self.layer.parameters(), noise, strict=True))
                F.linear(sources[r, d], *member)
            for grad, e in zip(grads, noise, strict=True):
                grad.add_(e, alpha=weights[d])
            return noise

        def call() -> None:
            for d in directions:
                one(d)

        def check() -> None:
            for grad in grads:
                grad.zero_()
            for grad, e in zip(grads, one(0), strict=True):
                assert_close(grad, weights[0] * e, "Loop", self.rtol)

        scale = c.directions / len(directions)
        return Row("Loop", call, check, self.noise_bytes() // c.directions, scale)

    # ---- all of them --------------------------------------------------------------------------

    def rows(
        self, view: str, full: bool, families: Sequence[NoiseFamily]
    ) -> Iterator[tuple[str, int, Callable[[], Row]]]:
        """Name, bytes that the row has still to allocate, and how to make it."""
        numel = self.case.directions * self.case.outputs * self.case.inputs
        yield "Base", 0, self.base
        if view != "update":
            yield "Naive", 0, self.naive
        if view == "step" and full:
            yield "Loop", 0, self.loop
        needed = self.buffers.missing("noise", numel)
        yield "Stored", needed, lambda: self.stored(view)
        if view != "update":
            needed = self.buffers.missing("noise", numel)  # none if Stored found its room
            needed += self.buffers.missing("networks", self.case.signs * numel)
            yield "vmap", needed, lambda: self.vmap(view)
        yield from ours.rows(view, self.layer, self.case.directions, self.x, self.weights, families)
