"""The benchmarks run, check what they time, and report it whole."""

import dataclasses
import json
import math
import re
import time

import pytest
import torch
from torch import nn

from bench import __main__ as cli
from bench import (
    common,
    eggroll,
    files,
    linear,
    machine,
    nesgpu,
    network,
    ours,
    peers,
    plain,
    population,
    report,
    timing,
)
from bench.common import Options
from bench.files import Run
from perturbed import Dense, LowRank

TINY = ["--sizes", "12", "20", "--batch", "16", "--seconds", "0.001"]
FAMILIES = [repr(noise) for noise in ours.families()]
METHODS = ["Base", "Naive", "Loop", "Stored", "vmap", *FAMILIES, "Sparse(2)"]
SCHEMES = ["torch sparse 1", "torch sparse 2", "torch permuted"]
QUICK = Options(seconds=0.0, sizes=(12,), batch=16)


@pytest.fixture(autouse=True)
def quick_roofs(monkeypatch):
    right = machine.roofs
    monkeypatch.setattr(machine, "roofs", lambda device: right(device, small=True))


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


def test_a_run_has_every_row(capsys, tmp_path, monkeypatch):
    drawn = []  # tests/test_bench_published.py draws
    monkeypatch.setattr(cli.plots, "write_all", lambda stem, run: drawn.append(len(run.results)))
    json_file = tmp_path / "out.json"
    assert cli.main(["linear", "update", *TINY, "--save", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    document = json.loads(json_file.read_text())
    squares = [f"{n}x{n}, {r}" for r in ("R=1 D=16", "R=2 D=8, antithetic") for n in (12, 20)]
    expected = [
        ("linear", v, c, m)
        for v in ("forward", "step")
        for c in squares
        for m in METHODS
        if (v, m) != ("forward", "Loop")
    ]
    expected += [("linear", "forward", c, m) for c in squares[:2] for m in SCHEMES]
    unneeded = {"Naive", "Loop", "vmap"}
    of_update = [m for m in METHODS if m not in unneeded]
    expected += [("update", "update", c, m) for c in squares[:2] for m in of_update]
    found = [(r["suite"], r["view"], r["case"], r["method"]) for r in document["results"]]
    assert sorted(found) == sorted(expected)
    for case in squares:
        assert f"linear, forward: {case}" in text
        assert f"linear, step: {case}" in text
    for row in document["results"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["times_base"] > 0
        assert (row["over_naive"] is None) == (row["suite"] == "update")
    assert str(tmp_path) not in json_file.read_text()  # it is made to be committed
    assert document["machine"]["torch"] == torch.__version__
    assert document["machine"]["isa"] in text
    assert drawn == [len(document["results"])]
    assert (tmp_path / "out.md").read_text() == text.removesuffix("\n")
    assert "of the roof" in text


def test_full_run_adds_more_repeats_and_more_families(capsys):
    cli.main(
        ["linear", "--full", "--view", "step", "--sizes", "12", "--batch", "32", "--seconds", "0"]
    )
    text = capsys.readouterr().out
    assert "12x12, R=16 D=2, antithetic" in text
    assert "| Loop" in text
    assert "LowRank(8)" not in FAMILIES
    assert "| LowRank(8)" in text


def test_the_default_is_every_suite_that_measures_time():
    others = ("variance", "zeroth")
    assert cli.parse([]).suites == [name for name in cli.SUITES if name not in others]
    assert cli.parse(["all"]).suites == list(cli.SUITES)
    assert cli.parse(["linear", "network", "linear"]).suites == ["network", "linear"]


def test_noise_held_grows_with_directions_only_where_it_is_stored():
    held = {}
    for batch in (16, 64):
        rows, _ = linear.run(dataclasses.replace(QUICK, batch=batch, views=("step",)))
        held[batch] = {row.method: row.noise_bytes for row in rows if "R=1" in row.case}
    assert held[16]["Stored"] == 4 * 16 * 12 * 13
    assert held[64]["Stored"] == 4 * held[16]["Stored"]
    assert held[64]["vmap"] == 2 * held[64]["Stored"]
    for method in FAMILIES:
        assert held[16][method] == held[64][method] < 100


def test_rows_that_do_not_fit_are_left_out_and_named(monkeypatch):
    monkeypatch.setattr(common, "free_bytes", lambda device: 1000)
    rows, _ = linear.run(dataclasses.replace(QUICK, views=("forward",)))
    missing = {row.method for row in rows if not row.timed}
    assert missing == {"Stored", "vmap", "torch sparse 2"}
    assert all("are free" in row.reason and not row.failed for row in rows if not row.timed)
    assert "| needs 0.0 GB of noise, 0.0 GB are free |" in report.markdown(Run(rows))


# ---- what is timed is what it says -------------------------------------------------------------


@pytest.mark.parametrize("name", ["stored", "vmap"])
@torch.no_grad()
def test_a_wrong_forward_is_not_timed(name, monkeypatch):
    case = population.Case(12, 10, 8, 2)
    problem = population.Problem(case, population.Buffers(torch.device("cpu")))
    row = getattr(problem, name)("forward")
    row.check()
    monkeypatch.setattr(
        problem,
        "check_forward",
        lambda y, name: type(problem).check_forward(problem, y + 1e-3, name),
    )
    with pytest.raises(AssertionError, match="relative error"):
        row.check()


@torch.no_grad()
def own(noise):
    return ours.Population(nn.Linear(12, 10), noise, 8, torch.rand(16, 12), torch.rand(8))


@pytest.mark.parametrize("noise", ours.families(full=True), ids=repr)
def test_a_family_that_adds_wrong_noise_is_not_timed(noise, monkeypatch):
    people = own(noise)
    with torch.no_grad():
        people.check()
        right = people.model.forward
        monkeypatch.setattr(people.model, "forward", lambda x: right(x.roll(1, 0)).roll(-1, 0))
        with pytest.raises(AssertionError, match="row 0"):  # the noise of the neighbour
            people.check()


@pytest.mark.parametrize("noise", ours.families(full=True), ids=repr)
def test_a_family_with_a_wrong_estimate_is_not_timed(noise, monkeypatch):
    people = own(noise)
    right = people.model.set_grad
    monkeypatch.setattr(people.model, "set_grad", lambda weights: right(1.01 * weights))
    with torch.no_grad(), pytest.raises(AssertionError, match="estimate of a"):
        people.check()


@torch.no_grad()
def test_every_forward_and_step_draws_new_noise():
    people = own(Dense())
    assert not torch.equal(people.forward(), people.forward())
    grads = []
    for _ in range(2):
        people.step()
        grads.append(people.net.weight.grad.clone())
    assert not torch.equal(*grads)


@pytest.mark.parametrize("repeats", [1, 2])
@torch.no_grad()
def test_torchs_own_rank_one_is_checked(repeats):
    case = population.Case(12, 12, 8 // repeats, repeats)
    layer = nn.Linear(12, 12, bias=False)
    factors = eggroll.Factors(case, layer, torch.rand(8, 12), torch.rand(8 // repeats))
    factors.check()
    factors.scale[-1] *= -1
    wrong = factors.forward()
    factors.scale[-1] *= -1
    factors.forward = lambda: wrong
    with pytest.raises(AssertionError, match="relative error"):
        factors.check()


def test_eggroll_reports_per_cent_of_the_unperturbed_layer():
    results, notes = eggroll.run(QUICK, features=12, members=16)
    own = ["Base", "torch, factors given", "torch, factors drawn", *FAMILIES]
    assert [r.method for r in results if r.view == "step" and "R=1" in r.case] == own
    assert len(results) == 4 * len(own) + 3
    assert sum(r.method == "torch, full rank given" for r in results) == 2
    assert all(r.timed for r in results)
    text = report.markdown(Run(results, {"cpu": "x"}, notes=notes))
    assert "% of base" in text
    assert "over naive" not in text
    assert re.search(r"\| Base +\|.*\| +100 % \|", text)


def test_nesgpu_has_its_layers_and_stores_noise_only_if_asked(monkeypatch):
    results, _ = nesgpu.run(QUICK, batch=16, layers=((12, 12), (12, 10)))
    cases = [f"12x{n}, {r}" for n in (12, 10) for r in ("R=1 D=16", "R=2 D=8, antithetic")]
    assert {(r.case, r.view) for r in results} == {
        (case, view) for case in cases for view in ("forward", "update")
    }
    single = {r.method for r in results if "R=1" in r.case}
    assert single == {"Base", *FAMILIES, *map(repr, nesgpu.SPARSE)}
    assert {r.method for r in results if "R=2" in r.case} == {"Base", "Dense('normal')"}
    full = dataclasses.replace(QUICK, full=True, views=("update",))
    results, _ = nesgpu.run(full, batch=16, layers=((12, 10),))
    assert {"Stored", "LowRank(8)"} < {r.method for r in results}


# ---- a network, and the others ------------------------------------------------------------------


def test_network_times_a_step_and_its_parts():
    results, _ = network.run(QUICK, members=16, widths=(12, 14, 10))
    methods = {view: [r.method for r in results if r.view == view] for view in network.VIEWS}
    programs = ["torch rank 1", "torch vmap", "torch loop"]
    others = [*peers.EVOX.values(), peers.EVOTORCH]
    for view in ("step", "forward"):
        assert methods[view] == ["Base", *FAMILIES, *programs, *others]
    assert methods["update"] == ["Base", *FAMILIES]
    assert methods["optimizer"] == ["Base", "centred ranks, Adam"]
    for row in results:
        if not row.timed:
            assert row.method in others
            assert "is not installed" in row.reason
            assert not row.failed


@torch.no_grad()
def test_the_row_with_a_graph_is_checked():
    task = plain.Task.random(16, 12, 10, torch.device("cpu"))
    trainer = network.GraphedTrainer(network.mlp((12, 10), task.x.device), LowRank(1), task)
    trainer.check()
    trainer.graphed = lambda: None
    with pytest.raises(AssertionError, match="Adam moved by 0"):
        trainer.check()


@torch.no_grad()
def test_torchs_own_training_step_is_ours():
    """Its noise in place of ours, the same ranks and the same Adam: the same parameters."""
    net = network.mlp((12, 14, 10), torch.device("cpu"))
    task = plain.Task.random(16, 12, 10, torch.device("cpu"))
    program = plain.TorchLowRank(net, task)
    program.check()
    trainer = network.Trainer(net, LowRank(1), task)
    step = program.forward
    trainer.model.set_noise()
    state, layers = trainer.model.state, list(trainer.model.layers())

    def draw():
        for mine, layer in zip(program.linear, layers, strict=True):
            factors = []
            for d in range(task.directions):
                noise = layer.parameter_noise("weight", d, 1)[0]
                u, s, v = torch.linalg.svd(noise)
                factors.append((u[:, 0] * s[0], v[0]))
            a, b = (torch.stack(parts) for parts in zip(*factors, strict=True))
            e = layer.parameter_noise("bias", 0, task.directions).flatten(1)
            program.noise[mine] = a, b, e

    program.draw = draw
    scores = step()
    torch.testing.assert_close(scores, trainer.model(task.x), rtol=1e-4, atol=1e-5)
    program.step()
    state.move(state.seed, state.generation - 1, state.sigma)
    trainer.step()
    for mine, theirs in zip(trainer.net.parameters(), program.net.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_row_that_fails_its_check_is_reported_and_the_others_go_on():
    def fail():
        raise AssertionError("wrong numbers\nin two lines")

    def never():
        raise RuntimeError("timed")

    rows = [common.Row("Base", lambda: None, lambda: None, 0), common.Row("x", never, fail, 0)]
    base, x = timing.measure("s", "step", "c", rows, torch.device("cpu"), 0.0)
    assert base.timed
    assert not base.reason
    assert x.failed
    assert not x.timed
    assert x.reason == "failed: AssertionError: wrong numbers"
    assert Run([base, x]).failed
    assert not Run([base]).failed


def test_a_row_that_cannot_be_made_is_reported():
    def make():
        raise RuntimeError("no such kernel")

    (row,) = common.fitting([("x", 0, make)], torch.device("cpu"))
    assert row.reason == "failed: RuntimeError: no such kernel"


def test_rows_are_timed_in_turn():
    order = []

    def slow(name):
        # Above the limit of bursts, so that every call is one sample.
        return lambda: (order.append(name), time.sleep(timing.FAST_S))

    rows = [common.Row(name, slow(name), lambda: None, 0) for name in "ab"]
    samples = timing.time_rows(rows, torch.device("cpu"), 3 * timing.FAST_S)
    assert order[:6] == list("ababab")
    assert all(len(taken) >= 3 and min(taken) >= timing.FAST_S for taken in samples)


def test_scale_multiplies_the_samples():
    row = common.Row("x", lambda: time.sleep(timing.FAST_S), lambda: None, 0, 100.0)
    (samples,) = timing.time_rows([row], torch.device("cpu"), 0.0)
    assert min(samples) >= 100 * timing.FAST_S


def test_ratios_relate_to_base_and_naive():
    rows = [
        common.Row(name, lambda s=s: time.sleep(s), lambda: None, 0)
        for name, s in (("Base", 0.02), ("Naive", 0.08), ("x", 0.04))
    ]
    base, naive, x = timing.measure("s", "step", "c", rows, torch.device("cpu"), 0.0)
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


def test_json_has_null_for_a_missing_ratio_and_is_read_back(tmp_path):
    file = tmp_path / "out.json"
    files.write_json(file, Run([result(times_base=2.0)], {"cpu": "x"}))
    (row,) = json.loads(file.read_text())["results"]
    assert row["over_naive"] is None
    assert row["median_s"] == 0.5
    run = files.read_json(file)
    (back,) = run.results
    assert math.isnan(back.over_naive)
    assert repr(back) == repr(result(times_base=2.0))  # NaN is unlike itself
    assert run.machine == {"cpu": "x"}
    assert run.cosines == []


def test_json_of_another_schema_is_refused(tmp_path):
    file = tmp_path / "out.json"
    for text, message in (
        (json.dumps({"schema": 1}), "schema 2, got 1"),
        ("[]", "schema 2, got None"),
        ("{", r"out\.json must be a file of"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            files.read_json(file)
    with pytest.raises(ValueError, match=r"nothing\.json must be a file of .*No such file"):
        files.read_json(tmp_path / "nothing.json")


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
    [["--sizes", "0"], ["--batch", "-1"], ["nothing"], ["--view", "backward"]],
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "error: argument" in capsys.readouterr().err
