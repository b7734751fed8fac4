"""What the operators' derivatives share."""

from __future__ import annotations

import torch
from torch import Tensor

ops = torch.ops.perturbed
_library = torch.library.Library("perturbed", "IMPL")

# Largest materialised noise that a derivative holds at once.
BACKWARD_BYTES = 32 << 20


def refuse_grad(name: str, instead: str) -> None:
    """Make an operator without a derivative raise where autograd would be silently wrong."""
    op = getattr(ops, name).default

    def refuse(*args):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(f"perturbed::{name} is not differentiable; {instead}")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, refuse, "Autograd")


def signed(grad: Tensor, directions: int, antithetic: bool) -> Tensor:
    """Return s_b times the gradient of y, as (R, D, T, out)."""
    rows = grad.reshape(grad.shape[0] // directions, directions, *grad.shape[1:])
    if antithetic:
        plus, minus = rows.chunk(2)
        rows = torch.cat((plus, -minus))
    return rows


def fold_rows(grad: Tensor, rows: int) -> Tensor:
    """Sum a gradient of (B, T, n) rows over the copies that read each of (rows, T, n)."""
    if grad.shape[0] == rows:
        return grad
    return grad.unflatten(0, (-1, rows)).sum(0)


def fold_shared(grad: Tensor, rows: int) -> Tensor:
    """Sum (R, D, T, n) gradients over all that read each of the N shared rows, (N, T, n)."""
    copies = grad.shape[0] // rows if rows else 0  # with 0 rows, -1 would leave it to guess
    return grad.unflatten(0, (copies, rows)).sum((0, 2))
