"""Low-rank noise: ``E_d`` is a product of two thin random matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _ops
from ..checks import as_count, check_option
from .base import (
    DISTRIBUTIONS,
    STREAM_FACTOR_A,
    STREAM_FACTOR_B,
    LayerNoise,
    NoiseFamily,
    add_outer_products,
    assign_total,
    matrix_shape,
    needs_grad,
    per_scratch,
    rows_of,
    wide_like,
)
from .convolution import Convolution, PopulationBatch, add_products, sums_are_cheap

# Rows that all members share from which a matrix product with drawn factors is at least as fast as
# the kernel's dot products, which on a GPU draw the factors again for every four rows.
GEMM_ROWS = {"cpu": 64, "cuda": 5}


class LowRank(NoiseFamily):
    """Noise of rank r: ``E_d = sigma A_d^T B_d / sqrt(r)`` with A_d (r, out) and B_d (r, in).

    A perturbed product costs r (in + out) multiplications a row instead of in * out, and r (in +
    out) random numbers a direction: close to the unperturbed layer's price. Every element of E_d
    has standard deviation sigma; the negative partner of a pair negates the product once. The sum
    of D directions has rank up to D * r, so estimates are not confined to low rank.

    After EGGROLL (Sarkar et al., 2025); low-rank perturbations for evolution strategies go back to
    LM-MA-ES (Loshchilov et al., 2017) and Flipout-like estimators (Wen et al., 2018).

    Args:
        rank: r, from 1 to min(in, out).
        distribution: "normal" or "rademacher", of the factors' elements.

    Raises:
        ValueError: a rank below 1 (or, in a layer, above min(in, out)), an unknown distribution.
        TypeError: a rank that is no integer.

    Example:
        >>> from perturbed import LowRank, PerturbedLinear
        >>> layer = PerturbedLinear(8, 4, directions=16, noise=LowRank(2))
        >>> layer.noise
        LowRank(2)
    """

    def __init__(self, rank: int = 1, distribution: str = "normal") -> None:
        """Check and store the options."""
        self.rank = as_count("rank", rank)
        self.distribution = check_option("distribution", distribution, DISTRIBUTIONS)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        kind = "" if self.distribution == "normal" else f", {self.distribution!r}"
        return f"LowRank({self.rank}{kind})"

    def check(
        self, rows: int, cols: int, directions: int, window: int = 1, groups: int = 1
    ) -> None:
        """See :meth:`NoiseFamily.check`."""
        if self.rank > min(rows, cols) > 0:
            raise ValueError(
                f"rank must be at most min(in, out) = {min(rows, cols)} of a ({rows}, {cols}) "
                f"weight, got {self.rank}"
            )

    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """See :meth:`NoiseFamily.add_linear`."""
        if site.weight < 0 or x.shape[2] == 0:
            return self.add_bias(y, site)
        state = site.state
        key, sigma = state.tensors(y.device)
        a_stream, b_stream = site.stream(STREAM_FACTOR_A), site.stream(STREAM_FACTOR_B)
        if shared and x.shape[0] * x.shape[1] >= GEMM_ROWS.get(x.device.type, 64):
            x, b_stream = self._project(x, site), -1
        antithetic = state.is_antithetic(y.shape[0] // state.directions)
        arguments = (
            key,
            sigma,
            a_stream,
            b_stream,
            site.bias,
            state.directions,
            self.rank,
            antithetic,
            self.rademacher,
        )
        if needs_grad(y, x):
            return _ops.low_rank_linear(y, x, *arguments)
        _ops.low_rank_linear_(y, x, *arguments)
        return y

    def _project(self, x: Tensor, site: LayerNoise) -> Tensor:
        """B_d x for rows that all members share: (N, T, in) -> (N * D, T, rank)."""
        directions, (rows, tokens, cols) = site.state.directions, x.shape
        each = per_scratch(x.device, self.rank * cols * x.element_size())
        flat = x.reshape(rows * tokens, cols)
        parts = []
        for first in range(0, directions, each):
            count = min(each, directions - first)
            factor = self._factor(site, STREAM_FACTOR_B, first, count, cols, x)
            parts.append(flat @ factor.flatten(0, 1).t())
        products = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        products = products.view(rows, tokens, directions, self.rank).transpose(1, 2)
        return products.reshape(rows * directions, tokens, self.rank)

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

        Where sums ``W + s E_d`` do not pay: r planes of B_d beside the base product, and A_d's
        mixtures of them.
        """
        batch = PopulationBatch.of(x, site.state, copies)
        if site.weight < 0 or sums_are_cheap(x, weight, conv, batch):
            return super().convolve(x, weight, bias, site, conv, copies)
        x = x.contiguous()
        rows = x if batch.shared else x.view(batch.repeats, batch.directions, *x.shape[1:])
        y = conv(x, weight, bias).contiguous()

        def parts() -> Iterator[tuple[int, int, Tensor]]:
            each = per_scratch(x.device, self.rank * site.groups * weight[0].nbytes)
            for first in range(0, batch.directions, each):
                count = min(each, batch.directions - first)
                here = rows if batch.shared else rows[:, first : first + count]
                yield 0, first, self._convolve_factors(here, weight, site, conv, first, count)

        in_place = not needs_grad(x, weight, bias)
        y = add_products(y, parts(), batch.signs(y), batch, in_place)
        return self.add_channel_bias(y, site, batch)

    def _convolve_factors(
        self,
        rows: Tensor,
        weight: Tensor,
        site: LayerNoise,
        conv: Convolution,
        first: int,
        count: int,
    ) -> Tensor:
        """Sigma E_d x for (R, count, C, *), or (N, C, *) of shared rows: (R, count, O, *)."""
        _, sigma = site.state.tensors(rows.device)
        (out, cols), groups, kernel = matrix_shape(weight), site.groups, weight.shape[1:]
        b = self._factor(site, STREAM_FACTOR_B, first, count, cols, rows)
        wide = rows.new_empty((), dtype=wide_like(rows))
        a = self._factor(site, STREAM_FACTOR_A, first, count, out, wide)
        a = (a * (sigma / self.rank**0.5)).to(rows.dtype).view(count, self.rank, groups, -1)
        if rows.dim() == weight.dim():
            filters = b.view(1, -1, *kernel).expand(groups, -1, *kernel)
            planes = conv(rows, filters.reshape(-1, *kernel))
            planes = planes.view(-1, groups, count, self.rank, *planes.shape[2:]).transpose(1, 2)
        else:
            filters = b.view(count, 1, self.rank, *kernel).expand(-1, groups, -1, *kernel)
            planes = conv(rows.flatten(1, 2), filters.reshape(-1, *kernel), None, count)
            planes = planes.view(-1, count, groups, self.rank, *planes.shape[2:])
        # (count, groups, O / groups, rank) @ (R, count, groups, rank, pixels)
        product = a.permute(0, 2, 3, 1) @ planes.flatten(4)
        return product.reshape(-1, count, out, *planes.shape[4:])

    def _factor(
        self, site: LayerNoise, stream: int, first: int, count: int, size: int, like: Tensor
    ) -> Tensor:
        """A or B of ``count`` directions, (count, rank, size)."""
        key, _ = site.state.tensors(like.device)
        return _ops.dense_materialise(
            key, site.stream(stream), first, count, self.rank, size, self.rademacher, like.dtype
        )

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`."""
        _, sigma = site.state.tensors(grad.device)
        rows, cols = grad.shape
        scaled = weights * (sigma / self.rank**0.5)
        wide = grad.dtype == wide_like(grad)
        total = grad if wide else torch.empty_like(grad, dtype=scaled.dtype)
        add_outer_products(
            total,
            lambda first, count: self._factor(site, STREAM_FACTOR_A, first, count, rows, scaled),
            lambda first, count: self._factor(site, STREAM_FACTOR_B, first, count, cols, scaled),
            scaled,
            self.rank,
            accumulate and wide,
        )
        if not wide:
            assign_total(grad, total, accumulate)

    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`."""
        wide = like.new_empty((), dtype=wide_like(like))
        a = self._factor(site, STREAM_FACTOR_A, first, count, rows, wide)
        b = self._factor(site, STREAM_FACTOR_B, first, count, cols, wide)
        return (a.mT @ b).mul_(self.rank**-0.5).to(like.dtype)

    # ---- rows of weights -----------------------------------------------------------------------

    def lookup_elements(self, rows: int, cols: int) -> int:
        """See :meth:`NoiseFamily.lookup_elements`: the factors, not their product."""
        return self.rank * (rows + cols)

    def lookup_directions(
        self, index: Tensor, site: LayerNoise, first: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.lookup_directions`; columns of A_d times B_d."""
        count = index.shape[1]
        wide = like.new_empty((), dtype=wide_like(like))
        a = self._factor(site, STREAM_FACTOR_A, first, count, rows, wide)
        b = self._factor(site, STREAM_FACTOR_B, first, count, cols, wide)
        return (rows_of(a.mT, index) @ b).mul_(self.rank**-0.5).to(like.dtype)
