"""Crossover: one tensor of a child from those of two parents, as torchzero's swarm has it.

Random numbers come from a CPU generator, so that a child is the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (best, second, generator) -> child, or a tuple of children, of which the first is taken.
Crossover = Callable[[Tensor, Tensor, torch.Generator], Any]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def swap(best: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Take the whole tensor of one of both, with equal chances."""
    return (best if _uniform(generator) < 0.5 else second).clone()


def uniform(best: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Take every element of one of both, with equal chances."""
    mask = torch.rand(best.shape, generator=generator) < 0.5
    return torch.where(mask.to(best.device), best, second)


def one_point(best: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Cut in two along one dimension, and take one piece of each parent.

    Dimension, cut and who gives the first piece are random; no piece is empty, so a dimension of
    size 2 crosses too. A tensor of one element is swapped.
    """
    dims = [d for d, size in enumerate(best.shape) if size > 1]
    if not dims or best.numel() == 0:
        return swap(best, second, generator)
    dim = dims[int(_uniform(generator) * len(dims))]
    cut = 1 + int(_uniform(generator) * (best.shape[dim] - 1))
    first, other = (best, second) if _uniform(generator) < 0.5 else (second, best)
    rest = best.shape[dim] - cut
    return torch.cat([first.narrow(dim, 0, cut), other.narrow(dim, cut, rest)], dim)


def mean(best: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Take the mean; draws nothing."""
    return torch.lerp(best, second, 0.5)


def mixed(best: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """One of swap, uniform, one_point and mean, with chances 8 : 1 : 4 : 4, torchzero's default."""
    u = _uniform(generator) * 17
    chosen = swap if u < 8 else uniform if u < 9 else one_point if u < 13 else mean
    return chosen(best, second, generator)


CROSSOVERS: dict[str, Crossover] = {
    "mixed": mixed,
    "swap": swap,
    "uniform": uniform,
    "one_point": one_point,
    "mean": mean,
}
"""Names that ``crossover=`` takes, and their functions: (best, second, generator) -> tensor.

Of each tensor "swap" takes that of one parent, "uniform" every element of either, "one_point" one
piece of each, "mean" the mean; "mixed" does one of these, with chances 8 : 1 : 4 : 4.
"""


def check_crossover(crossover: object) -> Crossover:
    """Return the function of a name of ``CROSSOVERS``, or a function as it is."""
    if isinstance(crossover, str) and crossover in CROSSOVERS:
        return CROSSOVERS[crossover]
    if callable(crossover):
        return crossover
    raise ValueError(
        f"crossover must be one of {tuple(CROSSOVERS)} or a function (best, second, generator) -> "
        f"tensor, got {crossover!r}"
    )


def cross(
    crossover: Crossover,
    parents: tuple[list[Tensor], list[Tensor]],
    chance: float,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return a child: tensor by tensor a crossover with a ``chance``, else the best parent's.

    Args:
        crossover: see ``Crossover``.
        parents: the tensors of the best and of the second.
        chance: 0 to 1.
        generator: of the CPU.

    Raises:
        TypeError: a crossover that returns no tensor.
        ValueError: one of another shape.
    """
    child = []
    for best, second in zip(*parents, strict=True):
        if _uniform(generator) >= chance:
            child.append(best.clone())
            continue
        result = crossover(best, second, generator)
        result = result[0] if isinstance(result, tuple) else result
        if not isinstance(result, Tensor):
            raise TypeError(f"crossover must return a tensor, got {type(result).__name__}")
        if result.shape != best.shape:
            raise ValueError(
                f"crossover must return a tensor of shape {tuple(best.shape)}, got "
                f"{tuple(result.shape)}"
            )
        child.append(result.detach().to(best))
    return child
