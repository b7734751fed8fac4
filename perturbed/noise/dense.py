"""Dense noise: every element of ``E_d`` is drawn independently (evolution strategies' usual noise).

Few rows per direction: the kernels draw ``E_d`` on the fly and use it from the cache. Many rows:
chunks of ``E_d`` are materialised into a scratch of bounded size and multiplied by the BLAS, whose
speed pays for the memory traffic; signs on a CPU stay with their kernel, which needs a quarter of
the BLAS's additions. Either way the noise held is independent of the number of directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from ..checks import check_option
from .base import (
    DISTRIBUTIONS,
    STORAGES,
    LayerNoise,
    NoiseFamily,
    matrix_shape,
    needs_grad,
    rows_of,
)
from .products import add_products

# From this many rows per direction on, a matrix product from scratch beats the fused kernels.
GEMM_ROWS = 24
# Outputs from which on the CPU kernel for signs is as fast all the same, or up to four times faster
# (64 to 784 inputs, 32 to 1024 rows per direction).
KERNEL_OUTPUTS = 8


class Dense(NoiseFamily):
    """Independent noise for every element.

    Args:
        distribution: "normal" for N(0, sigma^2), or "rademacher" for +-sigma, which costs about a
            tenth and is the same bits on every device.
        storage: "regenerate" draws noise again wherever it is needed and holds none; "stored" holds
            E_d of all directions (D * out * in elements) from its first use until the next
            ``set_noise``, for many forwards per draw.
        dtype: of stored noise; default: the parameter's.

    Raises:
        ValueError: an unknown distribution or storage.
        TypeError: a dtype that is not floating point.

    Example:
        >>> from perturbed import Dense, PerturbedLinear
        >>> layer = PerturbedLinear(8, 4, directions=16, noise=Dense("rademacher"))
        >>> layer.noise
        Dense('rademacher')
    """

    def __init__(
        self,
        distribution: str = "normal",
        storage: str = "regenerate",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check and store the options."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
        self.distribution = check_option("distribution", distribution, DISTRIBUTIONS)
        self.storage = check_option("storage", storage, STORAGES)
        self.dtype = dtype

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        options = [repr(self.distribution)]
        if self.storage != "regenerate":
            options.append(f"storage={self.storage!r}")
        if self.dtype is not None:
            options.append(f"dtype={self.dtype}")
        return f"Dense({', '.join(options)})"

    # ---- the four things -----------------------------------------------------------------------

    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """See :meth:`NoiseFamily.add_linear`."""
        state = site.state
        key, sigma = state.tensors(y.device)
        repeats = y.shape[0] // state.directions
        antithetic = state.is_antithetic(repeats)
        weight, bias = site.weight, site.bias
        sources = x.shape[0] if shared else repeats
        by_matmul = self.storage == "stored" or (
            sources * x.shape[1] >= GEMM_ROWS and not self._kernel_beats_blas(y, shared)
        )
        if weight >= 0 and by_matmul and y.numel() > 0 and x.numel() > 0:
            y = add_products(self, y, x, site, shared)
            weight = -1
        if weight < 0 and bias < 0:
            return y
        arguments = (key, sigma, weight, bias, state.directions, antithetic, self.rademacher)
        if needs_grad(y, x):
            return _ops.dense_linear(y, x, *arguments)
        _ops.dense_linear_(y, x, *arguments)
        return y

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`."""
        key, sigma = site.state.tensors(grad.device)
        if site.state.held.get(site.weight) is not None:
            super().estimate_weight_(grad, weights, site, accumulate)
            return
        _ops.dense_estimate_(grad, weights, key, sigma, site.weight, self.rademacher, accumulate)

    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`."""
        held = site.state.held.get(site.weight)
        if held is not None:
            return held[first : first + count].to(like.dtype)
        key, _ = site.state.tensors(like.device)
        return _ops.dense_materialise(
            key, site.weight, first, count, rows, cols, self.rademacher, like.dtype
        )

    def lookup(self, index: Tensor, site: LayerNoise, rows: int, cols: int, like: Tensor) -> Tensor:
        """See :meth:`NoiseFamily.lookup`; draws the rows that are asked for and no others."""
        directions = site.state.directions
        held = site.state.held.get(site.weight)
        if held is not None:
            by_direction = index.view(index.shape[0] // directions, directions, index.shape[1])
            return rows_of(held, by_direction).to(like.dtype).flatten(0, 1)
        key, _ = site.state.tensors(index.device)
        index, rademacher = index.contiguous(), self.rademacher
        return _ops.dense_lookup(
            index, key, site.weight, directions, rows, cols, rademacher, like.dtype
        )

    def allocate(self, weight: Tensor, site: LayerNoise) -> None:
        """Hold the whole noise of this draw, if storage is "stored"."""
        state = site.state
        if self.storage != "stored" or site.weight < 0:
            return
        held = state.held.get(site.weight)
        if held is not None and held.device == weight.device:
            return
        key, _ = state.tensors(weight.device)
        rows, cols = matrix_shape(weight)
        dtype = self.dtype or weight.dtype
        state.held[site.weight] = _ops.dense_materialise(
            key, site.weight, 0, state.directions, rows, cols, self.rademacher, dtype
        )

    def _kernel_beats_blas(self, y: Tensor, shared: bool) -> bool:
        """Whether the kernel is the fastest way for any number of rows (csrc/cpu/sign_panels.h).

        It first transposes x. That is the smaller part if all members see the same x, or if a row
        serves many outputs.
        """
        return (
            self.rademacher
            and y.device.type == "cpu"
            and y.dtype != torch.float64
            and (shared or y.shape[2] >= KERNEL_OUTPUTS)
        )
