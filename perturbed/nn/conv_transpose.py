"""Transposed convolutions with their own weights for every row of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..noise import NoiseFamily
from ..noise.convolution import Convolution
from ..replicate import replicate_rows
from .conv import PerturbedConvolution, Size, for_autocast


class PerturbedTransposedConvolution(PerturbedConvolution):
    """What perturbed transposed convolutions share; a mixin of nn.ConvTranspose1d, 2d and 3d."""

    output_padding: tuple[int, ...]
    _output_padding: Callable[..., list[int]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        directions: int,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as the torch layer does; the noise comes with the model that wraps it."""
        super(PerturbedConvolution, self).__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self.init_noise(directions, noise)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer, perturbed if its model says so.

        Args:
            input: (B, C, *).
            output_size: as in nn.ConvTranspose2d.
        """
        if not self.is_perturbed:
            return super(PerturbedConvolution, self).forward(input, output_size)
        self._check_input(input)
        rows, short = self.enter(input)
        rows, padding = self._pad(rows)
        stride, dilation = self._each(self.stride), self._each(self.dilation)
        extra = self._output_padding(
            rows, output_size, stride, padding, self.kernel_size, self.dims, dilation
        )
        conv = Convolution(stride, padding, dilation, self.groups, True, self._each(extra))
        sizes = zip(rows.shape[2:], stride, padding, self.kernel_size, dilation, extra, strict=True)
        if any((n - 1) * s - 2 * p + d * (k - 1) + e < 0 for n, s, p, k, d, e in sizes):
            raise ValueError(
                f"input must be larger than its padding takes away, got spatial size "
                f"{tuple(rows.shape[2:])} with padding {padding} for kernel_size "
                f"{self.kernel_size} and stride {stride}"
            )
        self.noise.allocate(self.weight, self.site)
        x, weight, bias = for_autocast(rows, self.weight, self.bias)
        if x.numel() == 0:
            y = conv(x, weight, bias)
            return y if short is None else replicate_rows(y, short.copies, short.directions)
        copies = 0 if short is None else short.copies
        x, weight = x.contiguous(), weight.contiguous()
        return self.noise.convolve(x, weight, bias, self.site, conv, copies)


class PerturbedConvTranspose1d(PerturbedTransposedConvolution, nn.ConvTranspose1d):
    """A ConvTranspose1d that evaluates a population, as :class:`PerturbedConvTranspose2d` does.

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv1d.
        stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as in
            nn.ConvTranspose1d.
        noise: the family of E_d, default ``Dense()``.

    Shapes:
        input (B, C, L), B = R * D rows; output (B, O, L').

    Raises:
        ValueError, TypeError: as PerturbedConv2d.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedConvTranspose1d, PerturbedModel
        >>> layer = PerturbedConvTranspose1d(3, 2, 4, directions=4, stride=2)
        >>> pm = PerturbedModel(layer, directions=4)
        >>> pm.set_noise()
        >>> pm(torch.ones(8, 3, 5)).shape
        torch.Size([8, 2, 12])
    """

    torch_class = nn.ConvTranspose1d
    dims = 1


class PerturbedConvTranspose2d(PerturbedTransposedConvolution, nn.ConvTranspose2d):
    """A ConvTranspose2d that evaluates a population; :class:`PerturbedConv2d` says how.

    The matrix that families see has a row for every input channel, as the weight's first dimension
    is theirs here. "In" and "out" of a family mean its columns and rows all the same, and every
    family forms the kernels ``W + s E_d``.

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv2d.
        stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as in
            nn.ConvTranspose2d.
        noise: the family of E_d, default ``Dense()``.

    Shapes:
        input (B, C, H, W), B = R * D rows; output (B, O, H', W').

    Raises:
        ValueError, TypeError: as PerturbedConv2d.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedConvTranspose2d, PerturbedModel
        >>> layer = PerturbedConvTranspose2d(3, 2, 4, directions=4, stride=2)
        >>> pm = PerturbedModel(layer, directions=4)
        >>> pm.set_noise()
        >>> pm(torch.ones(8, 3, 5, 5)).shape
        torch.Size([8, 2, 12, 12])
    """

    torch_class = nn.ConvTranspose2d
    dims = 2


class PerturbedConvTranspose3d(PerturbedTransposedConvolution, nn.ConvTranspose3d):
    """A ConvTranspose3d that evaluates a population, as :class:`PerturbedConvTranspose2d` does.

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv3d.
        stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as in
            nn.ConvTranspose3d.
        noise: the family of E_d, default ``Dense()``.

    Shapes:
        input (B, C, T, H, W), B = R * D rows; output (B, O, T', H', W').

    Raises:
        ValueError, TypeError: as PerturbedConv2d.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedConvTranspose3d, PerturbedModel
        >>> pm = PerturbedModel(PerturbedConvTranspose3d(3, 2, 2, directions=4), directions=4)
        >>> pm.set_noise()
        >>> pm(torch.ones(8, 3, 2, 2, 2)).shape
        torch.Size([8, 2, 3, 3, 3])
    """

    torch_class = nn.ConvTranspose3d
    dims = 3
