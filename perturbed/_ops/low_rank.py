"""Low-rank noise: ``E_d = A_d^T B_d / sqrt(rank)``."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import dense_materialise
from .registry import fold_rows, fold_shared, ops, refuse_grad, signed


def low_rank_linear_(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    a_stream: int,
    b_stream: int,
    bias_stream: int,
    directions: int,
    rank: int,
    antithetic: bool,
    rademacher: bool,
) -> None:
    """Add low-rank noise to the output ``y`` of a Linear, in place.

    ``y[b, t] += s_b sigma (A_d^T B_d x[b, t] / sqrt(rank) + e_d)``, with the noise matrices A_d
    (rank, out) and B_d (rank, in).

    Args:
        y: (B, T, out) contiguous.
        x: (B, T, in), or (N, T, in) with the N rows that every member sees. If ``b_stream`` is -1,
            the products B_d x instead: (M, T, rank), row b reading ``x[b % M]``.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        sigma: () float64, the noise scale.
        a_stream: Philox counter word of A.
        b_stream: the same of B, or -1.
        bias_stream: the same of the bias, -1 to leave it unperturbed.
        directions: D.
        rank: r.
        antithetic: whether the second half of the repeats uses -E_d.
        rademacher: factors of signs instead of normals.

    Raises:
        RuntimeError: if a gradient is asked of it; :func:`low_rank_linear` is the differentiable
            form.
    """
    ops.low_rank_linear_.default(
        y,
        x,
        key,
        sigma,
        a_stream,
        b_stream,
        bias_stream,
        directions,
        rank,
        antithetic,
        rademacher,
    )


def low_rank_linear(
    y: Tensor,
    x: Tensor,
    key: Tensor,
    sigma: Tensor,
    a_stream: int,
    b_stream: int,
    bias_stream: int,
    directions: int,
    rank: int,
    antithetic: bool,
    rademacher: bool,
) -> Tensor:
    """Return what :func:`low_rank_linear_` makes of ``y``; differentiable in ``y`` and ``x``."""
    return ops.low_rank_linear.default(
        y,
        x,
        key,
        sigma,
        a_stream,
        b_stream,
        bias_stream,
        directions,
        rank,
        antithetic,
        rademacher,
    )


@torch.library.register_fake("perturbed::low_rank_linear_")
def _(y, x, key, sigma, a_stream, b_stream, bias_stream, directions, rank, antithetic, rademacher):
    return None


@torch.library.register_fake("perturbed::low_rank_linear")
def _(y, x, key, sigma, a_stream, b_stream, bias_stream, directions, rank, antithetic, rademacher):
    return torch.empty_like(y)


def _context(ctx, inputs, output):
    y, x, key, sigma, a_stream, b_stream, _, directions, rank, antithetic, rademacher = inputs
    # Copies: set_noise updates key and sigma in place, and this draw must outlive it.
    ctx.save_for_backward(key.clone(), sigma.clone())
    ctx.noise = (a_stream, b_stream, directions, rank, antithetic, rademacher)
    ctx.x_shape, ctx.out = x.shape, y.shape[-1]


def _backward(ctx, grad: Tensor):
    """d/dy is the identity; d/dx of row b is s_b sigma B_d^T A_d / sqrt(rank)."""
    key, sigma = ctx.saved_tensors
    a_stream, b_stream, directions, rank, antithetic, rademacher = ctx.noise
    grad_x = None
    if ctx.needs_input_grad[1]:
        rows, _, cols = ctx.x_shape

        def factor(stream: int, size: int) -> Tensor:
            return dense_materialise(key, stream, 0, directions, rank, size, rademacher, grad.dtype)

        scale = (sigma / rank**0.5).to(grad.dtype)
        each = signed(grad, directions, antithetic) * scale
        inner = torch.einsum("rdto,dqo->rdtq", each, factor(a_stream, ctx.out))
        if b_stream < 0:
            grad_x = fold_rows(inner.flatten(0, 1), rows)
        else:
            grad_x = torch.einsum("rdtq,dqi->rdti", inner, factor(b_stream, cols))
            whole = rows == grad.shape[0]
            grad_x = grad_x.flatten(0, 1) if whole else fold_shared(grad_x, rows)
    return grad, grad_x, *[None] * 9


torch.library.register_autograd("perturbed::low_rank_linear", _backward, setup_context=_context)
refuse_grad("low_rank_linear_", "use low_rank_linear")
