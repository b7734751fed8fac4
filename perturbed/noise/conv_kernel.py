"""Where convolutions of members run in a kernel of ours, and where in torch's grouped convolution.

The choice is made here alone, by times of both, which docs/kernels.md has. Ours spares copies, of
channels-last memory above all; it multiplies zeros of the padding, which oneDNN skips.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops

if TYPE_CHECKING:
    from .convolution import Convolution, PopulationBatch

# Output channels from which the kernel pays: it works on 16 at a time.
MIN_CHANNELS = 12
# oneDNN's fast kernels take input channels in blocks of so many.
BLOCK = 8
# Numbers of a kernel from which packing it is felt, and output positions that make up for it.
LARGE_KERNEL, MANY_POSITIONS = 1 << 14, 512
# Numbers of a kernel from which packing it for one row is felt at any size of x.
HUGE_KERNEL = 1 << 17
# How much larger x may become with its padding.
MAX_PADDED = 1.3


def has_kernel(x: Tensor, shape: torch.Size, conv: Convolution, batch: PopulationBatch) -> bool:
    """Whether ``conv_members_`` is to convolve these rows; it has no derivative.

    Args:
        x: (B, C, *), or the N rows that all members see.
        shape: of the weight.
        conv: what the convolution does besides its weight.
        batch: how rows belong to members.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 4
        and conv.groups == 1
        and not conv.transposed
        and pays(x, shape, conv, batch)
    )


def pays(x: Tensor, shape: torch.Size, conv: Convolution, batch: PopulationBatch) -> bool:
    """Whether the kernel is the faster way; arguments as of :func:`has_kernel`."""
    if shape[0] < MIN_CHANNELS:
        return False
    rows = batch.repeats // 2 if batch.antithetic else batch.repeats
    if batch.shared:
        rows = x.shape[0]
        if not conv.channels_last:  # torch needs no groups for them
            return shape[1] == 1 and rows > 1
    if shape[1] % BLOCK:
        return True
    # A kernel that one row uses is packed for that row alone.
    if rows == 1 and not conv.channels_last:
        if shape[2] == shape[3] == 1 or shape.numel() >= HUGE_KERNEL:
            return False
    positions = rows * math.prod(conv.output_size(x.shape[2:], shape[2:]))
    if shape.numel() >= LARGE_KERNEL and positions < MANY_POSITIONS:
        return False
    if not any(conv.padding):
        return True
    height, width = (n + 2 * p for n, p in zip(x.shape[2:], conv.padding, strict=True))
    return conv.channels_last and height * width <= MAX_PADDED * x.shape[2] * x.shape[3]


def padded(x: Tensor, conv: Convolution) -> Tensor:
    """Return ``x`` with the convolution's zeros around it."""
    if not any(conv.padding):
        return x
    return F.pad(x, [p for pad in reversed(conv.padding) for p in (pad, pad)])


def empty_output(x: Tensor, shape: torch.Size, conv: Convolution, batch: PopulationBatch) -> Tensor:
    """Return memory for the output, (R, D, O, H', W'); arguments as of :func:`has_kernel`."""
    rows = batch.repeats * batch.directions
    size = conv.output_size(x.shape[2:], shape[2:])
    layout = torch.channels_last if conv.channels_last else torch.contiguous_format
    y = torch.empty(rows, shape[0], *size, dtype=x.dtype, device=x.device, memory_format=layout)
    return y.unflatten(0, (batch.repeats, batch.directions))


def convolve_(
    y: Tensor, x: Tensor, kernels: Tensor, shape: torch.Size, bias: Tensor | None, conv: Convolution
) -> None:
    """Convolve rows with the kernels of their directions.

    Args:
        y: (R, count, O, H', W'), a part of :func:`empty_output`.
        x: (R, count | 1, C, H, W), :func:`padded`.
        kernels: (count, *) of the matrices; any stride between members.
        shape: of the weight.
        bias: (count, O) or None.
        conv: the convolution.
    """
    x = x.expand(-1, y.shape[1], -1, -1, -1)
    kernels = kernels.flatten(1).unflatten(1, shape)
    _ops.conv_members_(y, x, kernels, bias, *conv.stride, *conv.dilation)
