"""Signs of every direction, applied to the inputs and outputs of a matrix that all share."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import fold_rows, fold_shared, ops, refuse_grad, signed


def flip(
    x: Tensor, key: Tensor, stream: int, directions: int, antithetic: bool, shared: bool
) -> Tensor:
    """Return ``s_b sign_d[i] x[b, t, i]``; differentiable in ``x``.

    Args:
        x: (B, T, n); or (N, T, n) if ``shared``, rows that every direction sees.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        stream: Philox counter word of the signs, a (1, n) matrix of the noise contract.
        directions: D.
        antithetic: whether s_b is -1 in the second half of the repeats; not with ``shared``.
        shared: whether to write every row out for every direction.

    Returns:
        (B, T, n), or (N * D, T, n) if ``shared``: row b from ``x[b // D]``.
    """
    return ops.flip.default(x, key, stream, directions, antithetic, shared)


def flip_add_(
    y: Tensor, z: Tensor, key: Tensor, stream: int, directions: int, antithetic: bool
) -> None:
    """Do ``y[b, t, i] += s_b sign_d[i] z[b % M, t, i]``.

    Args:
        y: (B, T, m) contiguous.
        z: (M, T, m), M a multiple of D that divides B.
        key: as in :func:`flip`.
        stream: Philox counter word of the signs, a (1, m) matrix of the noise contract.
        directions: D.
        antithetic: whether s_b is -1 in the second half of the repeats.

    Raises:
        RuntimeError: if a gradient is asked of it; :func:`flip_add` is the differentiable form.
    """
    ops.flip_add_.default(y, z, key, stream, directions, antithetic)


def flip_add(
    y: Tensor, z: Tensor, key: Tensor, stream: int, directions: int, antithetic: bool
) -> Tensor:
    """Return what :func:`flip_add_` makes of ``y``; differentiable in ``y`` and ``z``."""
    return ops.flip_add.default(y, z, key, stream, directions, antithetic)


@torch.library.register_fake("perturbed::flip")
def _(x, key, stream, directions, antithetic, shared):
    return x.new_empty((x.shape[0] * (directions if shared else 1), *x.shape[1:]))


@torch.library.register_fake("perturbed::flip_add_")
def _(y, z, key, stream, directions, antithetic):
    return None


@torch.library.register_fake("perturbed::flip_add")
def _(y, z, key, stream, directions, antithetic):
    return torch.empty_like(y)


def _flip_context(ctx, inputs, output):
    x, key, ctx.stream, ctx.directions, ctx.antithetic, ctx.shared = inputs
    # A copy: set_noise updates the key in place, and this draw must outlive it.
    ctx.save_for_backward(key.clone())
    ctx.rows = x.shape[0]


def _flip_backward(ctx, grad: Tensor):
    (key,) = ctx.saved_tensors
    each = flip(grad.contiguous(), key, ctx.stream, ctx.directions, ctx.antithetic, False)
    if ctx.shared:
        each = fold_shared(each.unflatten(0, (-1, ctx.directions)), ctx.rows)
    return each, None, None, None, None, None


def _add_context(ctx, inputs, output):
    _, z, key, ctx.stream, ctx.directions, ctx.antithetic = inputs
    ctx.save_for_backward(key.clone())
    ctx.rows = z.shape[0]


def _add_backward(ctx, grad: Tensor):
    (key,) = ctx.saved_tensors
    grad_z = None
    if ctx.needs_input_grad[1]:
        each = fold_rows(signed(grad, ctx.directions, ctx.antithetic).flatten(0, 1), ctx.rows)
        grad_z = flip(each.contiguous(), key, ctx.stream, ctx.directions, False, False)
    return grad, grad_z, None, None, None, None


torch.library.register_autograd("perturbed::flip", _flip_backward, setup_context=_flip_context)
torch.library.register_autograd("perturbed::flip_add", _add_backward, setup_context=_add_context)
refuse_grad("flip_add_", "use flip_add")
