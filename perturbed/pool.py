"""Losses that are arbitrary Python functions of a module, evaluated in a pool of processes."""

from __future__ import annotations

import collections
import copy
import math
import multiprocessing
import pickle
import time
from collections.abc import Iterable, Sequence
from multiprocessing import connection, reduction, util
from typing import Any

import torch
from torch import Tensor, nn

from ._worker import START_SECONDS, SharedMemory, Worker, shut_down
from .candidate import Candidate, Function, as_matrix, trainable

# Deaths are noticed at once by the pipe and the sentinel; unless a process that the worker has
# forked still holds both, so the exit status is looked at every so many seconds too.
_HEARTBEAT_SECONDS = 5.0


class WorkerError(RuntimeError):
    """An exception in a worker process, with the worker's traceback in its message.

    Raised itself where the original cannot travel between processes; else it is the original's
    ``__cause__``.
    """


class WorkerPool:
    """Evaluate a function of a module for many members, in worker processes.

    Every worker has a copy of the module as it was when the pool was made. A generation's members
    go into shared memory once; only indices and numbers travel. Evaluations are those of
    :func:`evaluate_one_by_one`: buffers and modes are put back before each, gradients are off. The
    results do not depend on which worker did what, unless the function keeps state of its own or
    draws from a global random number generator: each process has one. Bits depend on ``threads``.

    What goes wrong in a worker reaches the caller, and the pool stays usable: an exception as one
    of the same type, whose ``__cause__`` is a :class:`WorkerError` with the worker's traceback; a
    process that dies (a crash, the kernel's out-of-memory killer) is replaced and its member tried
    again. After an exception running evaluations are waited for; after Ctrl-C they are killed.

    Use as a context, or ``close()``; the end of the program closes it too. One ``evaluate`` at a
    time.

    Args:
        function: takes the module, returns a number or a 0-dim tensor.
        model: any module with a parameter that requires grad.
        workers: number of processes.
        timeout: seconds that one evaluation may take; a worker that takes longer is killed and
            replaced. None: no limit.
        on_timeout: "raise" a TimeoutError, or "nan": the member's value is NaN.
        retries: how often a member is tried again whose worker died.
        start_method: of ``multiprocessing``. "spawn" (default) and "forkserver" need a function and
            a module that pickle (a function defined at the top of a file), and, in the program that
            makes the pool, ``if __name__ == "__main__":``. "fork" takes closures as well and starts
            at once, but knows no CUDA and one thread only.
        device: where the workers' modules live, or a sequence of devices, dealt out in turn. None:
            where ``model`` is.
        threads: torch's threads in each worker.

    Attributes:
        replaced: number of workers replaced so far because they died, hung or were interrupted.

    Raises:
        TypeError: arguments of another type, a function or module that does not pickle.
        ValueError: values out of range, an unknown start method, CUDA with "fork".

    Example:
        >>> import torch, perturbed
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> members = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> with perturbed.WorkerPool(
        ...     lambda m: m(torch.ones(2)), net, workers=2, start_method="fork"
        ... ) as pool:
        ...     pool.evaluate(members)
        tensor([ 3.,  7., 11.], dtype=torch.float64)
    """

    def __init__(
        self,
        function: Function,
        model: nn.Module,
        workers: int = 2,
        timeout: float | None = None,
        on_timeout: str = "raise",
        retries: int = 1,
        start_method: str = "spawn",
        device: Any = None,
        threads: int = 1,
    ) -> None:
        """Check the arguments and start the processes, without waiting for them."""
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        self._size = Candidate(model).size
        self._workers_wanted = _count("workers", workers, 1)
        self._retries = _count("retries", retries, 0)
        self._threads = _count("threads", threads, 1)
        if timeout is not None and not (
            isinstance(timeout, (int, float)) and 0 < timeout < math.inf
        ):
            raise ValueError(f"timeout must be None or seconds greater than 0, got {timeout!r}")
        self._timeout = timeout
        if not isinstance(on_timeout, str) or on_timeout not in ("raise", "nan"):
            raise ValueError(f'on_timeout must be "raise" or "nan", got {on_timeout!r}')
        self._on_timeout = on_timeout
        methods = multiprocessing.get_all_start_methods()
        if not isinstance(start_method, str) or start_method not in methods:
            raise ValueError(f"start_method must be one of {methods}, got {start_method!r}")
        self._devices = _devices(device)
        self._context: Any = multiprocessing.get_context(start_method)
        if start_method == "fork":
            if any(d.type == "cuda" for d in (*self._devices, *_devices_of(model))):
                raise ValueError('start_method must be "spawn" with CUDA, got "fork"')
            if threads != 1:
                raise ValueError(
                    f"threads must be 1 with start_method='fork', which OpenMP's threads do not "
                    f"survive, got {threads}"
                )
        self._payload = _payload(function, model, start_method)
        self._memory: SharedMemory | None = None
        self._started = 0
        self.replaced = 0
        self._workers: list[Worker] = []
        # Runs at the end of the program as well, before multiprocessing waits for its processes; a
        # forked copy of the pool does nothing.
        self._close = util.Finalize(self, shut_down, (self._workers,), exitpriority=10)
        self._fill()

    # ---- for users -----------------------------------------------------------------------------

    def evaluate(self, members: Any) -> Tensor:
        """Return the values of all members.

        Args:
            members: (P, N) floating-point matrix on any device, or an iterable of P vectors (N,);
                N elements in the order of the parameters that require grad.

        Returns:
            (P,) float64, on the CPU; NaN where the function returns it.

        Raises:
            TypeError, ValueError: members of another type or shape.
            TimeoutError: an evaluation took longer than ``timeout``; the message names the member.
            RuntimeError: the pool is closed, or a worker died at each try of a member, or when it
                started.
            Exception: what the function raised, for the first member that raised.
        """
        if not self._close.still_active():
            raise RuntimeError("evaluate: the pool is closed")
        matrix = as_matrix(members, self._size)
        values = torch.full((len(matrix),), math.nan, dtype=torch.float64)
        if not len(matrix):
            return values
        nbytes = matrix.numel() * matrix.itemsize
        if self._memory is None or self._memory.size < nbytes:
            self._memory = SharedMemory(nbytes)
        self._memory.matrix(len(matrix), self._size, matrix.dtype).copy_(matrix)
        for worker in [w for w in self._workers if w.process.exitcode is not None]:
            self._discard(worker)  # has died since
        try:
            self._run(values, matrix.dtype)
        finally:
            for worker in [w for w in self._workers if w.member is not None]:
                self._discard(worker)  # this is an interruption
        return values

    def close(self) -> None:
        """End the processes. Twice is once; the pool is of no use afterwards."""
        self._close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- one generation ------------------------------------------------------------------------

    def _run(self, values: Tensor, dtype: torch.dtype) -> None:
        """Hand out the members and collect their values."""
        pending = collections.deque(range(len(values)))
        deaths: collections.Counter[int] = collections.Counter()
        errors: dict[int, Exception] = {}
        while pending or any(w.member is not None for w in self._workers):
            if pending:
                self._fill()
                self._hand_out(pending, dtype)
            for worker, message in self._listen():
                kind, *details = message
                member, worker.member, worker.deadline = worker.member, None, math.inf
                if kind == "ready":
                    worker.ready = True
                elif kind == "value" and member is not None:
                    values[member] = details[0]
                elif kind == "error" and member is not None:
                    errors[member] = _revive(member, *details)
                else:
                    how = self._discard(worker)
                    if not worker.ready:
                        raise RuntimeError(_cannot_start(kind, details, how))
                    if member is None:  # died while idle
                        continue
                    if kind == "dead":
                        deaths[member] += 1
                        pending.appendleft(member)
                        if deaths[member] > self._retries:
                            errors[member] = RuntimeError(
                                f"member {member}: the worker process died ({how}) at each of "
                                f"{deaths[member]} tries"
                            )
                    elif self._on_timeout == "raise":
                        errors[member] = TimeoutError(
                            f"member {member}: evaluation took longer than {self._timeout} s"
                        )
            if errors:
                pending.clear()  # wait for what is running, then raise
        if errors:
            raise errors[min(errors)]

    def _hand_out(self, pending: collections.deque[int], dtype: torch.dtype) -> None:
        """Give every idle worker a member."""
        assert self._memory is not None
        for worker in list(self._workers):
            if not pending or not worker.ready or worker.member is not None:
                continue
            try:
                if worker.memory is not self._memory:
                    worker.connection.send(("memory", self._memory.size))
                    reduction.send_handle(
                        worker.connection, self._memory.descriptor, worker.process.pid
                    )
                    worker.memory = self._memory
                worker.connection.send(("evaluate", pending[0], self._size, dtype))
            except OSError:  # died while idle, which is no member's fault
                self._discard(worker)
                continue
            worker.member = pending.popleft()
            worker.deadline = time.monotonic() + (self._timeout or math.inf)

    def _listen(self) -> list[tuple[Worker, tuple]]:
        """Sleep until a worker says something, dies or is late; return who and what."""
        now = time.monotonic()
        soon = min((w.deadline - now for w in self._workers), default=math.inf)
        sources = [s for w in self._workers for s in (w.connection, w.process.sentinel)]
        heard = connection.wait(sources, max(0.0, min(soon, _HEARTBEAT_SECONDS)))
        now = time.monotonic()
        news: list[tuple[Worker, tuple]] = []
        for worker in self._workers:
            if worker.connection in heard:
                try:
                    news.append((worker, worker.connection.recv()))
                except (EOFError, OSError):
                    news.append((worker, ("dead",)))
            elif worker.process.sentinel in heard or worker.process.exitcode is not None:
                news.append((worker, ("dead",)))
            elif now >= worker.deadline:
                news.append((worker, ("late",)))
        return news

    # ---- its workers ---------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start as many workers as are missing."""
        while len(self._workers) < self._workers_wanted:
            device = self._devices[self._started % len(self._devices)] if self._devices else None
            self._workers.append(Worker(self._context, self._payload, device, self._threads))
            self._started += 1

    def _discard(self, worker: Worker) -> str:
        """Take a worker out, kill it if need be, and say how it ended."""
        self._workers.remove(worker)
        self.replaced += 1
        return worker.kill()


def _payload(function: Function, model: nn.Module, start_method: str) -> Any:
    """Return copies of function and module in the form that the workers get.

    multiprocessing's own pickling would share the parameters with the workers instead of copying
    them.
    """
    if start_method == "fork":
        return function, copy.deepcopy(model)
    for name, value in (("function", function), ("model", model)):
        try:
            pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"{name} must be picklable with start_method={start_method!r}, such as what is "
                f"defined at the top of a file: {type(error).__name__}: {error}"
            ) from error
    return pickle.dumps((function, model))


def _revive(member: int, data: bytes | None, text: str) -> Exception:
    """Return the exception of a worker."""
    cause = WorkerError(f"member {member}, in its worker process:\n\n{text}")
    if data is None:
        return cause
    try:
        error = pickle.loads(data)
    except Exception:  # its class is not known here
        return cause
    error.__cause__ = cause
    return error


def _cannot_start(kind: str, details: Sequence[Any], how: str) -> str:
    if kind == "unusable":
        return f"a worker could not load function and model:\n\n{details[0]}"
    if kind == "late":
        return f"a worker was not ready after {START_SECONDS:.0f} s"
    return (
        f"a worker died before it was ready ({how}); with start_method='spawn' the program that "
        "makes the pool needs `if __name__ == '__main__':`"
    )


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value >= 2**31:  # what an operating system counts in
        raise ValueError(f"{name} must be below 2^31, got {value}")
    return value


def _devices(device: Any) -> list[torch.device]:
    """Return the devices to deal out; none where the module stays where it is."""
    if device is None:
        return []
    several = isinstance(device, Iterable) and not isinstance(device, str)
    try:
        devices = [torch.device(d) for d in (device if several else [device])]
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"device must be a device or a sequence of them: {error}") from None
    if not devices:
        raise ValueError("device must be a device or a sequence of devices, got an empty one")
    return devices


def _devices_of(model: nn.Module) -> set[torch.device]:
    return {p.device for p in trainable(model)}
