"""Convolutions with kernels that every direction has of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import ops, refuse_grad


def conv_members_(
    y: Tensor,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    stride_height: int,
    stride_width: int,
    dilation_height: int,
    dilation_width: int,
) -> None:
    """Write the convolution of every row with the kernels of its direction, without padding.

    Each output is one sum in a fixed order, so that its bits depend neither on the number of
    threads, nor on other rows, nor on how ``x`` and ``y`` lie in memory.

    Args:
        y: (R, D, O, H', W') float32, rows contiguous or channels-last, of any distance; no memory
            in common with the others.
        x: (R, D, C, H, W) float32, any strides, 0 for rows that all directions see.
        kernels: (D, O, C, kh, kw) float32, contiguous in every direction.
        bias: (D, O) float32 or None.
        stride_height: of the window.
        stride_width: of the window.
        dilation_height: distance of the kernel's taps.
        dilation_width: distance of the kernel's taps.

    Raises:
        RuntimeError: an argument does not fit, or a gradient is asked for.
    """
    ops.conv_members_.default(
        y, x, kernels, bias, stride_height, stride_width, dilation_height, dilation_width
    )


@torch.library.register_fake("perturbed::conv_members_")
def _(y, x, kernels, bias, stride_height, stride_width, dilation_height, dilation_width):
    return None


@torch.library.register_kernel("perturbed::conv_members_", "cuda")
def _(y, x, kernels, bias, stride_height, stride_width, dilation_height, dilation_width):
    """On a GPU it is cuDNN's grouped convolution, which layers call directly."""
    strides, dilations = (stride_height, stride_width), (dilation_height, dilation_width)
    flat = None if bias is None else bias.flatten()
    count = kernels.shape[0]
    product = F.conv2d(x.flatten(1, 2), kernels.flatten(0, 1), flat, strides, 0, dilations, count)
    y.copy_(product.view(y.shape))


refuse_grad("conv_members_", "torch's grouped convolution is")
