"""Three columns: theirs as published, theirs measured here, ours (numbers: bench/published.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from bench import report
from bench.common import Result
from bench.files import Run
from bench.published import TABLES, Line, Table


@dataclasses.dataclass
class Match:
    """A published line and its counterparts among the results, None where there is none."""

    line: Line
    theirs: Result | None
    ours: Result | None


def matches(published: Table, results: Sequence[Result]) -> list[Match]:
    """Every line of a table with the results that belong to it."""

    def find(line: Line, method: str) -> Result | None:
        for r in results:
            if (r.suite, r.view, r.method) == (line.suite, line.view, method) and all(
                part in f"{r.case}, " for part in line.case
            ):
                return r
        return None

    return [Match(li, find(li, li.theirs), find(li, li.ours)) for li in published.lines]


def markdown(published: Table, results: Sequence[Result]) -> str:
    """The table; empty if nothing of it was measured."""
    found = matches(published, results)
    bases = {r.key[:3]: r.best_s for r in results if r.method == "Base" and r.timed}
    if not any(m.theirs or m.ours for m in found):
        return ""
    multiple = _per_cent if published.per_cent else report.ratio
    unit = "% of base" if published.per_cent else "x base"
    rows, label = [], ""
    for m in found:
        line = m.line
        rows.append(
            [
                line.label if line.label != label else "",
                line.name,
                report.duration(line.seconds),
                multiple(line.times_base),
                *_here(line.theirs, m.theirs, bases, multiple),
                *_here(line.ours, m.ours, bases, multiple),
                _gain(m),
            ]
        )
        label = line.label
    headers = ["case", "theirs", "published", unit, "measured here", "time", unit]
    headers += ["ours", "time", unit, "gain"]
    text = report.table(headers, rows)
    return f"### {published.title}\n\n{published.source} {published.remark}\n\n{text}"


def _per_cent(times_base: float) -> str:
    share = 100 / times_base
    return "" if share != share else f"{share:.2g} %" if share < 10 else f"{share:.0f} %"


def _here(
    method: str,
    result: Result | None,
    bases: dict[tuple[str, ...], float],
    multiple: Callable[[float], str],
) -> list[str]:
    """Name, time and multiple; in place of a time, why there is none."""
    if not method:
        return ["", "", ""]
    name = f"`{method}`" if "(" in method else method
    if result is None:
        return [name, "not in this run", ""]
    if not result.timed:
        return [name, result.reason.replace("|", "/"), ""]
    times_base = result.best_s / bases.get(result.key[:3], math.nan)
    return [name, report.duration(result.best_s), multiple(times_base)]


def _gain(m: Match) -> str:
    """Their time here over ours."""
    if m.theirs is None or m.ours is None:
        return ""
    return report.ratio(m.theirs.best_s / m.ours.best_s)


def tables(run: Run) -> list[str]:
    """All tables of which the run has something."""
    if "peers" in run.machine and not run.roofs:  # the child of --peers
        return []
    made = (markdown(published, run.results) for published in TABLES.values())
    return [text for text in made if text]
