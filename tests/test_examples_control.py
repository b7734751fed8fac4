"""docs/examples/nes_control.py: CartPole is learned in seconds; its table, curve and options."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "nes_control.py"


@pytest.fixture(scope="module")
def nes_control():
    for package in ("matplotlib", "tqdm", "tabulate"):
        pytest.importorskip(package, reason=f"the demo needs {package} (the extra `examples`)")
    spec = importlib.util.spec_from_file_location("nes_control", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nes_control"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["nes_control"]


def test_cartpole_is_learned(nes_control, tmp_path, capsys):
    (run,) = nes_control.main(["--tasks", "cartpole", "--seeds", "1", "--out", str(tmp_path)])
    assert run.success
    assert run.test >= 490
    assert run.curve[0][1] < 150  # untrained
    assert run.curve[-1][1] >= 495
    assert run.generations <= 60
    assert run.env_steps >= 32 * 2 * 4 * 5 * 8  # no episode is over before 8 steps
    out = capsys.readouterr().out
    assert "64 members x 4 episodes" in out
    assert "1 of 1" in out
    assert (tmp_path / "nes_control.png").stat().st_size > 10_000


def test_acrobot_is_swung_up(nes_control, tmp_path):
    (run,) = nes_control.main(
        ["--tasks", "acrobot", "--seeds", "1", "--generations", "5", "--out", str(tmp_path)]
    )
    assert run.curve[0] == (0.0, -500.0)  # untrained, it pushes one way
    assert run.test > -120


def test_runs_repeat_and_differ_between_seeds(nes_control, tmp_path, capsys):
    arguments = ["--tasks", "cartpole", "--generations", "1", "--out", str(tmp_path)]
    first = nes_control.main([*arguments, "--seeds", "2"])
    again = nes_control.main([*arguments, "--seeds", "1"])
    assert again[0].test == first[0].test
    assert again[0].env_steps == first[0].env_steps
    assert again[0].curve[-1][1] == first[0].curve[-1][1]
    assert first[0].env_steps != first[1].env_steps
    assert [run.generations for run in first] == [1, 1]
    assert not any(run.success for run in first)  # one generation is not enough
    assert "0 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "must be at least 1, got 0"),
        (["--tasks", "pong"], "invalid choice: 'pong'"),
    ],
    ids=str,
)
def test_bad_options_are_named(nes_control, capsys, arguments, message):
    with pytest.raises(SystemExit):
        nes_control.main(arguments)
    assert message in capsys.readouterr().err
