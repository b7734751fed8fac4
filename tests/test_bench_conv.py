"""Suite ``conv`` runs, checks what it times, and has the shapes it names."""

import pytest
import torch

from bench import conv, ours
from bench.common import Options
from bench.conv import Case
from bench.nesgpu import SPARSE
from bench.population import Buffers

FAMILIES = [*map(repr, ours.families()), "Permuted('out')", *map(repr, SPARSE)]
METHODS = ["Base", "Naive", "Loop", "Stored", "vmap", *FAMILIES]
TINY = [Case(6, 6, 3, 5, 1, 8), Case(6, 8, 1, 4, 0, 4, 2)]


def test_a_run_has_every_row():
    results, notes = conv.run(Options(seconds=0.0), TINY)
    cases = ["6-6, 3x3 pad 1, 5x5, R=1 D=8", "6-8, 1x1, 4x4, R=2 D=4, antithetic"]
    expected = [
        (view, case, method)
        for case, view in [
            *((c, "forward") for c in cases),
            (cases[0], "update"),
            (cases[1], "step"),
        ]
        for method in METHODS
        if method not in {"forward": ["Loop"], "update": ["Naive", "Loop", "vmap"]}.get(view, ())
    ]
    expected.append(("forward", cases[0], "torch permuted"))
    assert sorted((r.view, r.case, r.method) for r in results) == sorted(expected)
    assert all(r.suite == "conv" and r.times_base > 0 for r in results)
    assert notes == [conv.NOTE]


def test_shapes_are_the_published_ones():
    full = conv.cases(Options(full=True))
    assert {case.repeats * case.directions for case in full} == {1024, 512}
    assert len(full) == 20
    assert str(full[0]) == "16-16, 3x3, 64x64, R=1 D=1024"
    assert [case.directions for case in conv.cases(Options())] == [64] * 5 + [32] * 5


def test_a_full_run_has_all_views():
    full = Options(seconds=0.0, full=True, views=("step", "update"))
    results, _ = conv.run(full, TINY[:1])
    assert {r.view for r in results} == {"step", "update"}


@pytest.mark.parametrize("method", ["stored", "vmap"])
@torch.no_grad()
def test_a_wrong_forward_is_noticed(method):
    problem = conv.Problem(TINY[1], Buffers(torch.device("cpu")))
    row = getattr(problem, method)("forward")
    row.check()
    y = row.call()
    if method == "vmap":  # (members, rows of a member, ...)
        y = y.flatten(0, 1)
    problem.check_forward(y, method)
    y[-1, 0] += 0.1
    with pytest.raises(AssertionError, match=f"{method}, row 7: relative error"):
        problem.check_forward(y, method)
