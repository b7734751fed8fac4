"""torch's fused layers, which read the weights of their parts and never call them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import mha

# The switch is one for the whole process: it stays off while a block of any thread lasts.
_lock = threading.Lock()
_blocks: set[object] = set()
_enabled_before = True


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Have nn.TransformerEncoderLayer call its Linears, in eval mode without grad too.

    The switch is torch's own, ``torch.backends.mha.set_fastpath_enabled``; ``torch.compile`` cannot
    trace that function, but it can trace the variable that it sets. It cannot trace a lock either:
    what is traced has only its own view of the variable to put back.
    """
    if torch.compiler.is_compiling():
        before = mha.get_fastpath_enabled()
        mha._is_fastpath_enabled = False
        try:
            yield
        finally:
            mha._is_fastpath_enabled = before
        return
    block = object()
    try:
        _enter(block)
        yield
    finally:
        _leave(block)


def _enter(block: object) -> None:
    global _enabled_before
    with _lock:
        if not _blocks:
            _enabled_before = mha.get_fastpath_enabled()
        _blocks.add(block)
        mha._is_fastpath_enabled = False


def _leave(block: object) -> None:
    with _lock:
        if block in _blocks:  # Ctrl-C may have come before it was
            _blocks.remove(block)
            if not _blocks:
                mha._is_fastpath_enabled = _enabled_before
