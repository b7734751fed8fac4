"""PerturbedAffine, and what layers share whose parameters scale and shift element by element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import as_int
from ..noise import NoiseFamily
from ..noise.base import matrix_shape, needs_grad, wide_like
from ..replicate import Replicated
from .base import PerturbedLayer, check_float


class VectorLayer(PerturbedLayer):
    """Mixin of layers whose ``weight`` and ``bias``, if any, act element by element.

    Their noise is independent in every element, whatever the family of the model.
    """

    @classmethod
    def layer_family(cls, noise: NoiseFamily) -> NoiseFamily:
        """Return dense noise of the family's distribution, or what the family says."""
        return noise.for_vectors()

    def check_noise(self, directions: int, noise: NoiseFamily) -> None:
        """Accept all: dense noise fits any size, and none where the layer has no parameters."""

    def allocate(self) -> None:
        """Hold nothing."""

    def enter_rows(
        self, input: Tensor, dims: int, shape: str
    ) -> tuple[Tensor, Replicated | None, int]:
        """Check an input of at least ``dims`` dimensions; see :meth:`PerturbedLayer.enter`.

        Returns:
            The rows to work on, the Replicated they came from if they are its N rows, and S.
        """
        check_float(input)
        if input.dim() < dims:
            raise ValueError(f"input must be {shape} with B = R * D rows, got {tuple(input.shape)}")
        rows, short = self.enter(input)
        state, batch = self.site.state, (rows if short is None else short).shape[0]
        signs = 2 if state.is_antithetic(batch // state.directions) else 1
        if short is not None and short.copies != signs:  # made by the caller
            return short.full(), None, signs
        return rows, short, signs

    def scale_and_shift(
        self,
        normal: Tensor,
        short: Replicated | None,
        shape: Sequence[int],
        signs: int,
        overwrite: bool = True,
    ) -> Tensor:
        """Return ``(w + s E_d) x_b + (b + s e_d)``, element by element, of every row.

        Half-precision vectors take their noise in float32, where it is not lost in the rounding of
        the sum, and the result is rounded once.

        Args:
            normal: x, (B, *); the (N, *) that belong to the rows of ``short`` if that is given.
            short: the Replicated that the rows come from, with S copies.
            shape: of the vectors in a row: a view that broadcasts against the last dimensions.
            signs: S.
            overwrite: whether ``normal`` is freshly made and may take the result.

        Returns:
            (B, *), of the dtype of ``normal``.
        """
        rows = self.split_rows(normal, short, signs)
        weight = self.vectors("weight", self.site.weight, shape, signs, normal.dim())
        bias = self.vectors("bias", self.site.bias, shape, signs, normal.dim())
        if weight is None:
            return self.join_rows(rows, signs)
        in_place = overwrite and short is None and weight.dtype == rows.dtype
        factors = (weight,) if bias is None else (weight, bias)
        out = rows if in_place and not needs_grad(rows, *factors) else None
        if bias is None:
            rows = torch.mul(rows, weight, out=out)
        else:
            rows = torch.addcmul(bias, rows, weight, out=out)
        return self.join_rows(rows.to(normal.dtype), signs)

    def split_rows(self, rows: Tensor, short: Replicated | None, signs: int) -> Tensor:
        """View rows as (S, R / S, D, *), or the N rows of ``short`` as (1, N, 1, *)."""
        if short is not None:
            return rows[None, :, None]
        directions = self.site.state.directions
        return rows.unflatten(0, (signs, rows.shape[0] // (signs * directions), directions))

    def join_rows(self, rows: Tensor, signs: int) -> Tensor:
        """Return what became of :meth:`split_rows` as a batch, (B, *)."""
        sizes = signs, -1, self.site.state.directions
        return rows.expand(*sizes, *rows.shape[3:]).flatten(0, 2)

    def vectors(
        self, name: str, stream: int, shape: Sequence[int], signs: int, dims: int
    ) -> Tensor | None:
        """Return a parameter with the noise of every member, (S, 1, D, *1, *shape), or None.

        Args:
            name: of the parameter.
            stream: its counter word, -1 for no noise.
            shape: of the vectors in a row.
            signs: S.
            dims: of the rows, the batch included.
        """
        parameter = getattr(self, name, None)
        if parameter is None:
            return None
        value = parameter.view(shape)
        if stream < 0:
            return value
        state = self.site.state
        sizes = (1, 1, state.directions, *[1] * (dims - 1 - len(shape)), *shape)
        if self.noise.absolute:
            return state.explicit[stream].view(sizes)
        _, sigma = state.tensors(value.device)
        like = value.detach().new_empty((), dtype=wide_like(value))
        noise = self.noise.materialise(
            self.site, stream, 0, state.directions, *matrix_shape(parameter), like
        )
        noise = (noise * sigma).view(sizes)
        return value + (torch.cat((noise, -noise)) if signs == 2 else noise)


def channel_shape(input: Tensor, channels: int) -> tuple[int, ...]:
    """Return the shape of per-channel vectors in a row of (B, C, *), after a check of C."""
    if input.shape[1] != channels:
        raise ValueError(
            f"input must be (B, {channels}, *), {channels} channels, got {tuple(input.shape)}"
        )
    return channels, *[1] * (input.dim() - 2)


class Affine(nn.Module):
    """Scale and shift element by element: ``weight * x + bias``, without normalising anything.

    What follows a normalisation that has no parameters of its own, such as
    ``nn.BatchNorm2d(C, affine=False)``. torch has no such layer.

    Args:
        normalized_shape: shape of weight and bias, an int or a sequence. They broadcast against
            the last dimensions of the input: ``n`` for (..., n), ``(C, 1, 1)`` for the channels of
            (B, C, H, W).
        bias: whether to shift.
        device, dtype: of the parameters, which start as ones and zeros.

    Shapes:
        input (*, normalized_shape) or what it broadcasts to; output alike.

    Raises:
        ValueError: a shape with a negative size; in the forward, an input that the shape does not
            broadcast to.
        TypeError: a shape that is no integer nor a sequence of them.

    Example:
        >>> import torch
        >>> from perturbed.nn import Affine
        >>> Affine((3, 1, 1))(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        sizes = normalized_shape if isinstance(normalized_shape, Sequence) else [normalized_shape]
        self.normalized_shape = tuple(as_int("normalized_shape", size) for size in sizes)
        if any(size < 0 for size in self.normalized_shape):
            raise ValueError(f"normalized_shape must not be negative, got {self.normalized_shape}")
        self.weight = nn.Parameter(torch.ones(self.normalized_shape, device=device, dtype=dtype))
        shift = nn.Parameter(torch.zeros_like(self.weight)) if bias else None
        self.register_parameter("bias", shift)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""
        self.check_input(input.shape)
        if self.bias is None:
            return input * self.weight
        return torch.addcmul(self.bias, input, self.weight)

    def check_input(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the parameters broadcast to inputs of this shape."""
        sizes = self.normalized_shape
        last = shape[len(shape) - len(sizes) :] if len(shape) >= len(sizes) else ()
        if len(last) != len(sizes) or any(
            n not in (1, m) for n, m in zip(sizes, last, strict=True)
        ):
            raise ValueError(
                f"input must have last dimensions that normalized_shape = {sizes} broadcasts to, "
                f"got shape {tuple(shape)}"
            )

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{self.normalized_shape}, bias={self.bias is not None}"


class PerturbedAffine(VectorLayer, Affine):
    """An Affine layer that evaluates a population: ``y_b = (w + s E_d) * x_b + (bias + s e_d)``.

    The noise is dense, in the distribution of the family that is asked for. After NESgpu's layer of
    the same name (Amand, 2020), which took one row per direction.

    Args:
        normalized_shape: shape of weight and bias, see :class:`~perturbed.nn.Affine`.
        directions: D.
        bias: whether to learn (and perturb) a shift.
        noise: a family, whose distribution counts; default ``Dense()``.
        device, dtype: of the parameters.

    Shapes:
        input (B, *), B = R * D rows, whose last dimensions ``normalized_shape`` broadcasts to;
        output alike.

    Raises:
        ValueError: as Affine; in the forward, rows that are no multiple of D, an odd R > 1 with
            antithetic sampling.
        TypeError: an input that is not floating point.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedAffine, PerturbedModel
        >>> layer = PerturbedAffine((3, 1, 1), directions=16)  # channels of images
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.ones(32, 3, 4, 4)).shape
        torch.Size([32, 3, 4, 4])
    """

    torch_class = Affine

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        directions: int,
        bias: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as Affine does."""
        super().__init__(normalized_shape, bias, device, dtype)
        self.init_noise(directions, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return Affine.forward(self, input)
        sizes = self.normalized_shape
        rows, short, signs = self.enter_rows(input, len(sizes) + 1, f"(B, *, {sizes})")
        self.check_input(input.shape[1:])
        # As torch promotes x * weight.
        rows = rows.to(torch.promote_types(rows.dtype, self.weight.dtype))
        return self.scale_and_shift(rows, short, sizes, signs, overwrite=False)
