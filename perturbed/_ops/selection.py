"""Permutations and draws with replacement, one for each direction."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import fold_rows, fold_shared, ops, refuse_grad, signed


def selections(
    key: Tensor,
    stream: int,
    first: int,
    directions: int,
    size: int,
    count: int,
    replace: bool,
) -> Tensor:
    """Return entries ``0 .. count - 1`` of pi_d: (directions, count) int64.

    pi_d is a permutation of ``0 .. size - 1``, or draws with replacement if ``replace``. The
    directions are counted from ``first`` on, and that from the key's own first one.
    """
    return ops.selections.default(key, stream, first, directions, size, count, replace)


def select(
    x: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    count: int,
    antithetic: bool,
    shared: bool,
    replace: bool,
) -> Tensor:
    """Return ``s_b x[b, t, pi_d(j)]`` for j < count; differentiable in ``x``.

    Args:
        x: (B, T, n); or (N, T, n) if ``shared``, rows that every direction sees.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        stream: Philox counter word of the selection.
        directions: D.
        count: entries of a row of the result; at most n unless ``replace``.
        antithetic: whether s_b is -1 in the second half of the repeats; not with ``shared``.
        shared: whether to write every row out for every direction.
        replace: draws with replacement instead of a permutation.

    Returns:
        (B, T, count), or (N * D, T, count) if ``shared``: row b from ``x[b // D]``.
    """
    return ops.select.default(x, key, stream, directions, count, antithetic, shared, replace)


def select_add_(
    y: Tensor,
    z: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    antithetic: bool,
    replace: bool,
) -> None:
    """Do ``y[b, t, i] += s_b z[b % M, t, pi_d(i)]`` wherever ``pi_d(i) < q``.

    Args:
        y: (B, T, m) contiguous.
        z: (M, T, q), M a multiple of D that divides B and q at most m.
        key: as in :func:`select`.
        stream: Philox counter word of the selection.
        directions: D.
        antithetic: whether s_b is -1 in the second half of the repeats.
        replace: draws with replacement instead of a permutation.

    Raises:
        RuntimeError: if a gradient is asked of it; :func:`select_add` is the differentiable form.
    """
    ops.select_add_.default(y, z, key, stream, directions, antithetic, replace)


def select_add(
    y: Tensor,
    z: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    antithetic: bool,
    replace: bool,
) -> Tensor:
    """Return what :func:`select_add_` makes of ``y``; differentiable in ``y`` and ``z``."""
    return ops.select_add.default(y, z, key, stream, directions, antithetic, replace)


def selection_sum(
    weights: Tensor, key: Tensor, stream: int, first: int, rows: int, size: int, replace: bool
) -> Tensor:
    """Return S with ``S[j, k] = sum_d weights[d] [pi_d(first + j) = k]``: (rows, size).

    ``weights`` is (D,), float32 or float64, and so is the result.
    """
    return ops.selection_sum.default(weights, key, stream, first, rows, size, replace)


def permuted_estimate_(
    grad: Tensor,
    base: Tensor,
    weights: Tensor,
    key: Tensor,
    in_stream: int,
    out_stream: int,
    accumulate: bool,
) -> None:
    """Do ``grad[i, in_d(j)] += weights[d] base[out_d(i), j]`` for all d, j and i.

    Rows with ``out_d(i) >= q`` are left out.

    Args:
        grad: (out, in); overwritten unless ``accumulate``.
        base: (q, p) in the weights' dtype.
        weights: (D,), float64 for a float64 gradient and float32 for every other.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        in_stream: Philox counter word of the permutation in_d of the inputs; -1: identity.
        out_stream: Philox counter word of the permutation out_d of the outputs; -1: identity.
        accumulate: add to what ``grad`` holds.
    """
    ops.permuted_estimate_.default(grad, base, weights, key, in_stream, out_stream, accumulate)


# ---- fake kernels ------------------------------------------------------------------------------


@torch.library.register_fake("perturbed::selections")
def _(key, stream, first, directions, size, count, replace):
    return key.new_empty((directions, count))


@torch.library.register_fake("perturbed::select")
def _(x, key, stream, directions, count, antithetic, shared, replace):
    return x.new_empty((x.shape[0] * (directions if shared else 1), x.shape[1], count))


@torch.library.register_fake("perturbed::select_add_")
def _(y, z, key, stream, directions, antithetic, replace):
    return None


@torch.library.register_fake("perturbed::select_add")
def _(y, z, key, stream, directions, antithetic, replace):
    return torch.empty_like(y)


@torch.library.register_fake("perturbed::selection_sum")
def _(weights, key, stream, first, rows, size, replace):
    return weights.new_empty((rows, size))


@torch.library.register_fake("perturbed::permuted_estimate_")
def _(grad, base, weights, key, in_stream, out_stream, accumulate):
    return None


# ---- derivatives -------------------------------------------------------------------------------


def _select_context(ctx, inputs, output):
    x, key, ctx.stream, ctx.directions, ctx.count, ctx.antithetic, ctx.shared, ctx.replace = inputs
    # A copy: set_noise updates the key in place, and this draw must outlive it.
    ctx.save_for_backward(key.clone())
    ctx.x_shape = x.shape


def _select_backward(ctx, grad: Tensor):
    (key,) = ctx.saved_tensors
    rows, _, size = ctx.x_shape
    each = signed(grad, ctx.directions, ctx.antithetic)
    index = selections(key, ctx.stream, 0, ctx.directions, size, ctx.count, ctx.replace)
    index = index[:, None].expand(each.shape)
    grad_x = each.new_zeros(*each.shape[:-1], size).scatter_add_(-1, index, each)
    grad_x = fold_shared(grad_x, rows) if ctx.shared else grad_x.flatten(0, 1)
    return grad_x, *[None] * 7


def _add_context(ctx, inputs, output):
    y, z, key, ctx.stream, ctx.directions, ctx.antithetic, ctx.replace = inputs
    ctx.save_for_backward(key.clone())
    ctx.z_shape, ctx.out = z.shape, y.shape[-1]


def _add_backward(ctx, grad: Tensor):
    (key,) = ctx.saved_tensors
    grad_z = None
    if ctx.needs_input_grad[1]:
        rows, _, count = ctx.z_shape
        each = signed(grad, ctx.directions, ctx.antithetic)
        index = selections(key, ctx.stream, 0, ctx.directions, ctx.out, ctx.out, ctx.replace)
        index = index[:, None].expand(each.shape)
        whole = each.new_zeros(each.shape).scatter_add_(-1, index, each)
        grad_z = fold_rows(whole[..., :count].flatten(0, 1), rows)
    return grad, grad_z, *[None] * 5


torch.library.register_autograd(
    "perturbed::select", _select_backward, setup_context=_select_context
)
torch.library.register_autograd("perturbed::select_add", _add_backward, setup_context=_add_context)
refuse_grad("select_add_", "use select_add")
refuse_grad("selection_sum", "call it under torch.no_grad()")
refuse_grad("permuted_estimate_", "call it under torch.no_grad()")
