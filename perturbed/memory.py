"""How much memory a piece of code takes at its peak, and what to do when there is not enough."""

from __future__ import annotations

import re
import sys
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .replicate import Replicated

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

# Parts of the texts by which allocators and kernels say that there is no memory: torch's CPU
# allocator on Linux, macOS and Windows, CUDA and its libraries, C++; and what our own operators say
# when torch gives them no tensor, since its stable ABI does not pass the reason on.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|bad_alloc"
    r"|aten::new_empty.*API call failed",
    re.DOTALL,
)


class PeakMemory:
    """Watch, in a block, the bytes of tensors that are made and still held.

    On a GPU torch's allocator knows, temporary memory of kernels included; its own peak starts anew
    (``torch.cuda.reset_peak_memory_stats``). Elsewhere the results of operators are counted as long
    as they live: what an operator takes and gives back inside, and what other threads make, is not
    seen. Functions of ``torch.compile`` run uncompiled in the block then, since compiled code makes
    tensors where nobody can count them; that takes as much memory or more.

    Args:
        device: whose memory.

    Attributes:
        peak: most bytes held at a time, beyond those held when the block was entered.

    Example:
        >>> import torch
        >>> from perturbed.memory import PeakMemory
        >>> x = torch.zeros(1000)
        >>> with PeakMemory(x.device) as memory:
        ...     y = (x + 1).view(10, 100).sum()  # 4000 bytes, and the sum
        >>> memory.peak
        4004
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is counted before the block is entered."""
        self.device = device
        self.peak = 0
        self._before = 0
        self._modes = ExitStack()

    @staticmethod
    def is_free(device: torch.device) -> bool:
        """Whether measuring costs nothing; else it is 10 to 20 us for every operator."""
        return device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        """Start to count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled; the import takes 1 s
            self._modes.enter_context(torch.compiler.set_stance("force_eager"))
        self._modes.enter_context(_Counter(self))
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop; ``peak`` is complete."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        self._modes.close()


class _Counter(TorchDispatchMode):
    """Counts the results of operators while they live; see :class:`PeakMemory`."""

    def __init__(self, memory: PeakMemory) -> None:
        super().__init__()
        self._memory = memory
        self._held = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, Replicated) for kind in types):
            with self:  # to see what it does with its rows
                result = Replicated.__torch_dispatch__(func, types, args, kwargs)
        else:
            result = func(*args, **kwargs)
        made = [t for value in tree_leaves(result) for t in _plain(value)]
        new = [
            t for t in made if t.device == self._memory.device and _address(t) not in self._counted
        ]
        if new:
            # Views of what was there before, and what was written in place, take nothing.
            old = {_address(t) for value in tree_leaves((args, kwargs)) for t in _plain(value)}
            for tensor in new:
                if _address(tensor) not in old and _address(tensor) not in self._counted:
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._counted.add(address)
        self._held += size
        self._memory.peak = max(self._memory.peak, self._held)
        weakref.finalize(storage, self._forget, address, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self._held -= size


def _plain(value: Any) -> list[Tensor]:
    """Return the tensors with memory of their own that a value is made of."""
    if not isinstance(value, Tensor):
        return []
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return [t for name in names for t in _plain(getattr(value, name))]
    return [value] if value.layout == torch.strided else []


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- when there is not enough ------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def with_advice(error: BaseException, advice: str) -> RuntimeError:
    """Return an error of the same kind whose text ends with ``advice``; raise it from ``error``."""
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
    return kind(f"{error}\n{advice}")


# ---- sizes -------------------------------------------------------------------------------------


def to_bytes(name: str, value: int | float | str) -> int:
    """Return a size in bytes from a number of bytes or a text such as "512 MB" or "4GiB".

    Raises:
        ValueError: a text without a number or a known unit, a size below 1 byte.
        TypeError: neither a number nor a text.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"{name} must be a number of bytes or a text such as '4 GB', got {value!r}")
    size: float
    if isinstance(value, str):
        text = value.strip()
        digits = text.rstrip("".join({*"".join(UNITS)}) + " ")
        unit = text[len(digits) :].strip() or "B"
        try:
            size = float(digits) * UNITS[unit]
        except (ValueError, KeyError):
            raise ValueError(
                f"{name} must be a number with a unit of {', '.join(UNITS)}, got {value!r}"
            ) from None
    else:
        size = value
    if not 1 <= size < float("inf"):
        raise ValueError(f"{name} must be at least 1 byte and finite, got {value!r}")
    return int(size)
