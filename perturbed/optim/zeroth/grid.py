"""Grid search: every combination of some values of every element."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from ...checks import check_number
from .base import Point, ScalarOptimizer, Trial
from .checks import check_options, improves
from .domain import check_domain, grid_size, grid_value


class GridSearch(ScalarOptimizer):
    """Try every point of a grid, one a step, then those of a grid half as wide, and so on.

    The elements of a group take the values low, low + step, ... and high of its ``domain``; the
    grid has every combination of all elements of all groups. A grid of N elements with k values
    each has k^N points, which are counted exactly: only few elements can be searched to the end,
    and the order, by a stride near the golden section of their number, spreads the first points
    over the whole grid. After a step the parameters are the best point so far.

    One evaluation a step; a step returns the loss of its point. The parameters as they are before
    the first step are not evaluated.

    Args:
        params: parameters or groups of them.
        domain: (low, high) of every element.
        step: distance between values.
        lr: factor of ``step``, read when a grid begins, for learning-rate schedulers.

    Raises:
        TypeError: arguments of another type.
        ValueError: an empty domain, a step that is not above 0, no parameter that requires grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import GridSearch
        >>> x, y = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> search = GridSearch([x, y], domain=(-1, 1), step=0.5)
        >>> for _ in range(25):  # 5 by 5 points
        ...     loss = search.step(lambda: (x - 0.5).square() + (y + 1).square())
        >>> x.item(), y.item(), search.evaluations
        (0.5, -1.0, 25)
    """

    def __init__(
        self, params: Any, domain: tuple[float, float], step: float, lr: float = 1.0
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        super().__init__(params, {"lr": lr, "domain": domain, "step": step})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr")
        check_domain(group["domain"])
        check_number("step", group["step"], above=True)

    def _start(self) -> dict[str, Any]:
        # How many grids are done, points of this one, and the distances between values in it.
        return {"loss": None, "level": 0, "visited": 0, "spacings": []}

    def _check_progress(self, progress: dict[str, Any]) -> None:
        super()._check_progress(progress)
        spacings = progress["spacings"]
        if progress["visited"] and len(spacings) != len(self.param_groups):
            raise ValueError(
                f"progress['spacings'] must be {len(self.param_groups)} numbers, got {spacings}"
            )
        for spacing in spacings:
            check_number("progress['spacings']", spacing)

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        if not self.progress["visited"]:
            half = 0.5 ** self.progress["level"]
            # A scheduler may have brought lr to 0, which no grid has: then the last one stays.
            self.progress["spacings"] = [
                group["step"] * half * group["lr"] or group["step"] * half
                for group in self.param_groups
            ]
        parts = [
            (self.param_groups[g]["domain"], self.progress["spacings"][g], home[part])
            for g, part in self._of_groups()
        ]
        radices = tuple(
            (grid_size(domain, spacing), sum(t.numel() for t in tensors))
            for domain, spacing, tensors in parts
        )
        total, stride = _plan(radices)
        digits = iter(_digits(self.progress["visited"] * stride % total, radices))
        point: Point = []
        for (domain, spacing, tensors), (size, _) in zip(parts, radices, strict=True):
            values = [grid_value(domain, spacing, i) for i in range(size)]
            for t in tensors:
                chosen = [values[next(digits)] for _ in range(t.numel())]
                point.append(t.new_tensor(chosen).view(t.shape))
        loss = trial(point)
        self.progress["visited"] += 1
        if self.progress["visited"] == total:
            self.progress["visited"] = 0
            self.progress["level"] += 1
        best = self.progress["loss"]
        if not improves(loss, math.inf if best is None else best):
            return home, loss
        self.progress["loss"] = loss
        return point, loss


@functools.lru_cache(maxsize=8)
def _plan(radices: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the number of points of a grid and a stride that visits each of them once.

    Args:
        radices: values of an element and number of elements, for each group.
    """
    total = math.prod(values**count for values, count in radices)
    # 0.6180... as a ratio of integers with more digits than any number of points that is reached.
    stride = max(1, total * 11400714819323198485 >> 64)
    while math.gcd(stride, total) != 1:
        stride += 1
    return total, stride


def _digits(number: int, radices: Sequence[tuple[int, int]]) -> list[int]:
    """Return the digits of a number, one for each element, in integers of any size."""
    found = []
    for values, count in radices:
        for _ in range(count):
            number, digit = divmod(number, values)
            found.append(digit)
    return found
