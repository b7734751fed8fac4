"""The benchmarks run, check what they time, and report it whole."""

import json
import time

import pytest
import torch

from bench import __main__ as cli
from bench import common, linear, population, report

TINY = ["--sizes", "12", "20", "--batch", "16", "--seconds", "0.001"]
METHODS = [
    "Base",
    "Naive",
    "Stored",
    "vmap",
    "PerturbedLinear normal",
    "PerturbedLinear rademacher",
]


def result(**changes: object) -> common.Result:
    fields = {
        "suite": "linear",
        "view": "step",
        "case": "8x8",
        "method": "Base",
        "median_s": 0.5,
        "min_s": 0.25,
        "max_s": 1.5,
        "repeats": 3,
        "noise_bytes": 0,
    }
    return common.Result(**{**fields, **changes})


def test_default_run_has_every_row(capsys, tmp_path):
    json_file, plot_file = tmp_path / "out.json", tmp_path / "out.png"
    cli.main([*TINY, "--json", str(json_file), "--plot", str(plot_file)])
    text = capsys.readouterr().out
    document = json.loads(json_file.read_text())
    cases = [f"{n}x{n}, {r}" for r in ("R=1 D=16", "R=2 D=8, antithetic") for n in (12, 20)]
    found = [(row["case"], row["view"], row["method"]) for row in document["results"]]
    assert sorted(found) == sorted((c, v, m) for c in cases for v in cli.VIEWS for m in METHODS)
    for case in cases:
        assert f"linear, forward: {case}" in text
        assert f"linear, step: {case}" in text
    for row in document["results"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["times_base"] > 0
        assert row["over_naive"] > 0
    assert document["machine"]["torch"] == torch.__version__
    assert document["machine"]["isa"] in text
    assert plot_file.read_bytes().startswith(b"\x89PNG")


def test_full_run_adds_the_loop_and_more_repeats(capsys):
    cli.main(["--full", "--view", "step", "--sizes", "12", "--batch", "32", "--seconds", "0.001"])
    text = capsys.readouterr().out
    assert "12x12, R=16 D=2, antithetic" in text
    assert "| Loop" in text


def test_noise_held_grows_with_directions_only_where_it_is_stored():
    held = {}
    for batch in (16, 64):
        rows, _ = linear.run(torch.device("cpu"), ("step",), 0.0, sizes=(12,), batch=batch)
        held[batch] = {row.method: row.noise_bytes for row in rows if "R=1" in row.case}
    assert held[16]["Stored"] == 4 * 16 * 12 * 13
    assert held[64]["Stored"] == 4 * held[16]["Stored"]
    assert held[64]["vmap"] == 2 * held[64]["Stored"]
    for method in METHODS[4:]:
        assert held[16][method] == held[64][method] < 100


def test_rows_that_do_not_fit_are_left_out_and_named(monkeypatch):
    monkeypatch.setattr(linear, "free_bytes", lambda device: 1000)
    rows, notes = linear.run(torch.device("cpu"), ("forward",), 0.0, sizes=(12,), batch=16)
    assert {row.method for row in rows} == set(METHODS) - {"Stored", "vmap"}
    assert any("Stored is missing at 12x12, R=1" in note for note in notes)


@pytest.mark.parametrize("name", ["stored", "vmap"])
def test_a_wrong_forward_is_not_timed(name, monkeypatch):
    problem = population.Problem(population.Case(12, 8, 2), population.Buffers(torch.device("cpu")))
    row = getattr(problem, name)(False)
    row.check()
    monkeypatch.setattr(
        problem,
        "check_forward",
        lambda y, name: type(problem).check_forward(problem, y + 1e-3, name),
    )
    with pytest.raises(AssertionError, match="relative error"):
        row.check()


def test_a_failing_check_stops_the_run():
    def fail():
        raise AssertionError("wrong numbers")

    with pytest.raises(AssertionError, match="wrong numbers"):
        common.time_rows([common.Row("x", lambda: None, fail, 0)], torch.device("cpu"), 0.0)


def test_rows_are_timed_in_turn():
    order = []

    def slow(name):
        # Above the limit of bursts, so that every call is one sample.
        return lambda: (order.append(name), time.sleep(common.FAST_S))

    rows = [common.Row(name, slow(name), lambda: None, 0) for name in "ab"]
    samples = common.time_rows(rows, torch.device("cpu"), 3 * common.FAST_S)
    assert order[:6] == list("ababab")
    assert all(len(taken) >= 3 and min(taken) >= common.FAST_S for taken in samples)


def test_scale_multiplies_the_samples():
    row = common.Row("x", lambda: time.sleep(common.FAST_S), lambda: None, 0, 100.0)
    (samples,) = common.time_rows([row], torch.device("cpu"), 0.0)
    assert min(samples) >= 100 * common.FAST_S


def test_ratios_relate_to_base_and_naive():
    rows = [
        common.Row(name, lambda s=s: time.sleep(s), lambda: None, 0)
        for name, s in (("Base", 0.02), ("Naive", 0.08), ("x", 0.04))
    ]
    base, naive, x = common.measure("s", "step", "c", rows, torch.device("cpu"), 0.0)
    assert base.times_base == naive.over_naive == 1
    assert x.times_base == x.median_s / base.median_s
    assert x.over_naive == naive.median_s / x.median_s


def test_assert_close_bounds_the_relative_error():
    expected = torch.ones(100)
    common.assert_close(expected + 1e-6, expected, "y", 1e-5)
    with pytest.raises(AssertionError, match="y: relative error"):
        common.assert_close(expected + 1e-4, expected, "y", 1e-5)
    with pytest.raises(AssertionError, match="nan"):
        common.assert_close(expected * float("nan"), expected, "y", 1e-5)


def test_json_has_null_for_a_missing_ratio(tmp_path):
    file = tmp_path / "out.json"
    report.write_json(file, [result()], {"cpu": "x"}, {})
    (row,) = json.loads(file.read_text())["results"]
    assert row["times_base"] is None
    assert row["median_s"] == 0.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (0.123456, "123 ms"), (9.99e-4, "999 us")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (32, "32 B"), (4_298_000_000, "4.3 GB"), (5e12, "5 TB")]
)
def test_size(count, text):
    assert report.size(count) == text


@pytest.mark.parametrize(
    "arguments",
    [["--sizes", "0"], ["--batch", "-1"], ["--suite", "nothing"], ["--view", "backward"]],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "error: argument" in capsys.readouterr().err
