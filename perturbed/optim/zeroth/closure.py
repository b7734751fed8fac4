"""What a closure of one loss may return, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]


def check_closure(closure: object) -> Closure:
    """Return ``closure`` if it can be called."""
    if not callable(closure):
        raise TypeError(
            f"closure must be a function without arguments that returns the loss, got "
            f"{type(closure).__name__}"
        )
    return closure


def to_loss(value: Any) -> float:
    """Return what a closure returned as a float, NaN and infinities as they are. Waits for a GPU.

    Args:
        value: a real number, or a tensor of one element.

    Raises:
        TypeError: None, complex numbers, or no number at all.
        ValueError: a tensor of several elements.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"closure must return one loss, a number or a 0-dim tensor, got a tensor of shape "
                f"{tuple(value.shape)}; average it"
            )
        if value.is_complex():
            raise TypeError(f"closure must return a real loss, got {value.dtype}")
        return float(value.detach())
    if value is None:
        raise TypeError("closure must return the loss, got None; does it lack a return?")
    if not isinstance(value, (str, bytes, complex)):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise TypeError(
        f"closure must return a real number or a 0-dim tensor, got {type(value).__name__}"
    )


def call(closure: Closure) -> Any:
    """Call a closure that must not need gradients, and say so where it does.

    Raises:
        RuntimeError: the closure calls ``backward``.
    """
    try:
        return closure()
    except RuntimeError as error:
        if not torch.is_grad_enabled() and "does not require grad" in str(error):
            raise RuntimeError(
                "closure must not call backward(): this optimizer uses the loss alone and calls "
                "its closure without gradients; return the loss only"
            ) from error
        raise
