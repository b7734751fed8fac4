"""Suite ``nesgpu``: the linear table of the NESgpu paper (Amand, 2020), 8192 rows, three layers.

It gives the forward as a multiple of the unperturbed layer's and the time of the update, with one
row for each direction and, for independent noise, in antithetic pairs. The paper's numbers are of
an RTX 2070 in half precision and leave drawing the noise out; ours draw it in the call. The paper's
convolutions are in suite ``conv``.
"""

from __future__ import annotations

import itertools

import torch

from bench import ours
from bench.common import Options, Result, fitting
from bench.population import Buffers, Case, Problem
from bench.timing import measure
from perturbed import Dense, Permuted

BATCH = 8192
LAYERS = ((256, 256), (512, 512), (512, 10))
NOTE = (
    "nesgpu: Stored is NESgpu's scheme for independent noise (its forward finds the noise drawn); "
    "on a CPU it is timed with --full, since drawing it takes minutes."
)


# Permutations that leave half and nine tenths of the inputs without noise, which the paper has.
SPARSE = (Permuted("in", in_sparsity=0.5), Permuted("in", in_sparsity=0.1))


@torch.no_grad()
def run(
    options: Options, batch: int = BATCH, layers: tuple[tuple[int, int], ...] = LAYERS
) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    results: list[Result] = []
    buffers = Buffers(options.device)
    fast = options.full or options.device.type == "cuda"
    others = {"Base", "Stored"} if fast else {"Base"}
    for (inputs, outputs), repeats in itertools.product(layers, (1, 2)):
        case = Case(inputs, outputs, batch // repeats, repeats)
        problem = Problem(case, buffers)
        families = (*ours.families(options.full), *SPARSE) if repeats == 1 else (Dense(),)
        wanted = others | {repr(noise) for noise in families}
        for view in options.chosen(("forward", "update")):
            options.progress(f"nesgpu, {view}: {case}")
            candidates = (c for c in problem.rows(view, families) if c[0] in wanted)
            rows = fitting(candidates, options.device)
            results += measure("nesgpu", view, str(case), rows, options.device, options.seconds)
    return results, [NOTE]
