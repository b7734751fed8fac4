"""Measured tables find their place in a page, and only measured ones."""

import re

import pytest

from bench import docs, files
from bench.common import Result
from bench.files import Run
from bench.variance import Cosine


def result(suite, view, case, method, **changes):
    fields = {"median_s": 0.002, "min_s": 0.001, "max_s": 0.004, "repeats": 3, "noise_bytes": 32}
    fields.update(times_base=2.0, **changes)
    return Result(suite=suite, view=view, case=case, method=method, **fields)


RESULTS = [
    *(
        result("linear", view, f"{n}x{n}, R={r}", method)
        for view in ("forward", "step")
        for n in (256, 512, 1024)
        for r in ("1 D=1024", "16 D=64, antithetic")
        for method in ("Base", "Naive", "Stored", "Dense('normal')")
    ),
    result("update", "update", "1024x1024, R=1 D=1024", "Dense('normal')", median_s=0.5),
    *(result("network", view, "mlp", "Dense('normal')") for view in ("step", "forward", "update")),
    result("eggroll", "forward", "8x8, R=2 D=4, antithetic", "Dense('normal')"),
    result("eggroll", "step", "8x8, R=1 D=8, float32", "Dense('normal')"),
    result("nesgpu", "forward", "256x10, R=1 D=8", "Base"),
    result("nesgpu", "update", "256x10, R=1 D=8", "Dense('normal')"),
]
COSINES = [Cosine("Dense('normal')", d, 0.5, 0.25, 5, 0.125, 1.0) for d in (16, 64)]


@pytest.fixture
def measured(tmp_path):
    file = tmp_path / "run.json"
    files.write_json(file, Run(RESULTS, {"cpu": "abacus"}, cosines=COSINES))
    return docs.Measured(file)


def cells(table, first):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_blocks_are_replaced_and_the_rest_stays(measured):
    page = "a\n<!-- bench: machine -->\nold\n<!-- /bench -->\nb\n"
    page += "<!-- bench: variance -->\n<!-- /bench -->\nc"
    once = docs.update(page, measured)
    assert once.startswith("a\n<!-- bench: machine -->\ncpu abacus. All of it: `bench/results/run")
    assert "old" not in once
    assert "-->\nb\n<!--" in once
    assert once.endswith("<!-- /bench -->\nc")
    assert docs.update(once, measured) == once


def test_costs_take_the_cases_with_one_row_per_direction(measured):
    table = measured.block("costs")
    assert cells(table, "`Dense('normal')`") == ["2.00x"] * 6
    assert cells(table, "Stored") == ["2.00x"] * 5 + [""]
    assert "Naive" not in table


def test_each_table_shows_its_suite(measured):
    ours = "`Dense('normal')`"
    assert cells(measured.block("network"), ours) == ["2.00 ms", "2.00x"] + ["2.00 ms"] * 2 + [
        "32 B"
    ]
    assert cells(measured.block("eggroll"), ours) == ["50 %", "", "", "50 %"]
    assert cells(measured.block("nesgpu"), ours) == ["", "2.00 ms"]
    assert cells(measured.block("nesgpu"), "Base") == ["2.00x", ""]
    row = cells(measured.block("variance"), "Dense('normal')")
    assert row == ["0.500 ± 0.250", "0.500 ± 0.250", "1.00", "125 ms"]


def test_what_was_not_measured_is_refused(tmp_path):
    file = tmp_path / "run.json"
    files.write_json(file, Run(RESULTS[:2], {"cpu": "abacus"}))
    measured = docs.Measured(file)
    with pytest.raises(ValueError, match="'variance', got none"):
        measured.block("variance")
    with pytest.raises(ValueError, match=r"a block must be one of .*, got 'nothing'"):
        measured.block("nothing")
    with pytest.raises(ValueError, match="the page must hold"):
        docs.update("plain text", measured)


def test_a_suite_comes_from_the_last_file_that_has_it(measured, tmp_path):
    file, other = tmp_path / "peers.json", tmp_path / "other.json"
    newer = [result("network", "step", "mlp", "EvoX", median_s=0.25)]
    files.write_json(file, Run(newer, {"cpu": "abacus"}))
    both = docs.Measured(tmp_path / "run.json", file)
    assert cells(both.block("network"), "EvoX")[:2] == ["250 ms", "2.00x"]
    assert "Dense" not in both.block("network")
    assert both.block("costs") == measured.block("costs")
    assert both.block("variance") == measured.block("variance")
    assert "run.json` and `bench/results/peers.json" in both.block("machine")
    files.write_json(other, Run(newer, {"cpu": "slide rule"}))
    with pytest.raises(ValueError, match=r"one machine, got cpu abacus and, in other\.json"):
        docs.Measured(file, other)


def test_every_block_of_the_page_can_be_made(measured):
    page = (docs.ROOT / "docs" / "noise.md").read_text()
    names = re.findall(r"<!-- bench: (\w+) -->", page)
    assert len(names) == page.count("<!-- /bench -->") == 6
    updated = docs.update(page, measured)
    assert updated.count("abacus") == 1


@pytest.mark.parametrize("page", docs.PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_files_that_the_page_names(page):
    text = page.read_text()
    files = re.findall(r"`(bench/results/[\w.-]+\.json)`", text)
    if "<!-- bench: machine -->" in text:
        assert docs.update(text, docs.Measured(*(docs.ROOT / file for file in files))) == text
    else:
        assert not files
