"""Suite ``rl`` runs, checks what it times, and counts steps of all lanes."""

import pytest
import torch

from bench import report, rl
from bench.common import Options
from bench.files import Run
from bench.rl import Case

pytest.importorskip("gymnasium", reason="needs the extra `rl`")
pytest.importorskip("mujoco", reason="needs the extra `rl`")

TINY = [Case("CartPole-v1", 8, "mlp", 3), Case("Swimmer-v5", 4, "linear", 3)]


def test_a_run_has_every_row():
    results, notes = rl.run(Options(seconds=0.0), TINY)
    methods = ["Base", "pm", "Naive", "pm, gymnasium"]
    expected = [(str(TINY[0]), method) for method in methods]
    expected += [(str(TINY[1]), method) for method in (*methods, "pm, 2 threads")]
    assert sorted((r.case, r.method) for r in results) == sorted(expected)
    assert str(TINY[1]) == "Swimmer-v5, 4 lanes, 4 members, linear"
    assert notes == rl.NOTES
    for result in results:
        case = TINY[result.case.startswith("Swimmer")]
        assert result.steps_per_s == pytest.approx(case.lanes * case.steps / result.median_s)
        assert 0 < result.policy_share < 1
    table = report.markdown(Run(results, {}, notes=notes))
    assert "env steps/s" in table
    assert "policy's share" in table


def test_the_default_cases_are_those_of_the_plan():
    chosen = rl.cases(Options())
    assert {c.lanes for c in chosen if c.task == "CartPole-v1"} == {64, 1024, 16384}
    assert {c.task for c in chosen} == {"CartPole-v1", "Swimmer-v5", "HalfCheetah-v5"}
    assert {c.policy for c in chosen} == {"linear", "mlp"}
    assert [Case("CartPole-v1", n, "mlp").directions for n in (64, 1024, 16384)] == [32, 256, 256]
    assert {c.task for c in rl.cases(Options(full=True))} > {"Ant-v5"}


def test_the_loop_orders_rows_as_the_population_does():
    problem = rl.Problem(Case("CartPole-v1", 24, "linear"), torch.device("cpu"))
    x = torch.randn(48, 4)  # R = 4: two rows a member
    with torch.no_grad():
        torch.testing.assert_close(problem.loop(x), problem.pm(x))


def test_a_wrong_policy_or_environment_is_noticed(monkeypatch):
    problem = rl.Problem(TINY[1], torch.device("cpu"))
    base, pm, *_ = problem.windows(with_gymnasium=False)
    pm.check()
    first = problem.loop.members[0][2]
    with torch.no_grad():
        first[0].weight.add_(0.5)
    with pytest.raises(AssertionError, match="pm, actions: relative error"):
        pm.check()
    step = base.env.step
    monkeypatch.setattr(base.env, "step", lambda actions: step(actions * 0.5))
    with pytest.raises(AssertionError, match="Base, observations: relative error"):
        base.check()


def test_rows_of_missing_packages_say_so(monkeypatch):
    monkeypatch.setattr(rl.importlib.util, "find_spec", lambda name: None)
    results, notes = rl.run(Options(seconds=0.0), TINY)
    assert {r.method for r in results} == {"Base", "pm", "Naive"}
    reasons = {r.case: r.reason for r in results if not r.timed}
    assert list(reasons) == ["Swimmer-v5, 4 lanes, 4 members, linear"]
    assert "gymnasium and mujoco not installed" in next(iter(reasons.values()))
    assert notes == rl.NOTES
