"""Convolutions with kernels that every direction has of its own, one direction at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_members(
    y: Tensor,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    stride_height: int,
    stride_width: int,
    dilation_height: int,
    dilation_width: int,
) -> Tensor:
    """Twin of :func:`perturbed._ops.conv_members_`; of ``y`` only shape and layout matter."""
    strides, dilations = (stride_height, stride_width), (dilation_height, dilation_width)
    result = torch.empty_like(y)
    for d in range(y.shape[1]):
        offset = None if bias is None else bias[d]
        result[:, d] = F.conv2d(x[:, d], kernels[d], offset, strides, 0, dilations)
    return result
