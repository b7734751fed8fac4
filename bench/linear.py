"""Suite ``linear``: the shapes of NESgpu's table, R = 1 as there, and antithetic pairs.

Views: ``forward`` is what NESgpu published, the forward alone with the noise already there (only
PerturbedLinear draws it inside); ``step`` is what training pays: noise, forward and the estimate
sum_d w_d E_d. bench/population.py says what the rows are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from bench.common import Result, free_bytes, measure
from bench.population import Buffers, Case, Problem

SIZES = (256, 512, 1024)
BATCH = 1024
NOTES = (
    "Forward: noise already drawn, except in PerturbedLinear, which draws it inside. "
    "Step: noise + forward + estimate, except in Base and Naive, which have only a forward.",
    "Naive is NESgpu's: the unperturbed layer at batch 1, once for every row of the batch.",
)


def cases(sizes: tuple[int, ...], batch: int, full: bool) -> list[Case]:
    """R = 1 and antithetic pairs for every size; --full adds more rows per direction."""
    repeats = (1, 2, 16) if full else (1, 2)
    return [Case(n, batch // r, r) for r, n in itertools.product(repeats, sizes) if batch >= r]


@torch.no_grad()
def run(
    device: torch.device,
    views: tuple[str, ...],
    seconds: float,
    full: bool = False,
    sizes: tuple[int, ...] = SIZES,
    batch: int = BATCH,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Result], list[str]]:
    """Runs the suite.

    Args:
        device: Where.
        views: Of "forward" and "step".
        seconds: Time of each row of each case.
        full: More cases and rows.
        sizes: Features of the square layers.
        batch: Rows B of every case.
        progress: Called with a line of text before each case.

    Returns:
        The results, and remarks on rows that were left out.
    """
    results: list[Result] = []
    notes: list[str] = list(NOTES)
    buffers = Buffers(device)
    for case in cases(sizes, batch, full):
        problem = Problem(case, buffers)
        for view in views:
            progress(f"linear, {view}: {case}")
            rows = []
            for name, needed, make in problem.rows(view == "step", full):
                free = free_bytes(device)
                if needed > 0.8 * free:
                    notes.append(
                        f"{name} is missing at {case}: it needs {needed / 1e9:.1f} GB of noise, "
                        f"{free / 1e9:.1f} GB are free."
                    )
                else:
                    rows.append(make())
            results += measure("linear", view, str(case), rows, device, seconds)
    return results, notes
