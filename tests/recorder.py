"""What a CUDA graph does, on any device: operators are recorded once and replayed on their tensors.

Numbers are what they were, inputs are read where they were, results go where they went, and nothing
may be read on the host in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
)


class Recorder(TorchDispatchMode):
    """Stands in for ``perturbed.optim.graphed.Graph``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _READS:
            raise RuntimeError(f"{func} reads values on the host while operators are recorded")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def capture(self, body: Callable[[], Any]) -> Any:
        """Record ``body``, and undo what it did: a CUDA graph executes nothing while recording."""
        with _Undo(), self:
            result = body()
        return result

    def replay(self) -> None:
        """Do it again."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for place, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != new.data_ptr():
                    place.copy_(new)


class _Undo(TorchDispatchMode):
    """Restores, at the end, all tensors that were written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema.arguments
        for argument, value in [
            *zip(schema, args, strict=False),
            *((a, kwargs[a.name]) for a in schema if a.name in kwargs),
        ]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self.before.append((tensor, tensor.clone()))
        return func(*args, **kwargs)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
