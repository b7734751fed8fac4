"""Fitness shaping: the losses of a population, turned into the weights of its noise.

Each function maps a floating-point tensor of member losses, any shape, to weights of the same shape
and dtype. They look at all members together, and a lower loss gets a lower weight, so that
descending along ``sum u E`` lowers the loss.

A loss that is NaN or infinite, of either sign, counts as the worst: it never wins and never
spreads. Where no loss is finite every weight is zero. Equal losses get equal weights; if all are
equal, zero (``identity`` aside). Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Shaping = Callable[[Tensor], Tensor]


def centered_rank(losses: Tensor) -> Tensor:
    """Return ranks scaled to [-0.5, 0.5]: blind to the scale of the loss and to outliers.

    ``u = rank / (n - 1) - 1/2``, rank 0 for the lowest of n losses; ties share their mean rank. The
    default of evolution strategies since Salimans et al., "Evolution Strategies as a Scalable
    Alternative to Reinforcement Learning" (2017).

    Example:
        >>> import torch
        >>> from perturbed.optim import centered_rank
        >>> centered_rank(torch.tensor([3.0, 1.0, 2.0, float("nan")]))
        tensor([ 0.1667, -0.5000, -0.1667,  0.5000])
    """
    check_losses(losses)
    below, through = _tied_ranks(losses)
    n = losses.numel()
    # 2 (n - 1) u is a whole number: (below + through - 1) / 2 is the rank.
    centred = (below + through).sub_(n).to(torch.float64)
    return centred.div_(2 * max(n - 1, 1)).to(losses.dtype)


def nes_utilities(losses: Tensor) -> Tensor:
    """Return the utilities of natural evolution strategies: the worse half weighs the same.

    ``u = 1/n - max(0, ln(n/2 + 1) - ln k) / sum(...)`` for the k-th best of n; ties share
    the mean of theirs. Wierstra, Schaul, Glasmachers, Sun, Peters, Schmidhuber: "Natural Evolution
    Strategies" (JMLR 15, 2014), section 3.1, with the sign of a loss.

    Example:
        >>> import torch
        >>> from perturbed.optim import nes_utilities
        >>> nes_utilities(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([-0.4804, -0.0196,  0.2500,  0.2500])
    """
    check_losses(losses)
    n = losses.numel()
    if n == 0:
        return losses.clone()
    place = torch.arange(1, n + 1, device=losses.device, dtype=torch.float64)
    utility = (torch.log(torch.full_like(place, n / 2 + 1)) - place.log()).clamp_(min=0)
    # Sums of the first k utilities, so that a run of ties is the difference of two of them.
    sums = F.pad(utility.div_(utility.sum()).cumsum(0), (1, 0))
    below, through = _tied_ranks(losses)
    tied = through - below
    shared = sums[through].sub_(sums[below]).div_(tied)
    all_equal = tied == n  # exactly zero, which rounding might miss
    return (1 / n - shared).masked_fill_(all_equal, 0.0).to(losses.dtype)


def zscore(losses: Tensor) -> Tensor:
    """Return ``(loss - mean) / std`` with the population's standard deviation (divisor n).

    Losses that are not finite count as the largest finite one. Used for instance by Qiu et al.,
    "Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement Learning" (2025).

    Example:
        >>> import torch
        >>> from perturbed.optim import zscore
        >>> zscore(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.2247,  0.0000,  1.2247])
    """
    check_losses(losses)
    if losses.numel() == 0:
        return losses.clone()
    clean = finite_losses(losses).to(torch.float64)
    # The result knows neither offset nor scale; in [0, 1] no square leaves the range of a double.
    low, high = clean.min(), clean.max()
    unit = (clean - low) / (high - low)
    centred = unit - unit.mean()
    scaled = centred / centred.square().mean().sqrt()
    return torch.where(high > low, scaled, 0.0).to(losses.dtype)


def identity(losses: Tensor) -> Tensor:
    """Return the losses themselves: the estimate is then unbiased for the smoothed loss.

    Nothing is centred: without antithetic pairs the mean loss adds variance, and subtracting a
    baseline is then the caller's part. Losses that are not finite count as the largest finite one.
    """
    return finite_losses(losses)


SHAPINGS: dict[str, Shaping] = {
    "centered_rank": centered_rank,
    "nes_utilities": nes_utilities,
    "zscore": zscore,
    "identity": identity,
}
"""Names that ``shaping=`` takes, and their functions: (n,) losses -> (n,) weights."""


def resolve_shaping(shaping: str | Shaping) -> Shaping:
    """Return the function of a name in ``SHAPINGS``; a callable is fenced in and returned.

    A caller's own function gets the losses after :func:`finite_losses` and must return one weight
    for each; weights of it that are not finite count as zero.

    Raises:
        ValueError: an unknown name; later, a callable that returns another shape.
        TypeError: neither a name nor a callable; later, a callable that returns no tensor.
    """
    if isinstance(shaping, str):
        if shaping not in SHAPINGS:
            raise ValueError(
                f"shaping must be one of {tuple(SHAPINGS)} or a callable, got {shaping!r}"
            )
        return SHAPINGS[shaping]
    if not callable(shaping):
        raise TypeError(f"shaping must be a name or a callable, got {shaping!r}")
    if shaping in SHAPINGS.values():
        return shaping

    def fenced(losses: Tensor) -> Tensor:
        weights = shaping(finite_losses(losses))
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"shaping must return a tensor of weights, got {type(weights).__name__}"
            )
        if weights.shape != losses.shape:
            raise ValueError(
                f"shaping must return one weight per loss, {tuple(losses.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        usable = weights.isfinite() & losses.isfinite().any()
        return torch.where(usable, weights, 0).to(losses.dtype)

    return fenced


def check_comparable(shaping: Shaping, members: int) -> None:
    """Refuse a population of one where the shaping compares: its weight would be 0 for ever.

    Raises:
        ValueError: that.
    """
    if members == 1 and shaping in (centered_rank, nes_utilities, zscore):
        raise ValueError(
            f"{shaping.__name__} compares members, and one alone has nothing to be compared with: "
            "nothing would ever be learned; use 2 members or more"
        )


def check_losses(losses: object) -> None:
    """Raise TypeError unless losses are a floating-point tensor: others cannot hold weights."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"losses must be a floating-point tensor, got {got}")
    if losses.layout != torch.strided:
        raise TypeError(f"losses must be a dense tensor, got one of layout {losses.layout}")


def finite_losses(losses: Tensor) -> Tensor:
    """Replace losses that are not finite by the largest finite one; by zeros if there is none."""
    check_losses(losses)
    if losses.numel() == 0:
        return losses.clone()
    worst = losses.nan_to_num(-torch.inf, -torch.inf, -torch.inf).amax()
    worst = worst.nan_to_num(neginf=0.0)  # there is no finite one
    return torch.where(losses.isfinite(), losses, worst)


def _tied_ranks(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Count for each loss the lower ones, and the lower or equal ones; not finite is worst."""
    flat = losses.nan_to_num(torch.inf, torch.inf, torch.inf).flatten()
    ordered = flat.sort().values
    below = torch.searchsorted(ordered, flat)
    through = torch.searchsorted(ordered, flat, right=True)
    return below.view(losses.shape), through.view(losses.shape)
