"""Timing that can be trusted on a shared machine, and what a measurement needs to be read later.

Rows of one case are timed in turn (A B C A B C ...), so that a slow minute of the machine hits all
of them; medians are compared and the extremes printed. A row checks its result before it is timed.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import perturbed

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
FAST_S = 0.02  # calls below this are timed in bursts, after one call that warms the caches


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks of a suite.

    Attributes:
        device: Where the work runs.
        seconds: Time of each row of each case.
        full: More cases, rows and seeds.
        views: Views to time; None for all that a suite has.
        sizes: Features of the square layers in the suites ``linear`` and ``update``.
        batch: Rows B of their cases.
        progress: Called with a line of text before each case.
    """

    device: torch.device = CPU
    seconds: float = 0.3
    full: bool = False
    views: tuple[str, ...] | None = None
    sizes: tuple[int, ...] = (256, 512, 1024)
    batch: int = 1024
    progress: Callable[[str], None] = lambda _: None

    def chosen(self, views: Sequence[str]) -> list[str]:
        """Those of a suite's views that are asked for."""
        return [view for view in views if self.views is None or view in self.views]


@dataclasses.dataclass
class Row:
    """One way to do the work of a case.

    Attributes:
        name: What the table calls it.
        call: The timed work, on inputs that exist already.
        check: Raises AssertionError if ``call`` does not compute what it should.
        noise_bytes: Bytes of noise held between drawing it and its last use.
        scale: Multiplies the time, for work of which ``call`` does only a part.
    """

    name: str
    call: Callable[[], object]
    check: Callable[[], None]
    noise_bytes: int
    scale: float = 1.0


@dataclasses.dataclass
class Sharing:
    """What a step costs that several processes share, suite ``distributed``.

    Attributes:
        processes: how many.
        estimate: how they come by the estimate: "full" or "sharded".
        directions: of all processes together.
        parameters: of the model.
        estimate_s: of the step, seconds in the estimate, exchange included.
        exchange_s: of the step, seconds in exchanges, with the wait for slower processes.
        transfer_s: of the same exchanges one after the other, when nobody waits.
        payload_bytes: what a process gives to exchanges in a step.
        wire_bytes: what a process sends in a step, headers included; NaN where that cannot be told.
        auto: what ``estimate="auto"`` chose for as many processes.
    """

    processes: int
    estimate: str
    directions: int
    parameters: int
    estimate_s: float
    exchange_s: float
    transfer_s: float
    payload_bytes: float
    wire_bytes: float
    auto: str


@dataclasses.dataclass
class Result:
    """Seconds of one row of one case, with the case's labels. JSON holds exactly these fields.

    Attributes:
        steps_per_s: environment steps, suite ``rl``; NaN elsewhere.
        policy_share: of the time, suite ``rl``; NaN elsewhere.
        sharing: suite ``distributed``; None elsewhere.
        peak_bytes: memory taken at the peak, suite ``memory``; NaN elsewhere.
        best_loss: lowest that a search saw, suite ``zeroth``; NaN elsewhere.
    """

    suite: str
    view: str
    case: str
    method: str
    median_s: float
    min_s: float
    max_s: float
    repeats: int
    noise_bytes: int
    times_base: float = float("nan")
    over_naive: float = float("nan")
    steps_per_s: float = float("nan")
    policy_share: float = float("nan")
    sharing: Sharing | None = None
    peak_bytes: float = float("nan")
    best_loss: float = float("nan")


class Clock:
    """Seconds of one call. On CUDA by events, with a cold L2 cache as in a real training step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_rows(
    rows: Sequence[Row], device: torch.device, seconds: float, min_repeats: int = 3
) -> list[list[float]]:
    """Times every row, in turn, until each has had its share of time.

    Args:
        rows: What to time; each is checked first, which also warms it up.
        device: Where the work runs.
        seconds: Time after which a row is done, once it has its repeats.
        min_repeats: Fewest samples of a row. One that takes longer than ``seconds`` gets 2.

    Returns:
        The samples of each row, in seconds.
    """
    clock = Clock(device)
    for row in rows:
        row.check()
    samples: list[list[float]] = [[] for _ in rows]
    pending = list(range(len(rows)))
    while pending:
        for i in pending:
            first = clock(rows[i].call)
            if first < FAST_S:
                burst = max(1, min(20, int(FAST_S / max(first, 1e-6))))
                samples[i] += [clock(rows[i].call) for _ in range(burst)]
            else:
                samples[i].append(first)
        pending = [i for i in pending if not _enough(samples[i], seconds, min_repeats)]
    return [[row.scale * s for s in taken] for row, taken in zip(rows, samples, strict=True)]


def _enough(taken: list[float], seconds: float, min_repeats: int) -> bool:
    needed = 2 if min(taken) > seconds else min_repeats
    return len(taken) >= needed and sum(taken) >= seconds


def measure(
    suite: str,
    view: str,
    case: str,
    rows: Sequence[Row],
    device: torch.device,
    seconds: float,
    base: float | None = None,
    naive: float | None = None,
) -> list[Result]:
    """Times the rows of one case and relates them to the rows named Base and Naive.

    Args:
        suite: Name of the suite.
        view: What is timed: "forward", "update", "step" ...
        case: Sizes, as the table shows them.
        rows: The rows of the case.
        device: Where the work runs.
        seconds: Time of each row, see :func:`time_rows`.
        base: Median of Base if it is not among the rows.
        naive: Median of Naive if it is not among the rows.
    """
    results = []
    for row, samples in zip(rows, time_rows(rows, device, seconds), strict=True):
        results.append(
            Result(
                suite=suite,
                view=view,
                case=case,
                method=row.name,
                median_s=statistics.median(samples),
                min_s=min(samples),
                max_s=max(samples),
                repeats=len(samples),
                noise_bytes=row.noise_bytes,
            )
        )
    medians = {result.method: result.median_s for result in results}
    base = medians.get("Base", base)
    naive = medians.get("Naive", naive)
    for result in results:
        if base is not None:
            result.times_base = result.median_s / base
        if naive is not None:
            result.over_naive = naive / result.median_s
    return results


def fitting(
    candidates: Iterable[tuple[str, int, Callable[[], Row]]],
    case: str,
    device: torch.device,
    notes: list[str],
) -> list[Row]:
    """Makes the rows that fit into memory, and notes the others.

    Args:
        candidates: Name of each row, bytes that it has still to allocate, and how to make it.
        case: Named in the notes.
        device: Whose memory is meant.
        notes: Where remarks go, each once.
    """
    rows = []
    for name, needed, make in candidates:
        free = free_bytes(device)
        if needed <= 0.8 * free:
            rows.append(make())
            continue
        note = f"{name} is missing at {case}: it needs {needed / 1e9:.1f} GB of noise, "
        note += f"{free / 1e9:.1f} GB are free."
        if note not in notes:
            notes.append(note)
    return rows


def rtol(x: torch.Tensor) -> float:
    """Relative error that a forward may have; a GPU's own rounding is looser than a CPU's."""
    if x.dtype not in (torch.float32, torch.float64):
        return 3e-2
    return 1e-5 if x.device.type == "cpu" else 1e-3


def estimate_rtol(x: torch.Tensor) -> float:
    """The same of an estimate, held against differences of weights that were rounded when added."""
    return max(1e-3, 2 * rtol(x))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, rtol: float) -> None:
    """Relative error of the whole tensor (2-norm); a wrong element among many still shows."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    if not error <= rtol:
        raise AssertionError(f"{what}: relative error {error:.2e}, allowed {rtol:.0e}")


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def machine(device: torch.device) -> dict[str, str]:
    """The facts without which a time means nothing."""
    facts = {
        "cpu": _cpu_model(),
        "threads": str(torch.get_num_threads()),
        "isa": perturbed._C.cpu_capability(),
        "torch": torch.__version__,
        "perturbed": f"{perturbed.__version__} ({_commit()})",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        facts["tf32"] = "on" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "off"
    return facts


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short commit of the working tree, with a plus sign if it holds changes."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return commit + ("+" if changes.strip() else "")
