"""What families share whose directions are variants of one random matrix."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .. import _ops
from ..checks import check_option
from .base import (
    DISTRIBUTIONS,
    STORAGES,
    STREAM_SHARED,
    LayerNoise,
    NoiseFamily,
    matrix_shape,
    needs_grad,
    repeat_signs,
)
from .convolution import Convolution, PopulationBatch, add_products, sums_are_cheap

SIDES = ("in", "out", "both", "auto")

# "auto" varies both sides of a weight whose sides are shorter than this: one would give too few
# variants.
BOTH_BELOW = 32


def choose_sides(side: str, rows: int, cols: int) -> tuple[bool, bool]:
    """Return whether inputs and outputs are varied, for a (rows, cols) weight."""
    if side == "auto":
        if 1 < rows < BOTH_BELOW and 1 < cols < BOTH_BELOW:
            return True, True
        return cols >= rows, cols < rows
    return side in ("in", "both"), side in ("out", "both")


class SharedBase(NoiseFamily):
    """A family whose directions are variants of base matrices that the whole population shares.

    Args:
        distribution: "normal" or "rademacher", of the base matrices.
        storage: "regenerate" draws them again for every use; "stored" holds them (once per layer,
            not per direction) from their first use until the next draw.
    """

    by_channel = True

    def __init__(self, distribution: str, storage: str) -> None:
        """Check and store the options."""
        self.distribution = check_option("distribution", distribution, DISTRIBUTIONS)
        self.storage = check_option("storage", storage, STORAGES)

    def base_count(self, site: LayerNoise) -> int:
        """How many base matrices the directions of the population use."""
        return 1

    def base_shape(self, rows: int, cols: int, window: int = 1, groups: int = 1) -> tuple[int, int]:
        """Shape of a base matrix for a (rows, cols) weight."""
        return rows, cols

    def bases(self, site: LayerNoise, rows: int, cols: int, like: Tensor) -> Tensor:
        """The base matrices for a (rows, cols) weight, (G, ...), without sigma."""
        held = site.state.held.get(site.stream(STREAM_SHARED))
        if held is not None:
            return held.to(like.dtype)
        return self._draw(site, rows, cols, like)

    def base_rows(
        self, index: Tensor, site: LayerNoise, base: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """Rows ``index`` of one base matrix for a (rows, cols) weight: (*, base's cols).

        Unless the matrices are held, only these rows are drawn.
        """
        held = site.state.held.get(site.stream(STREAM_SHARED))
        if held is not None:
            return held[base][index].to(like.dtype)
        key = site.state.shared_key(like.device)
        if base > 0:
            key = key.clone()
            key[2] = base  # a fill, unlike a new tensor, needs no synchronisation
        drawn = _ops.dense_lookup(
            index.reshape(1, -1).contiguous(),
            key,
            site.stream(STREAM_SHARED),
            1,
            *self.base_shape(rows, cols),
            self.rademacher,
            like.dtype,
        )
        return drawn.view(*index.shape, drawn.shape[2])

    def scaled_bases(
        self, site: LayerNoise, rows: int, cols: int, like: Tensor, scale: Tensor
    ) -> Tensor:
        """The base matrices times ``scale``, in a tensor of their own."""
        held = site.state.held.get(site.stream(STREAM_SHARED))
        if held is not None:
            return held.to(like.dtype) * scale
        return self._draw(site, rows, cols, like).mul_(scale)

    def allocate(self, weight: Tensor, site: LayerNoise) -> None:
        """Hold the base matrices of this draw, if storage is "stored"."""
        if self.storage != "stored" or site.weight < 0:
            return
        word = site.stream(STREAM_SHARED)
        held = site.state.held.get(word)
        if held is None or held.device != weight.device:
            site.state.held[word] = self._draw(site, *matrix_shape(weight), weight)

    def held_bytes(self, site: LayerNoise) -> int:
        """See :meth:`NoiseFamily.held_bytes`."""
        held = site.state.held.get(site.stream(STREAM_SHARED))
        return 0 if held is None else held.nbytes

    def _draw(self, site: LayerNoise, rows: int, cols: int, like: Tensor) -> Tensor:
        return _ops.dense_materialise(
            site.state.shared_key(like.device),
            site.stream(STREAM_SHARED),
            0,
            self.base_count(site),
            *self.base_shape(rows, cols, site.window, site.groups),
            self.rademacher,
            like.dtype,
        )

    # ---- convolutions --------------------------------------------------------------------------

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: LayerNoise,
        conv: Convolution,
        copies: int,
    ) -> Tensor:
        """See :meth:`NoiseFamily.convolve`.

        Either with kernels that are formed for every direction, as other families do; or with the
        base matrices as kernels that serve all rows, beside the base product.
        """
        batch = PopulationBatch.of(x, site.state, copies)
        if site.weight < 0 or sums_are_cheap(x, weight, conv, batch):
            return super().convolve(x, weight, bias, site, conv, copies)
        x = x.contiguous()
        y = conv(x, weight, bias).contiguous()
        product, factor = self.convolve_bases(x, weight, site, conv, batch)
        product = product.expand(-1, batch.directions, *product.shape[2:])
        in_place = not needs_grad(x, weight, bias)
        y = add_products(y, [(0, 0, product)], factor, batch, in_place)
        return self.add_channel_bias(y, site, batch)

    @abstractmethod
    def convolve_bases(
        self,
        x: Tensor,
        weight: Tensor,
        site: LayerNoise,
        conv: Convolution,
        batch: PopulationBatch,
    ) -> tuple[Tensor, Tensor]:
        """Return a product and a factor that make ``s sigma E_d x``.

        Args:
            x: (B, C, *) or the N rows that all members see.
            weight: whose noise it is.
            site: the layer's noise.
            conv: the convolution, not transposed.
            batch: how rows belong to members.

        Returns:
            The product, (R or N, D | 1, O, *), and the factor, which broadcasts to (S, N, D, O, 1).
        """


def add_rows(
    y: Tensor, product: Tensor, directions: int, antithetic: bool, in_place: bool
) -> Tensor:
    """Add the products of all rows to ``y``, or those of shared rows with the signs of the copies.

    Args:
        y: (B, T, out).
        product: (B, T, out), signs included; or (M, T, out) with M < B, without them.
        directions: D.
        antithetic: whether the second half of the repeats is negated.
        in_place: whether to write into ``y``.
    """
    if product.shape[0] == y.shape[0]:
        return y.add_(product) if in_place else y + product
    shape = (-1, product.shape[0] // directions, directions, *y.shape[1:])
    rows, product = y.view(shape), product.view(shape[1:])
    signs = repeat_signs(y, directions, antithetic).view(-1, shape[1], 1, 1, 1)
    if in_place:
        rows.addcmul_(product, signs)
        return y
    return torch.addcmul(rows, product, signs).view(y.shape)
