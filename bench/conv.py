"""Suite ``conv``: one convolution, of the shapes of NESgpu's README and of its paper (Amand, 2020).

The README's five have 1024 rows and no padding, the paper's 512 rows and padding 1; R = 1 in both,
with --full antithetic pairs and all views too. On a CPU the default is a sixteenth of the rows,
which changes times and hardly ratios. bench/population.py and bench/ours.py say what the rows are
(Stored is one grouped convolution beside the base product), bench/linear.py what the views are.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from bench import nesgpu, ours, schemes
from bench.common import Options, Result, fitting
from bench.population import Buffers, LayerProblem, Repeats
from bench.timing import measure
from perturbed import Permuted

README = ((16, 16, 3, 64), (32, 32, 3, 64), (64, 64, 3, 32), (32, 32, 1, 32), (1024, 1024, 1, 1))
PAPER = ((3, 64, 3, 32), (64, 64, 3, 32), (128, 128, 3, 16), (256, 256, 3, 8), (512, 512, 3, 4))
README_ROWS, PAPER_ROWS = 1024, 512
CPU_PART = 16  # of the rows without --full
VIEWS = ("forward", "step", "update")  # the paper's, which have padding, need no step
NOTE = (
    "conv: Stored and vmap find their noise drawn in the forward, all rows of ours draw it in the "
    "call. Step: noise + forward + estimate, except in Base, which has only a forward."
)


@dataclasses.dataclass(frozen=True)
class Case(Repeats):
    """A square convolution of square images, R repeats of D directions."""

    inputs: int
    outputs: int
    kernel: int
    size: int
    padding: int
    directions: int
    repeats: int = 1

    def __str__(self) -> str:
        k, s = self.kernel, self.size
        pad = f" pad {self.padding}" if self.padding else ""
        return f"{self.inputs}-{self.outputs}, {k}x{k}{pad}, {s}x{s}, {self.population()}"


class Problem(LayerProblem):
    """Inputs of one case, and its work done in each way."""

    def __init__(self, case: Case, buffers: Buffers) -> None:
        c, device = case, buffers.device
        generator = torch.Generator().manual_seed(c.inputs)
        shape = (c.repeats * c.directions, c.inputs, c.size, c.size)
        x = torch.rand(shape, generator=generator).to(device)
        weights = torch.randn(c.directions, generator=generator).to(device)
        layer = nn.Conv2d(c.inputs, c.outputs, c.kernel, padding=c.padding, device=device)
        super().__init__(layer, case, x, weights, buffers)
        self.row_signs = torch.ones(c.repeats, 1, 1, 1, device=device)
        if c.antithetic:
            self.row_signs[c.repeats // 2 :] = -1

    def add_stored(self, y: Tensor, x: Tensor) -> None:
        """See :meth:`LayerProblem.add_stored`; one convolution of D groups."""
        c, (big, small) = self.case, self.noise()
        grouped = x.view(c.repeats, -1, c.size, c.size)
        kernels, offsets = big.flatten(0, 1), small.flatten()
        part = torch.conv2d(grouped, kernels, offsets, 1, c.padding, 1, c.directions)
        y.view(part.shape).addcmul_(part, self.row_signs)


def cases(options: Options) -> list[Case]:
    """The published shapes; with --full all rows, and antithetic pairs."""
    part = CPU_PART if options.device.type == "cpu" and not options.full else 1
    several = (1, 2) if options.full else (1,)
    shapes = [(*shape, 0, README_ROWS // part) for shape in README]
    shapes += [(*shape, 1, PAPER_ROWS // part) for shape in PAPER]
    return [Case(*shape[:-1], shape[-1] // r, r) for shape in shapes for r in several]


@torch.no_grad()
def run(options: Options, only: list[Case] | None = None) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    results: list[Result] = []
    # What NESgpu's tables have, besides.
    families = (
        *ours.families(options.full),
        *(() if options.full else (Permuted("out"),)),
        *nesgpu.SPARSE,
    )
    for case in cases(options) if only is None else only:
        # Not kept from case to case, as the largest has gigabytes.
        problem = Problem(case, Buffers(options.device))
        for view in options.chosen(VIEWS if options.full else (VIEWS[0], VIEWS[1 + case.padding])):
            options.progress(f"conv, {view}: {case}")
            candidates = itertools.chain(
                problem.rows(view, families), schemes.conv_rows(view, problem)
            )
            rows = fitting(candidates, options.device)
            results += measure("conv", view, str(case), rows, options.device, options.seconds)
    return results, [NOTE]
