"""The searches with a scalar closure, by name, for the tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perturbed.optim import RandomSearch, ShrinkingRandomSearch

# Options with which a method makes progress on the quadratic of the tests in a few hundred steps.
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "random": (RandomSearch, {}),
    "random-domain": (RandomSearch, {"domain": (-2, 2)}),
    "shrinking": (ShrinkingRandomSearch, {"lr": 0.5, "nsteps": 300}),
    "shrinking-stochastic": (ShrinkingRandomSearch, {"lr": 0.3, "stochastic": True}),
}


def make(name: str, params: Any, **options: Any) -> Any:
    kind, defaults = METHODS[name]
    return kind(params, **{**defaults, **options})


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    """Three tensors, the second of which is frozen and the third not contiguous."""
    first = torch.tensor([0.2, -0.4], dtype=dtype, device=device)
    third = torch.tensor([[0.1, 0.3], [-0.2, 0.5]], dtype=dtype, device=device).t()
    points = [nn.Parameter(first), nn.Parameter(torch.full_like(first, 0.75)), nn.Parameter(third)]
    points[1].requires_grad_(False)
    assert not points[2].is_contiguous()
    return points


def quadratic(points: Sequence[Tensor]) -> Tensor:
    """0 where all elements are 0.75."""
    return sum(((p.double() - 0.75) ** 2).sum() for p in points)  # type: ignore[return-value]


def run(
    optimizer: Any, points: Sequence[Tensor], steps: int, loss: Callable[..., Any] = quadratic
) -> list[float]:
    return [float(optimizer.step(lambda: loss(points))) for _ in range(steps)]
