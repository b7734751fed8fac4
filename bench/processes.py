"""What a process of suite ``distributed`` does: build, compare, and measure in step with others.

All processes go through the same cases and rows. Those that a row has no use for wait, as all do
between two measurements, at a barrier of the operating system, which sends nothing over a wire.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import Result, Sharing, assert_close
from bench.distributed import TIMEOUT_S, Case
from bench.ours import SIGMA
from bench.timing import FAST_S
from perturbed import NES, PerturbedModel, convert

LEAST_ROUNDS = 3
LEARNING_RATE = 0.01
IDLE_S = 0.02  # of the look at what others send over the loopback device
QUIET = 0.05  # part of the bytes that may be theirs


def work(
    rank: int,
    store: str,
    meeting: Any,
    numbers: Any,
    said: Any,
    cases: Sequence[Case],
    worlds: Sequence[int],
    seconds: float,
) -> None:
    """Measure all cases; the first process says the results.

    Args:
        rank: of this process.
        store: URL of the file by which torch.distributed brings them together.
        meeting: barrier of all processes.
        numbers: two for each process: seconds of a step, and of those the ones in exchanges.
        said: queue for lists of results, and for lines of text before each case.
        cases: what to measure.
        worlds: numbers of processes to compare.
        seconds: time of each row.
    """
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store, timeout, max(worlds), rank)
    # Made by all processes, those outside a group included.
    groups = {n: dist.new_group(range(n)) for n in worlds if n > 1}
    team = Team(rank, meeting, numbers, groups)
    try:
        for case in cases:
            if rank == 0:
                said.put(f"distributed, {case.view}: {case}")
            check(team, case, worlds)
            rows = [Row(team, case, n, way) for n, way in ways(worlds)]
            measure(rows, seconds)
            autos = {n: team.choice(case, n) for n in worlds}
            found = [row.result(autos[row.processes]) for row in rows]
            if rank == 0:
                base = found[0].median_s
                for result in found:
                    result.times_base = result.median_s / base
                said.put(found)
        team.meet()
    finally:
        dist.destroy_process_group()


def ways(worlds: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Every number of processes with every way to the estimate; one process has only one."""
    for n in worlds:
        yield n, "full"
        if n > 1:
            yield n, "sharded"


class Team:
    """The processes, as one of them sees them.

    Args:
        rank: of this one.
        meeting: barrier of all.
        numbers: shared array, two numbers for each.
        groups: those of torch.distributed, by their number of processes.
    """

    def __init__(
        self, rank: int, meeting: Any, numbers: Any, groups: dict[int, dist.ProcessGroup]
    ) -> None:
        self.rank, self.meeting, self.numbers, self.groups = rank, meeting, numbers, groups

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.meeting.wait(TIMEOUT_S)

    def exchange(self, first: float, second: float) -> list[tuple[float, float]]:
        """Return what every process gave; all are here when it returns."""
        self.numbers[2 * self.rank], self.numbers[2 * self.rank + 1] = first, second
        self.meet()
        given = list(self.numbers)
        self.meet()  # before anyone writes again
        return list(zip(given[::2], given[1::2], strict=True))

    def build(
        self, case: Case, processes: int, estimate: str, chunk: int | None = None
    ) -> Training | None:
        """Return the training that this process has a part in, if it has."""
        if self.rank >= processes:
            return None
        return Training(case, processes, estimate, chunk, self.groups.get(processes, False))

    def choice(self, case: Case, processes: int) -> str:
        """Return what ``estimate="auto"`` chooses."""
        training = self.build(case, processes, "auto") if processes > 1 else None
        if training is not None:
            training.step()
        self.meet()
        return training.nes.evaluation.estimate if training is not None else ""


class Training:
    """A model in training: the same in all processes, and for any number of them."""

    def __init__(
        self,
        case: Case,
        processes: int,
        estimate: str,
        chunk: int | None,
        group: dist.ProcessGroup | bool,
    ) -> None:
        widths = case.widths
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.Tanh()]
            net = nn.Sequential(*layers[:-1])
            self.x = torch.randn(case.examples, widths[0])
            self.labels = torch.randint(widths[-1], (case.examples,))
        population = case.population(processes)
        convert(net, population, case.noise)
        self.pm = PerturbedModel(net, population, True, SIGMA)
        sgd = torch.optim.SGD(net.parameters(), LEARNING_RATE)
        self.nes = NES(self.pm, sgd, chunk=chunk, distributed=group, estimate=estimate)
        self.exchanges, self.estimates = Watch(), Watch()
        evaluation: Any = self.nes.evaluation
        evaluation.set_grad = self.estimates.around(evaluation.set_grad)
        if evaluation.processes is not None:
            inner = evaluation.processes._exchange  # the one place through which all bytes go
            evaluation.processes._exchange = self.exchanges.around(inner)

    def closure(self) -> Tensor:
        scores = self.pm(self.pm.replicate(self.x))
        labels = self.pm.replicate(self.labels).full()
        return F.cross_entropy(scores, labels, reduction="none")

    def step(self) -> float:
        return float(self.nes.step(self.closure))

    def gradient(self) -> Tensor:
        parts = [p.grad for p in self.pm.parameters()]
        return torch.cat([part.flatten() for part in parts if part is not None])

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.pm.parameters()])


class Watch:
    """Adds up the seconds in a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def check(team: Team, case: Case, worlds: Sequence[int]) -> None:
    """Compare several processes with one, in forwards of one shape.

    Raises:
        AssertionError: what :func:`compare` raises.
    """
    for n, estimate in ways(worlds):
        if n == 1:
            continue
        chunk = max(1, case.population(n) // max(worlds))
        several = team.build(case, n, estimate, chunk)
        alone = Training(case, n, "full", chunk, False) if team.rank == 0 else None
        # Sums over shares differ in their last bits; after a step losses do, and then their ranks.
        for step in range(2 if estimate == "full" else 1):
            loss = several.step() if several else None
            if alone is not None and several is not None:
                what = f"{case}, {n} processes, {estimate}, step {step}"
                compare(what, (loss, several), (alone.step(), alone), exact=estimate == "full")
        team.meet()


def compare(
    what: str, several: tuple[Any, Training], alone: tuple[Any, Training], exact: bool
) -> None:
    """Compare losses, estimates and parameters after a step.

    Raises:
        AssertionError: other losses; parameters with other bits or, unless ``exact``, an estimate
            that is not close.
    """
    (loss, shared), (expected, own) = several, alone
    if loss != expected:
        raise AssertionError(f"{what}: the loss {loss} differs from one process's, {expected}")
    assert_close(shared.gradient(), own.gradient(), f"{what}, estimate", 1e-5)
    if exact and not torch.equal(shared.parameters(), own.parameters()):
        raise AssertionError(f"{what}: parameters have other bits than one process's")


class Row:
    """One number of processes with one way to the estimate, and what was measured of it."""

    def __init__(self, team: Team, case: Case, processes: int, estimate: str) -> None:
        self.team, self.case, self.processes, self.estimate = team, case, processes, estimate
        self.training = team.build(case, processes, estimate)
        self.steps = 1  # of a burst
        self.samples: list[float] = []
        self.exchange: list[float] = []
        self.estimate_s: list[float] = []
        self.wire: list[float] = []
        self.payload = 0.0

    def warm_up(self) -> None:
        """Take steps that are not counted, and learn how many make a burst."""
        self._burst(1)
        seconds = self._burst(2)
        self.steps = max(1, min(50, int(2 * FAST_S / max(seconds, 1e-6))))
        for kept in (self.samples, self.exchange, self.estimate_s, self.wire):
            kept.clear()

    def measure(self) -> None:
        """Time a burst of steps, by the slowest process."""
        self._burst(self.steps)

    def _burst(self, steps: int) -> float:
        team, training = self.team, self.training
        taken = waited = estimated = payload = 0.0
        team.meet()
        start = loopback_bytes()
        if training is not None:
            processes = training.nes.evaluation.processes
            training.exchanges.seconds = training.estimates.seconds = 0.0
            before = processes.bytes if processes else 0
            begin = time.perf_counter()
            for _ in range(steps):
                training.step()
            taken = (time.perf_counter() - begin) / steps
            waited = training.exchanges.seconds / steps
            estimated = training.estimates.seconds / steps
            payload = ((processes.bytes if processes else 0) - before) / steps
        given = team.exchange(taken, waited)[: self.processes]
        sent = loopback_bytes() - start
        if team.rank == 0:
            time.sleep(IDLE_S)  # the others wait in the next meeting
        others = (loopback_bytes() - start - sent) / IDLE_S
        slowest = max(seconds for seconds, _ in given)
        self.samples.append(slowest)
        self.exchange.append(statistics.fmean(seconds for _, seconds in given))
        self.estimate_s.append(estimated)
        self.payload = payload
        if self.processes > 1 and others * slowest * steps <= QUIET * sent:
            self.wire.append(sent / steps / self.processes)
        return slowest

    def transfer(self) -> float:
        """Return the median seconds of a step's exchanges alone, by the slowest process."""
        samples = []
        training = self.training
        processes = training.nes.evaluation.processes if training is not None else None
        for _ in range(5):
            taken = 0.0
            self.team.meet()
            if training is not None and processes is not None:
                split = training.nes.evaluation.split
                losses = torch.zeros(2, split.count)
                sums = [torch.zeros_like(p) for p in training.pm.parameters()]
                dist.barrier(self.team.groups[self.processes])
                begin = time.perf_counter()
                for _ in range(self.steps):
                    processes.gather(losses, split.sizes)
                    if self.estimate == "sharded":
                        processes.add_up(sums)
                taken = (time.perf_counter() - begin) / self.steps
            samples.append(max(s for s, _ in self.team.exchange(taken, 0.0)))
        return statistics.median(samples)

    def result(self, auto: str) -> Result:
        """Return what was measured; only the first process has all of it."""
        transfer = self.transfer()
        training = self.training
        name = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return Result(
            suite="distributed",
            view=self.case.view,
            case=str(self.case),
            method=name if self.processes == 1 else f"{name}, {self.estimate}",
            median_s=statistics.median(self.samples),
            min_s=min(self.samples),
            max_s=max(self.samples),
            repeats=len(self.samples),
            noise_bytes=0,
            sharing=Sharing(
                processes=self.processes,
                estimate=self.estimate,
                directions=self.case.population(self.processes),
                parameters=len(training.parameters()) if training else 0,
                estimate_s=statistics.median(self.estimate_s),
                exchange_s=statistics.median(self.exchange),
                transfer_s=transfer,
                payload_bytes=self.payload,
                wire_bytes=min(self.wire, default=float("nan")),
                auto=auto,
            ),
        )


def measure(rows: Sequence[Row], seconds: float) -> None:
    """Time the rows in turn, until each has had its share of time.

    All processes know the same times and stop at the same round.
    """
    for row in rows:
        row.warm_up()
    pending = list(rows)
    while pending:
        for row in pending:
            row.measure()
        pending = [
            row
            for row in pending
            if len(row.samples) < LEAST_ROUNDS or sum(row.samples) * row.steps < seconds
        ]


def loopback_bytes() -> float:
    """Bytes that this machine has sent through its loopback device; NaN where nobody counts."""
    try:
        for line in Path("/proc/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == "lo":
                return float(counters.split()[8])  # the ninth: transmitted
    except OSError:
        pass
    return float("nan")
