"""Convolutions with their own weights for every row of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import NoiseFamily, NoiseState
from ..noise.base import LayerNoise, matrix_shape
from ..noise.convolution import Convolution
from ..noise.dense import GEMM_ROWS
from ..replicate import replicate_rows
from .base import PerturbedLayer, Slot, check_float

Size = int | tuple[int, ...]


class PerturbedConvolution(PerturbedLayer):
    """What perturbed convolutions of all dimensions share; a mixin of nn.Conv1d, 2d and 3d.

    Attributes:
        dims: number of spatial dimensions (class attribute).
    """

    dims: ClassVar[int]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    weight: Tensor
    bias: Tensor | None

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
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as the torch layer does; the noise comes with the model that wraps it."""
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.init_noise(directions, noise)

    # ---- the draw ------------------------------------------------------------------------------

    def make_site(self, state: NoiseState, slot: Slot) -> LayerNoise:
        """Return an empty place in a draw that knows what a channel is."""
        return LayerNoise(state, window=self._window(), groups=self.groups)

    def check_noise(self, directions: int, noise: NoiseFamily) -> None:
        """Raise ValueError if the family does not fit the size of the weight."""
        rows, cols = matrix_shape(self.weight)
        noise.check(rows, cols, directions, self._window(), self.groups)

    def _window(self) -> int:
        """Return the taps of a kernel; torch makes kernels without any, which have no columns."""
        return max(1, math.prod(self.kernel_size))

    # ---- forward -------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return super().forward(input)
        self._check_input(input)
        rows, short = self.enter(input)
        x, padding = self._pad(rows)
        last = _is_channels_last(rows) or _is_channels_last(self.weight)
        stride, dilation = self._each(self.stride), self._each(self.dilation)
        conv = Convolution(stride, padding, dilation, self.groups, channels_last=last)
        size = conv.output_size(x.shape[2:], self.weight.shape[2:])
        if any(n < 1 for n in size):
            raise ValueError(
                f"input must be as large as the dilated kernel, got spatial size "
                f"{tuple(rows.shape[2:])} with padding {self.padding} for kernel_size "
                f"{self.kernel_size} and dilation {self.dilation}"
            )
        self.noise.allocate(self.weight, self.site)
        x, weight, bias = for_autocast(x, self.weight, self.bias)
        if x.numel() == 0:
            y = conv(x, weight, bias)
            return y if short is None else replicate_rows(y, short.copies, short.directions)
        repeats = len(x) if short is not None else len(x) // self.site.state.directions
        few = repeats * math.prod(size) < GEMM_ROWS
        whole = math.prod(size) == 1 and not any(padding) and weight.shape[2:] == x.shape[2:]
        like_linear = self.groups == 1 and (few or whole)
        if like_linear and (self.site.window == 1 or not self.noise.by_channel):
            # Too few positions to pay for forming kernels, or the Linear that it is in truth.
            windows = conv.windows(x, weight.shape[2:])
            y = self.noise.linear(windows, weight.flatten(1), bias, self.site, short)
            return y.transpose(1, 2).unflatten(2, size)
        copies = 0 if short is None else short.copies
        y = self.noise.convolve(x, weight.contiguous(), bias, self.site, conv, copies)
        return y.contiguous(memory_format=torch.channels_last) if last else y

    def _check_input(self, input: Tensor) -> None:
        """Raise for an input that is no batch of this layer's channels."""
        check_float(input)
        axes = ", ".join(
            ("length",) if self.dims == 1 else ("depth", "height", "width")[-self.dims :]
        )
        if input.dim() == self.dims + 1:
            raise ValueError(
                f"input must be (B, {self.in_channels}, {axes}) with B = R * D rows, got "
                f"{tuple(input.shape)}; for one input to all members pass pm.replicate(x[None])"
            )
        if input.dim() != self.dims + 2 or input.shape[1] != self.in_channels:
            raise ValueError(
                f"input must be (B, {self.in_channels}, {axes}) with B = R * D rows, got "
                f"{tuple(input.shape)}"
            )

    def _each(self, sizes: Iterable[Any]) -> tuple[int, ...]:
        """Return a size for every axis; torch takes one in a tuple for all of them, too."""
        each = tuple(int(size) for size in sizes)
        return each * self.dims if len(each) == 1 else each

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Pad by what is not zeros on both sides alike, and return the zeros that remain."""
        if self.padding == "valid":
            return x, (0,) * self.dims
        if self.padding == "same":
            dilation = self._each(self.dilation)
            totals = [d * (k - 1) for d, k in zip(dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(p, p) for p in self._each(self.padding)]
        if self.padding_mode == "zeros" and all(before == after for before, after in sides):
            return x, tuple(before for before, _ in sides)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        amounts = [amount for side in reversed(sides) for amount in side]
        return F.pad(x, amounts, mode), (0,) * self.dims


def _is_channels_last(t: Tensor) -> bool:
    """Whether images or kernels lie so that torch's convolution answers with channels last.

    By strides, which tell the two layouts of one channel apart, as ``is_contiguous`` does not.
    """
    if t.dim() != 4 or t.shape[1:].numel() <= 1:
        return False
    _, channels, height, width = t.shape
    return t.stride() == (height * width * channels, 1, width * channels, channels)


def for_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would for a convolution; all ways to compute one then do the same."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class PerturbedConv2d(PerturbedConvolution, nn.Conv2d):
    """A Conv2d that evaluates a population: row b is convolved with ``W + s E_d``, bias b + s e_d.

    Row b of the flat batch belongs to direction ``d = b % D``; its sign s is -1 in the second half
    of the repeats if the sampling is antithetic. Without noise (outside ``pm(...)`` and
    ``pm.perturbed()``) it is ``nn.Conv2d``. Frozen parameters (``requires_grad=False``) are not
    perturbed.

    In float32 and float64 the kernels ``W + s E_d`` of a few directions at a time are formed and
    applied as groups of one convolution, at about the price of the unperturbed one. In other
    dtypes, where W would swallow the noise, the two are multiplied apart. With gradients in x
    the kernels of all directions are kept for the backward.

    Families see the weight as a matrix of out_channels rows; those that flip or permute do so with
    whole channels. After NESgpu's layer of the same name (Amand, 2020), whose noise is stored.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: of both dimensions or of each.
        directions: D.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv2d.
        noise: the family of E_d, default ``Dense()``.

    Shapes:
        input (B, C, H, W), B = R * D rows; output (B, O, H', W').

    Raises:
        ValueError: a family whose options do not fit the layer's size; in the forward, an input
            without a row dimension, of other channels or smaller than the kernel, rows that are no
            multiple of D, an odd R > 1 with antithetic sampling.
        TypeError: an input that is not floating point.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedConv2d, PerturbedModel
        >>> layer = PerturbedConv2d(3, 8, 3, directions=16, padding=1)
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.ones(32, 3, 12, 12)).shape  # R = 2: antithetic pairs
        torch.Size([32, 8, 12, 12])
    """

    torch_class = nn.Conv2d
    dims = 2


class PerturbedConv1d(PerturbedConvolution, nn.Conv1d):
    """A Conv1d that evaluates a population, as :class:`PerturbedConv2d` does.

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv2d.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv1d.
        noise: the family of E_d, default ``Dense()``.

    Shapes:
        input (B, C, L), B = R * D rows; output (B, O, L').

    Raises:
        ValueError, TypeError: as PerturbedConv2d.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedConv1d, PerturbedModel
        >>> pm = PerturbedModel(PerturbedConv1d(3, 8, 5, directions=16), directions=16)
        >>> pm.set_noise()
        >>> pm(torch.ones(32, 3, 20)).shape
        torch.Size([32, 8, 16])
    """

    torch_class = nn.Conv1d
    dims = 1


class PerturbedConv3d(PerturbedConvolution, nn.Conv3d):
    """A Conv3d that evaluates a population, as :class:`PerturbedConv2d` does.

    Args:
        in_channels, out_channels, kernel_size, directions: as in PerturbedConv2d.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in nn.Conv3d.
        noise: the family of E_d, default ``Dense()``.

    Shapes:
        input (B, C, T, H, W), B = R * D rows; output (B, O, T', H', W').

    Raises:
        ValueError, TypeError: as PerturbedConv2d.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedConv3d, PerturbedModel
        >>> pm = PerturbedModel(PerturbedConv3d(1, 2, 3, directions=4), directions=4)
        >>> pm.set_noise()
        >>> pm(torch.ones(8, 1, 5, 6, 7)).shape
        torch.Size([8, 2, 3, 4, 5])
    """

    torch_class = nn.Conv3d
    dims = 3
