"""Suites ``linear`` and ``update``: one layer, of the sizes of NESgpu's table.

``linear`` has R = 1, as there, and antithetic pairs. Views: ``forward`` is what NESgpu published,
the forward alone (with the noise already there in the rows that store it); ``step`` is what
training pays: noise, forward and the estimate sum_d w_d E_d. ``update`` times that estimate alone,
which does not depend on R. bench/population.py and bench/ours.py say what the rows are.
"""

from __future__ import annotations

import itertools

import torch

from bench import ours, schemes
from bench.common import Options, Result, fitting
from bench.population import Buffers, Case, Problem
from bench.timing import measure
from perturbed import Sparse

NOTES = (
    "Forward: noise already drawn in Stored and vmap, drawn in the call in all rows of ours. "
    "Step: noise + forward + estimate, except in Base and Naive, which have only a forward. "
    "Update: the estimate alone, beside Base's forward.",
    "Naive is NESgpu's: the unperturbed layer at batch 1, once for every row of the batch.",
)


def cases(options: Options) -> list[Case]:
    """R = 1 and antithetic pairs for every size; --full adds more rows per direction."""
    repeats = (1, 2, 16) if options.full else (1, 2)
    return [
        Case(n, n, options.batch // r, r)
        for r, n in itertools.product(repeats, options.sizes)
        if options.batch >= r
    ]


def run(options: Options) -> tuple[list[Result], list[str]]:
    """Runs the suite ``linear``; returns its results, and remarks."""
    return _run("linear", cases(options), options.chosen(("forward", "step")), options)


def run_update(options: Options) -> tuple[list[Result], list[str]]:
    """Runs the suite ``update``."""
    single = [Case(n, n, options.batch) for n in options.sizes]
    return _run("update", single, options.chosen(("update",)), options)


@torch.no_grad()
def _run(
    suite: str, cases: list[Case], views: list[str], options: Options
) -> tuple[list[Result], list[str]]:
    results: list[Result] = []
    buffers = Buffers(options.device)
    # What NESgpu's table has, besides.
    families = (*ours.families(options.full), Sparse(2))
    for case in cases:
        problem = Problem(case, buffers)
        for view in views:
            options.progress(f"{suite}, {view}: {case}")
            candidates = itertools.chain(
                problem.rows(view, families), schemes.linear_rows(view, problem)
            )
            rows = fitting(candidates, options.device)
            results += measure(suite, view, str(case), rows, options.device, options.seconds)
    return results, list(NOTES)
