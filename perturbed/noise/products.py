"""What any family can do with E_d materialised, a chunk of directions at a time: products and sums.

They serve families that have no kernel of their own, and Dense where the BLAS beats its kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .scratch import needs_grad, per_scratch, repeat_signs

if TYPE_CHECKING:
    from .base import LayerNoise, NoiseFamily


def add_products(
    family: NoiseFamily, y: Tensor, x: Tensor, site: LayerNoise, shared: bool
) -> Tensor:
    """Return ``y + s sigma E_d x``, the weight's noise alone; may write into ``y``.

    Args:
        family: whose ``materialise_weight`` makes E_d.
        y: (B, T, out) contiguous.
        x: (B, T, in), or (N, T, in) if ``shared``.
        site: the layer's noise; its weight is perturbed.
        shared: whether every member sees the same N rows.
    """
    if y.numel() == 0 or x.numel() == 0:
        return y
    state = site.state
    _, sigma = state.tensors(y.device)
    directions, (_, tokens, cols), out = state.directions, x.shape, y.shape[2]
    antithetic = state.is_antithetic(y.shape[0] // directions)
    if needs_grad(y, x):
        y = y.clone()
    each = per_scratch(x.device, out * cols * x.element_size())
    signs = repeat_signs(y, directions, antithetic)
    if shared:  # (copies, N, D, T, out)
        rows = y.view(-1, x.shape[0], directions, tokens, out)
        signs = signs.view(-1, x.shape[0], 1, 1, 1)
    else:  # (R, D, T, out)
        rows = y.view(-1, directions, tokens, out)
    for first in range(0, directions, each):
        count = min(each, directions - first)
        noise = family.materialise_weight(site, first, count, out, cols, x) * sigma
        if shared:
            product = x.flatten(0, 1) @ noise.flatten(0, 1).t()  # (N * T, count * out)
            product = product.view(-1, tokens, count, out).transpose(1, 2)
        else:
            here = x.view(-1, directions, tokens, cols)[:, first : first + count]
            here = here.transpose(0, 1).flatten(1, 2)  # (count, R * T, in)
            product = torch.bmm(here, noise.transpose(1, 2))
            product = product.view(count, -1, tokens, out).transpose(0, 1)
        # Both signs in one pass; slices of a symbolic R take torch.compile a minute.
        rows[..., first : first + count, :, :].addcmul_(product, signs)
    return y


def sum_noise(family: NoiseFamily, grad: Tensor, weights: Tensor, site: LayerNoise) -> Tensor:
    """Return ``sum_d weights[d] E_d`` (sigma included) in the weights' dtype, (rows, cols).

    Args:
        family: whose ``materialise_weight`` makes E_d.
        grad: (rows, cols), for its shape and device.
        weights: (D,) in the dtype in which to add up.
        site: the layer's noise.
    """
    _, sigma = site.state.tensors(grad.device)
    rows, cols = grad.shape
    total = torch.zeros(grad.numel(), dtype=weights.dtype, device=grad.device)
    each = per_scratch(grad.device, grad.numel() * weights.element_size())
    for first in range(0, len(weights) if grad.numel() > 0 else 0, each):
        part = weights[first : first + each]
        noise = family.materialise_weight(site, first, len(part), rows, cols, weights)
        total.addmv_(noise.flatten(1).t(), part)
    return total.mul_(sigma).view_as(grad)
