"""The page on 64 and 1,024 GPUs: its formulas, and its tables that only computed numbers reach."""

import dataclasses
import math
import re

import pytest

from bench import docs, files, scaling
from bench.cluster import (
    ASSUMPTIONS,
    FAMILIES,
    MODELS,
    Cluster,
    Model,
    assumed,
    crossover,
    step,
)
from bench.common import Result, Sharing
from bench.files import Run

COMPUTED = ("assumed", "models", "traffic", "clusters", "crossover", "memory")


def result(view, processes, way, seconds, estimate, transfer):
    case = "tiny, LowRank(1), D=40"
    name = "1 process" if processes == 1 else f"{processes} processes, {way}"
    timed = {"median_s": seconds, "min_s": seconds, "max_s": seconds, "repeats": 3}
    sharing = Sharing(processes, way, 40, 1000, estimate, 0.0, transfer, 160.0, math.nan, way)
    return Result("distributed", view, case, name, **timed, noise_bytes=0, sharing=sharing)


RESULTS = [
    result(view, *numbers)
    for view in ("strong", "weak")
    for numbers in (
        (1, "full", 0.100, 0.040, 0.0),
        (2, "full", 0.088, 0.040, 0.010),
        (2, "sharded", 0.090, 0.040, 0.020),
    )
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.json"
    files.write_json(path, Run(RESULTS, {"cpu": "abacus"}))
    return path


def cells(table, row=0):
    return [cell.strip() for cell in table.splitlines()[2 + row].strip("|").split("|")]


def test_sums_take_latency_and_bandwidth():
    hop, speed = assumed("inside latency"), assumed("inside")
    assert Cluster(1).all_reduce(1e9) == Cluster(1).all_gather(1e9) == 0
    # A ring of 8 sends 2 * 7 / 8 of the bytes in 14 hops, a gather half of that.
    assert Cluster(8).all_reduce(8e9) == pytest.approx(14 * (hop + 1e9 / speed))
    assert Cluster(8).all_gather(8e9) == pytest.approx(7 * (hop + 1e9 / speed))
    # Two nodes: a ring has one hop out and one back, each of an adapter's half.
    link, far = assumed("between"), assumed("between latency")
    inside = Cluster(8).all_reduce(8e9)
    assert Cluster(16).all_reduce(8e9) == pytest.approx(inside + 2 * far + 1e9 / link)
    assert Cluster(16, 1).all_reduce(8e9) == pytest.approx(inside + 2 * far + 8e9 / link)
    # 128 nodes and next to no bytes: the tree of 7 levels.
    assert Cluster(1024).all_reduce(0) == pytest.approx(14 * hop + 2 * 7 * far)
    assert Cluster(1024).all_gather(0) == pytest.approx(7 * hop + 127 * far)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gpus", [64, 1024])
def test_both_ways_take_the_same_time_at_the_crossover(family, gpus):
    for model in MODELS:
        even = crossover(model, family, Cluster(gpus))
        at = step(dataclasses.replace(model, directions=even), family, Cluster(gpus))
        assert at.with_full == pytest.approx(at.with_sharded)
        beyond = step(dataclasses.replace(model, directions=2 * even), family, Cluster(gpus))
        assert beyond.with_full > beyond.with_sharded


def test_a_step_is_the_sum_of_its_work():
    model = Model("one layer", 1e6, 0, 100, 64, "fp32")
    alone, of_eight = (step(model, "Dense()", Cluster(n)) for n in (1, 8))
    products = 2 * 64 * 100 * 2 * 1e6 * 2 / (assumed("fp32") * assumed("used"))
    noise = 64 * 1e6 / assumed("normal")
    assert alone.forward == pytest.approx(products + noise)
    assert alone.full == alone.part == pytest.approx(noise)
    assert of_eight.forward == pytest.approx(alone.forward / 8)
    assert of_eight.part == pytest.approx(of_eight.full / 8)
    assert of_eight.full == alone.full
    assert of_eight.update == alone.update
    low = step(model, "LowRank(1)", Cluster(1))
    assert low.forward == pytest.approx(products / 2 * (1 + assumed("factor forward")))


def test_measured_tables():
    rates = scaling.rates_table(RESULTS)
    assert cells(rates) == ["tiny, `LowRank(1)`, D=40", "1.50 ms", "1.00 ms", "1e+06"]
    (row,) = scaling.formula_table(RESULTS).splitlines()[2:]
    # (0.1 - 0.04) / 2 + 0.04 + 0.01, and 0.1 / 2 + 0.02; 10 ms of sums buy 20 half directions
    expected = ["80.0 ms", "88.0 ms (1.10x)", "70.0 ms", "90.0 ms (1.29x)", "20", "full"]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == expected


def test_the_program_prints_every_table(file, capsys, tmp_path):
    scaling.main([str(file)])
    text = capsys.readouterr().out
    assert text.count("### ") == 8
    assert "cpu abacus" in text
    assert "7B, `LowRank(1)`" in text
    other = tmp_path / "other.json"
    files.write_json(other, Run([], {"cpu": "abacus"}))
    with pytest.raises(SystemExit):
        scaling.main([str(other)])
    assert "results of suite distributed, got none" in capsys.readouterr().err


def test_pages_are_written_where_there_are_results(file, monkeypatch, tmp_path, capsys):
    before = {page.name: page.read_text() for page in docs.PAGES}
    pages = tuple(tmp_path / name for name in before)
    for page in pages:
        page.write_text(before[page.name])
    monkeypatch.setattr(docs, "PAGES", pages)
    docs.main([str(file)])
    assert capsys.readouterr().out == "wrote distributed.md\nwrote scaling.md\n"
    after = {page.name: page.read_text() for page in pages}
    assert after["noise.md"] == before["noise.md"]
    for name in ("distributed.md", "scaling.md"):
        assert "cpu abacus" in after[name]
        assert "Not measured yet" not in after[name]
    empty = tmp_path / "empty.json"
    files.write_json(empty, Run([], {"cpu": "abacus"}))
    with pytest.raises(SystemExit):
        docs.main([str(empty)])


def test_computed_tables_of_the_page_are_those_of_the_code(file):
    """They need no measurement, so nothing but ``python -m bench.docs`` keeps them from aging."""
    page = (docs.ROOT / "docs" / "scaling.md").read_text()
    made = docs.Measured(file)
    names = re.findall(r"<!-- bench: (\w+) -->", page)
    assert set(COMPUTED) <= set(names)
    for match in docs.BLOCK.finditer(page):
        if match[2] in COMPUTED:
            assert made.block(match[2]) in match[0], f"block {match[2]} is out of date"


def test_guesses_are_called_guesses():
    kinds = {a.kind for a in ASSUMPTIONS.values()}
    assert kinds == {"data sheet", "counted", "guess"}
