"""Results as Markdown tables; bench/plots.py draws them, bench/files.py writes them as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tabulate import tabulate

from bench import goals, roofline
from bench.common import Result, Sharing
from bench.files import Run
from bench.variance import Cosine


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits; nothing where there is no time."""
    if math.isnan(seconds):
        return ""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    value = seconds * scale
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def size(count: float) -> str:
    """Bytes in decimal units, as memory vendors and NESgpu's tables count."""
    value = float(count)
    if math.isnan(value):
        return ""
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


def percent(share: float) -> str:
    """A share in whole per cent; nothing where there is none."""
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


Columns = dict[str, Callable[[Result], str]]


def _columns(suite: str, members: Sequence[Result], run: Run) -> Columns:
    """Headers and cells of a suite's tables; ratios where there is something to relate to."""
    columns: Columns = {
        "method": lambda r: r.method,
        "time": lambda r: duration(r.median_s),
        "min - max": lambda r: f"{duration(r.min_s)} - {duration(r.max_s)}" if r.timed else "",
    }
    if suite == "distributed":
        return columns | _sharing_columns() | _reasons(members)
    if any(not math.isnan(member.replay_s) for member in members):
        columns["replayed"] = lambda r: duration(r.replay_s)
    columns["times base"] = lambda r: ratio(r.times_base)
    if suite == "eggroll":  # the paper's unit
        columns["% of base"] = lambda r: percent(1 / r.times_base)
    if not all(math.isnan(member.over_naive) for member in members):
        columns["over naive"] = lambda r: ratio(r.over_naive)
    if suite == "rl":
        columns["env steps/s"] = lambda r: f"{r.steps_per_s:,.0f}" if r.timed else ""
        columns["policy's share"] = lambda r: percent(r.policy_share)
    if suite == "zeroth":
        columns["evaluations/s"] = lambda r: f"{1 / r.median_s:,.0f}"
        return columns | {"loss": lambda r: f"{r.best_loss:.4g}"}
    if suite == "memory":
        columns["peak memory"] = lambda r: size(r.peak_bytes)
    else:
        columns["noise held"] = lambda r: size(r.noise_bytes) if r.timed else ""
    return columns | _limits(members, run) | _reasons(members)


def _limits(members: Sequence[Result], run: Run) -> Columns:
    """How near a row is to what the machine can do, and to what we want of it."""
    columns: Columns = {}
    if run.roofs and any(member.work for member in members):
        columns["of the roof"] = lambda r: roofline.text(r, run.roofs)
        if any(member.work and member.work.normals + member.work.signs for member in members):
            columns["random words/s"] = roofline.words_text
    wanted = goals.verdicts(run.results, run.on_gpu)
    if any(member.key in wanted for member in members):
        columns["goal"] = lambda r: wanted.get(r.key, "")
    return columns


def _reasons(members: Sequence[Result]) -> Columns:
    if not any(member.reason for member in members):
        return {}
    return {"remark": lambda r: r.reason.replace("|", "/")}


def _sharing_columns() -> Columns:
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


def roofs_line(roofs: dict[str, float]) -> str:
    """The rates of the machine, in one line."""
    units = {"copy": "B/s", "normals": "/s", "signs": "/s"}
    return ", ".join(
        f"{name} {rate:.2g} {units.get(name, 'FLOP/s')}" for name, rate in roofs.items()
    )


def markdown(run: Run, tables: Sequence[str] = ()) -> str:
    """One table per suite, view and case, with the machine above and the notes below.

    Args:
        run: what was measured.
        tables: further ones, Markdown, which come first.
    """
    parts = [machine_line(run.machine)]
    if run.roofs:
        parts.append(f"Measured rates: {roofs_line(run.roofs)}.")
    parts += [f"**{suite} failed**: {error}" for suite, error in run.errors.items()]
    parts += tables
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in run.results:
        groups.setdefault((result.suite, result.view, result.case), []).append(result)
    for (suite, view, case), members in groups.items():
        columns = _columns(suite, members, run)
        cells = [[cell(member) for cell in columns.values()] for member in members]
        parts.append(f"### {suite}, {view}: {case}\n\n{table(list(columns), cells)}")
    if run.cosines:
        parts.append(
            "### variance: cosine between estimate and gradient\n\n" + variance_table(run.cosines)
        )
    parts.append("\n".join(f"- {note}" for note in run.notes))
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
