"""What moved between two runs: ``python -m bench compare A.json B.json``.

A row's ratio is B's time over A's; where the machines differ, B's multiple of its base over A's, as
times of different machines say nothing of the code. A row counts as moved if the quartiles of its
samples do not overlap and the ratio is off by more than a threshold (5 per cent): runs differ by
that much with nothing changed, since memory lies elsewhere and clocks vary. On a machine that
others use too, take the threshold higher.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import files, report
from bench.common import Result
from bench.files import Run

SAME = ("cpu", "cores", "threads", "isa", "gpu", "tf32")  # a machine, as far as times are concerned
TOLD = (*SAME, "torch", "compiler", "python", "driver", "cuda", "clocks", "perturbed", "date")
THRESHOLD = 0.05


@dataclasses.dataclass(frozen=True)
class Spread:
    """A row's time, or multiple of its base: quartiles around the median."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, result: Result, scale: float) -> Spread:
        """Of a result; extremes where its file is older than quartiles."""
        low = result.min_s if math.isnan(result.low_s) else result.low_s
        high = result.max_s if math.isnan(result.high_s) else result.high_s
        return cls(low * scale, result.median_s * scale, high * scale)

    def text(self, relative: bool) -> str:
        """Median, and half the distance of the quartiles in per cent of it."""
        middle = report.ratio(self.middle) if relative else report.duration(self.middle)
        return f"{middle} ± {50 * (self.high - self.low) / self.middle:.0f} %"


@dataclasses.dataclass(frozen=True)
class Change:
    """A row of both runs."""

    key: tuple[str, ...]
    a: Spread
    b: Spread
    threshold: float

    @property
    def ratio(self) -> float:
        return self.b.middle / self.a.middle

    @property
    def mark(self) -> str:
        """ "slower", "faster", or nothing within the noise."""
        if self.ratio > 1 + self.threshold and self.b.low > self.a.high:
            return "slower"
        if self.ratio < 1 / (1 + self.threshold) and self.b.high < self.a.low:
            return "faster"
        return ""


@dataclasses.dataclass
class Comparison:
    """Two runs, row by row.

    Attributes:
        changes: rows timed in both.
        only: rows timed in one alone, and why the other has none if it says so: A's, B's.
        relative: whether multiples of the base were compared, because machines differ.
        differences: facts that differ, A's and B's.
    """

    changes: list[Change]
    only: tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], str]]
    relative: bool
    differences: dict[str, tuple[str, str]]


def compare(a: Run, b: Run, threshold: float = THRESHOLD) -> Comparison:
    """Compares runs.

    Args:
        a: what was before.
        b: what is now.
        threshold: least change that counts, as a fraction.

    Raises:
        ValueError: runs without a common suite.
    """
    suites = [sorted({r.suite for r in run.results if r.timed}) for run in (a, b)]
    if not set(suites[0]) & set(suites[1]):
        first, second = (", ".join(names) or "none" for names in suites)
        raise ValueError(f"the runs must have a suite in common, got {first} and {second}")
    facts = {name: (a.machine.get(name, ""), b.machine.get(name, "")) for name in TOLD}
    # Files from before a fact was recorded do not differ in it.
    relative = any(x != y for x, y in (facts[name] for name in SAME) if x and y)
    relative = relative or a.on_gpu != b.on_gpu
    rows = [{r.key: r for r in run.results} for run in (a, b)]
    changes, only = [], ({}, {})
    for key in dict.fromkeys((*rows[0], *rows[1])):
        pair = [mine.get(key) for mine in rows]
        spreads = [_spread(result, relative) for result in pair]
        if all(spreads):
            changes.append(Change(key, *spreads, threshold))
            continue
        for i in (0, 1):
            other = pair[1 - i]
            if spreads[i]:
                only[i][key] = other.reason if other is not None else ""
    return Comparison(changes, only, relative, {k: v for k, v in facts.items() if v[0] != v[1]})


def _spread(result: Result | None, relative: bool) -> Spread | None:
    if result is None or not result.timed:
        return None
    if not relative:
        return Spread.of(result, 1.0)
    if math.isnan(result.times_base):
        return None
    return Spread.of(result, result.times_base / result.median_s)


def markdown(found: Comparison, everything: bool = False) -> str:
    """What moved, most first; all rows if asked for; rows of one run; facts that differ."""
    parts = []
    if found.differences:
        rows = [[name, x or "?", y or "?"] for name, (x, y) in found.differences.items()]
        parts.append(report.table(["differs", "A", "B"], rows))
    if found.relative:
        parts.append("The machines differ: multiples of the base are compared, not times.")
    moved = [change for change in found.changes if change.mark]
    shown = found.changes if everything else moved
    slower = sum(change.mark == "slower" for change in moved)
    parts.append(
        f"{len(found.changes)} rows in both: {slower} slower, {len(moved) - slower} faster, "
        f"{len(found.changes) - len(moved)} within the noise."
    )
    if shown:
        ordered = sorted(shown, key=lambda change: -abs(math.log(change.ratio)))
        rows = [
            [
                " | ".join(change.key).replace("|", "/"),
                change.a.text(found.relative),
                change.b.text(found.relative),
                f"{change.ratio:.2f}",
                change.mark,
            ]
            for change in ordered
        ]
        parts.append(report.table(["row", "A", "B", "B / A", ""], rows))
    common = {change.key[0] for change in found.changes}
    for name, keys in zip("AB", found.only, strict=True):
        if keys:
            lines = _only_lines(keys, common)
            parts.append(f"Only in {name} ({len(keys)} rows):\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _only_lines(keys: dict[tuple[str, ...], str], common: set[str]) -> list[str]:
    """A line for each row of a suite that both runs have, and for each other suite."""
    others: dict[str, int] = {}
    lines = []
    for key, why in keys.items():
        if key[0] in common:
            lines.append(f"- {' / '.join(key)}{f': {why}' if why else ''}")
        else:
            others[key[0]] = others.get(key[0], 0) + 1
    return lines + [f"- suite {suite}, {count} rows" for suite, count in others.items()]


def main(argv: Sequence[str]) -> int:
    """The command; the exit status is 1 if a row is slower beyond --fail-above, 2 for bad files."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="before")
    parser.add_argument("b", type=Path, metavar="B.json", help="now")
    parser.add_argument("--all", action="store_true", help="show the rows that did not move, too")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"least change (default: {THRESHOLD})"
    )
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="exit with status 1 if a row that moved has B / A above this",
    )
    chosen = parser.parse_args(argv)
    try:
        found = compare(files.read_json(chosen.a), files.read_json(chosen.b), chosen.threshold)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(markdown(found, chosen.all))
    limit = math.inf if chosen.fail_above is None else chosen.fail_above
    bad = [change for change in found.changes if change.mark == "slower" and change.ratio > limit]
    for change in bad:
        print(f"{' / '.join(change.key)}: {change.ratio:.2f}, above {limit:g}", file=sys.stderr)
    return int(bool(bad))
