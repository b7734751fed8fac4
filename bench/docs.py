"""Writes measured tables into pages: ``python -m bench.docs RESULTS.json [RESULTS.json ...]``.

A table stands between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``; what is between them is
replaced, in every page for all of whose tables the files have results. The files are what ``python
-m bench --save`` wrote. A suite that several of them hold is taken from the last, so that one suite
can come from an environment with other packages in it.
"""

from __future__ import annotations

import argparse
import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import distributed, files, plots, published, report, scaling, sidebyside
from bench.common import ROOT, Result
from bench.report import duration, ratio, table
from bench.variance import Cosine

BLOCK = re.compile(r"(<!-- bench: ([a-z]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("noise", "memory", "distributed", "scaling")),
    *(ROOT / "docs" / f"{name}.md" for name in ("optimizers", "howto/convert", "benchmarks")),
)
# In benchmarks.md, beside the published numbers that they belong to.
SCHEMES = ("torch sparse 1", "torch sparse 2", "torch permuted")
PUBLISHED_PLOT = ROOT / "docs" / "benchmarks.png"
VARIANCE_PLOT = ROOT / "docs" / "noise-variance.png"
Column = tuple[str, Callable[[Result], bool], Callable[[Result], str]]


class Measured:
    """The content of some JSON files, and the tables that can be made of it.

    Raises:
        ValueError: files of different machines.
    """

    def __init__(self, *paths: Path) -> None:
        self.names = [path.name for path in paths]
        self.results: list[Result] = []
        self.cosines: list[Cosine] = []
        self.facts: dict[str, str] = {}
        for path in paths:
            run = files.read_json(path)
            results, facts, cosines = run.results, run.machine, run.cosines
            self.facts = self.facts or facts
            if facts["cpu"] != self.facts["cpu"] or facts.get("gpu") != self.facts.get("gpu"):
                raise ValueError(
                    f"results must be of one machine, got {report.machine_line(self.facts)} and, "
                    f"in {path.name}, {report.machine_line(facts)}"
                )
            new = {result.suite for result in results}
            self.results = [r for r in self.results if r.suite not in new] + results
            self.cosines = cosines or self.cosines

    def _pivot(self, first: str, methods: Iterable[str], columns: Sequence[Column]) -> str:
        """A row for each method, and in a column the one result that it selects."""
        rows = []
        for method in methods:
            cells = []
            for _, wanted, text in columns:
                found = [r for r in self.results if r.method == method and wanted(r)]
                cells.append(text(found[0]) if found else "")
            rows.append([f"`{method}`" if "(" in method else method, *cells])
        return table([first, *(name for name, _, _ in columns)], rows)

    def _methods(self, suite: str, *left_out: str) -> list[str]:
        names = dict.fromkeys(r.method for r in self.results if r.suite == suite and r.timed)
        missing = [name for name in left_out if name in names]
        return [name for name in names if name not in missing]

    def machine(self) -> str:
        files = " and ".join(f"`bench/results/{name}`" for name in self.names)
        text = f"{report.machine_line(self.facts)}. All of it: {files}."
        return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)

    def costs(self) -> str:
        """One layer: multiples of the unperturbed forward."""

        def column(suite: str, view: str, size: int, rows: str) -> Column:
            case = f"{size}x{size}, {rows} "
            return (
                f"{view}, {size}",
                lambda r: (r.suite, r.view) == (suite, view) and r.case.startswith(case),
                lambda r: ratio(r.times_base),
            )

        columns = [column("linear", "forward", n, "R=1") for n in (256, 512, 1024)]
        columns += [column("linear", "step", n, "R=1") for n in (256, 1024)]
        columns += [column("update", "update", 1024, "R=1")]
        return self._pivot("noise", self._methods("linear", "Naive", "Loop", *SCHEMES), columns)

    def layer(self) -> str:
        """One layer of 1024 x 1024, the beginning of README.md: times."""

        def column(view: str) -> Column:
            wanted = ("linear", view)
            case = "1024x1024, R=1 "
            return (
                view,
                lambda r: (r.suite, r.view) == wanted and r.case.startswith(case),
                lambda r: duration(r.median_s),
            )

        held = ("noise held", column("step")[1], lambda r: report.size(r.noise_bytes))
        few = ("Naive", "Loop", "Sparse(2)", *SCHEMES, "LowRank(4)", "LowRank(1, 'rademacher')")
        shown = self._methods("linear", *few, "Permuted('both')", "SignFlip('both')")
        return self._pivot("noise", shown, [column("forward"), column("step"), held])

    def step(self) -> str:
        """A training step of the policy network beside other systems."""
        step = lambda r: (r.suite, r.view) == ("network", "step")  # noqa: E731
        columns: list[Column] = [
            ("step", step, lambda r: duration(r.median_s)),
            ("times base", step, lambda r: ratio(r.times_base)),
            ("noise held", step, lambda r: report.size(r.noise_bytes)),
        ]
        names = ("Base", "LowRank(1)", "Dense('rademacher')", "Dense('normal')")
        # In benchmarks.md, with all views.
        few = ("torch vmap", "torch loop", "EvoX VirtualLoRA, rank 4")
        methods = self._methods("network", "centred ranks, Adam", *few)
        shown = [m for m in methods if m in names or "(" not in m]
        return self._pivot("", shown, columns)

    def resnet(self) -> str:
        """The forward of whole models: times and multiples."""
        columns: list[Column] = []
        for case in dict.fromkeys(r.case for r in self.results if r.suite == "models"):
            wanted = lambda r, case=case: (  # noqa: E731
                (r.suite, r.view, r.case) == ("models", "forward", case)
            )
            short = case.split(",")[0]
            columns.append((f"{short}: forward", wanted, lambda r: duration(r.median_s)))
            columns.append((f"{short}: times base", wanted, lambda r: ratio(r.times_base)))
        return self._pivot("noise", self._methods("models"), columns)

    def swarm(self) -> str:
        """The move of a swarm of particles beside the same in plain torch."""
        columns: list[Column] = []
        for case in dict.fromkeys(r.case for r in self.results if r.suite == "pso"):
            wanted = lambda r, case=case: (  # noqa: E731
                (r.suite, r.view, r.case) == ("pso", "update", case)
            )
            columns.append((case, wanted, lambda r: duration(r.median_s)))
        return self._pivot("", ["PSO", "Naive"], columns)

    def network(self) -> str:
        """A training step of the policy network, and its parts."""

        def column(name: str, view: str, text: Callable[[Result], str]) -> Column:
            return name, lambda r: (r.suite, r.view) == ("network", view), text

        columns = [
            column("step", "step", lambda r: duration(r.median_s)),
            column("times base", "step", lambda r: ratio(r.times_base)),
            column("forward", "forward", lambda r: duration(r.median_s)),
            column("estimate", "update", lambda r: duration(r.median_s)),
            column("noise held", "step", lambda r: report.size(r.noise_bytes)),
        ]
        return self._pivot("noise", self._methods("network", "centred ranks, Adam"), columns)

    def eggroll(self) -> str:
        """Per cent of the throughput of pure inference."""

        def column(name: str, view: str, rows: str) -> Column:
            return (
                f"{view}, {name}",
                lambda r: (r.suite, r.view) == ("eggroll", view) and rows in r.case,
                lambda r: f"{100 / r.times_base:.0f} %",
            )

        sides = (("pairs", "R=2 "), ("R = 1", "R=1 "))
        columns = [column(name, view, r) for view in ("forward", "step") for name, r in sides]
        return self._pivot("noise", self._methods("eggroll", "Base"), columns)

    def nesgpu(self) -> str:
        """The table of the NESgpu paper: forward as multiples, update as time."""
        columns: list[Column] = []
        for view in ("forward", "update"):
            for case in dict.fromkeys(r.case for r in self.results if r.suite == "nesgpu"):
                wanted = lambda r, view=view, case=case: (  # noqa: E731
                    (r.suite, r.view, r.case) == ("nesgpu", view, case)
                )
                text = (
                    (lambda r: ratio(r.times_base))
                    if view == "forward"
                    else (lambda r: "" if r.method == "Base" else duration(r.median_s))
                )
                columns.append((f"{view}, {case.split(',')[0]}", wanted, text))
        return self._pivot("noise", self._methods("nesgpu"), columns)

    def peak(self) -> str:
        """A generation in one forward and in several: peak memory, and time as multiples."""
        columns: list[Column] = []
        for case in dict.fromkeys(r.case for r in self.results if r.suite == "memory"):
            wanted = lambda r, case=case: (r.suite, r.case) == ("memory", case)  # noqa: E731
            short = case.split(",")[0]
            columns.append((f"{short}: peak", wanted, lambda r: report.size(int(r.peak_bytes))))
            columns.append((f"{short}: time", wanted, lambda r: ratio(r.times_base)))
        return self._pivot("a generation in", self._methods("memory"), columns)

    def variance(self) -> str:
        """Cosine between estimate and gradient."""
        return report.variance_table(self.cosines)

    def published(self, entry: published.Table) -> str:
        """A published table beside what was measured here."""
        return sidebyside.markdown(entry, self.results)

    def _makers(self) -> dict[str, tuple[str, Callable[[], str]]]:
        """Name of a table -> the suite that it needs, and how it is made."""

        published_tables = {
            name: (entry.lines[0].suite, functools.partial(self.published, entry))
            for name, entry in published.TABLES.items()
        }

        def of(name: str, function: Callable[..., str], *more: object) -> tuple:
            return name, lambda: function(self.results, *more)

        return {
            "costs": ("linear", self.costs),
            "layer": ("linear", self.layer),
            "step": ("network", self.step),
            "resnet": ("models", self.resnet),
            "swarm": ("pso", self.swarm),
            "network": ("network", self.network),
            "eggroll": ("eggroll", self.eggroll),
            "nesgpu": ("nesgpu", self.nesgpu),
            "variance": ("variance", self.variance),
            "wire": of("distributed", distributed.wire_table),
            "strong": of("distributed", distributed.steps_table, "strong"),
            "weak": of("distributed", distributed.steps_table, "weak"),
            "rates": of("distributed", scaling.rates_table),
            "formula": of("distributed", scaling.formula_table),
            # From assumptions alone; beside the measured tables that their formulas are held to.
            "assumed": ("distributed", scaling.assumptions_table),
            "models": ("distributed", scaling.models_table),
            "traffic": ("distributed", scaling.traffic_table),
            "clusters": ("distributed", scaling.clusters_table),
            "crossover": ("distributed", scaling.crossover_table),
            "memory": ("distributed", scaling.memory_table),
            "peak": ("memory", self.peak),
            **published_tables,
        }

    def has(self, name: str) -> bool:
        """Whether there are results for the table of a name.

        Raises:
            ValueError: a name that is none.
        """
        makers = self._makers()
        if name == "machine":
            return bool(self.results or self.cosines)
        if name not in makers:
            names = ", ".join(["machine", *makers])
            raise ValueError(f"a block must be one of {names}, got {name!r}")
        suite = makers[name][0]
        return bool(self.cosines if suite == "variance" else self._methods(suite))

    def block(self, name: str) -> str:
        """The table of a name.

        Raises:
            ValueError: a name that is none, or a file that lacks its suite.
        """
        if not self.has(name):
            files = ", ".join(self.names)
            raise ValueError(f"{files} must hold results for the block {name!r}, got none")
        return self.machine() if name == "machine" else self._makers()[name][1]()


def update(page: str, measured: Measured) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: no block in the page, or one that cannot be made.
    """
    if not BLOCK.search(page):
        raise ValueError("the page must hold a block <!-- bench: NAME --> ... <!-- /bench -->")
    return BLOCK.sub(lambda m: f"{m[1]}{measured.block(m[2])}\n{m[3]}", page)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.docs", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--page", type=Path, help="default: all for which there are results")
    options = parser.parse_args(argv)
    measured = Measured(*options.results)
    pages = [options.page] if options.page else [p for p in PAGES if _can_make(p, measured)]
    if not pages:
        parser.error("the files hold the results of no page")
    for page in pages:
        page.write_text(update(page.read_text(), measured))
        print(f"wrote {page.name}")
    if any(page.stem == PUBLISHED_PLOT.stem for page in pages):
        run = files.Run(measured.results, measured.facts)
        plots.write_published(PUBLISHED_PLOT, run)
        print(f"wrote {PUBLISHED_PLOT.name}")
    if measured.cosines and not options.page:
        plots.write_variance(VARIANCE_PLOT, measured.cosines, measured.facts)
        print(f"wrote {VARIANCE_PLOT.name}")


def _can_make(page: Path, measured: Measured) -> bool:
    return all(measured.has(match[2]) for match in BLOCK.finditer(page.read_text()))


if __name__ == "__main__":
    main()
