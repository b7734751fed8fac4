"""Perturbed normalisation layers: torch's statistics, then a scale and a shift for every row."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import NoiseFamily
from ..replicate import Replicated
from .affine import VectorLayer, channel_shape
from .base import Slot


class PerturbedLayerNorm(VectorLayer, nn.LayerNorm):
    """A LayerNorm that evaluates a population: row b has scale ``w + s E_d``, shift ``b + s e_d``.

    The noise is dense, in the distribution of the family that is asked for. Without noise it is
    ``nn.LayerNorm`` (Ba et al., 2016).

    Args:
        normalized_shape: trailing dimensions to normalise over.
        directions: D.
        eps, elementwise_affine, bias: as in nn.LayerNorm.
        noise: a family, whose distribution counts; default ``Dense()``.
        device, dtype: as in nn.LayerNorm.

    Shapes:
        input (B, *, normalized_shape), B = R * D rows; output alike.

    Raises:
        ValueError: in the forward, rows that are no multiple of D, an odd R > 1 with antithetic
            sampling, an input without a row dimension.
        TypeError: an input that is not floating point.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedLayerNorm, PerturbedModel
        >>> pm = PerturbedModel(PerturbedLayerNorm(8, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.randn(32, 5, 8)).shape
        torch.Size([32, 5, 8])
    """

    torch_class = nn.LayerNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        directions: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.LayerNorm does."""
        sizes: Any = normalized_shape
        if not isinstance(sizes, numbers.Integral):  # NumPy's are, too
            sizes = list(sizes)
        super().__init__(sizes, eps, elementwise_affine, bias, device, dtype)
        self.init_noise(directions, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        sizes = self.normalized_shape
        if not self.is_perturbed:
            return F.layer_norm(input, sizes, self.weight, self.bias, self.eps)
        rows, short, signs = self.enter_rows(input, len(sizes) + 1, f"(B, *, {tuple(sizes)})")
        normal = F.layer_norm(rows, sizes, eps=self.eps)
        return self.scale_and_shift(normal, short, sizes, signs)


class PerturbedRMSNorm(VectorLayer, nn.RMSNorm):
    """An RMSNorm that evaluates a population: row b has the scale ``w + s E_d``.

    The noise is dense, in the distribution of the family that is asked for. Without noise it is
    ``nn.RMSNorm`` (Zhang and Sennrich, 2019).

    Args:
        normalized_shape: trailing dimensions to normalise over.
        directions: D.
        eps, elementwise_affine: as in nn.RMSNorm.
        noise: a family, whose distribution counts; default ``Dense()``.
        device, dtype: as in nn.RMSNorm.

    Shapes:
        input (B, *, normalized_shape), B = R * D rows; output alike.

    Raises:
        ValueError, TypeError: as PerturbedLayerNorm.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedModel, PerturbedRMSNorm
        >>> pm = PerturbedModel(PerturbedRMSNorm(8, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.randn(32, 5, 8)).shape
        torch.Size([32, 5, 8])
    """

    torch_class = nn.RMSNorm

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        directions: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.RMSNorm does."""
        sizes: Any = normalized_shape
        if not isinstance(sizes, numbers.Integral):  # NumPy's are, too
            sizes = list(sizes)
        super().__init__(sizes, eps, elementwise_affine, device, dtype)
        self.init_noise(directions, noise)

    def slots(self) -> list[Slot]:
        """See :meth:`PerturbedLayer.slots`."""
        return [("weight", None)]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        sizes = self.normalized_shape
        if not self.is_perturbed:
            return F.rms_norm(input, sizes, self.weight, self.eps)
        rows, short, signs = self.enter_rows(input, len(sizes) + 1, f"(B, *, {tuple(sizes)})")
        normal = F.rms_norm(rows, sizes, eps=self.eps)
        return self.scale_and_shift(normal, short, sizes, signs)


class PerturbedGroupNorm(VectorLayer, nn.GroupNorm):
    """A GroupNorm that evaluates a population: row b has scale ``w + s E_d``, shift ``b + s e_d``.

    The noise is dense, in the distribution of the family that is asked for. Without noise it is
    ``nn.GroupNorm`` (Wu and He, 2018).

    Args:
        num_groups: groups of channels that are normalised together.
        num_channels: C.
        directions: D.
        eps, affine: as in nn.GroupNorm.
        noise: a family, whose distribution counts; default ``Dense()``.
        device, dtype: as in nn.GroupNorm.

    Shapes:
        input (B, C, *), B = R * D rows; output alike.

    Raises:
        ValueError, TypeError: as PerturbedLayerNorm; channels that the groups do not divide.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedGroupNorm, PerturbedModel
        >>> pm = PerturbedModel(PerturbedGroupNorm(2, 8, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.randn(32, 8, 3, 3)).shape
        torch.Size([32, 8, 3, 3])
    """

    torch_class = nn.GroupNorm

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        directions: int,
        eps: float = 1e-5,
        affine: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.GroupNorm does."""
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.init_noise(directions, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        rows, short, signs = self.enter_rows(input, 2, f"(B, {self.num_channels}, *)")
        shape = channel_shape(input, self.num_channels)
        normal = F.group_norm(rows, self.num_groups, eps=self.eps)
        return self.scale_and_shift(normal, short, shape, signs)


class PerturbedBatchNorm(VectorLayer, nn.modules.batchnorm._BatchNorm):
    """What the perturbed batch normalisations share; see :class:`PerturbedBatchNorm2d`."""

    def __init__(
        self,
        num_features: int,
        directions: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as torch's layer does."""
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.init_noise(directions, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return super().forward(input)
        self._check_input_dim(input)
        rows, short, signs = self.enter_rows(input, 2, f"(B, {self.num_features}, *)")
        shape = channel_shape(input, self.num_features)
        if self.training or self.running_mean is None:
            normal = self._by_member(rows, short, signs)
        else:
            mean, var = self.running_mean, self.running_var
            normal = F.batch_norm(rows, mean, var, training=False, eps=self.eps)
        return self.scale_and_shift(normal, short, shape, signs)

    def _by_member(self, rows: Tensor, short: Replicated | None, signs: int) -> Tensor:
        """Rows normalised by the mean and variance of their member's rows alone."""
        count, channels, *pixels = rows.shape
        directions = self.site.state.directions
        members = 1 if short is not None else signs * directions
        values = count // members * torch.Size(pixels).numel()
        if values < 2:
            raise ValueError(
                "batch statistics are each member's own and need more than one value per channel: "
                f"a member has {count // members} rows of {torch.Size(pixels).numel()} values; "
                "give every member more rows, or call eval() for the running statistics"
            )

        def normalise(x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True, eps=self.eps)

        if short is not None:  # the members' rows are the same
            return normalise(rows)
        # Directions become channels: a batch normalisation of R / S rows of D * C channels.
        parts = [
            normalise(part.reshape(-1, directions * channels, *pixels)).view(part.shape)
            for part in rows.chunk(signs)
        ]
        return parts[0] if signs == 1 else torch.cat(parts)


class PerturbedBatchNorm1d(PerturbedBatchNorm, nn.BatchNorm1d):
    """A BatchNorm1d that evaluates a population; see :class:`PerturbedBatchNorm2d`.

    Shapes:
        input (B, C) or (B, C, L), B = R * D rows; output alike.

    Example:
        >>> from perturbed import PerturbedBatchNorm1d
        >>> PerturbedBatchNorm1d(3, directions=16).weight.shape
        torch.Size([3])
    """

    torch_class = nn.BatchNorm1d


class PerturbedBatchNorm2d(PerturbedBatchNorm, nn.BatchNorm2d):
    """A BatchNorm2d that evaluates a population: row b has scale w + s E_d, shift b + s e_d.

    Statistics are never mixed across members. In eval mode they are the running ones. In training
    mode, or without running statistics, they are those of the member's own rows (the repeats of
    its sign and direction), so that every member sees what ``pm.member(d, sign)`` in training mode
    makes of its rows. Perturbed forwards leave the running statistics as they are, for they belong
    to no member: update them by unperturbed forwards of the base model.

    The noise is dense, in the distribution of the family that is asked for. Without noise it is
    ``nn.BatchNorm2d`` (Ioffe and Szegedy, 2015).

    Args:
        num_features: C.
        directions: D.
        eps, momentum, affine, track_running_stats: as in nn.BatchNorm2d.
        noise: a family, whose distribution counts; default ``Dense()``.
        device, dtype: as in nn.BatchNorm2d.

    Shapes:
        input (B, C, H, W), B = R * D rows; output alike.

    Raises:
        ValueError: in the forward, rows that are no multiple of D, an odd R > 1 with antithetic
            sampling, another number of dimensions, or batch statistics of members with a single
            value per channel.
        TypeError: an input that is not floating point.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedBatchNorm2d, PerturbedModel
        >>> pm = PerturbedModel(PerturbedBatchNorm2d(3, directions=16), directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.randn(32, 3, 5, 5)).shape
        torch.Size([32, 3, 5, 5])
    """

    torch_class = nn.BatchNorm2d


class PerturbedBatchNorm3d(PerturbedBatchNorm, nn.BatchNorm3d):
    """A BatchNorm3d that evaluates a population; see :class:`PerturbedBatchNorm2d`.

    Shapes:
        input (B, C, T, H, W), B = R * D rows; output alike.

    Example:
        >>> from perturbed import PerturbedBatchNorm3d
        >>> PerturbedBatchNorm3d(3, directions=16).weight.shape
        torch.Size([3])
    """

    torch_class = nn.BatchNorm3d
