"""Results as a Markdown table, JSON and a plot."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.common import Result

SCHEMA = 1  # of the JSON file; raise it when a field changes its meaning
HEADERS = ("method", "time", "min - max", "times base", "over naive", "noise held")
# Told apart on a grey printer too; none so dark that the line from min to max is lost in it.
STYLES = (
    ("0.95", ""),
    ("0.95", "///"),
    ("0.75", ""),
    ("0.75", "..."),
    ("0.5", ""),
    ("0.5", "xxx"),
    ("0.65", "\\\\\\"),
    ("0.65", "+++"),
)


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    value = seconds * scale
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def size(count: int) -> str:
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


def _cells(result: Result) -> list[str]:
    return [
        result.method,
        duration(result.median_s),
        f"{duration(result.min_s)} - {duration(result.max_s)}",
        ratio(result.times_base),
        ratio(result.over_naive),
        size(result.noise_bytes),
    ]


def _machine_line(machine: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def markdown(results: Sequence[Result], machine: dict[str, str], notes: Sequence[str]) -> str:
    """One table per suite, view and case, with the machine above and the notes below."""
    parts = [_machine_line(machine)]
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.suite, result.view, result.case), []).append(result)
    for (suite, view, case), members in groups.items():
        table = tabulate(
            [_cells(member) for member in members],
            HEADERS,
            tablefmt="github",
            disable_numparse=True,
            colalign=("left", *["right"] * (len(HEADERS) - 1)),
        )
        parts.append(f"### {suite}, {view}: {case}\n\n{table}")
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_json(
    path: Path, results: Sequence[Result], machine: dict[str, str], options: dict[str, Any]
) -> None:
    """Everything the table was made of; a ratio without its base is null."""
    rows = [
        {k: None if v != v else v for k, v in dataclasses.asdict(result).items()}
        for result in results
    ]
    document = {"schema": SCHEMA, "machine": machine, "options": options, "results": rows}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_plot(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Bars of the medians on a logarithmic axis, a panel for each view, a group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    views = list(dict.fromkeys((r.suite, r.view) for r in results))
    methods = list(dict.fromkeys(r.method for r in results))
    figure, axes = plt.subplots(
        len(views), 1, figsize=(9, 3.2 * len(views)), squeeze=False, layout="constrained"
    )
    width = 0.8 / len(methods)
    for axis, (suite, view) in zip(axes[:, 0], views, strict=True):
        members = [r for r in results if (r.suite, r.view) == (suite, view)]
        cases = list(dict.fromkeys(r.case for r in members))
        for m, method in enumerate(methods):
            shade, hatch = STYLES[m % len(STYLES)]
            of_method = [r for r in members if r.method == method]
            places = [cases.index(r.case) + (m - (len(methods) - 1) / 2) * width for r in of_method]
            medians = [1e3 * r.median_s for r in of_method]
            spread = [
                [1e3 * (r.median_s - r.min_s) for r in of_method],
                [1e3 * (r.max_s - r.median_s) for r in of_method],
            ]
            axis.bar(
                places,
                medians,
                width,
                yerr=spread,
                label=method,
                color=shade,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.6,
                error_kw={"elinewidth": 0.8},
            )
        axis.set_yscale("log")
        axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
        axis.set_ylabel("ms (log scale)")
        axis.set_title(f"{suite}, {view}: median, bars from min to max", loc="left", fontsize=10)
        axis.grid(axis="y", color="0.85", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.supxlabel(_machine_line(machine), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
