"""Suite ``distributed``: one population over 1, 2 and 4 processes of this machine, 1 thread each.

A step is all of training: noise, forward, cross entropy, centred ranks, estimate, SGD. gloo joins
the processes over the loopback device. Views:

strong    the population stays, and each process has less of it: ideal is 1 / processes
weak      each process keeps as many directions: ideal is the time of one process

Rows: 1 process, which exchanges nothing, and for 2 and 4 the two ways to the estimate
(``estimate=`` of NES). Before anything is timed, processes must give the parameters of one, bit for
bit.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.common import Options, Result, Sharing
from bench.report import duration, ratio, size, table
from perturbed import Dense, LowRank
from perturbed.noise import NoiseFamily

WORLDS = (1, 2, 4)
MODELS = {"51k": (784, 64, 10), "1M": (512, 1024, 512)}  # widths, by number of parameters
FAMILIES: tuple[NoiseFamily, ...] = (Dense(), Dense("rademacher"), LowRank(1))
TIMEOUT_S = 300.0  # of a meeting of the processes: the slowest row of the slowest machine
NOTES = [
    "distributed: gloo over loopback, 1 thread a process; 4 processes share the cores of this "
    f"machine ({os.cpu_count()}), and where they are fewer than 4 that is not what 4 machines do.",
    "distributed: time in exchanges includes waiting for slower processes; exchanges alone do not. "
    "Payload is what a process gives to exchanges, on the wire what it sent through the loopback "
    "device, headers and acknowledgements included: bytes of all processes divided by their "
    "number, least of the rounds; empty where others used the device.",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its noise and its population.

    Attributes:
        view: "strong" or "weak".
        model: what tables call it.
        widths: of its linear layers; tanh between them.
        noise: the family of all layers.
        directions: of the population; of each process in view weak.
        examples: that every member sees.
    """

    view: str
    model: str
    widths: tuple[int, ...]
    noise: NoiseFamily
    directions: int
    examples: int = 8

    def population(self, processes: int) -> int:
        """Directions of all processes together."""
        return self.directions * (processes if self.view == "weak" else 1)

    def __str__(self) -> str:
        share = " a process" if self.view == "weak" else ""
        return f"{self.model}, {self.noise!r}, D={self.directions}{share}"


def cases(options: Options) -> list[Case]:
    """Every model with every family; the weak ones with a quarter of the directions."""
    directions = {"51k": 512, "1M": 64}
    return [
        Case(view, model, widths, noise, directions[model] // (4 if view == "weak" else 1))
        for view in options.chosen(("strong", "weak"))
        for model, widths in MODELS.items()
        for noise in FAMILIES
    ]


def run(
    options: Options, chosen: Sequence[Case] | None = None, worlds: Sequence[int] = WORLDS
) -> tuple[list[Result], list[str]]:
    """Run the suite; returns its results, and remarks."""
    if options.device.type != "cpu":
        return [], ["distributed: left out; it measures processes on the CPUs of one machine."]
    chosen = cases(options) if chosen is None else list(chosen)
    return launch(options, chosen, worlds) if chosen else [], NOTES


def launch(options: Options, chosen: list[Case], worlds: Sequence[int]) -> list[Result]:
    """Start the processes, have them measure, and collect what the first one says.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; the others are stopped.
    """
    from bench.processes import work  # which needs what is above

    context = torch.multiprocessing.get_context("spawn")
    most = max(worlds)
    meeting, numbers = context.Barrier(most), context.Array("d", 2 * most)
    said = context.SimpleQueue()
    results: list[Result] = []

    def listen() -> None:
        while not said.empty():
            item = said.get()
            if isinstance(item, str):
                options.progress(item)
            else:
                results.extend(item)

    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder).as_posix()}/store"
        arguments = (store, meeting, numbers, said, chosen, tuple(worlds), options.seconds)
        with _environment(OMP_NUM_THREADS="1", **_loopback()):
            running = torch.multiprocessing.spawn(work, arguments, most, join=False)
        while not running.join(timeout=0.1):
            listen()
    listen()
    return results


class _environment:
    """Environment variables for processes that are started in a block."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *error: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _loopback() -> dict[str, str]:
    """Have gloo take the loopback device, which the host's name need not lead to."""
    found = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": found[0]} if found else {}


# ---- tables of docs/distributed.md ---------------------------------------------------------------


def shared(results: Sequence[Result], view: str) -> dict[str, dict[tuple[int, str], Result]]:
    """Results of a view: case -> (processes, estimate) -> result."""
    found: dict[str, dict[tuple[int, str], Result]] = {}
    for result in results:
        if result.sharing is not None and result.view == view:
            key = result.sharing.processes, result.sharing.estimate
            found.setdefault(result.case, {})[key] = result
    return found


def sharing(result: Result) -> Sharing:
    """What is known of a result of this suite.

    Raises:
        ValueError: a result of another suite.
    """
    if result.sharing is None:
        raise ValueError(f"result must be of suite distributed, got suite {result.suite}")
    return result.sharing


def expected_bytes(s: Sharing) -> int:
    """Payload of a step and process: float32 losses of its members, and sums of the estimate."""
    losses = 2 * -(-s.directions // s.processes) * 4
    return losses + (4 * s.parameters if s.estimate == "sharded" else 0)


def wire_table(results: Sequence[Result]) -> str:
    """Bytes of a step and process; those of the first family, as noise does not travel."""
    rows = []
    seen = set()
    for rows_of_case in shared(results, "strong").values():
        for (processes, estimate), result in rows_of_case.items():
            s = sharing(result)
            key = s.parameters, s.directions, processes, estimate
            if processes == 1 or key in seen:
                continue
            seen.add(key)
            wire = "" if s.wire_bytes != s.wire_bytes else size(s.wire_bytes)
            rows.append(
                [
                    f"{s.parameters:,} parameters, {s.directions} pairs",
                    str(processes),
                    f'`"{estimate}"`',
                    f"{expected_bytes(s):,}",
                    f"{s.payload_bytes:,.0f}",
                    wire,
                ]
            )
    headers = ["model, population", "processes", "estimate", "formula", "payload", "on the wire"]
    return table(headers, rows)


def steps_table(results: Sequence[Result], view: str) -> str:
    """Step times as multiples of one process, with the share of exchanges in parentheses."""
    found = shared(results, view)
    keys = list(dict.fromkeys(key for rows in found.values() for key in rows))
    several = [key for key in keys if key[0] > 1]
    worlds = list(dict.fromkeys(processes for processes, _ in several))
    rows = []
    for case, of in found.items():
        model, family, population = case.split(", ", 1)[0], *case.split(", ", 1)[1].rsplit(", ", 1)
        cells = [f"{model}, `{family}`, {population}", duration(of[1, "full"].median_s)]
        for key in several:
            r = of[key]
            share = sharing(r).exchange_s / r.median_s
            cells.append(f"{ratio(r.times_base)} ({share:.0%})")
        autos = [f"{n}: {sharing(of[n, 'full']).auto}" for n in worlds]
        rows.append([*cells, ", ".join(autos)])
    headers = [f"{processes}, {estimate}" for processes, estimate in several]
    return table(["model, noise, population", "1 process", *headers, "auto takes"], rows)
