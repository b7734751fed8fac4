"""Timing that can be trusted on a shared machine.

Rows of one case are timed in turn (A B C A B C ...), so that a slow minute of the machine hits all
of them; medians are compared and the extremes printed. A row checks its result before it is timed;
one that fails is reported and not timed, and the others go on.

On CUDA a call is timed by events on its stream, its inputs and weights out of the L2 cache, which
is overwritten before every call, as other layers do in training. A call below LAUNCH_BOUND_S may
be nothing but launches: such a one is timed again, replayed from a CUDA graph of several calls,
each of which reads a copy of its inputs that the others did not (class Rotating).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.common import NAN, Result, Row, failure

FAST_S = 0.02  # calls below this are timed in bursts, after one call that warms the caches
LAUNCH_BOUND_S = 2e-4  # some tens of launches
REPLAYED_CALLS = 8  # in one graph
REPLAYS = 50
L2_SHARE = 2  # what overwrites the L2 cache is so many times as large


class Clock:
    """Seconds of one call. On CUDA by events, with a cold L2 cache as in a real training step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(L2_SHARE * l2_bytes(device), dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the GPU writes, the host gets ahead: the gap before a call's first kernel is none.
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


class Rotating:
    """A tensor for one call after the other to read: on a GPU, copies in turn.

    The calls of a CUDA graph then do not find their inputs in the L2 cache, which is overwritten
    before the graph. On a CPU, whose caches hold a layer's inputs in training too, and for tensors
    larger than the L2 cache, it is the tensor itself.

    Args:
        tensor: what every call is to read.
        cache: bytes of the L2 cache; default: the device's, 0 on a CPU.
    """

    def __init__(self, tensor: Tensor, cache: int | None = None) -> None:
        if cache is None:
            cache = l2_bytes(tensor.device) if tensor.is_cuda else 0
        copies = REPLAYED_CALLS if tensor.nbytes < cache else 1
        self.copies = [tensor, *(tensor.clone() for _ in range(copies - 1))]
        self.turn = 0

    def __call__(self) -> Tensor:
        self.turn = (self.turn + 1) % len(self.copies)
        return self.copies[self.turn]


def time_rows(
    rows: Sequence[Row], device: torch.device, seconds: float, min_repeats: int = 3
) -> list[list[float]]:
    """Times every row, in turn, until each has had its share of time.

    Args:
        rows: What to time.
        device: Where the work runs.
        seconds: Time after which a row is done, once it has its repeats.
        min_repeats: Fewest samples of a row. One that takes longer than ``seconds`` gets 2.

    Returns:
        The samples of each row, in seconds.
    """
    clock = Clock(device)
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


def check_rows(rows: Sequence[Row]) -> None:
    """Runs the checks, which also warm up; a row that fails has the reason, and no time, after."""
    for row in rows:
        if row.reason:
            continue
        try:
            row.check()
        except Exception as error:
            row.reason = failure(error)


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

    Returns:
        A result for every row; one that cannot run here, or failed its check, has no time.
    """
    check_rows(rows)
    good = [row for row in rows if not row.reason]
    timed = dict(zip(map(id, good), time_rows(good, device, seconds), strict=True))
    results = [_result(suite, view, case, row, timed.get(id(row))) for row in rows]
    if device.type == "cuda":
        for row, result in zip(rows, results, strict=True):
            if result.median_s < LAUNCH_BOUND_S and row.scale == 1:
                try:
                    result.replay_s = replayed(row.call)
                except AssertionError as error:
                    result.reason = failure(error)
    medians = {result.method: result.median_s for result in results if result.timed}
    base = medians.get("Base", base)
    naive = medians.get("Naive", naive)
    for result in results:
        if base is not None:
            result.times_base = result.median_s / base
        if naive is not None:
            result.over_naive = naive / result.median_s
    return results


def _result(suite: str, view: str, case: str, row: Row, samples: list[float] | None) -> Result:
    taken = samples or [NAN]
    low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (taken[0],) * 3
    return Result(
        suite=suite,
        view=view,
        case=case,
        method=row.name,
        median_s=statistics.median(taken),
        min_s=min(taken),
        max_s=max(taken),
        # Of 2 or 3 samples the quartiles lie outside of them.
        low_s=max(low, min(taken)),
        high_s=min(high, max(taken)),
        repeats=len(samples or ()),
        noise_bytes=row.noise_bytes,
        work=row.work,
        reason=row.reason,
    )


# ---- CUDA graphs ---------------------------------------------------------------------------------


def capture(call: Callable[[], object]) -> tuple[Callable[[], None], list[Tensor]]:
    """Captures several calls in one CUDA graph, after some that warm up; replay and outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: a capture that fails would leave its stream the current one.
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            given = [call() for _ in range(REPLAYED_CALLS)]
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay, [y for y in given if isinstance(y, Tensor) and y.is_floating_point()]


def replayed(
    call: Callable[[], object],
    capture: Callable[..., tuple[Callable[[], None], list[Tensor]]] = capture,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> float:
    """Seconds of a call that is replayed from a CUDA graph.

    Args:
        call: what to time. It may draw noise: a replay draws the next generation or the same
            again, which costs the same.
        capture: makes the graph of REPLAYED_CALLS calls.
        clock: times a replay; default: :class:`Clock` of the current GPU.

    Returns:
        The median; NaN where the call cannot be captured, as one that reads a result on the host.

    Raises:
        AssertionError: a replay that does not write what the call returned.
    """
    clock = clock or Clock(torch.device("cuda", torch.cuda.current_device()))
    try:
        replay, outputs = capture(call)
    except RuntimeError:
        return NAN
    for y in outputs:
        y.fill_(NAN)
    replay()
    if any(not bool(y.isfinite().all()) for y in outputs):
        raise AssertionError("a replayed CUDA graph must write all that its calls return")
    return statistics.median(clock(replay) for _ in range(REPLAYS)) / REPLAYED_CALLS
