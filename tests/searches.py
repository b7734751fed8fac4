"""The searches with a scalar closure, by name, for the tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perturbed.optim import (
    FDSA,
    RDSA,
    SPSA,
    AcceleratedRandomSearch,
    GridSearch,
    RandomBestGrad,
    RandomGrad,
    RandomSearch,
    RandomWalk,
    ResidualFeedback,
    SequentialSearch,
    ShrinkingRandomSearch,
    SimulatedAnnealing,
    ThresholdAccepting,
)


def WithAdam(params: Any, kind: type, **options: Any) -> Any:
    """A search whose estimates Adam follows."""
    params = list(params)
    return kind(params, opt=torch.optim.Adam(params, 0.02), **options)


# Options with which a method makes progress on the quadratic of the tests in a few hundred steps.
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "random": (RandomSearch, {}),
    "random-domain": (RandomSearch, {"domain": (-2, 2)}),
    "accelerated": (AcceleratedRandomSearch, {"domain": (-2, 2)}),
    "shrinking": (ShrinkingRandomSearch, {"lr": 0.5, "nsteps": 300}),
    "shrinking-stochastic": (ShrinkingRandomSearch, {"lr": 0.3, "stochastic": True}),
    "grid": (GridSearch, {"domain": (0, 1), "step": 0.25}),
    "sequential": (SequentialSearch, {"lr": 0.25, "domain": (-1, 1)}),
    "walk": (RandomWalk, {"lr": 0.05}),
    "walk-remembered": (RandomWalk, {"lr": 0.05, "stochastic": False, "best_of": 2}),
    "walk-order-2": (RandomWalk, {"lr": 0.02, "order": 2, "best_of": 3}),
    "walk-order-3": (RandomWalk, {"lr": 0.01, "order": 3, "best_of": 3, "momentum": 0.7}),
    "walk-so": (RandomWalk, {"lr": 0.02, "order": 2, "retries": 2, "momentum": 1.0}),
    "walk-penalised": (RandomWalk, {"lr": 0.05, "L1": 1e-3, "L2": 1e-3, "literal_wd": 1e-4}),
    "grad": (WithAdam, {"kind": RandomGrad, "magn": 1e-3}),
    "best-grad": (WithAdam, {"kind": RandomBestGrad, "magn": 1e-3, "bestof": 3}),
    "average-grad": (WithAdam, {"kind": RandomBestGrad, "magn": 1e-3, "avgbest": True}),
    "spsa": (SPSA, {"lr": 0.02}),
    "spsa-adam": (WithAdam, {"kind": SPSA, "n": 2}),
    "rdsa": (RDSA, {"lr": 0.01, "n": 3}),
    "fdsa": (FDSA, {"lr": 0.1}),
    "residual": (ResidualFeedback, {"lr": 0.01, "magn": 0.1}),
    "annealing": (SimulatedAnnealing, {"lr": 0.1}),
    "annealing-stochastic": (SimulatedAnnealing, {"lr": 0.1, "stochastic": True}),
    "threshold": (ThresholdAccepting, {"lr": 0.1, "max_bad_iter": 7}),
}


def make(name: str, params: Any, **options: Any) -> Any:
    kind, defaults = METHODS[name]
    if {kind, defaults.get("kind")} & {GridSearch, SequentialSearch, FDSA}:  # nothing random
        options.pop("seed", None)
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
