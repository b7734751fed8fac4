"""The examples of particle swarms: they learn, and what they report is so."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def example(request, monkeypatch):
    for package in ("matplotlib", "tabulate", "sklearn", "scipy"):
        pytest.importorskip(package, reason=f"the examples need {package} (the extra `examples`)")
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.syspath_prepend(str(EXAMPLES))  # for worker processes
    spec.loader.exec_module(module)
    return module


pso_demo = pytest.mark.parametrize("example", ["pso_demo"], indirect=True)
swarm_svm = pytest.mark.parametrize("example", ["swarm_svm"], indirect=True)


# ---- the demo of PyTorch-PSO -------------------------------------------------------------------


@pso_demo
def test_the_demo_beats_the_original_by_far(example, tmp_path, capsys):
    (run,) = example.main(["--seeds", "1", "--out", str(tmp_path)])
    assert run.pso.steps == 390
    assert run.pso.stats["evaluations"] == 7800
    assert sum(p.numel() for p in run.net.parameters()) == 51
    assert run.seconds < 60  # 0.5 s on a quiet core
    assert run.curve[-1] < 4 < 178 < run.curve[0]  # 178: the original after four minutes
    assert run.curve == sorted(run.curve, reverse=True)
    out = capsys.readouterr().out
    assert "below 4 in 1 of 1 seeds" in out
    assert (tmp_path / "pso_demo.png").stat().st_size > 5000
    net = example.make_network(5)
    net.load_state_dict(torch.load(tmp_path / "pso_demo.pt", weights_only=True))
    assert example.loss_of(net, 0) == pytest.approx(run.curve[-1], rel=1e-5)


@pso_demo
@pytest.mark.parametrize("variant", ["inertia", "accelerated"])
def test_the_best_of_the_demo_evaluates_to_what_was_recorded(example, variant):
    speed = 0.0 if variant == "accelerated" else 3.0
    run = example.train(1, 20, 60, variant=variant, velocity_spread=speed)
    pm, best = run.pso.swarm.pm, run.pso.best
    x, y = example.make_data(1)
    rows, targets = pm.replicate(x), y.repeat_interleave(20, 0)
    again = run.pso.swarm.score(
        lambda: (pm(rows) - targets).square().squeeze(1), best.expand(20, -1).contiguous()
    )
    again = pm.member_mean(again)[0]
    # The batched forward gives the recorded bits; a plain module, which sums in another order, may
    # not.
    assert (again == run.pso.best_value).any()
    assert example.loss_of(run.net, 1) == pytest.approx(run.pso.best_value, rel=1e-5)
    assert example.loss_of(run.pso.best_model(), 1) == pytest.approx(run.curve[-1], rel=1e-5)


@pso_demo
def test_bad_options_of_the_demo_are_named(example, capsys):
    for arguments, message in [
        (["--particles", "0"], "must be at least 1, got 0"),
        (["--variant", "simplex"], "invalid choice: 'simplex'"),
        (["--variant", "competitive", "--topology", "ring"], "competitive has none"),
    ]:
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err


# ---- support vector machine --------------------------------------------------------------------


def plateau(point):
    """Flat but near (1, -4): in the place of minutes of cross-validation."""
    return 0.627 + 0.36 * float(np.exp(-np.square(point - np.array([1.0, -4.0])).sum() / 4))


@swarm_svm
def test_methods_have_the_same_number_of_evaluations(example):
    for name, method in example.METHODS.items():
        found = method(plateau, 0)
        assert 1 < len(found) <= 80, name
        assert max(found) <= 0.987
        if name in ("PSO 10 x 8", "random search"):
            assert len(found) == 80
            assert max(found) > 0.9
    points = []
    example.swarm(lambda point: points.append(point.copy()) or plateau(point), 3)
    points = np.array(points)
    assert (points >= np.array(example.LOWER)).all()
    assert (points <= np.array(example.UPPER)).all()
    assert len(np.unique(points, axis=0)) > 70


@swarm_svm
def test_the_score_is_that_of_scikit_learn(example):
    good = example.score_of(np.array([0.0, np.log(1 / 30)]))
    assert 0.97 < good < 0.985
    share = example.score_of(np.array([np.log(1e-3), np.log(1e-6)]))
    assert share == pytest.approx(0.627, abs=2e-3)  # the larger class


@swarm_svm
def test_the_report(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "score_of", plateau)
    results = example.main(["--seeds", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    best = [max(run) for run in results["PSO 10 x 8"]]
    assert f"{best[0]:.4f}" in out
    assert f"{best[1]:.4f}" in out
    assert f"{sum(value >= 0.975 for value in best)} of 2" in out
    assert (tmp_path / "swarm_svm.png").stat().st_size > 5000


@swarm_svm
@pytest.mark.slow
def test_processes_score_as_this_one_does(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 1)
    monkeypatch.setattr(example, "PARTICLES", 4)
    assert example.swarm(example.score_of, 0, workers=2) == example.swarm(example.score_of, 0)
