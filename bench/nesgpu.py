"""Suite ``nesgpu``: the table of the NESgpu paper (Amand, 2020), 8192 rows through three layers.

It gives the forward as a multiple of the unperturbed layer's and the time of the update, R = 1. The
paper's numbers are of an RTX 2070 in half precision and leave drawing the noise out; ours draw it
in the call.
"""

from __future__ import annotations

import torch

from bench import ours
from bench.common import Options, Result, fitting, measure
from bench.population import Buffers, Case, Problem

BATCH = 8192
LAYERS = ((256, 256), (512, 512), (512, 10))
NOTE = (
    "nesgpu: Stored is NESgpu's scheme for independent noise (its forward finds the noise drawn); "
    "it is timed with --full, since drawing it takes minutes."
)


@torch.no_grad()
def run(
    options: Options, batch: int = BATCH, layers: tuple[tuple[int, int], ...] = LAYERS
) -> tuple[list[Result], list[str]]:
    """Runs the suite; returns its results, and remarks."""
    results: list[Result] = []
    notes = [NOTE]
    buffers = Buffers(options.device)
    wanted = {"Base", "Stored"} if options.full else {"Base"}
    for inputs, outputs in layers:
        case = Case(inputs, outputs, batch)
        problem = Problem(case, buffers)
        families = ours.families(options.full)
        for view in options.chosen(("forward", "update")):
            options.progress(f"nesgpu, {view}: {case}")
            own = {repr(noise) for noise in families}
            candidates = (c for c in problem.rows(view, False, families) if c[0] in wanted | own)
            rows = fitting(candidates, str(case), options.device, notes)
            results += measure("nesgpu", view, str(case), rows, options.device, options.seconds)
    return results, notes
