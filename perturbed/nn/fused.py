"""torch's fused layers, which read the weights of their parts and never call them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import mha


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Have nn.TransformerEncoderLayer call its Linears, in eval mode without grad too.

    The switch is torch's own, ``torch.backends.mha.set_fastpath_enabled``; ``torch.compile`` cannot
    trace that function, but it can trace the variable that it sets.
    """
    before = mha.get_fastpath_enabled()
    mha._is_fastpath_enabled = False
    try:
        yield
    finally:
        mha._is_fastpath_enabled = before
