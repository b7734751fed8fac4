"""Sequential search: one element after the other, each over all of its values."""

from __future__ import annotations

from typing import Any

from .base import Point, ScalarOptimizer, Trial
from .checks import check_options, improves
from .domain import check_domain, grid_size, grid_value


class SequentialSearch(ScalarOptimizer):
    """Try low, low + lr, ... and high for one element, keep the best, go on to the next.

    After the last element of the last group comes the first again. A value that an element has
    already is passed over. After a step the parameters are the best point so far.

    The first step evaluates the parameters as they are, too: 2 evaluations, then 1 a step. A step
    returns the best loss so far.

    Args:
        params: parameters or groups of them.
        lr: distance between values.
        domain: (low, high) of every element.

    Raises:
        TypeError: arguments of another type.
        ValueError: an empty domain, lr that is not above 0, no parameter that requires grad.

    Example:
        >>> import torch
        >>> from perturbed.optim import SequentialSearch
        >>> x = torch.nn.Parameter(torch.zeros(3))
        >>> search = SequentialSearch([x], lr=0.5, domain=(-1, 1))
        >>> target = torch.tensor([0.5, -1.0, 1.0])
        >>> for _ in range(15):  # 5 values of each element
        ...     loss = search.step(lambda: (x - target).square().sum())
        >>> x.tolist()
        [0.5, -1.0, 1.0]
    """

    def __init__(self, params: Any, lr: float, domain: tuple[float, float]) -> None:
        """Check the arguments; nothing is evaluated yet."""
        super().__init__(params, {"lr": lr, "domain": domain})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr")
        grid_size(check_domain(group["domain"]), group["lr"])

    def _start(self) -> dict[str, Any]:
        # Where the search is: tensor, element of it, value of that.
        return {"loss": None, "tensor": 0, "element": 0, "value": 0}

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        if self.progress["loss"] is None:
            self.progress["loss"] = trial(home)
        place, value = self._next_value(home)
        point = list(home)
        point[place] = home[place].clone()
        point[place].view(-1)[self.progress["element"]] = value
        loss = trial(point)
        self.progress["value"] += 1
        if improves(loss, self.progress["loss"]):
            self.progress["loss"] = loss
            return point, loss
        return home, self.progress["loss"]

    def _next_value(self, home: Point) -> tuple[int, float]:
        """Move on to the next value that is another one; return its tensor and the value."""
        where = self.progress
        numbers = [g for g, _ in self._trained()]
        while True:
            place = where["tensor"]
            group = self.param_groups[numbers[place]]
            # A scheduler may have brought lr to 0: then the ends of the domain are left.
            spacing = group["lr"] or group["domain"][1] - group["domain"][0]
            if where["element"] >= home[place].numel():
                where["tensor"], where["element"] = (place + 1) % len(home), 0
            elif where["value"] >= grid_size(group["domain"], spacing):
                where["element"], where["value"] = where["element"] + 1, 0
            else:
                value = grid_value(group["domain"], spacing, where["value"])
                present = home[place].view(-1)[where["element"]]
                if present != present.new_tensor(value):
                    return place, value
                where["value"] += 1
