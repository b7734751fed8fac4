"""Boxes in which elements are searched."""

from __future__ import annotations

import math
from typing import Any


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
