"""Checks of options, and the comparison of losses, that several searches share."""

from __future__ import annotations

import math
from typing import Any

from ...checks import check_number
from .samplers import check_sampler


def check_options(group: dict[str, Any], *names: str) -> None:
    """Check options that several methods have.

    Args:
        group: a group with all options.
        names: of "lr" (number, at least 0) and "sampler".
    """
    if "lr" in names:
        check_number("lr", group["lr"])
    if "sampler" in names:
        check_sampler(group["sampler"])


def improves(loss: float, reference: float) -> bool:
    """Whether a loss is finite and below a reference; any is, if the reference is not finite."""
    return math.isfinite(loss) and not (math.isfinite(reference) and loss >= reference)
