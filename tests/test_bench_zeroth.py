"""Suite ``zeroth`` on problems small enough for a test."""

import math

import pytest
import torch
from torch import nn

from bench import __main__ as cli
from bench import files, report, zeroth
from bench.common import Options
from bench.files import Run

pytest.importorskip("sklearn", reason="the problems need scikit-learn (the extra `bench`)")
CPU = torch.device("cpu")


def small():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator)
    y = (x.sum(1) > 0).long()
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return zeroth.Problem("small", net, zeroth._classify(x, y), 180)


def test_every_row_is_there_and_learns():
    results, notes = zeroth.run(Options(seconds=0.0), [small()])
    names = [r.method for r in results]
    assert names[0] == "Base"
    assert [n for n in names if zeroth.BATCHED not in n][1:] == list(zeroth.METHODS)
    assert sum(zeroth.BATCHED in n for n in names) == 4
    start = results[0].best_loss
    assert start == pytest.approx(math.log(2))
    assert all(r.best_loss < 0.9 * start for r in results[1:])
    assert all(0 < r.min_s <= r.median_s <= r.max_s for r in results)
    text = report.markdown(Run(results, {"cpu": "test"}, notes=notes))
    assert "evaluations/s" in text
    assert "| RandomGrad " in text


@pytest.mark.parametrize("name", zeroth.PROBLEMS)
def test_the_problems_are_the_same_for_members(name):
    problem = zeroth.PROBLEMS[name](False)
    problem.net.requires_grad_(False)
    noise = zeroth.METHODS["SPSA, 16 pairs"].noise
    want = float(problem.loss(problem.net))
    problem.net.requires_grad_(True)
    pm = zeroth.PerturbedModel(zeroth.convert(problem.net, 2, noise), 2, True, sigma=0.0)
    pm.set_noise()
    values = problem.loss(pm)
    members = values if values.dim() == 2 else pm.member_mean(values)
    torch.testing.assert_close(members, torch.full_like(members, want), rtol=1e-5, atol=1e-5)
    with pm.window(0, 1):
        assert float(problem.loss(pm).mean()) == pytest.approx(want, rel=1e-5)


def test_a_wrong_best_is_not_reported(monkeypatch):
    monkeypatch.setattr(zeroth.RandomGrad, "best", lambda self: [torch.ones(2, 3), torch.ones(2)])
    with pytest.raises(AssertionError, match="not the recorded"):
        zeroth.run_method(small(), "RandomGrad", False, CPU)


def test_methods_without_a_form_of_one_forward_say_so():
    with pytest.raises(ValueError, match="RandomGrad has no form of one forward"):
        zeroth.run_method(small(), "RandomGrad", True, CPU)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zeroth, "PROBLEMS", {"small": lambda full: small()})
    monkeypatch.setattr(
        zeroth, "METHODS", {n: zeroth.METHODS[n] for n in ("RandomSearch", "SPSA, 16 pairs")}
    )
    threads = torch.get_num_threads()
    assert cli.main(["zeroth", "--save", str(tmp_path / "run")]) == 0
    assert torch.get_num_threads() == threads
    plot = tmp_path / "run-zeroth.png"
    assert plot.stat().st_size > 5000
    assert "zeroth, evaluation: small, 180 evaluations" in capsys.readouterr().out
    results = files.read_json(tmp_path / "run.json").results
    assert [r.method for r in results][-1] == "SPSA, 16 pairs, one forward"
    assert all(r.best_loss < 1 for r in results)
