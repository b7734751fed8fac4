"""What 64 and 1,024 GPUs would do: ``python -m bench.scaling RESULTS.json [RESULTS.json ...]``.

Prints the tables of docs/scaling.md, which ``python -m bench.docs`` writes there. The form of a
step's time (bench/cluster.py), and the bytes that travel, are held against a run of suite
``distributed``; the constants of a cluster are assumptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import files, report
from bench.cluster import ASSUMPTIONS, FAMILIES, MODELS, Cluster, assumed, crossover, step
from bench.common import Result
from bench.distributed import shared, sharing
from bench.report import duration, ratio, size, table


def assumptions_table() -> str:
    rows = [[a.what, a.text, a.kind, a.source] for a in ASSUMPTIONS.values()]
    return table(["what", "value", "kind", "source"], rows)


def models_table() -> str:
    names = {"fp32": "float32", "bf16": "bfloat16"}
    rows = [
        [
            m.name,
            f"{m.parameters:,.0f}",
            names[m.dtype],
            str(m.layers),
            f"{m.tokens:,}",
            f"{m.directions:,}",
        ]
        for m in MODELS
    ]
    headers = ["model", "parameters", "dtype", "linear layers", "tokens a member", "D (pairs)"]
    return table(headers, rows)


def rates_table(results: Sequence[Result]) -> str:
    """Measured, one thread: what a direction costs, and elements of an estimate a second."""
    rows = []
    for case, of in shared(results, "strong").items():
        alone, s = of[1, "full"], sharing(of[1, "full"])
        rest = (alone.median_s - s.estimate_s) / s.directions
        rate = s.directions * s.parameters / s.estimate_s
        rows.append(
            [_name(case), duration(rest), duration(s.estimate_s / s.directions), f"{rate:.2g}"]
        )
    headers = ["model, noise, population", "step without estimate", "estimate", "elements / s"]
    return table(headers, rows)


def formula_table(results: Sequence[Result], processes: int = 2) -> str:
    """The form of a step's time, from one process and the exchanges, beside measured steps."""
    rows = []
    for case, of in shared(results, "strong").items():
        if (processes, "sharded") not in of:
            continue
        alone = of[1, "full"]
        estimate = sharing(alone).estimate_s
        full, sharded = of[processes, "full"], of[processes, "sharded"]
        waits = {way: sharing(of[processes, way]).transfer_s for way in ("full", "sharded")}
        expected_full = (alone.median_s - estimate) / processes + estimate + waits["full"]
        expected_sharded = alone.median_s / processes + waits["sharded"]
        each = estimate / sharing(alone).directions * (1 - 1 / processes)
        even = max(0.0, waits["sharded"] - waits["full"]) / each
        rows.append(
            [
                _name(case),
                duration(expected_full),
                f"{duration(full.median_s)} ({ratio(full.median_s / expected_full)})",
                duration(expected_sharded),
                f"{duration(sharded.median_s)} ({ratio(sharded.median_s / expected_sharded)})",
                f"{even:,.0f}",
                sharing(full).auto,
            ]
        )
    headers = ["model, noise, population", "full: formula", "measured", "sharded: formula"]
    headers += ["measured", "D up to which full pays", "auto takes"]
    return table(headers, rows)


def _name(case: str) -> str:
    model, rest = case.split(", ", 1)
    family, population = rest.rsplit(", ", 1)
    return f"{model}, `{family}`, {population}"


def traffic_table() -> str:
    """Payload of a GPU and step, and how long it takes."""
    rows = []
    for model in MODELS:
        for gpus in (64, 1024):
            wide, narrow = Cluster(gpus), Cluster(gpus, adapters=1)
            losses = 2 * model.directions * 4
            rows.append(
                [
                    model.name,
                    f"{gpus:,}",
                    size(losses / gpus),
                    duration(wide.all_gather(losses)),
                    size(model.nbytes),
                    duration(wide.all_reduce(model.nbytes)),
                    duration(narrow.all_reduce(model.nbytes)),
                ]
            )
    headers = ["model", "GPUs", "losses", "all-gather", "estimate", "all-reduce"]
    return table([*headers, "with 1 adapter a node"], rows)


def clusters_table() -> str:
    """A step of every model and family, both ways."""
    rows = []
    for model in MODELS:
        for family in FAMILIES:
            for gpus in (64, 1024):
                s = step(model, family, Cluster(gpus))
                alone = step(model, family, Cluster(1))
                best = min(s.with_full, s.with_sharded)
                rows.append(
                    [
                        f"{model.name}, `{family}`",
                        f"{gpus:,}",
                        duration(s.forward),
                        duration(s.full),
                        duration(s.with_full),
                        f"{duration(s.part)} + {duration(s.add_up)}",
                        duration(s.with_sharded),
                        "full" if s.with_full <= s.with_sharded else "sharded",
                        f"{alone.with_full / best / gpus:.0%}",
                    ]
                )
    headers = ["model, noise", "GPUs", "forward", "estimate, full", "step, full"]
    headers += ["estimate, sharded", "step, sharded", "take", "efficiency"]
    return table(headers, rows)


def crossover_table() -> str:
    """Directions up to which "full" pays."""
    rows = []
    for model in MODELS:
        for gpus in (8, 64, 1024):
            for adapters in (8, 1) if gpus > 8 else (8,):
                cluster = Cluster(gpus, adapters)
                cells = [f"{crossover(model, family, cluster):,.0f}" for family in FAMILIES]
                between = "" if gpus == 8 else str(adapters)
                rows.append([model.name, f"{gpus:,}", between, *cells])
    headers = ["model", "GPUs", "adapters a node", *(f"`{family}`" for family in FAMILIES)]
    return table(headers, rows)


def memory_table() -> str:
    """What a GPU holds beside activations, which `chunk` bounds."""
    rows = []
    for model in MODELS:
        held = 4 * model.nbytes
        most = held + 2 * model.nbytes
        fits = "yes" if most < assumed("memory") else "no"
        cells = [2 * model.nbytes, 2 * model.nbytes, held, most]
        rows.append([model.name, *(size(cell) for cell in cells), fits])
    headers = ["model", "parameters, estimate", "Adam", "full", "sharded, at its peak"]
    return table([*headers, "fits"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    options = parser.parse_args(argv)
    results: list[Result] = []
    for path in options.results:
        run = files.read_json(path)
        found, facts = run.results, run.machine
        results += [r for r in found if r.suite == "distributed"]
        print(f"{path.name}: {report.machine_line(facts)}\n")
    if not results:
        parser.error("the files must hold results of suite distributed, got none")
    for title, text in (
        ("Measured, 1 thread: a direction", rates_table(results)),
        ("Measured, 2 processes", formula_table(results)),
        ("Assumed", assumptions_table()),
        ("Models", models_table()),
        ("Payload of a step and GPU", traffic_table()),
        ("Steps", clusters_table()),
        ("Directions up to which full pays", crossover_table()),
        ("Memory of a GPU", memory_table()),
    ):
        print(f"### {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
