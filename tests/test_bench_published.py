"""Published numbers beside measured ones; limits and goals; other packages' rows."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from bench import __main__ as cli
from bench import conv, files, goals, ours, peers, plots, published, roofline, sidebyside
from bench.common import Options, Result, Row, Work
from bench.files import Run
from bench.roofline import Layer
from perturbed import Dense, LowRank, Permuted, SignFlip, Sparse


def result(suite, view, case, method, seconds=0.5, **changes):
    fields = {"min_s": seconds, "max_s": seconds, "repeats": 3, "noise_bytes": 0, **changes}
    return Result(suite, view, case, method, seconds, **fields)


# ---- published tables ----------------------------------------------------------------------------


def test_published_ratios_are_those_of_the_published_times():
    lines = {(li.label, li.name): li for li in published.TABLES["readmelinear"].lines}
    assert len(lines) == 18
    assert lines["1024x1024", "PerturbedLinear"].times_base == pytest.approx(40.02, abs=0.05)
    assert lines["256x256", "SparsePerturbedLinear, k = 2"].times_base == pytest.approx(4.43, 1e-3)
    conv_lines = {(li.label, li.name): li for li in published.TABLES["readmeconv"].lines}
    assert conv_lines["1024-1024, 1x1, 1x1", "PermutedConv2d"].times_base == pytest.approx(
        2.22, 0.01
    )
    paper = published.TABLES["paperconv"].lines
    assert len(paper) == 5 * 6 * 2
    assert sum(math.isnan(li.seconds) for li in paper) == 5  # updates of 50 %, not given


def test_every_line_names_rows_and_cases_that_exist():
    families = {repr(noise) for noise in ours.families()} | {
        "Sparse(2)",
        "Permuted('out')",
        "Permuted('in', in_sparsity=0.5)",
        "Permuted('in', in_sparsity=0.1)",
    }
    known = families | {"", "PSO"}
    cases = [str(case) for case in conv.cases(Options(full=True))]
    for table in published.TABLES.values():
        for line in table.lines:
            assert line.ours in known
            assert line.suite in cli.SUITES
            if line.suite == "conv":
                assert any(all(part in case for part in line.case) for case in cases)


def test_a_table_has_three_columns_and_says_why_one_is_empty():
    case = "256x256, R=1 D=1024"
    results = [
        result("linear", "forward", case, "Base", 0.001),
        result("linear", "forward", case, "Stored", 0.008, times_base=8.0),
        result("linear", "forward", case, "Dense('normal')", 0.004, times_base=4.0),
        result("linear", "forward", case, "torch sparse 1", math.nan, reason="needs | room"),
        # Of other cases, which must not be taken.
        result("linear", "forward", "256x256, R=16 D=64", "Sparse(1)", 0.1),
        result("linear", "step", case, "Sparse(1)", 0.1),
    ]
    text = sidebyside.markdown(published.TABLES["readmelinear"], results)
    cells = [[c.strip() for c in li.split("|")[1:-1]] for li in text.splitlines() if "|" in li]
    assert cells[0][:4] == ["case", "theirs", "published", "x base"]
    theirs = ["863 us", "17x", "Stored", "8.00 ms", "8.00x"]
    assert cells[2] == [
        "256x256",
        "PerturbedLinear",
        *theirs,
        "`Dense('normal')`",
        "4.00 ms",
        "4.00x",
        "2.00x",
    ]
    assert cells[3][4:6] == ["torch sparse 1", "needs / room"]
    assert cells[3][7:] == ["`Sparse(1)`", "not in this run", "", ""]
    assert "GeForce 1080 Ti" in text
    assert sidebyside.markdown(published.TABLES["readmeconv"], results) == ""
    assert sidebyside.tables(Run(results)) == [text]


def test_eggrolls_unit_is_per_cent_of_inference():
    case = "8x8, R=2 D=512, antithetic, float32"
    results = [
        result("eggroll", "forward", case, "Base", 0.004),
        result("eggroll", "forward", case, "LowRank(1)", 0.005, times_base=1.25),
    ]
    text = sidebyside.markdown(published.TABLES["eggrolls"], results)
    assert "91 %" in text
    assert "0.41 %" in text
    assert "80 %" in text


def test_plots_of_all_kinds_are_drawn(tmp_path):
    results = [
        result("linear", "forward", "256x256, R=1 D=8", name, seconds, times_base=seconds)
        for name, seconds in (("Base", 1.0), ("Stored", 4.0), ("Dense('normal')", 2.0))
    ]
    made = plots.write_all(tmp_path / "run", Run(results, {"cpu": "abacus", "threads": "1"}))
    assert [path.name for path in made] == ["run-linear.png", "run-published.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


# ---- limits and goals ----------------------------------------------------------------------------

ROOFS = {"copy": 1e9, "float32": 1e12, "normals": 1e9, "signs": 1e11}


def test_the_roof_is_what_takes_longest():
    slow = result("s", "v", "c", "x", 2.0, work=Work(moved=1e9, flops=1e11, normals=0.5e9))
    assert roofline.fraction(slow, ROOFS) == (0.5, "copy")
    assert roofline.text(slow, ROOFS) == "50 % (memory)"
    assert roofline.words_text(slow) == "2.5e+08"
    slow.replay_s = 1.25
    assert roofline.text(slow, ROOFS) == "80 % (memory)"
    drawn = result("s", "v", "c", "x", 2.0, work=Work(1.0, 1.0, normals=1e9, signs=32e9))
    assert roofline.text(drawn, ROOFS) == "66 % (random numbers)"
    assert roofline.words_text(drawn) == "1e+09"
    assert roofline.text(result("s", "v", "c", "x"), ROOFS) == ""
    with pytest.raises(ValueError, match="must have work"):
        roofline.fraction(result("s", "v", "c", "x"), ROOFS)


def test_the_least_work_of_a_linear_layer():
    layer = Layer.of(nn.Linear(30, 20), torch.rand(16, 30), 8)  # R = 2
    base = layer.base()
    assert base == Work(4 * (16 * 30 + 20 * 30 + 16 * 20), 2 * 16 * 20 * 30)
    dense = layer.perturbed(Dense(), "forward")
    assert dense.normals == 8 * 20 * 31
    assert dense.flops == 2 * base.flops
    assert dense.moved == base.moved
    assert layer.perturbed(Dense("rademacher"), "update").signs == 8 * 20 * 31
    assert layer.perturbed(LowRank(3), "update").flops == 2 * 8 * 3 * 20 * 30
    assert layer.perturbed(LowRank(3), "step").normals == 2 * (8 * 3 * 50 + 8 * 20)
    assert layer.perturbed(Sparse(2), "forward").normals == 8 * 2 * 20 + 8 * 20
    flip = layer.perturbed(SignFlip("in"), "forward")
    assert (flip.normals, flip.signs) == (600 + 160, 8 * 30)
    half = layer.perturbed(Permuted("in", in_sparsity=0.5), "forward")
    assert half.normals == 300 + 160
    assert half.flops == 1.5 * base.flops
    stored = layer.stored("forward")
    assert stored.moved == base.moved + 4 * 8 * 20 * 31
    assert layer.stored("step").normals == 8 * 20 * 31


def test_the_least_work_of_a_convolution():
    module, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.rand(4, 3, 9, 9)
    y = module(x)
    base = Layer.of(module, x, 4).base()
    assert base.moved == 4 * (x.numel() + module.weight.numel() + y.numel())
    assert base.flops == 2 * y.numel() * 27


def test_goals_are_met_or_missed():
    case = "1024x1024, R=1 D=1024"
    rows = [
        result("linear", "step", case, name, seconds)
        for name, seconds in (("Stored", 4.0), ("Dense('normal')", 0.4), ("vmap", 4.0))
    ]
    found = goals.verdicts(rows, on_gpu=False)
    (texts,) = found.values()
    assert texts == "10x Stored, at least 8x: met; 10x vmap, at least 12x: missed"
    (texts,) = goals.verdicts(rows, on_gpu=True).values()
    assert texts == "10x Stored, at least 2x: met; 10x vmap, at least 5x: met"
    base = result("linear", "forward", case, "Base", 1.0)
    sparse = result("linear", "forward", case, "Sparse(1)", 1.2)
    (text,) = goals.verdicts([base, sparse], on_gpu=False).values()
    assert text == "1.2x Base, at most 1.1x: missed"
    assert goals.verdicts([sparse], on_gpu=False) == {}


# ---- other packages, and failures ----------------------------------------------------------------


def test_others_rows_take_the_place_of_those_without_a_time():
    own = [
        result("network", "step", "mlp", "Base", 0.1),
        result("network", "step", "mlp", "Naive", 0.4),
        result("network", "step", "mlp", "EvoX", math.nan, reason="not installed"),
        result("network", "step", "mlp", "EvoTorch", math.nan, reason="not installed"),
    ]
    others = [
        result("network", "step", "mlp", "EvoX", 0.2),
        result("network", "step", "mlp", "Base"),
    ]
    merged = peers.merge(own, others)
    assert [r.method for r in merged] == [r.method for r in own]
    assert merged[0].median_s == 0.1
    assert merged[2].times_base == pytest.approx(2.0)
    assert merged[2].over_naive == pytest.approx(2.0)
    assert merged[3] is own[3]


def test_a_package_that_is_missing_leaves_its_reason():
    def make():
        raise ImportError("No module named 'evox'")

    (row,) = peers.optional("evox", ["EvoX PSO"], make)
    assert row.name == "EvoX PSO"
    assert row.reason.startswith("evox is not installed (No module named 'evox'): pip install")
    good = Row("x", lambda: None, lambda: None, 0)
    assert peers.optional("evox", ["x"], lambda: [good]) == [good]


@pytest.fixture
def elsewhere(monkeypatch):
    """Another interpreter, which writes or says what a test wants."""

    def install(answer, words=b""):
        def start(command):
            assert command[1:5] == ["-m", "bench", "network", "--only-peers"]
            if answer is not None:
                files.write_json(
                    files.Path(command[command.index("--save") + 1]).with_suffix(".json"), answer
                )
            return subprocess.CompletedProcess(command, 0, b"", words)

        monkeypatch.setattr(peers, "start", start)

    return install


def test_rows_of_another_interpreter_are_in_the_same_run(elsewhere, tmp_path, monkeypatch, capsys):
    def suite(options):
        return [
            result("network", "step", "mlp", "Base", 0.1),
            result("network", "step", "mlp", "EvoX", math.nan, reason="not installed"),
        ], []

    monkeypatch.setitem(cli.SUITES, "network", suite)
    elsewhere(Run([result("network", "step", "mlp", "EvoX", 0.3)], {"peers": "evox 9"}))
    stem = tmp_path / "run"
    arguments = ["network", "--peers", sys.executable, "--save", str(stem)]
    assert cli.main(arguments) == 0
    run = files.read_json(tmp_path / "run.json")
    assert run.results[1].times_base == pytest.approx(3.0)
    assert run.machine["peers"] == "evox 9"
    assert sys.executable not in (tmp_path / "run.json").read_text()
    elsewhere(None, b"Traceback\nImportError: no torch\n")
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert "**network, peers failed**: --peers" in text
    assert "it said: ImportError: no torch" in text
    assert "| EvoX" in text


def test_a_suite_that_fails_loses_no_other(monkeypatch, tmp_path, capsys):
    def fails(options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(cli.SUITES, "network", fails)
    rows = [result("rl", "window", "pole", "Base", 0.1)]
    monkeypatch.setitem(cli.SUITES, "rl", lambda options: (rows, ["a note"]))
    assert cli.main(["rl", "network", "--save", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    assert "**network failed**: ZeroDivisionError: by zero" in captured.out
    assert "### rl, window: pole" in captured.out
    assert "by zero" in captured.err
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["errors"] == {"network": "ZeroDivisionError: by zero"}
    assert document["notes"] == ["a note"]
    monkeypatch.setitem(cli.SUITES, "network", lambda options: (rows, []))
    assert cli.main(["network"]) == 0


def test_an_interpreter_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["network", "--peers", "no/such/python"])
    assert "must be a Python interpreter, got 'no/such/python'" in capsys.readouterr().err
