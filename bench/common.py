"""What suites have in common: options, rows, results, and the checks that come before timing."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
NAN = float("nan")
FAILED = "failed: "  # so begins the reason of a row that should have run


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
        only_peers: Time other packages alone, beside Base; see bench/peers.py.
        progress: Called with a line of text before each case.
    """

    device: torch.device = CPU
    seconds: float = 0.3
    full: bool = False
    views: tuple[str, ...] | None = None
    sizes: tuple[int, ...] = (256, 512, 1024)
    batch: int = 1024
    only_peers: bool = False
    progress: Callable[[str], None] = lambda _: None

    def chosen(self, views: Sequence[str]) -> list[str]:
        """Those of a suite's views that are asked for."""
        return [view for view in views if self.views is None or view in self.views]


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a row has to do, whoever does it; bench/roofline.py makes times of it.

    Attributes:
        moved: bytes to and from memory: inputs, weights, outputs and stored noise once each.
        flops: floating-point operations; a multiply-add is two.
        normals: random normals to draw.
        signs: random signs to draw.
        dtype: of the products, as in "float32".
    """

    moved: float
    flops: float
    normals: float = 0.0
    signs: float = 0.0
    dtype: str = "float32"

    def __add__(self, other: Work) -> Work:
        return Work(
            self.moved + other.moved,
            self.flops + other.flops,
            self.normals + other.normals,
            self.signs + other.signs,
            self.dtype,
        )


@dataclasses.dataclass
class Row:
    """One way to do the work of a case.

    Attributes:
        name: What the table calls it.
        call: The timed work, on inputs that exist already.
        check: Raises AssertionError if ``call`` does not compute what it should.
        noise_bytes: Bytes of noise held between drawing it and its last use.
        scale: Multiplies the time, for work of which ``call`` does only a part.
        work: For the column of the roofline; None where it says nothing.
        reason: Why the row cannot run here; empty if it can.
    """

    name: str
    call: Callable[[], object]
    check: Callable[[], None]
    noise_bytes: int
    scale: float = 1.0
    work: Work | None = None
    reason: str = ""

    @classmethod
    def missing(cls, name: str, reason: str) -> Row:
        """A row that cannot run here, which the table shows with its reason."""
        return cls(name, lambda: None, lambda: None, 0, reason=reason)


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
        low_s: first quartile of the samples.
        high_s: third quartile.
        replay_s: of a call replayed from a CUDA graph, for calls that launches dominate.
        steps_per_s: environment steps, suite ``rl``; NaN elsewhere.
        policy_share: of the time, suite ``rl``; NaN elsewhere.
        sharing: suite ``distributed``; None elsewhere.
        peak_bytes: memory taken at the peak, suite ``memory``; NaN elsewhere.
        best_loss: lowest that a search saw, suite ``zeroth``; NaN elsewhere.
        work: for the roofline; None where it says nothing.
        reason: why the row has no time; empty if it has.
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
    times_base: float = NAN
    over_naive: float = NAN
    low_s: float = NAN
    high_s: float = NAN
    replay_s: float = NAN
    steps_per_s: float = NAN
    policy_share: float = NAN
    sharing: Sharing | None = None
    peak_bytes: float = NAN
    best_loss: float = NAN
    work: Work | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells the rows of a run apart."""
        return self.suite, self.view, self.case, self.method

    @property
    def timed(self) -> bool:
        return not math.isnan(self.median_s)

    @property
    def best_s(self) -> float:
        """Seconds to compare by: the median, or that of a replay, which has no launches in it."""
        return self.replay_s if self.replay_s < self.median_s else self.median_s

    @property
    def failed(self) -> bool:
        return self.reason.startswith(FAILED)


def failure(error: BaseException) -> str:
    """The reason of a row or suite that should have run: the error on one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{FAILED}{type(error).__name__}: {lines[0]}".rstrip(": ")


def fitting(
    candidates: Iterable[tuple[str, int, Callable[[], Row]]], device: torch.device
) -> list[Row]:
    """Makes the rows; one that does not fit into memory, or cannot be made, says why.

    Args:
        candidates: Name of each row, bytes that it has still to allocate, and how to make it.
        device: Whose memory is meant.
    """
    rows = []
    for name, needed, make in candidates:
        free = free_bytes(device)
        if needed > 0.8 * free:
            reason = f"needs {needed / 1e9:.1f} GB of noise, {free / 1e9:.1f} GB are free"
            rows.append(Row.missing(name, reason))
            continue
        try:
            rows.append(make())
        except Exception as error:
            rows.append(Row.missing(name, failure(error)))
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
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
