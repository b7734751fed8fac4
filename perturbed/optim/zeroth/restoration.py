"""A problem of a few numbers with a known answer, to set optimizers side by side on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import as_count
from ...noise.state import check_seed
from .closure import to_loss
from .samplers import Source


class Restoration(nn.Module):
    """Find the numbers of a target from the loss alone: torchzero's toy benchmark.

    ``x``, the parameter, begins at random normals. Calling the module returns its loss, and counts.
    :meth:`evaluate` runs an optimizer of ``parameters()`` and compares fairly: what counts is the
    best of the first so many losses, however many a step has.

    Args:
        target: of any shape; None: 0, 0.1, ... 0.9.
        loss: (x, target) -> a loss of one element; default: the mean square.
        seed: of where x begins; None takes one from the operating system.

    Attributes:
        x: (*target.shape), the parameter.
        target: a buffer.
        losses: of all calls so far, as they are.

    Raises:
        TypeError: a target that is no tensor, a loss that is no function.
        ValueError: a target without elements, or of no floating-point numbers.

    Example:
        >>> from perturbed.optim import RandomSearch, Restoration, SPSA
        >>> problem = Restoration()
        >>> found = problem.evaluate(SPSA(problem.parameters(), lr=0.5), evaluations=200)
        >>> other = Restoration()
        >>> found < 0.01 < other.evaluate(RandomSearch(other.parameters()), evaluations=200)
        True
    """

    target: Tensor

    def __init__(
        self,
        target: Tensor | None = None,
        loss: Callable[[Tensor, Tensor], Any] = F.mse_loss,
        seed: int | None = 0,
    ) -> None:
        """Put x at its beginning."""
        super().__init__()
        target = torch.arange(10) / 10 if target is None else target
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a tensor, got {type(target).__name__}")
        if target.numel() == 0 or not target.is_floating_point():
            raise ValueError(
                f"target must have floating-point elements, got shape {tuple(target.shape)} of "
                f"{target.dtype}"
            )
        if not callable(loss):
            raise TypeError(f"loss must be a function (x, target) -> loss, got {loss!r}")
        (start,) = Source(check_seed(seed), 0, 0).normals([target])
        self.x = nn.Parameter(start)
        self.register_buffer("target", target.detach().clone())
        self.loss = loss
        self.losses: list[float] = []

    def forward(self) -> Tensor:
        """Return the loss of x, and keep a note of it."""
        loss = self.loss(self.x, self.target)
        self.losses.append(to_loss(loss))
        return loss

    def evaluate(
        self, optimizer: torch.optim.Optimizer, evaluations: int = 1000, backward: bool = False
    ) -> float:
        """Step until there are so many losses; return the best of them.

        Losses of earlier calls count: a second ``evaluate`` goes on where the first stopped.

        Args:
            optimizer: of this module's parameters.
            evaluations: losses that count, from the first on.
            backward: whether the optimizer needs gradients.

        Returns:
            The lowest of the first ``evaluations`` losses; infinite if none is a number.

        Raises:
            RuntimeError: a step that did not call its closure.
            TypeError: evaluations that are no integer, a loss that is no number.
            ValueError: evaluations below 1, a loss of several elements.
        """
        count = as_count("evaluations", evaluations)

        def closure() -> Tensor:
            if backward:
                optimizer.zero_grad()
            loss = self()
            if backward:
                loss.backward()
            return loss

        while (before := len(self.losses)) < count:
            optimizer.step(closure)  # type: ignore[arg-type]
            if len(self.losses) == before:
                raise RuntimeError(
                    f"optimizer must call its closure in every step; {type(optimizer).__name__} "
                    "did not"
                )
        return min((x for x in self.losses[:count] if math.isfinite(x)), default=math.inf)
