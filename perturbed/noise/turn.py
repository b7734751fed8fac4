"""One thread at a time: who may evaluate a population, and change its draw."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turn:
    """Blocks that one thread at a time may be in; a second one is refused and not made to wait.

    Waiting would only hide the mistake: a forward sees the draw of whoever drew last. The same
    thread may enter again. Copies and pickles begin with nobody in the block.

    Example:
        >>> from perturbed.noise.turn import Turn
        >>> turn = Turn()
        >>> with turn.taken(), turn.taken():
        ...     pass
    """

    def __init__(self) -> None:
        """Nobody is in the block."""
        self._lock = threading.RLock()

    # A generator, which torch.compile can trace; it cannot trace the lock, and traced code takes
    # no turn.
    @contextmanager
    def taken(self) -> Iterator[None]:
        """Be alone for a block.

        Raises:
            RuntimeError: another thread is in one.
        """
        if torch.compiler.is_compiling():
            yield
            return
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "in use by another thread: one thread at a time may evaluate a PerturbedModel, "
                "change its draw or step its optimizer; give every thread a model of its own "
                "(copy.deepcopy)"
            )
        try:
            yield
        finally:
            self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return type(self), ()
