"""PerturbedConv2d with a noise family of its own, one class each."""

from __future__ import annotations

import torch

from ..noise import LowRank, Permuted, SignFlip
from .conv import PerturbedConv2d, Size


class PermutedConv2d(PerturbedConv2d):
    """A PerturbedConv2d with :class:`~perturbed.Permuted` noise: one weight in permuted places.

    Whole channels change places, those of inputs, of outputs or both, each within its group and
    alike in all groups; the kernels' taps stay where they are. After NESgpu's layer of the same
    name (Amand, 2020).

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv2d.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv2d.
        permutation: "in", "out", "both" or "auto", which looks at the channels of a group.
        in_sparsity: input channels of a group that are not 0, a count or a fraction; 0 for all.
        out_sparsity: the same of output channels.
        allow_repeats: draw with replacement instead of permuting.
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedConv2d.

    Raises:
        ValueError: an unknown permutation, a sparsity above its size or a fraction outside (0, 1],
            no side of more than one channel to permute (as in a depthwise convolution).
        TypeError: a sparsity that is no number.

    Example:
        >>> from perturbed import PermutedConv2d
        >>> PermutedConv2d(8, 4, 3, directions=16, permutation="in").noise
        Permuted('in')
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        directions: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        permutation: str = "auto",
        in_sparsity: int | float = 0,
        out_sparsity: int | float = 0,
        allow_repeats: bool = False,
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Conv2d does."""
        noise = Permuted(permutation, in_sparsity, out_sparsity, allow_repeats, distribution)
        super().__init__(
            in_channels, out_channels, kernel_size, directions, stride, padding, dilation, groups,
            bias, padding_mode, noise, device, dtype,
        )  # fmt: skip


class SignFlipConv2d(PerturbedConv2d):
    """A PerturbedConv2d with :class:`~perturbed.SignFlip` noise: one weight with flipped signs.

    Signs belong to whole channels, of inputs, of outputs or both. After Flipout (Wen et al., 2018)
    and NESgpu's SyntheticConv2d (Amand, 2020).

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv2d.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv2d.
        flip: "in", "out", "both" or "auto", which looks at the numbers of channels.
        bases: G, how many weights the directions share; more of them lower the variance.
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedConv2d.

    Raises:
        ValueError: an unknown flip, ``bases`` below 1.
        TypeError: ``bases`` that is no integer.

    Example:
        >>> from perturbed import SignFlipConv2d
        >>> SignFlipConv2d(8, 4, 3, directions=16, flip="out").noise
        SignFlip('out')
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        directions: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        flip: str = "auto",
        bases: int = 1,
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Conv2d does."""
        noise = SignFlip(flip, bases, distribution)
        super().__init__(
            in_channels, out_channels, kernel_size, directions, stride, padding, dilation, groups,
            bias, padding_mode, noise, device, dtype,
        )  # fmt: skip


class LowRankConv2d(PerturbedConv2d):
    """A PerturbedConv2d with :class:`~perturbed.LowRank` noise: out_channels mixtures of r kernels.

    With groups, all groups mix the same r kernels. After EGGROLL (Sarkar et al., 2025).

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv2d.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv2d.
        rank: r, from 1 to min(out_channels, in_channels / groups * taps of the kernel).
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedConv2d.

    Raises:
        ValueError: a rank below 1 or above that.
        TypeError: a rank that is no integer.

    Example:
        >>> from perturbed import LowRankConv2d
        >>> LowRankConv2d(8, 4, 3, directions=16, rank=2).noise
        LowRank(2)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        directions: int,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        rank: int = 1,
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Conv2d does."""
        noise = LowRank(rank, distribution)
        super().__init__(
            in_channels, out_channels, kernel_size, directions, stride, padding, dilation, groups,
            bias, padding_mode, noise, device, dtype,
        )  # fmt: skip
