"""How many directions a forward may have if it is to stay within a limit of memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checks import check_like
from ..memory import PeakMemory

# Directions of the first forward: few, to learn what one takes.
FIRST = 2
# No forward has more than this many times the directions of one that was measured.
GROWTH = 8
# A forward is large enough when larger ones would save no more than this part of all forwards.
SAVED = 0.1
# Where measuring costs time, forwards that go unmeasured once the number of directions is found.
EVERY = 100


class Budget:
    """Finds the largest forward within a limit of memory, from what forwards take.

    A forward of n directions that takes p bytes lets the next have ``limit / p`` times as many.
    What does not grow with the directions only makes that too few, and the next forward knows
    better (unless it is most of the limit): forwards grow up to the limit and not beyond it. Once
    they are large enough the number stays, until one is found to exceed the limit (longer inputs,
    say) or runs out of memory. It never grows again: the bits of losses may depend on it.

    Args:
        limit: bytes that a forward may take.
        count: directions that there are to evaluate.

    Attributes:
        chunk: directions of the next forward.
        settled: whether they are found.
    """

    def __init__(self, limit: int, count: int) -> None:
        """Nothing is known yet."""
        self.limit, self.count = limit, count
        self.chunk = min(FIRST, count)
        self.settled = False
        self._most = count  # directions that are not known to be too many
        self._unmeasured = 0
        self._warned = False

    @contextmanager
    def watch(self, shown: int, device: torch.device) -> Iterator[None]:
        """Measure a forward of ``shown`` directions where that is of use, and learn from it.

        Args:
            shown: directions of the forward.
            device: whose memory is limited.
        """
        due = not self.settled or self._unmeasured >= EVERY or PeakMemory.is_free(device)
        if not due or shown < self.chunk:  # the rest of a population says nothing of whole chunks
            self._unmeasured += 1
            yield
            return
        with PeakMemory(device) as memory:
            yield
        self._unmeasured = 0
        self.learn(shown, memory.peak)

    def learn(self, shown: int, peak: int) -> None:
        """Take in that a forward of ``shown`` directions takes ``peak`` bytes."""
        fits = max(1, self.limit * shown // max(1, peak))
        if peak > self.limit:
            self._most = max(1, shown - 1)
            self.settled = shown == 1
            self.chunk = min(fits, self._most)
            if shown == 1 and not self._warned:
                self._warned = True
                warnings.warn(
                    f"max_memory is {self.limit:,} bytes, but a forward of one direction alone "
                    f"takes {peak:,}: fewer or shorter rows for every member would take less",
                    stacklevel=2,
                )
        elif not self.settled:
            most = min(fits, self._most)
            now, least = -(-self.count // shown), -(-self.count // most)
            self.settled = now - least <= SAVED * now
            # Once found, forwards of equal size: with less memory there would be more of them.
            self.chunk = -(-self.count // now) if self.settled else min(most, GROWTH * shown)

    def halve(self, shown: int) -> bool:
        """After a forward ran out of memory: make the next ones half as large, if that is possible.

        Returns:
            Whether there is a smaller forward.
        """
        if shown == 1:
            return False
        self.chunk = self._most = shown // 2
        self.settled = False
        warnings.warn(
            f"a forward of {shown} directions ran out of memory though max_memory, "
            f"{self.limit:,} bytes, let it be; going on with {self.chunk}",
            stacklevel=2,
        )
        return True

    # ---- resuming ------------------------------------------------------------------------------

    def state(self) -> dict[str, int]:
        """Return all that has been learnt, in plain numbers."""
        return {
            "limit": self.limit,
            "chunk": self.chunk,
            "settled": int(self.settled),
            "most": self._most,
            "unmeasured": self._unmeasured,
        }

    def load(self, state: dict[str, int]) -> None:
        """Go on from :meth:`state`; what was learnt under another limit does not count."""
        check_like("state['memory']", state, self.state())
        if state["limit"] != self.limit:
            return
        self.chunk, self._most = (min(state[k], self.count) for k in ("chunk", "most"))
        self.settled, self._unmeasured = bool(state["settled"]), state["unmeasured"]
