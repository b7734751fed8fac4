"""Boxes in which elements are searched, and the values on a grid in them."""

from __future__ import annotations

import math
from typing import Any

from ...checks import check_number


def check_domain(domain: Any) -> tuple[float, float]:
    """Return (low, high) if it is a pair of finite numbers in order.

    Raises:
        TypeError: no pair of numbers.
        ValueError: numbers that are not finite or not in order.
    """
    try:
        low, high = (float(end) for end in domain)
    except (TypeError, ValueError):
        raise TypeError(f"domain must be a pair (low, high) of numbers, got {domain!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"domain must be finite with low < high, got {domain!r}")
    return low, high


def grid_size(domain: tuple[float, float], spacing: float) -> int:
    """Return how many values a grid has: low, low + spacing, ... and high, both ends included.

    A spacing that divides the domain but for rounding does so: 0 to 0.3 by 0.1 has 4 values. One
    that does not leaves a shorter last interval.
    """
    low, high = domain
    intervals = (high - low) / check_number("the spacing of a grid", spacing, above=True)
    return max(1, math.ceil(intervals - 1e-9 * max(1.0, intervals))) + 1


def grid_value(domain: tuple[float, float], spacing: float, i: int) -> float:
    """Return value i of a grid, from 0 to ``grid_size - 1``."""
    low, high = domain
    return high if i >= grid_size(domain, spacing) - 1 else low + i * spacing
