"""How much memory a piece of code takes at its peak."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .replicate import Replicated

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class PeakMemory(TorchDispatchMode):
    """Watch, while it is on, the bytes of tensors that are made and still held.

    On a GPU the allocator knows, temporary memory of kernels included. On a CPU the results of
    operators are counted as long as they live; what an operator takes and gives back inside is not
    seen.

    Args:
        device: whose memory.

    Attributes:
        peak: most bytes held at a time, beyond those held when the mode was entered.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is counted before the mode is entered."""
        super().__init__()
        self.device = device
        self.peak = 0
        self._live = 0
        self._seen: set[int] = set()
        self._depth = 0

    def __enter__(self) -> PeakMemory:
        """Start to count."""
        if self._depth == 0 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._live = torch.cuda.memory_allocated(self.device)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop; ``peak`` is complete."""
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0 and self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count its results."""
        kwargs = kwargs or {}
        if any(issubclass(kind, Replicated) for kind in types):
            with self:  # to see what it does with its rows
                return Replicated.__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        if self.device.type != "cuda":
            for value in torch.utils._pytree.tree_leaves(result):
                if isinstance(value, Tensor) and not isinstance(value, Replicated):
                    self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        if tensor.device != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self._live -= size


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
        digits = value.strip().rstrip("".join({*"".join(UNITS)}) + " ")
        unit = value.strip()[len(digits) :].strip() or "B"
        try:
            size = float(digits) * UNITS[unit]
        except (ValueError, KeyError):
            raise ValueError(
                f"{name} must be a number with a unit of {', '.join(UNITS)}, got {value!r}"
            ) from None
    else:
        size = float(value)
    if not 1 <= size < float("inf"):
        raise ValueError(f"{name} must be at least 1 byte and finite, got {value!r}")
    return int(size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch has raised ``error``."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
