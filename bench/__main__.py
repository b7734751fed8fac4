"""Command line of the benchmarks; tables go to standard output, progress to standard error."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import (
    conv,
    distributed,
    eggroll,
    linear,
    memory,
    models,
    nesgpu,
    network,
    pso,
    report,
    rl,
    variance,
    zeroth,
)
from bench.common import Options, Result, machine
from bench.variance import Cosine

SUITES: dict[str, Callable[[Options], tuple[list, list[str]]]] = {
    "linear": linear.run,
    "update": linear.run_update,
    "conv": conv.run,
    "eggroll": eggroll.run,
    "nesgpu": nesgpu.run,
    "network": network.run,
    "models": models.run,
    "memory": memory.run,
    "pso": pso.run,
    "rl": rl.run,
    "distributed": distributed.run,
    "variance": variance.run,
    "zeroth": zeroth.run,
}
# The suites that measure time, of what comes with the extra `bench`.
DEFAULT = [name for name in SUITES if name not in ("variance", "zeroth")]
VIEWS = ("forward", "step", "update", "optimizer", "strong", "weak")


def positive(text: str) -> int:
    """An integer above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def suite(text: str) -> str:
    if text not in (*SUITES, "all"):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(SUITES)}, all; got {text!r}")
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "suites",
        metavar="SUITE",
        type=suite,
        nargs="*",
        help=f"of {', '.join(SUITES)}; all; default: {', '.join(DEFAULT)}",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--view", choices=VIEWS, action="append", help="default: all of a suite")
    parser.add_argument("--full", action="store_true", help="more cases, rows and seeds")
    defaults = Options()
    parser.add_argument(
        "--sizes", type=positive, nargs="+", default=list(defaults.sizes), help="linear, update"
    )
    parser.add_argument("--batch", type=positive, default=defaults.batch, help="linear, update")
    parser.add_argument("--seconds", type=float, help="time of each row (default: 0.2; full: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times (png, svg, pdf)")
    parser.add_argument(
        "--plot-variance", type=Path, metavar="FILE", help="draw the cosines of suite variance"
    )
    parser.add_argument(
        "--plot-losses", type=Path, metavar="FILE", help="draw the losses of suite zeroth"
    )
    options = parser.parse_args(argv)
    if "all" in options.suites:
        options.suites = list(SUITES)
    options.suites = list(dict.fromkeys(options.suites)) or DEFAULT
    if options.seconds is None:
        options.seconds = 3.0 if options.full else 0.2
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no CUDA device")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen suites and reports."""
    chosen = parse(argv)
    started = time.perf_counter()

    def progress(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    options = Options(
        device=chosen.device,
        seconds=chosen.seconds,
        full=chosen.full,
        views=tuple(chosen.view) if chosen.view else None,
        sizes=tuple(chosen.sizes),
        batch=chosen.batch,
        progress=progress,
    )
    results: list[Result] = []
    cosines: list[Cosine] = []
    notes: list[str] = []
    for name in chosen.suites:
        rows, remarks = SUITES[name](options)
        (cosines if name == "variance" else results).extend(rows)
        notes += [remark for remark in remarks if remark not in notes]
    facts = machine(options.device)
    print(report.markdown(results, facts, notes, cosines))
    if chosen.json:
        given = vars(chosen).items()
        settings = {key: str(value) for key, value in given if not isinstance(value, Path)}
        report.write_json(chosen.json, results, facts, settings, cosines)
    if chosen.plot and results:
        report.write_plot(chosen.plot, results, facts)
    if chosen.plot_variance and cosines:
        report.write_variance_plot(chosen.plot_variance, cosines, facts)
    searches = [result for result in results if result.suite == "zeroth"]
    if chosen.plot_losses and searches:
        zeroth.write_plot(chosen.plot_losses, searches, facts)
    progress("done")


if __name__ == "__main__":
    main()
