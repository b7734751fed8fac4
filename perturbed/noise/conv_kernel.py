"""Where convolutions of members run in a kernel of ours, and where in torch's grouped convolution.

The choice is made here alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops

if TYPE_CHECKING:
    from .convolution import Convolution, PopulationBatch

# Output channels from which the kernel is taken: it works on 16 at a time.
MIN_CHANNELS = 8


def has_kernel(x: Tensor, shape: torch.Size, conv: Convolution) -> bool:
    """Whether ``conv_members_`` is to convolve these rows; it has no derivative.

    Args:
        x: (B, C, *), or the N rows that all members see.
        shape: of the weight.
        conv: what the convolution does besides its weight.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.dim() == 4
        and conv.groups == 1
        and not conv.transposed
        and shape[0] >= MIN_CHANNELS
    )


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
