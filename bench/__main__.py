"""Command line of the benchmarks; tables go to standard output, progress to standard error.

``python -m bench`` runs all suites that measure time, short ones first, and prints their tables,
beside published ones. ``python -m bench compare A.json B.json`` shows what moved between two runs.
A suite that fails does not stop the others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import (
    compare,
    conv,
    distributed,
    eggroll,
    files,
    linear,
    machine,
    memory,
    models,
    nesgpu,
    network,
    peers,
    plots,
    pso,
    report,
    rl,
    sidebyside,
    variance,
    zeroth,
)
from bench.common import FAILED, Options, failure
from bench.files import Run

# Short ones first.
SUITES: dict[str, Callable[[Options], tuple[list, list[str]]]] = {
    "network": network.run,
    "eggroll": eggroll.run,
    "update": linear.run_update,
    "conv": conv.run,
    "models": models.run,
    "memory": memory.run,
    "pso": pso.run,
    "rl": rl.run,
    "distributed": distributed.run,
    "nesgpu": nesgpu.run,
    "linear": linear.run,
    "zeroth": zeroth.run,
    "variance": variance.run,
}
# What a stranger would check; the others measure losses and angles besides.
DEFAULT = [name for name in SUITES if name not in ("variance", "zeroth")]
WITH_ROOFS = {"linear", "update", "conv", "eggroll", "nesgpu"}
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
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    parser.add_argument("--seconds", type=float, help="time of each row (default: 0.1; full: 3)")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="STEM",
        help="write STEM.json and STEM.md after every suite, and plots at the end",
    )
    parser.add_argument(
        "--peers",
        type=peers.interpreter,
        metavar="PYTHON",
        help="an interpreter with evox and evotorch, where this one lacks them",
    )
    parser.add_argument("--only-peers", action="store_true", help="their rows alone")
    parser.add_argument("--tf32", action="store_true", help="TF32 for float32 products on a GPU")
    options = parser.parse_args(argv)
    if "all" in options.suites:
        options.suites = list(SUITES)
    options.suites = list(dict.fromkeys(options.suites)) or DEFAULT
    options.suites = [name for name in SUITES if name in options.suites]
    if options.seconds is None:
        options.seconds = 3.0 if options.full else 0.1
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no CUDA device")
    return options


def run_suite(name: str, options: Options, run: Run, peers_python: Path | None) -> None:
    """Runs a suite and adds what it finds to the run; an error is kept there, too."""
    try:
        rows, remarks = SUITES[name](options)
        if peers_python and name in peers.SUITES and any(not row.timed for row in rows):
            try:
                others, run.machine["peers"] = peers.run_elsewhere(peers_python, name, options)
                rows = peers.merge(rows, others)
            except RuntimeError as error:
                run.errors[f"{name}, peers"] = str(error)
    except Exception as error:
        options.progress("".join(traceback.format_exception(error)))
        run.errors[name] = failure(error).removeprefix(FAILED)
        return
    (run.cosines if name == "variance" else run.results).extend(rows)
    run.notes += [remark for remark in remarks if remark not in run.notes]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the chosen suites and reports.

    Returns:
        The exit status: 1 if something failed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
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
        only_peers=chosen.only_peers,
        progress=progress,
    )
    if chosen.device.type == "cuda":
        if chosen.device.index is not None:
            torch.cuda.set_device(chosen.device)
        machine.set_tf32(chosen.tf32)
    paths = "save", "peers"  # of this machine; results are made to be committed
    settings = {k: str(v) for k, v in vars(chosen).items() if k not in paths}
    run = Run(machine=machine.machine(options.device), settings=settings)
    if chosen.only_peers:
        run.machine["peers"] = peers.versions()
    elif not WITH_ROOFS.isdisjoint(chosen.suites):
        progress("rates of the machine")
        run.roofs = machine.roofs(options.device)
    for name in chosen.suites:
        run_suite(name, options, run, chosen.peers)
        text = report.markdown(run, sidebyside.tables(run))
        if chosen.save:
            files.write_json(chosen.save.with_name(chosen.save.name + ".json"), run)
            chosen.save.with_name(chosen.save.name + ".md").write_text(text)
    print(text)
    if chosen.save:
        plots.write_all(chosen.save, run)
    progress("done" if not run.failed else "done, with failures: see the tables")
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
