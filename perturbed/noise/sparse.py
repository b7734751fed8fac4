"""Sparse noise: each direction perturbs a few input columns of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from ..checks import check_option
from .base import (
    DISTRIBUTIONS,
    STREAM_COLUMNS,
    STREAM_VALUES,
    LayerNoise,
    NoiseFamily,
    check_count,
    needs_grad,
    resolve_count,
    rows_of,
    wide_like,
)


class Sparse(NoiseFamily):
    """Noise in k of the ``in`` columns of E_d, another set for every direction.

    The k columns of a direction are distinct, and their elements have standard deviation
    ``sigma sqrt(in / k)``, so that over directions every element has sigma. A perturbed product
    costs k * out multiplications a row: almost nothing. One direction says nothing about most of
    the weight, so use this with many of them, D * k well above ``in``.

    After NESgpu's SparsePerturbedLinear (Amand, 2020), whose columns could repeat.

    Args:
        sparsity: k as a count (int) or as a fraction of the inputs (float in (0, 1], at least one
            column); "auto" for max(1, in // D).
        distribution: "normal" or "rademacher", of the elements that are not 0.

    Raises:
        ValueError: a sparsity below 1 or a fraction outside (0, 1], in a layer a count above its
            inputs; an unknown distribution.
        TypeError: a sparsity that is no number.

    Example:
        >>> from perturbed import PerturbedLinear, Sparse
        >>> layer = PerturbedLinear(8, 4, directions=16, noise=Sparse(2))
        >>> layer.noise
        Sparse(2)
    """

    def __init__(self, sparsity: int | float | str = "auto", distribution: str = "normal") -> None:
        """Check and store the options."""
        if isinstance(sparsity, str) and sparsity != "auto":
            raise ValueError(f"sparsity must be a count, a fraction or 'auto', got {sparsity!r}")
        self.sparsity: int | float | str = sparsity
        if not isinstance(sparsity, str):
            self.sparsity = check_count("sparsity", sparsity)
        self.distribution = check_option("distribution", distribution, DISTRIBUTIONS)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        kind = "" if self.distribution == "normal" else f", {self.distribution!r}"
        return f"Sparse({self.sparsity!r}{kind})"

    def check(
        self, rows: int, cols: int, directions: int, window: int = 1, groups: int = 1
    ) -> None:
        """See :meth:`NoiseFamily.check`."""
        self.columns(cols, directions)

    def columns(self, cols: int, directions: int) -> int:
        """Return k for a weight of ``cols`` columns and the directions of a whole population."""
        if isinstance(self.sparsity, str):
            return min(cols, max(1, cols // directions))
        return resolve_count("sparsity", self.sparsity, cols, "in_features")

    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """See :meth:`NoiseFamily.add_linear`."""
        if site.weight < 0 or x.shape[2] == 0:
            return self.add_bias(y, site)
        state = site.state
        key, sigma = state.tensors(y.device)
        antithetic = state.is_antithetic(y.shape[0] // state.directions)
        arguments = (
            key,
            sigma,
            site.stream(STREAM_COLUMNS),
            site.stream(STREAM_VALUES),
            site.bias,
            state.directions,
            self.columns(x.shape[2], state.population),
            antithetic,
            self.rademacher,
        )
        if needs_grad(y, x):
            return _ops.sparse_linear(y, x, *arguments)
        _ops.sparse_linear_(y, x, *arguments)
        return y

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`."""
        if grad.numel() == 0:
            return
        key, sigma = site.state.tensors(grad.device)
        _ops.sparse_estimate_(
            grad,
            weights,
            key,
            sigma,
            site.stream(STREAM_COLUMNS),
            site.stream(STREAM_VALUES),
            self.columns(grad.shape[1], site.state.population),
            self.rademacher,
            accumulate,
        )

    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`."""
        noise = torch.zeros(count, cols, rows, dtype=wide_like(like), device=like.device)
        if noise.numel() > 0:
            key, _ = site.state.tensors(like.device)
            k = self.columns(cols, site.state.population)
            values = _ops.dense_materialise(
                key, site.stream(STREAM_VALUES), first, count, k, rows, self.rademacher, noise.dtype
            )
            columns = _ops.selections(
                key, site.stream(STREAM_COLUMNS), first, count, cols, k, False
            )
            index = columns[:, :, None].expand(values.shape)
            noise.scatter_(1, index, values.mul_((cols / k) ** 0.5))
        return noise.mT.to(like.dtype).contiguous()

    # ---- rows of weights -----------------------------------------------------------------------

    def lookup_directions(
        self, index: Tensor, site: LayerNoise, first: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.lookup_directions`; k values a row, the others are 0."""
        count = index.shape[1]
        noise = torch.zeros(*index.shape, cols, dtype=like.dtype, device=like.device)
        if noise.numel() == 0:
            return noise
        key, _ = site.state.tensors(like.device)
        k = self.columns(cols, site.state.population)
        values = _ops.dense_materialise(
            key, site.stream(STREAM_VALUES), first, count, k, rows, self.rademacher, like.dtype
        )
        columns = _ops.selections(key, site.stream(STREAM_COLUMNS), first, count, cols, k, False)
        picked = rows_of(values.mT, index).mul_((cols / k) ** 0.5)
        return noise.scatter_(3, columns[:, None].expand(picked.shape), picked)
