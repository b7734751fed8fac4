"""Dense noise: every element of ``E_d`` drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import BACKWARD_BYTES, fold_shared, ops, refuse_grad, signed


def dense_linear_(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    weight_stream: int,
    bias_stream: int,
    directions: int,
    antithetic: bool,
    rademacher: bool,
) -> None:
    """Add dense noise to the output ``y`` of a Linear, in place.

    ``y[b, t] += s_b sigma (E_d x[b, t] + e_d)`` with direction ``d = b % D`` and, if antithetic,
    sign ``s_b = -1`` for the second half of the repeats.

    Args:
        y: (B, T, out) contiguous.
        x: (B, T, in), or (N, T, in) with the N rows that every member sees; row b then reads
            ``x[b // D % N]``.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        sigma: () float64, the noise scale.
        weight_stream: Philox counter word of the weight, -1 to leave it unperturbed.
        bias_stream: the same of the bias.
        directions: D.
        antithetic: whether the second half of the repeats uses -E_d.
        rademacher: signs instead of normals.

    Raises:
        RuntimeError: if a gradient is asked of it; :func:`dense_linear` is the differentiable form.
    """
    ops.dense_linear_.default(
        y, x, key, sigma, weight_stream, bias_stream, directions, antithetic, rademacher
    )


def dense_linear(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    weight_stream: int,
    bias_stream: int,
    directions: int,
    antithetic: bool,
    rademacher: bool,
) -> Tensor:
    """Return what :func:`dense_linear_` makes of ``y``; differentiable in ``y`` and ``x``."""
    return ops.dense_linear.default(
        y, x, key, sigma, weight_stream, bias_stream, directions, antithetic, rademacher
    )


def dense_estimate_(
    grad: Tensor,
    weights: Tensor,
    key: Tensor,
    sigma: Tensor,
    stream: int,
    rademacher: bool,
    accumulate: bool,
) -> None:
    """Write ``sigma sum_d weights[d] E_d`` into ``grad`` (rows, cols), or add it.

    ``weights`` is (D,), float64 for a float64 gradient and float32 for every other.
    """
    ops.dense_estimate_.default(grad, weights, key, sigma, stream, rademacher, accumulate)


def dense_materialise(
    key: Tensor,
    stream: int,
    first: int,
    count: int,
    rows: int,
    cols: int,
    rademacher: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return E_d without sigma, (count, rows, cols).

    The directions are ``first .. first + count - 1``, counted from the key's own first one.
    """
    return ops.dense_materialise.default(key, stream, first, count, rows, cols, rademacher, dtype)


# ---- fake kernels ------------------------------------------------------------------------------


@torch.library.register_fake("perturbed::dense_linear_")
def _(y, x, key, sigma, weight_stream, bias_stream, directions, antithetic, rademacher):
    return None


@torch.library.register_fake("perturbed::dense_linear")
def _(y, x, key, sigma, weight_stream, bias_stream, directions, antithetic, rademacher):
    return torch.empty_like(y)


@torch.library.register_fake("perturbed::dense_estimate_")
def _(grad, weights, key, sigma, stream, rademacher, accumulate):
    return None


@torch.library.register_fake("perturbed::dense_materialise")
def _(key, stream, first, count, rows, cols, rademacher, dtype):
    return key.new_empty((count, rows, cols), dtype=dtype)


# ---- derivatives -------------------------------------------------------------------------------


def _dense_linear_context(ctx, inputs, output):
    y, x, key, sigma, weight_stream, _, directions, antithetic, rademacher = inputs
    # Copies: set_noise updates key and sigma in place, and this draw must outlive it.
    ctx.save_for_backward(key.clone(), sigma.clone())
    ctx.noise = (weight_stream, directions, antithetic, rademacher)
    ctx.x_shape, ctx.out = x.shape, y.shape[-1]


def _dense_linear_backward(ctx, grad: Tensor):
    """d/dy is the identity; d/dx of row b is s_b sigma E_d^T."""
    key, sigma = ctx.saved_tensors
    stream, directions, antithetic, rademacher = ctx.noise
    grad_x = None
    if ctx.needs_input_grad[1]:
        grad_x = grad.new_zeros(ctx.x_shape)
        if stream >= 0 and grad.numel() > 0 and grad_x.numel() > 0:
            rows, _, cols = ctx.x_shape
            repeats = grad.shape[0] // directions
            signed_grad = signed(grad, directions, antithetic)
            each = max(1, BACKWARD_BYTES // (ctx.out * cols * grad.element_size()))
            parts = []
            for first in range(0, directions, each):
                count = min(each, directions - first)
                noise = dense_materialise(
                    key, stream, first, count, ctx.out, cols, rademacher, grad.dtype
                )
                part = signed_grad[:, first : first + count]
                parts.append(torch.einsum("rdto,doi->rdti", part, noise * sigma.to(grad.dtype)))
            grad_x = torch.cat(parts, dim=1)
            if rows == repeats * directions:
                grad_x = grad_x.reshape(ctx.x_shape)
            else:
                grad_x = fold_shared(grad_x, rows)
    return grad, grad_x, None, None, None, None, None, None, None


torch.library.register_autograd(
    "perturbed::dense_linear", _dense_linear_backward, setup_context=_dense_linear_context
)

refuse_grad("dense_linear_", "use dense_linear")
refuse_grad("dense_estimate_", "call it under torch.no_grad()")
