"""Plots of a run, readable in grey: marks and hatches tell rows and cases apart, not colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import sidebyside, zeroth
from bench.common import Result
from bench.files import Run
from bench.published import TABLES
from bench.report import machine_line
from bench.variance import Cosine

MARKERS = "osD^vPX*"
SHADES = ("white", "black", "0.6")
LINES = ("-", "--", ":", "-.")
# Their numbers as published, their way here, ours.
COLUMNS = (
    ("published", "s", "white"),
    ("their way, here", "o", "0.6"),
    ("ours, here", "D", "black"),
)


def pyplot() -> Any:
    """matplotlib, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _style(number: int) -> dict[str, Any]:
    """The mark of a row or case, unlike its neighbours'."""
    return {
        "marker": MARKERS[number % len(MARKERS)],
        "color": "black",
        "markerfacecolor": SHADES[number % len(SHADES)],
        "markersize": 5,
    }


def _clean(axis: Any) -> None:
    axis.grid(color="0.85", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path, machine: dict[str, str]) -> None:
    plt = pyplot()
    # Two lines: a machine with a GPU has many facts.
    facts = list(machine.items())
    half = (len(facts) + 1) // 2
    lines = (machine_line(dict(part)) for part in (facts[:half], facts[half:]))
    figure.supxlabel("\n".join(lines), fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_all(stem: Path, run: Run) -> list[Path]:
    """One file for each suite, one of published numbers beside ours: STEM-NAME.png.

    Returns:
        The files.
    """

    def path(name: str) -> Path:
        return stem.with_name(f"{stem.name}-{name}.png")

    jobs: dict[str, Callable[[Path], None]] = {}
    for suite in dict.fromkeys(result.suite for result in run.results if result.timed):
        rows = [result for result in run.results if result.suite == suite and result.timed]
        if suite == "zeroth":
            jobs[suite] = lambda p, rows=rows: write_losses(p, rows, run.machine)
        elif any(not math.isnan(row.times_base) for row in rows):
            jobs[suite] = lambda p, rows=rows: write_suite(p, rows, run.machine)
    if run.cosines:
        jobs["variance"] = lambda p: write_variance(p, run.cosines, run.machine)
    if sidebyside.tables(run):
        jobs["published"] = lambda p: write_published(p, run)
    for name, draw in jobs.items():
        draw(path(name))
    return [path(name) for name in jobs]


def _times_axis(axis: Any, label: str) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    subs = (1, 2, 5) if high / low < 200 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(label, fontsize=8)
    _clean(axis)


def write_suite(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Multiples of the unperturbed forward, a panel for each view and a mark for each case.

    The optimizer, which is the same for all families, has no panel beside others.
    """
    plt = pyplot()
    results = [r for r in results if not math.isnan(r.times_base)]
    views = list(dict.fromkeys(r.view for r in results))
    views = [view for view in views if view != "optimizer"] or views
    most = max(len({r.method for r in results if r.view == view}) for view in views)
    cases = max(len({r.case for r in results if r.view == view}) for view in views)
    figure, axes = plt.subplots(
        1,
        len(views),
        figsize=(max(7, 6.2 * len(views)), 1.6 + most * (0.13 + 0.07 * cases) + 0.17 * cases),
        squeeze=False,
        layout="constrained",
    )
    for axis, view in zip(axes.flat, views, strict=True):
        _panel(axis, [r for r in results if r.view == view])
        suite = results[0].suite
        axis.set_ylabel(f"{suite}, {view}", fontsize=10)
        unit = {"distributed": "one process", "zeroth": "one loss"}.get(suite, "Base")
        _times_axis(axis, f"times {unit} (median and quartiles)")
    _save(figure, path, machine)


def _panel(axis: Any, members: Sequence[Result]) -> None:
    """A line for each method; on it the cases one below the other."""
    methods = list(dict.fromkeys(r.method for r in members))
    cases = list(dict.fromkeys(r.case for r in members))
    for i, case in enumerate(cases):
        of_case = [r for r in members if r.case == case]
        offset = 0.8 * ((i + 0.5) / len(cases) - 0.5)
        each = [[r.times_base * s / r.median_s for s in _quartiles(r)] for r in of_case]
        axis.errorbar(
            [r.times_base for r in of_case],
            [methods.index(r.method) + offset for r in of_case],
            xerr=[[max(0.0, error) for error in side] for side in zip(*each, strict=True)],
            **_style(i),
            linestyle="none",
            elinewidth=0.6,
            label=case,
        )
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    axis.set_ylim(len(methods) - 0.4, -0.6)
    # Above the panel, where no mark can be.
    axis.legend(fontsize=6.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=1)


def _quartiles(r: Result) -> tuple[float, float]:
    """Distances of the quartiles from the median; of the extremes, in files older than those."""
    if math.isnan(r.low_s):
        return r.median_s - r.min_s, r.max_s - r.median_s
    return r.median_s - r.low_s, r.high_s - r.median_s


def write_published(path: Path, run: Run) -> None:
    """Multiples of the unperturbed layer's forward: published, their way here, ours.

    Base, which is 1, and updates, of which not all were published as multiples, are left out.
    """
    plt = pyplot()
    found = {}
    for name, table in TABLES.items():
        members = [m for m in sidebyside.matches(table, run.results) if _shown(m)]
        if any(m.theirs or m.ours for m in members):
            found[name] = members
    columns: list[list[str]] = [[], []] if len(found) > 1 else [[]]
    for name in found:
        min(columns, key=lambda names: sum(2 + len(found[n]) for n in names)).append(name)
    lengths = [[2.0 + len(found[name]) for name in names] for names in columns]
    height = 0.8 + 0.17 * max(map(sum, lengths))
    figure = plt.figure(figsize=(7.5 * len(columns), height), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)
    for part, names, ratios in zip(parts.flat, columns, lengths, strict=True):
        axes = part.subplots(len(names), 1, height_ratios=ratios, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=True):
            _published_panel(axis, TABLES[name].title, found[name])
    handles = parts.flat[0].axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path, run.machine)


def _shown(m: sidebyside.Match) -> bool:
    results = [r for r in (m.theirs, m.ours) if r is not None and not math.isnan(r.times_base)]
    if m.line.name == "Base" or m.line.view == "update":
        return False
    return bool(results) or not math.isnan(m.line.times_base)


def _published_panel(axis: Any, title: str, members: Sequence[sidebyside.Match]) -> None:
    labels = [f"{m.line.label}: {m.line.name}" for m in members]
    values = (
        [m.line.times_base for m in members],
        [m.theirs.times_base if m.theirs else math.nan for m in members],
        [m.ours.times_base if m.ours else math.nan for m in members],
    )
    for (label, marker, shade), numbers in zip(COLUMNS, values, strict=True):
        axis.plot(
            numbers,
            range(len(members)),
            marker=marker,
            color="black",
            markerfacecolor=shade,
            markersize=5,
            linestyle="none",
            label=label,
        )
    axis.set_yticks(range(len(labels)), labels, fontsize=6.5)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_title(title, fontsize=8, loc="left")
    _times_axis(axis, "times the unperturbed forward")


def write_variance(path: Path, cosines: Sequence[Cosine], machine: dict[str, str]) -> None:
    """Cosine over directions, and over seconds: what a family is worth and what it costs."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for i, method in enumerate(dict.fromkeys(c.method for c in cosines)):
        of = [c for c in cosines if c.method == method]
        for axis, x in ((axes[0], [c.directions for c in of]), (axes[1], [c.seconds for c in of])):
            axis.errorbar(
                x,
                [c.mean for c in of],
                yerr=[c.std for c in of],
                linestyle=LINES[i // len(MARKERS) % len(LINES)],
                linewidth=0.8,
                elinewidth=0.5,
                label=method,
                **_style(i),
            )
    axes[0].set_xlabel("directions (antithetic pairs)")
    axes[1].set_xlabel("seconds of an estimate")
    axes[0].set_ylabel("cosine with the true gradient, mean and std")
    for axis in axes:
        axis.set_xscale("log")
        _clean(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _save(figure, path, machine)


def write_losses(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Draw the best loss of each method beside its evaluations a second, a row for a problem.

    Hatched: the methods with all candidates in one forward.
    """
    plt = pyplot()
    cases = list(dict.fromkeys(r.case for r in results))
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(10, 0.8 + 3.4 * len(cases)), squeeze=False, layout="constrained"
    )
    for (left, right), case in zip(axes, cases, strict=True):
        of_case = [r for r in results if r.case == case]
        names = [r.method for r in of_case]
        style = {
            "color": "0.85",
            "edgecolor": "black",
            "linewidth": 0.5,
            "hatch": ["////" if zeroth.BATCHED in name else "" for name in names],
        }
        left.barh(names, [r.best_loss for r in of_case], **style)
        right.barh(names, [1 / r.median_s for r in of_case], **style)
        left.set_xlabel(f"best loss: {case}", fontsize=8)
        right.set_xlabel("evaluations a second", fontsize=8)
        right.set_yticklabels([])
        for axis in (left, right):
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            axis.grid(axis="x", color="0.85", linewidth=0.5)
            axis.set_axisbelow(True)
    _save(figure, path, machine)
