"""Suite ``conv``: one convolution, of the shapes of NESgpu's README and of its paper (Amand, 2020).

The README's five have 1024 rows and no padding, the paper's 512 rows and padding 1; R = 1 in both,
with --full antithetic pairs too. On a CPU the default is a sixteenth of the rows, which changes
times and hardly ratios. Rows of the tables: Base, the unperturbed convolution of the whole batch;
Stored, NESgpu's scheme in torch: the noise of all directions in memory, one grouped convolution
beside the base product, and w @ E; vmap, torch.func.vmap over materialised networks; and every
family of ours. Views as in bench/linear.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bench import ours
from bench.common import Options, Result, Row, assert_close, fitting, measure, rtol
from bench.ours import SIGMA

README = ((16, 16, 3, 64), (32, 32, 3, 64), (64, 64, 3, 32), (32, 32, 1, 32), (1024, 1024, 1, 1))
PAPER = ((3, 64, 3, 32), (64, 64, 3, 32), (128, 128, 3, 16), (256, 256, 3, 8), (512, 512, 3, 4))
README_ROWS, PAPER_ROWS = 1024, 512
CPU_PART = 16  # of the rows without --full
NOTE = (
    "conv: Stored and vmap find their noise drawn in the forward, all rows of ours draw it in the "
    "call. Step: noise + forward + estimate, except in Base, which has only a forward."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A square convolution of square images, R repeats of D directions; antithetic if R is even."""

    inputs: int
    outputs: int
    kernel: int
    size: int
    padding: int
    directions: int
    repeats: int = 1

    @property
    def signs(self) -> int:
        return 2 if self.repeats % 2 == 0 else 1

    def __str__(self) -> str:
        k, s = self.kernel, self.size
        pad = f" pad {self.padding}" if self.padding else ""
        pairs = ", antithetic" if self.signs == 2 else ""
        return (
            f"{self.inputs}-{self.outputs}, {k}x{k}{pad}, {s}x{s}, R={self.repeats} "
            f"D={self.directions}{pairs}"
        )


class Problem:
    """Inputs of one case, and its work done in each way."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = c = case
        generator = torch.Generator().manual_seed(c.inputs)
        shape = (c.repeats * c.directions, c.inputs, c.size, c.size)
        self.x = torch.rand(shape, generator=generator).to(device)
        self.weights = torch.randn(c.directions, generator=generator).to(device)
        self.layer = nn.Conv2d(c.inputs, c.outputs, c.kernel, padding=c.padding, device=device)
        self._noise: tuple[Tensor, Tensor] | None = None

    def base(self) -> Row:
        expected = self.layer(self.x[:1])

        def check() -> None:
            assert_close(self.layer(self.x)[:1], expected, "Base", rtol(self.x))

        return Row("Base", lambda: self.layer(self.x), check, 0)

    # ---- noise in memory ----------------------------------------------------------------------

    def noise(self) -> tuple[Tensor, Tensor]:
        """E and e of all directions; Stored and vmap share them, as they never run together."""
        if self._noise is None:
            shape = (self.case.directions, *self.layer.weight.shape)
            self._noise = self.x.new_empty(shape), self.x.new_empty(shape[:2])
            self.draw()
        return self._noise

    def draw(self) -> None:
        for part in self.noise():
            part.normal_(0, SIGMA)

    def noise_bytes(self) -> int:
        return 4 * self.case.directions * sum(p.numel() for p in self.layer.parameters())

    def estimate(self) -> tuple[Tensor, Tensor]:
        big, small = self.noise()
        return (self.weights @ big.flatten(1)).view_as(self.layer.weight), self.weights @ small

    def check_forward(self, y: Tensor, name: str) -> None:
        """Compares rows of some directions with the networks that they should be."""
        big, small = self.noise()
        directions = self.case.directions
        for b in {0, directions // 2, len(self.x) - 1}:
            sign = -1 if self.case.signs == 2 and b >= len(self.x) // 2 else 1
            parameters = {
                "weight": self.layer.weight + sign * big[b % directions],
                "bias": self.layer.bias + sign * small[b % directions],
            }
            expected = functional_call(self.layer, parameters, (self.x[b : b + 1],))[0]
            assert_close(y[b], expected, f"{name}, row {b}", rtol(self.x))

    def stored(self, view: str) -> Row:
        c = self.case
        big, small = self.noise()
        grouped = self.x.view(c.repeats, -1, c.size, c.size)
        kernels, offsets = big.flatten(0, 1), small.flatten()
        signs = torch.ones(c.repeats, 1, 1, 1, device=self.x.device)
        if c.signs == 2:
            signs[c.repeats // 2 :] = -1

        def forward() -> Tensor:
            y = self.layer(self.x)
            part = torch.conv2d(grouped, kernels, offsets, 1, c.padding, 1, c.directions)
            y.view(part.shape).addcmul_(part, signs)
            return y

        def whole() -> None:
            self.draw()
            forward()
            self.estimate()

        def check() -> None:
            self.check_forward(forward(), "Stored")
            total = torch.tensordot(self.weights.double(), big[:, -1].double(), 1)
            assert_close(self.estimate()[0][-1], total, "Stored, estimate", rtol(self.x))

        calls = {"forward": forward, "update": self.estimate, "step": whole}
        return Row("Stored", calls[view], check, self.noise_bytes())

    def vmap(self, view: str) -> Row:
        c = self.case
        noise = self.noise()
        networks = [part.new_empty(c.signs * len(part), *part.shape[1:]) for part in noise]
        x = self.x.view(c.signs, -1, c.directions, *self.x.shape[1:]).transpose(1, 2).flatten(0, 1)

        def materialise() -> None:
            for own, part, centre in zip(networks, noise, self.layer.parameters(), strict=True):
                torch.add(centre, part, out=own[: c.directions])
                if c.signs == 2:
                    torch.sub(centre, part, out=own[c.directions :])

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
            y = forward().unflatten(0, (c.signs, c.directions)).transpose(1, 2)
            self.check_forward(y.flatten(0, 2), "vmap")

        held = (1 + c.signs) * self.noise_bytes()
        return Row("vmap", {"forward": forward, "step": whole}[view], check, held)

    # ---- all of them --------------------------------------------------------------------------

    def rows(self, view: str, full: bool) -> Iterator[tuple[str, int, Callable[[], Row]]]:
        """Name, bytes that the row has still to allocate, and how to make it."""
        held = 0 if self._noise is not None else self.noise_bytes()
        yield "Base", 0, self.base
        yield "Stored", held, lambda: self.stored(view)
        if view != "update":
            held = 0 if self._noise is not None else self.noise_bytes()
            needed = held + self.case.signs * self.noise_bytes()
            yield "vmap", needed, lambda: self.vmap(view)
        families = ours.families(full)
        yield from ours.rows(view, self.layer, self.case.directions, self.x, self.weights, families)


def cases(options: Options) -> list[Case]:
    """The README's shapes; with --full the paper's too, all rows, and antithetic pairs."""
    part = CPU_PART if options.device.type == "cpu" and not options.full else 1
    several = (1, 2) if options.full else (1,)
    shapes = [(*shape, 0, README_ROWS // part) for shape in README]
    if options.full:
        shapes += [(*shape, 1, PAPER_ROWS) for shape in PAPER]
    return [Case(*shape[:-1], shape[-1] // r, r) for shape in shapes for r in several]


@torch.no_grad()
def run(options: Options, only: list[Case] | None = None) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    results: list[Result] = []
    notes = [NOTE]
    for case in cases(options) if only is None else only:
        problem = Problem(case, options.device)
        for view in options.chosen(("forward", "update", "step")):
            options.progress(f"conv, {view}: {case}")
            candidates = problem.rows(view, options.full)
            rows = fitting(candidates, str(case), options.device, notes)
            results += measure("conv", view, str(case), rows, options.device, options.seconds)
    return results, notes
