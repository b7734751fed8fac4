"""What searches share that estimate a gradient and hand it to an optimizer."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...checks import check_flag, check_number
from ..strategy import check_optimizer
from .base import Point
from .checks import check_options
from .population import PopulationSearch


class GradientSearch(PopulationSearch):
    """Base of searches that write an estimate into ``.grad``.

    With ``opt`` a step ends with ``opt.step()``; learning-rate schedulers belong on ``opt``, which
    has a ``state_dict`` within this one's. Without it the caller steps an optimizer of his own, or
    the subclass moves the parameters itself. Where losses say nothing, because all are equal or
    none is finite, the estimate is zero and ``opt`` does not step: no momentum leads off a plateau.

    Args:
        params: parameters, groups of them, or a PerturbedModel.
        defaults: options of groups; has "lr" and "magn".
        opt: a torch optimizer of the same parameters, one whose ``step`` needs no closure.
        accumulate: add to what is in ``.grad`` instead of replacing it.
        seed: of the random numbers.
        count: candidates of a draw.
        chunk: directions of a forward, at most, of a PerturbedModel.
        max_memory: bytes that a forward of it may take.

    Raises:
        TypeError: arguments of another type.
        ValueError: an optimizer of none of the parameters.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        opt: torch.optim.Optimizer | None,
        accumulate: bool,
        seed: int | None,
        count: int | None,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
    ) -> None:
        """Check the arguments; nothing is evaluated yet."""
        self.accumulate = check_flag("accumulate", accumulate)
        self.opt: torch.optim.Optimizer | None = None
        self._estimate: Point | None = None  # of the step under way
        super().__init__(params, defaults, seed, count, chunk, max_memory)
        if opt is not None:
            self.opt = check_optimizer(
                opt,
                [p for _, p in self._trained()],  # type: ignore[misc]
                "opt",
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_options(group, "lr", "sampler")
        check_number("magn", group["magn"], above=True)

    def _finish(self) -> None:
        """Write the estimate, or zeros if there is none, and have ``opt`` step along it."""
        estimate, self._estimate = self._estimate, None
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    p.grad = None  # of before it was frozen: optimizers move what has one
        for i, (_, p) in enumerate(self._trained()):
            part = None if estimate is None else estimate[i].to(p.dtype)
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif not self.accumulate:
                p.grad.zero_()
            if part is not None:
                p.grad.add_(part)
        if self.opt is not None and estimate is not None:
            self.opt.step()

    def _restore(self, snapshot: Any) -> None:
        super()._restore(snapshot)
        self._estimate = None

    def _others(self) -> dict[str, Any]:
        # Copies, here and below: torch's states share their tensors with the optimizer.
        inner = {} if self.opt is None else {"opt": copy.deepcopy(self.opt.state_dict())}
        return {**super()._others(), **inner}

    def _load_others(self, state: dict[str, Any]) -> None:
        super()._load_others(state)
        if self.opt is not None:
            self.opt.load_state_dict(copy.deepcopy(state["opt"]))
