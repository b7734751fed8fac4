"""Sparse noise: each direction perturbs ``count`` columns of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import dense_materialise
from .registry import fold_shared, ops, refuse_grad, signed
from .selection import selections


def sparse_linear_(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    column_stream: int,
    value_stream: int,
    bias_stream: int,
    directions: int,
    count: int,
    antithetic: bool,
    rademacher: bool,
) -> None:
    """Add sparse noise to the output ``y`` of a Linear, in place.

    ``y[b, t] += s_b sigma (E_d x[b, t] + e_d)``, where column ``pi_d(j)`` of E_d is
    ``sqrt(in / count) V_d[j]`` for j < count and the others are 0; V_d is (count, out).

    Args:
        y: (B, T, out) contiguous.
        x: (B, T, in), or (N, T, in) with the N rows that every member sees.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        sigma: () float64, the noise scale.
        column_stream: Philox counter word of the permutation pi_d of the columns.
        value_stream: the same of V.
        bias_stream: the same of the bias, -1 to leave it unperturbed.
        directions: D.
        count: columns of a direction, 1 .. in.
        antithetic: whether the second half of the repeats uses -E_d.
        rademacher: signs instead of normals for V.

    Raises:
        RuntimeError: if a gradient is asked of it; :func:`sparse_linear` is the differentiable
            form.
    """
    ops.sparse_linear_.default(
        y,
        x,
        key,
        sigma,
        column_stream,
        value_stream,
        bias_stream,
        directions,
        count,
        antithetic,
        rademacher,
    )


def sparse_linear(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    column_stream: int,
    value_stream: int,
    bias_stream: int,
    directions: int,
    count: int,
    antithetic: bool,
    rademacher: bool,
) -> Tensor:
    """Return what :func:`sparse_linear_` makes of ``y``; differentiable in ``y`` and ``x``."""
    return ops.sparse_linear.default(
        y,
        x,
        key,
        sigma,
        column_stream,
        value_stream,
        bias_stream,
        directions,
        count,
        antithetic,
        rademacher,
    )


def sparse_estimate_(
    grad: Tensor,
    weights: Tensor,
    key: Tensor,
    sigma: Tensor,
    column_stream: int,
    value_stream: int,
    count: int,
    rademacher: bool,
    accumulate: bool,
) -> None:
    """Write ``sigma sum_d weights[d] E_d`` into ``grad`` (out, in), or add it.

    ``weights`` is (D,), float64 for a float64 gradient and float32 for every other.
    """
    ops.sparse_estimate_.default(
        grad, weights, key, sigma, column_stream, value_stream, count, rademacher, accumulate
    )


@torch.library.register_fake("perturbed::sparse_linear_")
def _(y, x, key, sigma, columns, values, bias, directions, count, antithetic, rademacher):
    return None


@torch.library.register_fake("perturbed::sparse_linear")
def _(y, x, key, sigma, columns, values, bias, directions, count, antithetic, rademacher):
    return torch.empty_like(y)


@torch.library.register_fake("perturbed::sparse_estimate_")
def _(grad, weights, key, sigma, columns, values, count, rademacher, accumulate):
    return None


def _context(ctx, inputs, output):
    y, x, key, sigma, columns, values, _, directions, count, antithetic, rademacher = inputs
    # Copies: set_noise updates key and sigma in place, and this draw must outlive it.
    ctx.save_for_backward(key.clone(), sigma.clone())
    ctx.noise = (columns, values, directions, count, antithetic, rademacher)
    ctx.x_shape, ctx.out = x.shape, y.shape[-1]


def _backward(ctx, grad: Tensor):
    """d/dy is the identity; d/dx of row b is s_b sigma E_d^T, non-zero in `count` places."""
    key, sigma = ctx.saved_tensors
    columns, values, directions, count, antithetic, rademacher = ctx.noise
    grad_x = None
    if ctx.needs_input_grad[1]:
        rows, _, cols = ctx.x_shape
        scale = (sigma * (cols / count) ** 0.5).to(grad.dtype)
        each = signed(grad, directions, antithetic) * scale
        noise = dense_materialise(
            key, values, 0, directions, count, ctx.out, rademacher, grad.dtype
        )
        inner = torch.einsum("rdto,dqo->rdtq", each, noise)
        index = selections(key, columns, 0, directions, cols, count, False)
        index = index[:, None].expand(inner.shape)
        grad_x = inner.new_zeros(*inner.shape[:-1], cols).scatter_add_(-1, index, inner)
        whole = rows == grad.shape[0]
        grad_x = grad_x.flatten(0, 1) if whole else fold_shared(grad_x, rows)
    return grad, grad_x, *[None] * 9


torch.library.register_autograd("perturbed::sparse_linear", _backward, setup_context=_context)
refuse_grad("sparse_linear_", "use sparse_linear")
refuse_grad("sparse_estimate_", "call it under torch.no_grad()")
