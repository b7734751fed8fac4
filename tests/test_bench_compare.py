"""What moved between two runs, and what only seems to have."""

import json

import pytest

from bench import __main__ as cli
from bench import files
from bench.common import Result
from bench.compare import compare, markdown
from bench.files import Run

HERE = {"cpu": "abacus", "threads": "2", "perturbed": "1 (aaaa)"}
THERE = {"cpu": "slide rule", "threads": "2", "perturbed": "1 (bbbb)"}


def row(method, seconds, spread=0.01, suite="linear", **changes):
    """A result with quartiles at 1 -+ spread of the median, and base 1 s."""
    fields = {
        "median_s": seconds,
        "min_s": seconds * (1 - 2 * spread),
        "max_s": seconds * (1 + 2 * spread),
        "low_s": seconds * (1 - spread),
        "high_s": seconds * (1 + spread),
        "times_base": seconds,
        "repeats": 9,
        "noise_bytes": 0,
    }
    return Result(suite=suite, view="step", case="8x8", method=method, **{**fields, **changes})


def marks(a, b, **options):
    found = compare(Run(a, HERE), Run(b, HERE), **options)
    return {change.key[-1]: change.mark for change in found.changes}


def test_rows_move_beyond_noise_and_threshold_alone():
    before = [row("a", 1.0), row("b", 1.0), row("c", 1.0), row("d", 1.0, 0.3), row("e", 1.0)]
    after = [row("a", 1.3), row("b", 0.7), row("c", 1.04), row("d", 1.3), row("e", 1.3, 0.5)]
    want = {"a": "slower", "b": "faster", "c": "", "d": "", "e": ""}
    assert marks(before, after) == want
    assert marks(before, after, threshold=0.5) == dict.fromkeys(want, "")
    assert marks(before, before) == dict.fromkeys(want, "")


def test_older_files_have_extremes_for_quartiles():
    nan = float("nan")
    before, after = row("a", 1.0, 0.1, low_s=nan, high_s=nan), row("a", 1.3, 0.1)
    assert marks([before], [after]) == {"a": ""}  # 1.2 and 1.17 overlap
    assert marks([before], [row("a", 1.4, 0.1)]) == {"a": "slower"}


def test_machines_that_differ_are_compared_by_multiples_of_the_base():
    a = Run([row("a", 2.0), row("no base", 1.0, times_base=float("nan"))], HERE)
    b = Run([row("a", 20.0, times_base=2.0), row("no base", 1.0)], THERE)
    found = compare(a, b)
    assert found.relative
    (change,) = found.changes
    assert change.ratio == 1.0
    assert found.differences["cpu"] == ("abacus", "slide rule")
    text = markdown(found, everything=True)
    assert "The machines differ: multiples of the base are compared" in text
    assert "2.00x ± 1 %" in text
    # Another commit is what one wants to compare; it is named, and times stay times.
    again = compare(a, Run(b.results, {**HERE, "perturbed": "1 (bbbb)"}))
    assert not again.relative
    assert "perturbed" in again.differences


def test_rows_of_one_run_are_listed_with_the_reason():
    gone = row("x", float("nan"), reason="needs 9 GB")
    more = [row("y", 1.0, suite="rl"), row("z", 1.0, suite="rl")]
    a = Run([row("a", 1.0), row("x", 1.0), *more], HERE)
    found = compare(a, Run([row("a", 1.0), gone], HERE))
    assert [key[-1] for key in found.only[0]] == ["x", "y", "z"]
    assert not found.only[1]
    want = "Only in A (3 rows):\n\n- linear / step / 8x8 / x: needs 9 GB\n- suite rl, 2 rows"
    assert want in markdown(found)


def test_runs_without_a_common_suite_are_refused():
    with pytest.raises(ValueError, match="suite in common, got linear and rl"):
        compare(Run([row("a", 1.0)], HERE), Run([row("a", 1.0, suite="rl")], HERE))
    with pytest.raises(ValueError, match="got linear and none"):
        compare(Run([row("a", 1.0)], HERE), Run([], HERE))


def test_the_command(tmp_path, capsys):
    a, b, other = (tmp_path / name for name in ("a.json", "b.json", "other.json"))
    files.write_json(a, Run([row("a", 1.0), row("b", 1.0)], HERE))
    files.write_json(b, Run([row("a", 1.3), row("b", 1.0)], HERE))
    assert cli.main(["compare", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "2 rows in both: 1 slower, 0 faster, 1 within the noise." in text
    assert "1.30 | slower" in " ".join(text.split())
    assert cli.main(["compare", str(a), str(b), "--fail-above", "1.4"]) == 0
    assert cli.main(["compare", str(a), str(b), "--fail-above", "1.2"]) == 1
    assert "linear / step / 8x8 / a: 1.30, above 1.2" in capsys.readouterr().err
    other.write_text(json.dumps({"schema": 99}))
    assert cli.main(["compare", str(a), str(other)]) == 2
    assert "other.json must be a file of `python -m bench --save`" in capsys.readouterr().err
