"""Random walks: take the best of some random moves if it lowers the loss.

The methods are torchzero's ``RandomWalk`` (orders 1, 2 and n) and ``RandomWalkSO``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...checks import as_count, check_flag, check_number
from .base import Point, Trial
from .checks import check_options, improves
from .population import PopulationSearch
from .samplers import Sampler


class RandomWalk(PopulationSearch):
    """Try ``best_of`` random moves at each step and take the best if it lowers the loss.

    Order 1 tries ``p + lr z_k``. Order n keeps n - 1 directions D_1 (a velocity), D_2 (an
    acceleration), ...: a draw perturbs the last, each adds up to the one before, and the point
    moves by the first, so that a try is ``p + D_1 + ... + lr z_k``. After a success the directions
    are those of the try. After a failure the point stays, and the last direction turns away from
    the worst draw (``turn_away``). All directions are multiplied by ``momentum`` at each step.

    If no try lowers the loss, ``move_opposite`` tries the opposite of the worst draw, too, and
    takes it only if it does. NaN is worse than every number; a loss that stays the same counts as
    lower only with ``accept_equal``. A step has ``best_of`` evaluations, one more for an opposite
    move, and one more for the present point, at the first step or, with ``stochastic``, at every
    one. It returns the lowest loss that it saw, penalties included.

    ``RandomWalkSO`` of torchzero is ``order=2, retries=k, restart=length``.

    Given a :class:`~perturbed.PerturbedModel` all tries are one forward; its members, of both signs
    if the sampling is antithetic, take the place of ``best_of`` and ``sampler``; see
    ``docs/optimizers.md``.

    Args:
        params: parameters, groups of them, or a PerturbedModel.
        lr: scale of a draw.
        order: 1 or more.
        best_of: tries of a step.
        move_opposite: whether to try the opposite of the worst draw after a failure.
        turn_away: whether the last direction turns away from the worst draw after a failure;
            without effect in order 1 without momentum.
        momentum: what directions are multiplied by at each step, 0 to 1; default: 0.9, and 0 for
            order 1, which with momentum keeps a velocity as order 2 does. torchzero's order 2 has
            1: it keeps its velocity whatever happens.
        retries: failures in a row after which the directions start afresh; None: they never do.
        restart: length of the fresh first direction; default: 10 lr.
        stochastic: evaluate the present point at every step, for losses that are of other data at
            each.
        accept_equal: whether to take a move that changes nothing, to drift along plateaus.
        L1: weight of a penalty on the mean absolute value of each tensor, averaged over tensors.
        L2: the same of the mean square.
        literal_wd: parameters are multiplied by 1 - literal_wd in each try.
        sampler: a name of ``SAMPLERS`` or a function (tensor, generator) -> tensor; None: "normal".
        seed: of the random numbers.
        chunk: directions of a forward of the PerturbedModel, at most: the closure is then called
            several times, each time for others and with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.

    Raises:
        TypeError: arguments of another type.
        ValueError: numbers out of range, an unknown sampler, no parameter that requires grad;
            best_of, sampler, L1 or L2 beside a PerturbedModel; chunk below 1, beside max_memory, or
            either without a PerturbedModel.

    Example:
        >>> import torch
        >>> from perturbed.optim import RandomWalk
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -3.0]))
        >>> walk = RandomWalk([x], lr=0.1, best_of=3, stochastic=False)
        >>> for _ in range(100):
        ...     loss = walk.step(lambda: x.square().sum())
        >>> bool(x.square().sum() < 0.01)
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        order: int = 1,
        best_of: int | None = None,
        move_opposite: bool = True,
        turn_away: bool = True,
        momentum: float | None = None,
        retries: int | None = None,
        restart: float | None = None,
        stochastic: bool = True,
        accept_equal: bool = False,
        L1: float = 0.0,
        L2: float = 0.0,
        literal_wd: float = 0.0,
        sampler: Sampler | None = None,
        seed: int | None = 0,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        self.order = as_count("order", order)
        count = None if best_of is None else as_count("best_of", best_of)
        self.move_opposite = check_flag("move_opposite", move_opposite)
        self.turn_away = check_flag("turn_away", turn_away)
        if momentum is None:
            momentum = 0.9 if self.order > 1 else 0.0
        self.momentum = check_number("momentum", momentum, high=1.0)
        self.retries = None if retries is None else as_count("retries", retries)
        self.restart = None if restart is None else check_number("restart", restart)
        self.stochastic = check_flag("stochastic", stochastic)
        self.accept_equal = check_flag("accept_equal", accept_equal)
        self.L1, self.L2 = check_number("L1", L1), check_number("L2", L2)
        self.literal_wd = check_number("literal_wd", literal_wd, high=1.0)
        #: Directions that are kept.
        self.levels = max(self.order - 1, 1 if self.momentum or self.retries else 0)
        defaults = {"lr": lr, "sampler": "normal" if sampler is None else sampler}
        super().__init__(params, defaults, seed, count, chunk, max_memory)
        penalties = {"L1": L1 or None, "L2": L2 or None}
        self._refuse({"best_of": best_of, "sampler": sampler, **penalties})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr", "sampler")

    def _start(self) -> dict[str, Any]:
        return {"loss": None, "directions": [], "failures": 0}

    def _check_progress(self, progress: dict[str, Any]) -> None:
        super()._check_progress(progress)
        directions = progress["directions"]
        if directions and len(directions) != self.levels:
            raise ValueError(
                f"progress['directions'] must be {self.levels} of them, got {len(directions)}"
            )
        for i, direction in enumerate(directions):
            self._check_point(f"progress['directions'][{i}]", direction)

    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        progress = self.progress
        if progress["loss"] is None or self.stochastic:
            progress["loss"] = self._penalised(trial(home), home)
        directions = self._directions(home)
        centre: Point = list(torch._foreach_mul(home, 1 - self.literal_wd))
        for direction in directions:
            torch._foreach_add_(centre, direction)
        scales = self._option("lr")
        losses = self.tries.losses(centre, scales)
        if self.L1 or self.L2:
            losses = [
                self._penalised(loss, list(torch._foreach_add(centre, self.tries.move(k))))
                for k, loss in enumerate(losses)
            ]
        ranked = [loss if math.isfinite(loss) else math.inf for loss in losses]
        k = min(range(len(ranked)), key=ranked.__getitem__)
        lowest = ranked[k]
        move = self.tries.move(k)
        if not self._lowers(lowest):
            worst = max(range(len(ranked)), key=ranked.__getitem__)
            move = list(torch._foreach_neg(self.tries.move(worst)))
            if self.move_opposite:
                point = list(torch._foreach_add(centre, move))
                opposite = self._penalised(trial(point), point)
                if math.isfinite(opposite):
                    lowest = min(lowest, opposite)
                if not self._lowers(opposite):
                    return self._fail(home, directions, move, lowest)
            else:
                return self._fail(home, directions, move, lowest)
        point = list(torch._foreach_add(centre, move))
        # From the last direction to the first: each has the next one added, as it now is.
        grown, step = [], move
        for direction in reversed(directions):
            step = list(torch._foreach_add(direction, step))
            grown.append(list(torch._foreach_mul(step, self.momentum)))
        progress["directions"] = grown[::-1]
        progress["failures"] = 0
        progress["loss"] = lowest
        return point, lowest

    def _lowers(self, loss: float) -> bool:
        """Whether a loss is an improvement on that of the present point."""
        present = self.progress["loss"]
        return improves(loss, present) or (self.accept_equal and loss == present)

    def _fail(
        self, home: Point, directions: list[Point], away: Point, lowest: float
    ) -> tuple[Point, float]:
        """Stay, and change the directions; ``away`` is the opposite of the worst draw."""
        progress = self.progress
        progress["failures"] += 1
        if self.retries is not None and progress["failures"] >= self.retries:
            progress["failures"] = 0
            fresh = self._fresh(home)
            zeros = [[torch.zeros_like(t) for t in home] for _ in directions[1:]]
            progress["directions"] = [fresh, *zeros]
        elif directions:
            if self.turn_away:
                directions = [*directions[:-1], list(torch._foreach_add(directions[-1], away))]
            scaled = [list(torch._foreach_mul(d, self.momentum)) for d in directions]
            progress["directions"] = scaled
        present = progress["loss"]
        return home, min(lowest, present if math.isfinite(present) else math.inf)

    def _fresh(self, like: Point) -> Point:
        """Return a direction of a new draw."""
        lengths = [10 * lr if self.restart is None else self.restart for lr in self._option("lr")]
        noise = self._sample(like, self._next_draw())
        torch._foreach_mul_(noise, lengths)
        return noise

    def _directions(self, home: Point) -> list[Point]:
        held = self.progress["directions"]
        return held or [[torch.zeros_like(t) for t in home] for _ in range(self.levels)]

    def _penalised(self, loss: float, point: Point) -> float:
        """Add the penalties of a point to its loss."""
        if not (self.L1 or self.L2):
            return loss
        means = [
            self.L1 * t.abs().mean().item() + self.L2 * t.square().mean().item()
            for t in point
            if t.numel()
        ]
        return loss + sum(means) / len(means)
