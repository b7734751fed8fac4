"""Command line of the benchmarks; the table goes to standard output, progress to standard error."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import linear, report
from bench.common import Result, machine

SUITES = {"linear": linear.run}
VIEWS = ("forward", "step")


def positive(text: str) -> int:
    """An integer above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: every suite")
    parser.add_argument("--view", choices=VIEWS, action="append", help="default: both")
    parser.add_argument("--full", action="store_true", help="more cases, rows and repeats")
    parser.add_argument("--sizes", type=positive, nargs="+", default=list(linear.SIZES))
    parser.add_argument("--batch", type=positive, default=linear.BATCH, help="rows of every case")
    parser.add_argument("--seconds", type=float, help="time of each row (default: 0.3; full: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the results (png, svg, pdf)"
    )
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 3.0 if options.full else 0.3
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no CUDA device")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen suites and reports."""
    options = parse(argv)
    started = time.perf_counter()

    def progress(line: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    results: list[Result] = []
    notes: list[str] = []
    for name in options.suite or SUITES:
        rows, remarks = SUITES[name](
            options.device,
            tuple(options.view or VIEWS),
            options.seconds,
            options.full,
            tuple(options.sizes),
            options.batch,
            progress,
        )
        results += rows
        notes += remarks
    facts = machine(options.device)
    print(report.markdown(results, facts, notes))
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        report.write_json(options.json, results, facts, settings)
    if options.plot:
        report.write_plot(options.plot, results, facts)
    progress("done")


if __name__ == "__main__":
    main()
