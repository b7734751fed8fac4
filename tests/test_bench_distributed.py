"""Suite ``distributed`` starts its processes, compares them with one, and counts what they send."""

import dataclasses
import itertools
import math

import pytest
import torch

from bench import distributed, files, processes, report
from bench.common import Options
from bench.distributed import Case
from bench.files import Run
from perturbed import Dense, LowRank

WIDTHS = (6, 5, 3)
PARAMETERS = 6 * 5 + 5 + 5 * 3 + 3
TINY = [
    Case("strong", "tiny", WIDTHS, LowRank(1), 6),
    Case("weak", "tiny", WIDTHS, Dense("rademacher"), 4),
]
METHODS = ["1 process", "2 processes, full", "2 processes, sharded"]


@pytest.fixture(scope="module")
def run():
    lines = []
    results, notes = distributed.run(Options(seconds=0.0, progress=lines.append), TINY, (1, 2))
    return results, notes, lines


def test_a_run_has_every_row(run):
    results, notes, lines = run
    cases = ["tiny, LowRank(1), D=6", "tiny, Dense('rademacher'), D=4 a process"]
    assert [(r.case, r.method) for r in results] == [(c, m) for c in cases for m in METHODS]
    assert lines == [f"distributed, {case.view}: {case}" for case in TINY]
    assert notes == distributed.NOTES
    for result in results:
        s = result.sharing
        assert result.repeats >= 3
        assert 0 < result.min_s <= result.median_s <= result.max_s
        assert 0 < s.estimate_s < result.max_s
        assert s.parameters == PARAMETERS
        assert s.directions == (6 if result.view == "strong" else 4 * s.processes)
        assert (s.auto in ("full", "sharded")) == (s.processes == 2)
        if s.processes == 1:
            assert (s.exchange_s, s.transfer_s, s.payload_bytes) == (0, 0, 0)
            assert result.times_base == 1
            assert math.isnan(s.wire_bytes)
        else:
            assert 0 < s.exchange_s < result.max_s
            assert s.transfer_s > 0


def test_the_payload_is_that_of_the_formula_and_the_wire_carries_it(run):
    of_two = [r for r in run[0] if r.sharing.processes == 2]
    # float32 losses of 2 * D / 2 members, and the sums of all parameters
    expected = [6 * 4, 6 * 4 + 4 * PARAMETERS, 8 * 4, 8 * 4 + 4 * PARAMETERS]
    assert [r.sharing.payload_bytes for r in of_two] == expected
    assert [distributed.expected_bytes(r.sharing) for r in of_two] == expected
    for result in of_two:
        s = result.sharing
        if not math.isnan(s.wire_bytes):  # with two processes each sends all that it gives
            assert s.wire_bytes > s.payload_bytes


def test_results_survive_json(run, tmp_path):
    file = tmp_path / "run.json"
    files.write_json(file, Run(run[0], {"cpu": "abacus"}))
    again = files.read_json(file).results
    assert "NaN" not in file.read_text()
    assert [repr(r) for r in again] == [repr(r) for r in run[0]]


def test_tables_show_the_suite(run):
    results, notes, _ = run
    text = report.markdown(Run(results, {}, notes=notes))
    for header in ("of 1 process", "in exchanges", "payload", "on the wire", "auto takes"):
        assert header in text
    assert "times base" not in text
    wire = distributed.wire_table(results).splitlines()
    assert len(wire) == 4
    assert f"| {PARAMETERS} parameters, 6 pairs |" in wire[2]
    assert f"{24 + 4 * PARAMETERS} |" in wire[3]
    (row,) = distributed.steps_table(results, "weak").splitlines()[2:]
    assert row.startswith("| tiny, `Dense('rademacher')`, D=4 a process |")
    assert row.count("%") == 2


@pytest.mark.slow
def test_a_failure_ends_all_processes():
    few = dataclasses.replace(TINY[0], directions=1)
    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match="a direction for every process"
    ):
        distributed.run(Options(seconds=0.0), [few], (1, 2))


def test_a_wrong_result_is_noticed():
    def training():
        return processes.Training(TINY[0], 1, "full", None, False)

    good, other = training(), training()
    loss = good.step()
    assert other.step() == loss
    processes.compare("two", (loss, good), (loss, other), exact=True)
    with pytest.raises(AssertionError, match=r"two: the loss .* differs"):
        processes.compare("two", (loss + 1e-6, good), (loss, other), exact=False)
    with torch.no_grad():
        good.pm.model[0].weight[0, 0] += 1e-6
    processes.compare("two", (loss, good), (loss, other), exact=False)
    with pytest.raises(AssertionError, match="two: parameters have other bits"):
        processes.compare("two", (loss, good), (loss, other), exact=True)
    good.pm.model[0].weight.grad[0, 0] += 1.0
    with pytest.raises(AssertionError, match="two, estimate: relative error"):
        processes.compare("two", (loss, good), (loss, other), exact=False)


def test_the_default_cases_are_those_of_the_plan():
    chosen = distributed.cases(Options())
    layers = {c.model: itertools.pairwise(c.widths) for c in chosen}
    counts = {name: sum((i + 1) * o for i, o in found) for name, found in layers.items()}
    assert counts == {"51k": 50_890, "1M": 1_050_112}
    assert {repr(c.noise) for c in chosen} == {repr(n) for n in distributed.FAMILIES}
    for case in chosen:
        assert case.population(4) == case.directions * (4 if case.view == "weak" else 1)
    assert {c.view for c in distributed.cases(Options(views=("weak",)))} == {"weak"}
    assert distributed.cases(Options(views=("forward",))) == []


def test_only_cpus_are_measured():
    assert distributed.run(Options(device=torch.device("cuda")))[0] == []


def test_loopback_bytes_count_up():
    before, after = processes.loopback_bytes(), processes.loopback_bytes()
    assert math.isnan(before) or 0 <= before <= after
