"""Results as Markdown tables, JSON and plots."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.common import Result, Sharing
from bench.variance import Cosine

SCHEMA = 2  # of the JSON file; raise it when a field changes its meaning
MARKERS = "oosvD^"
SHADES = ("white", "black", "0.6", "white", "black", "0.6")


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    value = seconds * scale
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def size(count: float) -> str:
    """Bytes in decimal units, as memory vendors and NESgpu's tables count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value else "0"


def ratio(value: float) -> str:
    """A ratio with two or three significant digits; nothing where there is none."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}x" if value >= 100 else f"{value:.2g}x" if value >= 10 else f"{value:.2f}x"


def _columns(suite: str, members: Sequence[Result]) -> dict[str, Callable[[Result], str]]:
    """Headers and cells of a suite's tables; ratios where there is something to relate to."""
    columns: dict[str, Callable[[Result], str]] = {
        "method": lambda r: r.method,
        "time": lambda r: duration(r.median_s),
        "min - max": lambda r: f"{duration(r.min_s)} - {duration(r.max_s)}",
    }
    if suite == "distributed":
        return columns | _sharing_columns()
    columns["times base"] = lambda r: ratio(r.times_base)
    if suite == "eggroll":  # the paper's unit
        columns["% of base"] = lambda r: f"{100 / r.times_base:.0f} %"
    if not all(math.isnan(member.over_naive) for member in members):
        columns["over naive"] = lambda r: ratio(r.over_naive)
    if suite == "rl":
        columns["env steps/s"] = lambda r: f"{r.steps_per_s:,.0f}"
        columns["policy's share"] = lambda r: f"{r.policy_share:.0%}"
    if suite == "zeroth":
        columns["evaluations/s"] = lambda r: f"{1 / r.median_s:,.0f}"
        return columns | {"loss": lambda r: f"{r.best_loss:.4g}"}
    if suite == "memory":
        return columns | {"peak memory": lambda r: size(int(r.peak_bytes))}
    columns["noise held"] = lambda r: size(r.noise_bytes)
    return columns


def _sharing_columns() -> dict[str, Callable[[Result], str]]:
    """Columns of suite ``distributed``."""

    def of(text: Callable[[Sharing, Result], str]) -> Callable[[Result], str]:
        return lambda r: text(r.sharing, r) if r.sharing else ""

    def alone(s: Sharing) -> bool:
        return s.processes == 1

    return {
        "of 1 process": lambda r: ratio(r.times_base),
        "estimate": of(lambda s, r: duration(s.estimate_s)),
        "in exchanges": of(lambda s, r: "" if alone(s) else f"{s.exchange_s / r.median_s:.0%}"),
        "exchanges alone": of(lambda s, r: "" if alone(s) else duration(s.transfer_s)),
        "payload": of(lambda s, r: "" if alone(s) else size(round(s.payload_bytes))),
        "on the wire": of(lambda s, r: "" if math.isnan(s.wire_bytes) else size(s.wire_bytes)),
        "auto takes": of(lambda s, r: s.auto),
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and numbers to the right."""
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def machine_line(machine: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def markdown(
    results: Sequence[Result],
    machine: dict[str, str],
    notes: Sequence[str],
    cosines: Sequence[Cosine] = (),
) -> str:
    """One table per suite, view and case, with the machine above and the notes below."""
    parts = [machine_line(machine)]
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.suite, result.view, result.case), []).append(result)
    for (suite, view, case), members in groups.items():
        columns = _columns(suite, members)
        cells = [[cell(member) for cell in columns.values()] for member in members]
        parts.append(f"### {suite}, {view}: {case}\n\n{table(list(columns), cells)}")
    if cosines:
        parts.append(
            "### variance: cosine between estimate and gradient\n\n" + variance_table(cosines)
        )
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def variance_table(cosines: Sequence[Cosine]) -> str:
    """A row for each family, a column for each number of directions."""
    directions = sorted({c.directions for c in cosines})
    last = directions[-1]
    rows = []
    for method in dict.fromkeys(c.method for c in cosines):
        of = {c.directions: c for c in cosines if c.method == method}
        cells = [f"{of[d].mean:.3f} ± {of[d].std:.3f}" if d in of else "" for d in directions]
        end = [f"{of[last].worth:.2f}", duration(of[last].seconds)] if last in of else ["", ""]
        rows.append([method, *cells, *end])
    headers = ["family", *(f"D = {d}" for d in directions), "worth of a direction", "time"]
    return table(headers, rows)


def write_json(
    path: Path,
    results: Sequence[Result],
    machine: dict[str, str],
    options: dict[str, Any],
    cosines: Sequence[Cosine] = (),
) -> None:
    """Everything the tables were made of; a ratio without its base is null."""
    document = {
        "schema": SCHEMA,
        "machine": machine,
        "options": options,
        "results": [_plain(result) for result in results],
        "cosines": [_plain(cosine) for cosine in cosines],
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def _plain(record: Result | Cosine) -> dict[str, Any]:
    return _without_nan(dataclasses.asdict(record))


def _without_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """Put None, which JSON has, for NaN."""
    return {
        k: _without_nan(v) if isinstance(v, dict) else None if v != v else v
        for k, v in fields.items()
    }


def _result(fields: dict[str, Any]) -> Result:
    """Make a Result of what :func:`_plain` made of one."""
    sharing = fields.pop("sharing", None)
    result = Result(**{k: math.nan if v is None else v for k, v in fields.items()})
    if sharing is not None:
        result.sharing = Sharing(**{k: math.nan if v is None else v for k, v in sharing.items()})
    return result


def read_json(path: Path) -> tuple[list[Result], dict[str, str], list[Cosine]]:
    """What :func:`write_json` wrote: results, machine, cosines.

    Raises:
        ValueError: a file of another schema.
    """
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {document.get('schema')}")
    cosines = [Cosine(**row) for row in document["cosines"]]
    return [_result(row) for row in document["results"]], document["machine"], cosines


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_plot(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Multiples of the unperturbed forward, a panel for each view and a mark for each case.

    The optimizer, which is the same for all families, has no panel beside others.
    """
    plt = _pyplot()
    views = list(dict.fromkeys((r.suite, r.view) for r in results))
    views = [view for view in views if view[1] != "optimizer"] or views
    columns = min(2, len(views))
    lines = -(-len(views) // columns)
    most = max(len({r.method for r in results if (r.suite, r.view) == view}) for view in views)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(7 * columns, lines * (1.6 + 0.17 * most)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(views) :]:
        axis.set_visible(False)
    for axis, (suite, view) in zip(axes.flat, views, strict=False):
        members = [r for r in results if (r.suite, r.view) == (suite, view)]
        methods = list(dict.fromkeys(r.method for r in members))
        for i, case in enumerate(dict.fromkeys(r.case for r in members)):
            of_case = [r for r in members if r.case == case]
            base = [r.median_s / r.times_base for r in of_case]
            axis.errorbar(
                [r.times_base for r in of_case],
                [methods.index(r.method) for r in of_case],
                xerr=[
                    [(r.median_s - r.min_s) / b for r, b in zip(of_case, base, strict=True)],
                    [(r.max_s - r.median_s) / b for r, b in zip(of_case, base, strict=True)],
                ],
                fmt=MARKERS[i % len(MARKERS)],
                color="black",
                markerfacecolor=SHADES[i % len(SHADES)],
                markersize=5,
                elinewidth=0.6,
                label=case,
            )
        axis.set_xscale("log")
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.invert_yaxis()
        # Above the panel, where no mark can be.
        axis.legend(fontsize=6.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
        axis.set_ylabel(f"{suite}, {view}", fontsize=10)
        unit = "one process" if suite == "distributed" else "the unperturbed forward"
        axis.set_xlabel(f"times {unit} (median, min to max)", fontsize=8)
        axis.grid(color="0.85", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(machine_line(machine), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_variance_plot(path: Path, cosines: Sequence[Cosine], machine: dict[str, str]) -> None:
    """Cosine over directions, and over seconds: what a family is worth and what it costs."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    methods = list(dict.fromkeys(c.method for c in cosines))
    colours = plt.get_cmap("tab20").colors
    for i, method in enumerate(methods):
        of = [c for c in cosines if c.method == method]
        for axis, x in ((axes[0], [c.directions for c in of]), (axes[1], [c.seconds for c in of])):
            axis.errorbar(
                x,
                [c.mean for c in of],
                yerr=[c.std for c in of],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="--" if "draws of" in method else "-",
                color=colours[i % len(colours)],
                markersize=4,
                linewidth=1,
                label=method,
            )
    axes[0].set_xlabel("directions (antithetic pairs)")
    axes[1].set_xlabel("seconds of an estimate")
    axes[0].set_ylabel("cosine with the true gradient, mean and standard deviation")
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(color="0.85", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.supxlabel(machine_line(machine), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
