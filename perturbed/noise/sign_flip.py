"""Sign-flip noise: one random matrix whose rows and columns change sign from member to member."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from ..checks import as_count, check_option
from .base import (
    STREAM_FLIP_IN,
    STREAM_FLIP_OUT,
    LayerNoise,
    add_outer_products,
    assign_total,
    matrix_shape,
    needs_grad,
    rows_of,
    wide_like,
)
from .convolution import Convolution, PopulationBatch
from .shared_base import SIDES, SharedBase, add_rows, choose_sides


class SignFlip(SharedBase):
    """Noise ``E_d = sigma diag(o_d) N diag(i_d)``: a shared matrix N and random signs o_d, i_d.

    One matrix product with N serves the whole population, and one side's signs make an estimate of
    O(D in + in * out). All directions are variants of one N, so what they can say about the
    gradient is limited: with flips of one side only, the estimate of row j (or column) is N's row
    times a number per element of the other side. More bases lower that variance.

    After Flipout (Wen et al., 2018) and NESgpu's synthetic layers (Amand, 2020).

    Args:
        flip: "in" changes the signs of inputs, "out" of outputs, "both" of both; "auto" takes both
            if 1 < in < 32 and 1 < out < 32, else the longer side.
        bases: G, how many matrices N; direction d uses number d % G.
        distribution: "normal" or "rademacher", of N.
        storage: "regenerate" draws N again for every use; "stored" holds it until the next draw,
            for many forwards per draw.

    Raises:
        ValueError: an unknown option, ``bases`` below 1.
        TypeError: ``bases`` that is no integer.

    Example:
        >>> from perturbed import PerturbedLinear, SignFlip
        >>> layer = PerturbedLinear(8, 4, directions=16, noise=SignFlip("in", bases=2))
        >>> layer.noise
        SignFlip('in', bases=2)
    """

    def __init__(
        self,
        flip: str = "auto",
        bases: int = 1,
        distribution: str = "normal",
        storage: str = "regenerate",
    ) -> None:
        """Check and store the options."""
        super().__init__(distribution, storage)
        self.flip = check_option("flip", flip, SIDES)
        self.bases_used = as_count("bases", bases)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        options = [repr(self.flip)]
        if self.bases_used != 1:
            options.append(f"bases={self.bases_used}")
        if self.distribution != "normal":
            options.append(f"distribution={self.distribution!r}")
        if self.storage != "regenerate":
            options.append(f"storage={self.storage!r}")
        return f"SignFlip({', '.join(options)})"

    def base_count(self, site: LayerNoise) -> int:
        """See :meth:`SharedBase.base_count`."""
        state = site.state
        return min(self.bases_used, max(state.population, state.first_direction + state.directions))

    # ---- forward -------------------------------------------------------------------------------

    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """See :meth:`NoiseFamily.add_linear`."""
        if site.weight >= 0 and y.numel() > 0 and x.numel() > 0:
            y = self._add_products(y, x, site, shared)
        return self.add_bias(y, site)

    def _add_products(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """Add ``s sigma E_d x``."""
        state = site.state
        key, sigma = state.tensors(y.device)
        directions = state.directions
        antithetic = state.is_antithetic(y.shape[0] // directions)
        flip_in, flip_out = choose_sides(self.flip, y.shape[2], x.shape[2])
        # Scaled before it is rounded to the layer's dtype.
        wide = y.new_empty((), dtype=wide_like(y))
        bases = self.scaled_bases(site, y.shape[2], x.shape[2], wide, sigma).to(y.dtype)
        in_place = not needs_grad(y, x)
        # The rows' signs s go where every row has its own product.
        early = antithetic and not flip_out and not shared
        if flip_in:
            stream = site.stream(STREAM_FLIP_IN)
            x = _ops.flip(x, key, stream, directions, early, shared)
            if in_place and len(bases) == 1 and not flip_out and not shared:
                y.view(-1, y.shape[2]).addmm_(x.flatten(0, 1), bases[0].t())
                return y
            product = self._multiply(x, bases, state.directions, state.first_direction)
        elif shared and len(bases) == 1:
            product = (x @ bases[0].t())[:, None].expand(-1, directions, -1, -1).flatten(0, 1)
        else:
            if shared:
                x = x[:, None].expand(-1, directions, -1, -1).flatten(0, 1)
            product = self._multiply(x, bases, state.directions, state.first_direction)
        if not flip_out:
            return add_rows(y, product, directions, antithetic, in_place)
        stream = site.stream(STREAM_FLIP_OUT)
        if in_place:
            _ops.flip_add_(y, product, key, stream, directions, antithetic)
            return y
        return _ops.flip_add(y, product, key, stream, directions, antithetic)

    def _multiply(self, x: Tensor, bases: Tensor, directions: int, first: int) -> Tensor:
        """N_d x for rows (M, T, in) of all directions, whose first is ``first``."""
        if len(bases) == 1:
            return x @ bases[0].t()
        rows = x.view(-1, directions, *x.shape[1:])
        product = rows.new_empty(*rows.shape[:-1], bases.shape[1])
        for g, base in enumerate(bases):
            start = (g - first) % len(bases)  # this base's first direction here
            product[:, start :: len(bases)] = rows[:, start :: len(bases)] @ base.t()
        return product.flatten(0, 1)

    def convolve_bases(
        self,
        x: Tensor,
        weight: Tensor,
        site: LayerNoise,
        conv: Convolution,
        batch: PopulationBatch,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`SharedBase.convolve_bases`."""
        _, sigma = site.state.tensors(x.device)
        (rows, cols), directions = matrix_shape(weight), batch.directions
        channels = x.shape[1]
        flip_in, flip_out = choose_sides(self.flip, rows, channels)
        bases = self.bases(site, rows, cols, x.new_empty((), dtype=wide_like(x)))
        kernels = (bases * sigma).to(x.dtype).view(-1, *weight.shape)
        factor = batch.signs(x)
        each = x[:, None] if batch.shared else x.view(-1, directions, *x.shape[1:])
        if flip_in:
            signs = self._signs(site, False, 0, directions, channels, x)
            each = each * signs.view(directions, channels, *[1] * (x.dim() - 2))
        elif len(bases) > 1:
            each = each.expand(-1, directions, *each.shape[2:])
        if flip_out:
            factor = factor * self._signs(site, True, 0, directions, rows, x).view(-1, rows, 1)
        if len(bases) == 1:
            part = conv(each.flatten(0, 1), kernels[0])
            return part.view(*each.shape[:2], *part.shape[1:]), factor
        product: Tensor | None = None
        for g, kernel in enumerate(kernels):
            mine = slice((g - site.state.first_direction) % len(bases), None, len(bases))
            of_base = each[:, mine]
            part = conv(of_base.flatten(0, 1), kernel)
            if product is None:
                product = part.new_empty(*each.shape[:2], *part.shape[1:])
            product[:, mine] = part.view(*of_base.shape[:2], *part.shape[1:])
        assert product is not None
        return product, factor

    # ---- estimate and materialise --------------------------------------------------------------

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`."""
        rows, cols = grad.shape
        if grad.numel() == 0:
            return
        key, sigma = site.state.tensors(grad.device)
        channels = cols // site.window * site.groups
        flip_in, flip_out = choose_sides(self.flip, rows, channels)
        bases = self.bases(site, rows, cols, weights)
        total = torch.zeros_like(grad, dtype=weights.dtype)
        blocks = (site.groups, rows // site.groups, cols // site.window, site.window)
        for g, base in enumerate(bases):
            of_base = self._weights_of_base(weights, g, len(bases), site.state.first_direction)
            if flip_in and flip_out:
                signs = total.new_empty(rows, cols // site.window)
                add_outer_products(
                    signs,
                    lambda first, count: self._signs(site, True, first, count, rows, total),
                    lambda first, count: self._signs(site, False, first, count, channels, total),
                    of_base * sigma.to(weights.dtype),
                    groups=site.groups,
                )
                signs = signs.view(*blocks[:3], 1)
            else:
                size, side = (channels, STREAM_FLIP_IN) if flip_in else (rows, STREAM_FLIP_OUT)
                signs = total.new_empty(1, size)
                _ops.dense_estimate_(signs, of_base, key, sigma, site.stream(side), True, False)
                signs = signs.view(blocks[0], *((1, blocks[2]) if flip_in else (blocks[1], 1)), 1)
            total.view(blocks).addcmul_(base.view(blocks), signs)
        assign_total(grad, total, accumulate)

    @staticmethod
    def _weights_of_base(weights: Tensor, base: int, bases: int, first: int) -> Tensor:
        """The weights of the directions that use a base matrix, 0 for the others."""
        if bases == 1:
            return weights
        of_base = torch.zeros_like(weights)
        mine = slice((base - first) % bases, None, bases)
        of_base[mine] = weights[mine]
        return of_base

    def _signs(
        self, site: LayerNoise, out: bool, first: int, count: int, size: int, like: Tensor
    ) -> Tensor:
        """Signs of one side, (count, 1, size)."""
        key, _ = site.state.tensors(like.device)
        stream = site.stream(STREAM_FLIP_OUT if out else STREAM_FLIP_IN)
        return _ops.dense_materialise(key, stream, first, count, 1, size, True, like.dtype)

    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`."""
        channels = cols // site.window * site.groups
        flip_in, flip_out = choose_sides(self.flip, rows, channels)
        bases = self.bases(site, rows, cols, like)
        number = torch.arange(first, first + count, device=like.device)
        number = (number + site.state.first_direction) % len(bases)
        noise = bases[number]
        groups, channels_each = site.groups, cols // site.window
        blocks = noise.view(count, groups, rows // groups, channels_each, site.window)
        if flip_in:
            signs = self._signs(site, False, first, count, channels, like)
            blocks *= signs.view(count, groups, 1, channels_each, 1)
        if flip_out:
            signs = self._signs(site, True, first, count, rows, like)
            blocks *= signs.view(count, groups, rows // groups, 1, 1)
        return noise

    # ---- rows of weights -----------------------------------------------------------------------

    def lookup_elements(self, rows: int, cols: int) -> int:
        """See :meth:`NoiseFamily.lookup_elements`: the signs."""
        return rows + cols

    def lookup_directions(
        self, index: Tensor, site: LayerNoise, first: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.lookup_directions`; rows of the base matrices with their signs."""
        count = index.shape[1]
        flip_in, flip_out = choose_sides(self.flip, rows, cols)
        noise = like.new_empty(*index.shape, cols)
        bases = self.base_count(site)
        for g in range(bases):
            mine = slice((g - first - site.state.first_direction) % bases, None, bases)
            noise[:, mine] = self.base_rows(index[:, mine], site, g, rows, cols, like)
        if flip_in:
            noise *= self._signs(site, False, first, count, cols, like)
        if flip_out:
            noise *= rows_of(self._signs(site, True, first, count, rows, like).mT, index)
        return noise
