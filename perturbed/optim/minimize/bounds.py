"""Bounds of parameters, as groups hold them and as vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def bound_vectors(groups: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of all trainable elements, (N,) float64 each.

    Args:
        groups: of an optimizer; ``group["bounds"]`` is None, a pair for all of its parameters, or a
            dict of pairs by ``group["param_names"]``. An end is None, a number, or what broadcasts
            to the parameter.

    Raises:
        TypeError: ends that are no real numbers.
        ValueError: no pairs, unknown names, other shapes, NaN, lower ends above upper ones.
    """
    lower: list[np.ndarray] = []
    upper: list[np.ndarray] = []
    for group in groups:
        for i, parameter in enumerate(group["params"]):
            if not parameter.requires_grad:
                continue
            name, pair = _pair_of(group, i)
            for ends, end, absent in ((lower, pair[0], -math.inf), (upper, pair[1], math.inf)):
                ends.append(_broadcast(name, absent if end is None else end, parameter))
            if not (lower[-1] <= upper[-1]).all():
                raise ValueError(f"{name} must have lower ends that are at most the upper ones")
    none = np.empty(0)
    return np.concatenate([none, *lower]), np.concatenate([none, *upper])


def check_names(group: dict[str, Any]) -> None:
    """Refuse bounds by name that name no parameter of the group."""
    bounds = group["bounds"]
    if not isinstance(bounds, Mapping):
        return
    names = group.get("param_names")
    if names is None:
        raise ValueError(
            "bounds by name need parameters with names: pass net.named_parameters(), or one "
            "group for each pair of bounds"
        )
    unknown = [key for key in bounds if key not in names]
    if unknown:
        raise ValueError(f"bounds must name parameters of {list(names)}, got {unknown}")


def _pair_of(group: dict[str, Any], i: int) -> tuple[str, tuple[Any, Any]]:
    """Return what to call the bounds of parameter i, and its pair."""
    name, value = "bounds", group["bounds"]
    if isinstance(value, Mapping):
        key = group["param_names"][i]
        name, value = f"bounds[{key!r}]", value.get(key)
    if value is None:
        return name, (None, None)
    if isinstance(value, (str, Tensor)):
        raise TypeError(f"{name} must be a pair (lower, upper) or None, got {value!r}")
    try:
        low, high = value
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (lower, upper) or None, got {value!r}") from None
    return name, (low, high)


def _broadcast(name: str, end: Any, parameter: Tensor) -> np.ndarray:
    """Return an end for every element of a parameter, flat."""
    if isinstance(end, (bool, str)):
        raise TypeError(f"{name} must have numbers or tensors as ends, got {end!r}")
    try:
        values = torch.as_tensor(end)
        if values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"no real numbers: {values.dtype}")
        wide = values.detach().cpu().to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must have numbers or tensors as ends, got {end!r} ({error})"
        ) from None
    if wide.isnan().any():
        raise ValueError(f"{name} must not be NaN")
    try:
        return wide.expand(parameter.shape).reshape(-1).numpy()
    except RuntimeError:
        raise ValueError(
            f"{name} must have ends that broadcast to {tuple(parameter.shape)}, got "
            f"{tuple(wide.shape)}"
        ) from None
