"""A worker process, both ends of it: what it does, and the handle that its caller has."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import tempfile
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from .candidate import Candidate, Function

START_SECONDS = 300.0  # for a worker to import torch and unpickle; minutes on a loaded machine
CLOSE_SECONDS = 2.0  # for idle workers to leave by themselves

# The callers' ends of all connections to workers; a forked worker closes its copies.
_ends: weakref.WeakSet[Connection] = weakref.WeakSet()


class SharedMemory:
    """Memory without a name that processes share through a file descriptor.

    The kernel frees it when the last process that has it is gone, however that one ended; nothing
    is left to clean up, and the size of /dev/shm is no limit.

    Args:
        size: bytes, reserved at once.

    Raises:
        OSError: there is not as much memory.
    """

    def __init__(self, size: int) -> None:
        """Reserve the memory and map it."""
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("perturbed")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)
        self.size = size
        # Without this, memory that is not there would be a SIGBUS at the first write.
        os.posix_fallocate(self.descriptor, 0, size)
        self.memory = mmap.mmap(self.descriptor, size)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the first bytes as a (rows, columns) tensor."""
        count = rows * columns
        return torch.frombuffer(self.memory, dtype=dtype, count=count).view(rows, columns)


def work(
    connection: Connection,
    payload: bytes | tuple[Function, nn.Module],
    device: torch.device | None,
    threads: int,
    inherited: list[Connection],
) -> None:
    """Serve evaluations until the caller closes its end of the connection.

    Messages in: ``("memory", size)`` followed by a descriptor; ``("evaluate", row, columns,
    dtype)``. Out: ``("ready",)`` or ``("unusable", traceback)`` once, then for each evaluation
    ``("value", number)`` or ``("error", pickled exception or None, traceback)``.

    Args:
        connection: the worker's end.
        payload: function and module, pickled where the process is not a fork.
        device: where the module goes; None: it stays.
        threads: torch's threads.
        inherited: ends of connections that belong to the caller and came with a fork; while they
            are open here, other workers would not notice that the caller is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's business
    if hasattr(signal, "pthread_sigmask"):  # held back since before the start
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    torch.set_num_threads(threads)
    try:
        function, model = pickle.loads(payload) if isinstance(payload, bytes) else payload
        if device is not None:
            model = model.to(device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
        candidate = Candidate(model)
    except BaseException:
        connection.send(("unusable", traceback.format_exc()))
        return
    connection.send(("ready",))
    memory = None
    try:
        while True:
            kind, *arguments = connection.recv()
            if kind == "memory":
                descriptor = reduction.recv_handle(connection)
                memory = mmap.mmap(descriptor, arguments[0])
                os.close(descriptor)
                continue
            row, columns, dtype = arguments
            assert memory is not None
            vector = torch.frombuffer(
                memory, dtype=dtype, count=columns, offset=row * columns * dtype.itemsize
            )
            try:
                answer: tuple = ("value", candidate.evaluate(function, vector))
            except BaseException as error:
                answer = ("error", _pickled(error), traceback.format_exc())
            connection.send(answer)
    except (EOFError, OSError):  # the caller is done, or gone
        return


def _pickled(error: BaseException) -> bytes | None:
    """Return an exception in bytes, None where it would not come out as it went in."""
    if not isinstance(error, Exception):  # SystemExit would end the caller
        return None
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else None
    except Exception:
        return None


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back, so that a process started meanwhile gets none before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """The caller's side of one process."""

    def __init__(
        self, context: Any, payload: Any, device: torch.device | None, threads: int
    ) -> None:
        self.connection, theirs = context.Pipe()
        _ends.add(self.connection)
        inherited = list(_ends) if context.get_start_method() == "fork" else []
        self.process = context.Process(
            target=work,
            args=(theirs, payload, device, threads, inherited),
            name="perturbed-worker",
            daemon=False,  # so that a function may use a DataLoader with workers
        )
        try:
            with _interrupts_held():
                self.process.start()
        finally:
            theirs.close()  # the worker then has the only one, and its end is seen here
        self.ready = False
        self.member: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.memory: SharedMemory | None = None

    def kill(self) -> str:
        """End the process if it has not ended, and say how it did."""
        self.connection.close()
        _ends.discard(self.connection)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"


def shut_down(workers: list[Worker]) -> None:
    """Let idle workers leave, kill the others, and wait for all."""
    for worker in workers:
        if worker.ready and worker.member is None:
            worker.connection.close()  # which a worker takes as the end
        else:
            worker.process.kill()
    deadline = time.monotonic() + CLOSE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.kill()
    workers.clear()
