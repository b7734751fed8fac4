"""One population over many processes: what they exchange, and how they notice that one is wrong.

Every process holds the whole model and evaluates its share of the directions. Noise is a function
of the global number of a direction, so that only losses travel; the estimate is drawn again by each
process, or summed over shares (see ``estimate`` of :class:`~perturbed.NES`). After Salimans, Ho,
Chen, Sidor, Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning"
(2017), where workers know each other's seeds.

A script for one process becomes one for many by ``perturbed.distributed.init()`` in its first
lines; ``torchrun --nproc-per-node=4 script.py`` then starts it. docs/distributed.md tells the rest.
"""

from __future__ import annotations

import datetime
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_number
from .description import differences

# Elements of an exchange of many, at most: enough for full bandwidth, few beside a model.
BLOCK_ELEMENTS = 1 << 24


class ProcessError(RuntimeError):
    """Another process of the group has died, hangs, or trains something else."""


def init(timeout: float = 300.0, backend: str | None = None) -> bool:
    """Join the processes that torchrun started; without torchrun, do nothing.

    Args:
        timeout: seconds after which an exchange fails when a process does not answer. It must be
            longer than the slowest generation takes longer than the fastest.
        backend: of torch.distributed; default: nccl where there is a GPU for every process of this
            machine, else gloo. With nccl the process's GPU becomes the current device.

    Returns:
        Whether there is a group of processes now.

    Raises:
        ValueError: a timeout that is not positive and finite.
        TypeError: a timeout that is no number.
        ProcessError: not all processes have come within the timeout.
    """
    timeout = check_number("timeout", timeout, above=True)
    if dist.is_initialized():
        return True
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return False
    if backend is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= here
        backend = "nccl" if enough else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    limit = datetime.timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _fresh_store(rank, size, limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)
    return True


def _fresh_store(rank: int, size: int, limit: datetime.timedelta) -> Any:
    """Return a part of torchrun's store that only the processes of this start use.

    torchrun keeps one store over restarts, in which processes would find the addresses of those
    that have died (pytorch #135712; still so in torch 2.13), and its count of restarts is not
    the same on all machines. Hence rank 0 asks with a word of its own, the others answer with
    theirs, and all go on when each has seen its word come back.
    """
    c10d: Any = dist  # torch's types do not know its stores
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = c10d.TCPStore(address, port, None, False, limit, False)
    store = c10d.PrefixStore("perturbed", server)
    end = time.monotonic() + limit.total_seconds()
    own = secrets.token_hex(8)

    def read(key: str) -> list[str]:
        return store.get(key).decode().split() if store.check([key]) else []

    def rest(missing: str) -> None:
        if time.monotonic() > end:
            raise ProcessError(
                f"rank {rank} of {size} waited {limit.total_seconds():g} s for {missing} to start"
            )
        time.sleep(0.02)

    if rank == 0:
        store.set("question", own)
        joined = [own]
        for other in range(1, size):
            while (answer := read(f"answer {other}"))[:1] != [own]:
                rest(f"rank {other}")
            joined.append(answer[1])
        store.set("joined", " ".join(joined))
        return c10d.PrefixStore(own, store)
    answered: list[str] = []
    while True:
        question = read("question")
        if question and question != answered:
            store.set(f"answer {rank}", f"{question[0]} {own}")
            answered = question
        joined = read("joined")
        if joined[:1] == answered and own in joined:
            return c10d.PrefixStore(joined[0], store)
        rest("rank 0 and all others")


def is_first() -> bool:
    """Whether this is the process that prints and writes: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class Processes:
    """The processes that share a population.

    Args:
        group: of torch.distributed; None for its default group, which must exist.

    Attributes:
        rank: number of this process.
        size: how many there are.
        bytes: payload that this process has given to exchanges so far.

    Raises:
        RuntimeError: no process group has been made.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Look at the group."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there is no process group: call perturbed.distributed.init() in a script that "
                "torchrun starts"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes = 0
        self._on_gpu = dist.get_backend(group) == "nccl"

    # ---- exchanges -----------------------------------------------------------------------------

    def gather(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """Join every process's columns: (S, sizes[rank]) -> (S, sum of sizes), the same on all."""
        wire = self._to_wire(part)
        padded = wire.new_zeros(part.shape[0], max(sizes))
        padded[:, : part.shape[1]] = wire
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._exchange("gathering losses", dist.all_gather, parts, padded, self.group)
        self.bytes += padded.nbytes
        joined = torch.cat([p[:, :n] for p, n in zip(parts, sizes, strict=True)], 1)
        return joined.to(part.device)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes.

        They travel in blocks of bounded size, and what has fewer bits than float32 as float32, in
        which it is added.
        """
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            of_dtype.setdefault(tensor.dtype, []).append(tensor)
        for dtype, some in of_dtype.items():
            flats = [tensor.reshape(-1) for tensor in some]
            narrow = dtype.is_floating_point and dtype.itemsize < 4
            for block in _blocks(flats, BLOCK_ELEMENTS):
                joined = torch.cat(block)
                wire = self._to_wire(joined.float() if narrow else joined)
                self._exchange("adding up tensors", dist.all_reduce, wire, group=self.group)
                self.bytes += wire.nbytes
                sums = wire.to(joined.device).split([part.numel() for part in block])
                for part, total in zip(block, sums, strict=True):
                    part.copy_(total)
            for tensor, flat in zip(some, flats, strict=True):
                if not tensor.is_contiguous():  # flat is a copy
                    tensor.copy_(flat.view_as(tensor))

    def maximum(self, values: Tensor) -> Tensor:
        """Return the largest of the processes' numbers, element by element."""
        wire = self._to_wire(values)
        self._exchange("comparing numbers", dist.all_reduce, wire, dist.ReduceOp.MAX, self.group)
        self.bytes += wire.nbytes
        return wire.to(values.device)

    def collect(self, value: Any) -> list[Any]:
        """Return the plain values of all processes, by rank."""
        values: list[Any] = [None] * self.size
        self._exchange("gathering values", dist.all_gather_object, values, value, self.group)
        return values

    def agree(self, description: dict[str, Any]) -> None:
        """Raise ProcessError on every process if they do not all describe the same run."""
        described = self.collect(description)
        for rank, other in enumerate(described):
            found = [f"{w}: {a} and {b}" for w, a, b in differences(described[0], other)]
            if found:
                more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
                raise ProcessError(
                    f"the processes of ranks 0 and {rank} do not train the same thing: "
                    f"{'; '.join(found[:3])}{more}"
                )

    # ---- how -----------------------------------------------------------------------------------

    def _to_wire(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy on a device that the backend reads."""
        device = torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else "cpu"
        return tensor.detach().to(device).clone(memory_format=torch.contiguous_format)

    def _exchange(self, what: str, function: Callable, *args: Any, **kwargs: Any) -> None:
        """Call ``function``, and say what it means if it fails."""
        try:
            function(*args, **kwargs)
        except RuntimeError as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise ProcessError(
                f"{what} failed on rank {self.rank} of {self.size}: another process has died or "
                f"does not answer; start again from the last checkpoint ({first_line})"
            ) from error


def _blocks(flats: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Cut vectors into lists of pieces with ``size`` elements in all, in order."""
    block: list[Tensor] = []
    room = size
    for flat in flats:
        start = 0
        while start < flat.numel():
            piece = flat[start : start + room]
            block.append(piece)
            start, room = start + piece.numel(), room - piece.numel()
            if room == 0:
                yield block
                block, room = [], size
    if block:
        yield block
