"""The operators of ``perturbed::``: one typed wrapper each, its fake kernel and its derivative.

No arithmetic lives here. Schemas are in ``csrc/schema.cpp``, kernels in ``csrc/cpu`` and
``csrc/cuda``, and the slow truth of every operator in ``perturbed/reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.perturbed

# Largest materialised noise that a derivative holds at once.
_BACKWARD_BYTES = 32 << 20


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
    _ops.dense_linear_.default(
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
    return _ops.dense_linear.default(
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
    _ops.dense_estimate_.default(grad, weights, key, sigma, stream, rademacher, accumulate)


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
    return _ops.dense_materialise.default(key, stream, first, count, rows, cols, rademacher, dtype)


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
            rows, tokens, cols = ctx.x_shape
            repeats = grad.shape[0] // directions
            signed = grad.reshape(repeats, directions, tokens, ctx.out)
            if antithetic:
                plus, minus = signed.chunk(2)
                signed = torch.cat((plus, -minus))
            each = max(1, _BACKWARD_BYTES // (ctx.out * cols * grad.element_size()))
            parts = []
            for first in range(0, directions, each):
                count = min(each, directions - first)
                noise = dense_materialise(
                    key, stream, first, count, ctx.out, cols, rademacher, grad.dtype
                )
                part = signed[:, first : first + count]
                parts.append(torch.einsum("rdto,doi->rdti", part, noise * sigma.to(grad.dtype)))
            grad_x = torch.cat(parts, dim=1)
            if rows == repeats * directions:
                grad_x = grad_x.reshape(ctx.x_shape)
            else:
                grad_x = grad_x.unflatten(0, (repeats // rows, rows)).sum((0, 2))
    return grad, grad_x, None, None, None, None, None, None, None


torch.library.register_autograd(
    "perturbed::dense_linear", _dense_linear_backward, setup_context=_dense_linear_context
)


def _refuse_grad(name: str, instead: str) -> None:
    """Make an in-place operator raise where autograd would otherwise be silently wrong."""
    op = getattr(_ops, name).default

    def refuse(*args):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(f"perturbed::{name} is not differentiable; {instead}")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, refuse, "Autograd")


_library = torch.library.Library("perturbed", "IMPL")
_refuse_grad("dense_linear_", "use dense_linear")
_refuse_grad("dense_estimate_", "call it under torch.no_grad()")
