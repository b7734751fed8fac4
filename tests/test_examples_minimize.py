"""The example of scipy's methods: they find the same minimum, and what it reports is so."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def example(monkeypatch):
    for package in ("mlxtend", "pandas", "scipy", "tabulate", "tqdm"):
        pytest.importorskip(package, reason=f"the examples need {package} (the extra `examples`)")
    monkeypatch.syspath_prepend(str(EXAMPLES))  # nes_mnist.py has the digits
    path = EXAMPLES / "minimize_logistic.py"
    spec = importlib.util.spec_from_file_location("minimize_logistic", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minimize_logistic", module)
    spec.loader.exec_module(module)
    return module


def test_all_methods_find_the_one_minimum(example, capsys):
    results = example.main([])
    scipy, adam = results[::2], results[1::2]
    assert [result.name for result in scipy] == ["CG", "L-BFGS-B", "Newton-CG"]
    for result, baseline in zip(scipy, adam, strict=True):
        assert result.loss == pytest.approx(0.03064, abs=5e-5)
        assert result.loss < baseline.loss
        assert baseline.evaluations == result.evaluations + 2 * result.products
        assert 0.83 < result.accuracy < 0.87
        assert result.evaluations < 400
    assert scipy[2].products > 0
    out = capsys.readouterr().out
    assert f"{scipy[0].loss:.6f}" in out
    assert str(scipy[1].evaluations) in out


def test_bad_options_are_named(example, capsys):
    for arguments, message in [
        (["--methods", "Powell"], "invalid choice: 'Powell'"),
        (["--maxiter", "0"], "must be at least 1, got 0"),
    ]:
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err
