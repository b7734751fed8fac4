"""Permuted noise: one random matrix whose rows and columns change places from member to member."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops
from ..checks import check_flag, check_option
from .base import (
    STREAM_SELECT_IN,
    STREAM_SELECT_OUT,
    LayerNoise,
    assign_total,
    check_count,
    matrix_shape,
    needs_grad,
    per_scratch,
    resolve_count,
    rows_of,
    wide_like,
)
from .convolution import Convolution, PopulationBatch
from .shared_base import SIDES, SharedBase, add_rows, choose_sides

# The estimate of one permuted side is a matrix product, or for few directions direct sums: their
# elements are this many times dearer than a multiplication of the product.
DIRECT_COST = 64


class Permuted(SharedBase):
    """Noise ``E_d[i, in_d(j)] = sigma N[out_d(i), j]``: a shared matrix N in permuted places.

    The permutations in_d of the inputs and out_d of the outputs are computed where they are needed
    and never stored. One matrix product with N serves the whole population. With a sparsity, N has
    only so many columns or rows, larger by the square root of the ratio, and the other columns or
    rows of E_d are 0; that makes the product cheaper too.

    All directions are variants of one N: elements of a row (or column) of the estimate are mixtures
    of the same numbers. After NESgpu's PermutedLinear (Amand, 2020).

    Args:
        permutation: "in" permutes inputs, "out" outputs, "both" both; "auto" takes the sides that
            have a sparsity, else both if 1 < in < 32 and 1 < out < 32, else the longer side. A
            side with a sparsity is always permuted.
        in_sparsity: non-zero columns of E_d as a count (int) or a fraction (float in (0, 1]); 0 for
            all.
        out_sparsity: non-zero rows of E_d, likewise.
        allow_repeats: draw with replacement instead of permuting: inputs may be used several times
            (their columns add up) or never, and rows of N may appear several times or never. No
            cheaper here than a permutation; for comparisons with NESgpu.
        distribution: "normal" or "rademacher", of N.
        storage: "regenerate" draws N again for every use; "stored" holds it until the next draw,
            for many forwards per draw.

    Raises:
        ValueError: an unknown option, a negative count, a fraction outside (0, 1]; in a layer a
            count above its size, or no side longer than 1 to permute.
        TypeError: a sparsity that is no number.

    Example:
        >>> from perturbed import PerturbedLinear, Permuted
        >>> layer = PerturbedLinear(8, 4, directions=16, noise=Permuted("in", in_sparsity=0.5))
        >>> layer.noise
        Permuted('in', in_sparsity=0.5)
    """

    def __init__(
        self,
        permutation: str = "auto",
        in_sparsity: int | float = 0,
        out_sparsity: int | float = 0,
        allow_repeats: bool = False,
        distribution: str = "normal",
        storage: str = "regenerate",
    ) -> None:
        """Check and store the options."""
        super().__init__(distribution, storage)
        self.permutation = check_option("permutation", permutation, SIDES)
        self.in_sparsity = check_count("in_sparsity", in_sparsity, none_is_zero=True)
        self.out_sparsity = check_count("out_sparsity", out_sparsity, none_is_zero=True)
        self.allow_repeats = check_flag("allow_repeats", allow_repeats)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        options = [repr(self.permutation)]
        defaults = {
            "in_sparsity": 0,
            "out_sparsity": 0,
            "allow_repeats": False,
            "distribution": "normal",
            "storage": "regenerate",
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                options.append(f"{name}={getattr(self, name)!r}")
        return f"Permuted({', '.join(options)})"

    # ---- geometry ------------------------------------------------------------------------------

    def check(
        self, rows: int, cols: int, directions: int, window: int = 1, groups: int = 1
    ) -> None:
        """See :meth:`NoiseFamily.check`."""
        self.base_shape(rows, cols, window, groups)
        m, n = rows // groups, cols // window
        permute_in, permute_out = self.sides(m, n)
        if m * n > 0 and not (permute_in and n > 1) and not (permute_out and m > 1):
            raise ValueError(
                f"permutation {self.permutation!r} must permute a side longer than 1, got a "
                f"({m}, {n}) weight{' in every group' if groups > 1 else ''}, whose members would "
                "all be alike"
            )

    def sides(self, rows: int, cols: int) -> tuple[bool, bool]:
        """Return whether inputs and outputs are permuted, for so many of them (in each group)."""
        sparse = bool(self.in_sparsity), bool(self.out_sparsity)
        if self.permutation == "auto" and any(sparse):
            return sparse
        permute_in, permute_out = choose_sides(self.permutation, rows, cols)
        return permute_in or sparse[0], permute_out or sparse[1]

    def base_shape(self, rows: int, cols: int, window: int = 1, groups: int = 1) -> tuple[int, int]:
        """See :meth:`SharedBase.base_shape`; (groups * q, p * window)."""
        m, n = rows // groups, cols // window
        q = resolve_count("out_sparsity", self.out_sparsity or m, m, "out_features")
        p = resolve_count("in_sparsity", self.in_sparsity or n, n, "in_features")
        return groups * q, p * window

    def _scaled_base(self, site: LayerNoise, rows: int, cols: int, like: Tensor) -> Tensor:
        """N, (groups * q, p * window), scaled so that the elements of E_d have variance 1."""
        base = self.bases(site, rows, cols, like)[0]
        scale = (rows * cols / base.numel()) ** 0.5
        return base if scale == 1 else base * scale

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
        directions, rows, cols = state.directions, y.shape[2], x.shape[2]
        antithetic = state.is_antithetic(y.shape[0] // directions)
        permute_in, permute_out = self.sides(rows, cols)
        # Scaled before it is rounded to the layer's dtype.
        wide = y.new_empty((), dtype=wide_like(y))
        base = self.scaled_bases(site, rows, cols, wide, sigma)[0]
        if base.numel() < rows * cols:
            base.mul_((rows * cols / base.numel()) ** 0.5)
        base = base.to(y.dtype)
        in_place = not needs_grad(y, x)
        if permute_in:
            # The rows' signs s go where every row has its own product.
            early = antithetic and not permute_out and not shared
            stream = site.stream(STREAM_SELECT_IN)
            x = _ops.select(
                x, key, stream, directions, base.shape[1], early, shared, self.allow_repeats
            )
            if in_place and not permute_out and not shared:
                y.view(-1, rows).addmm_(x.flatten(0, 1), base.t())
                return y
        product = x @ base.t()
        if not permute_out:
            return add_rows(y, product, directions, antithetic, in_place)
        if shared and not permute_in:
            product = product[:, None].expand(-1, directions, -1, -1).flatten(0, 1)
        stream = site.stream(STREAM_SELECT_OUT)
        arguments = (key, stream, directions, antithetic, self.allow_repeats)
        if in_place:
            _ops.select_add_(y, product, *arguments)
            return y
        return _ops.select_add(y, product, *arguments)

    def convolve_bases(
        self,
        x: Tensor,
        weight: Tensor,
        site: LayerNoise,
        conv: Convolution,
        batch: PopulationBatch,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`SharedBase.convolve_bases`: channels are gathered as whole planes."""
        key, sigma = site.state.tensors(x.device)
        (rows, cols), directions, groups = matrix_shape(weight), batch.directions, site.groups
        m, n = rows // groups, cols // site.window
        permute_in, permute_out = self.sides(m, n)
        base = self._scaled_base(site, rows, cols, x.new_empty((), dtype=wide_like(x)))
        q, p = base.shape[0] // groups, base.shape[1] // site.window
        kernels = (base * sigma).to(x.dtype).view(groups * q, p, *weight.shape[2:])
        factor = batch.signs(x)
        if permute_in:
            stream = site.stream(STREAM_SELECT_IN)
            index = _ops.selections(key, stream, 0, directions, n, p, self.allow_repeats)
            x = _planes(x, index, groups, batch.shared)
        product = conv(x, kernels)
        if permute_out:
            stream = site.stream(STREAM_SELECT_OUT)
            index = _ops.selections(key, stream, 0, directions, m, m, self.allow_repeats)
            inside = (index < q).repeat(1, groups).view(directions, rows, 1)
            factor = factor * inside
            shared = batch.shared and not permute_in
            product = _planes(product, index.clamp(max=q - 1), groups, shared)
        depth = 1 if batch.shared and not (permute_in or permute_out) else directions
        return product.view(-1, depth, *product.shape[1:]), factor

    # ---- estimate ------------------------------------------------------------------------------

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`."""
        if grad.numel() == 0:
            return
        (rows, cols), state = grad.shape, site.state
        key, sigma = state.tensors(grad.device)
        m, n = rows // site.groups, cols // site.window
        permute_in, permute_out = self.sides(m, n)
        base = self._scaled_base(site, rows, cols, weights) * sigma.to(weights.dtype)
        side = n if permute_in else m
        one_side = permute_in != permute_out
        if one_side and (self.allow_repeats or DIRECT_COST * state.directions > side):
            total = self._one_side(weights, site, base, rows, cols, permute_in)
            assign_total(grad, total, accumulate)
        elif not self.allow_repeats:
            in_stream = site.stream(STREAM_SELECT_IN) if permute_in else -1
            out_stream = site.stream(STREAM_SELECT_OUT) if permute_out else -1
            arguments = (weights, key, in_stream, out_stream)
            if site.groups == site.window == 1:
                _ops.permuted_estimate_(grad, base, *arguments, accumulate)
                return
            # A matrix for every tap of every group, which are permuted alike.
            bases = base.view(site.groups, -1, base.shape[1] // site.window, site.window)
            bases = bases.movedim(3, 0).contiguous()
            total = weights.new_empty(site.window, site.groups, m, n)
            for taps, base_taps in zip(total, bases, strict=True):
                for matrix, base_matrix in zip(taps, base_taps, strict=True):
                    _ops.permuted_estimate_(matrix, base_matrix, *arguments, False)
            assign_total(grad, total.movedim(0, 3).reshape(rows, cols), accumulate)
        else:
            total = torch.zeros_like(grad, dtype=weights.dtype)
            each = per_scratch(grad.device, total.nbytes)
            for first in range(0, state.directions, each):
                part = weights[first : first + each]
                noise = self.materialise_weight(site, first, len(part), rows, cols, weights)
                total += torch.tensordot(part * sigma.to(part.dtype), noise, 1)
            assign_total(grad, total, accumulate)

    def _one_side(
        self,
        weights: Tensor,
        site: LayerNoise,
        base: Tensor,
        rows: int,
        cols: int,
        permute_in: bool,
    ) -> Tensor:
        """The estimate as a product of N and the summed permutation matrices of one side.

        Those are made a slice at a time: for a long side they would be larger than the weight.
        """
        key, _ = site.state.tensors(weights.device)
        stream = site.stream(STREAM_SELECT_IN if permute_in else STREAM_SELECT_OUT)
        groups, window = site.groups, site.window
        m, n, p = rows // groups, cols // window, base.shape[1] // window
        size, count = (n, p) if permute_in else (m, m)
        each = max(1, rows * cols // size)
        if permute_in:  # the taps of a channel as rows of their own
            of_taps = base.view(-1, p, window).transpose(1, 2).reshape(-1, p)
            total = weights.new_zeros(of_taps.shape[0], n)
        else:
            of_groups = base.view(groups, -1, base.shape[1])
            total = weights.new_empty(groups, m, cols)
        for first in range(0, count, each):
            here = slice(first, min(first + each, count))
            sums = _ops.selection_sum(
                weights, key, stream, first, here.stop - first, size, self.allow_repeats
            )
            if permute_in:
                total.addmm_(of_taps[:, here], sums)
            else:
                total[:, here] = sums[:, : of_groups.shape[1]] @ of_groups
        if permute_in:
            total = total.view(rows, window, n).transpose(1, 2)
        return total.reshape(rows, cols)

    # ---- materialise ---------------------------------------------------------------------------

    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`."""
        if rows * cols == 0:
            return like.new_zeros(count, rows, cols)
        key, _ = site.state.tensors(like.device)
        groups, window = site.groups, site.window
        m, n = rows // groups, cols // window
        permute_in, permute_out = self.sides(m, n)
        base = self._scaled_base(site, rows, cols, like.new_empty((), dtype=wide_like(like)))
        q, p = base.shape[0] // groups, base.shape[1] // window
        if permute_in:
            stream = site.stream(STREAM_SELECT_IN)
            index = _ops.selections(key, stream, first, count, n, p, self.allow_repeats)
            wide = base.new_zeros(count, groups * q, n, window)
            shape = (count, groups * q, p, window)
            wide.scatter_add_(
                2, index[:, None, :, None].expand(shape), base.view(shape[1:]).expand(shape)
            )
        else:
            wide = base.expand(count, -1, -1)
        wide = wide.view(count, groups, q, cols)
        if permute_out:
            stream = site.stream(STREAM_SELECT_OUT)
            index = _ops.selections(key, stream, first, count, m, m, self.allow_repeats)
            inside = (index < q)[:, None, :, None]
            index = torch.where(inside, index[:, None, :, None], 0)
            wide = wide.gather(2, index.expand(count, groups, m, cols)).masked_fill(~inside, 0)
        return wide.reshape(count, rows, cols).to(like.dtype).contiguous()

    # ---- rows of weights -----------------------------------------------------------------------

    def lookup_elements(self, rows: int, cols: int) -> int:
        """See :meth:`NoiseFamily.lookup_elements`: the permutations, int64."""
        return 2 * (rows + cols)

    def lookup_directions(
        self, index: Tensor, site: LayerNoise, first: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.lookup_directions`; rows of N, their elements in other places."""
        noise = torch.zeros(*index.shape, cols, dtype=like.dtype, device=like.device)
        if noise.numel() == 0:
            return noise
        key, _ = site.state.tensors(like.device)
        count, (base_rows, base_cols) = index.shape[1], self.base_shape(rows, cols)
        permute_in, permute_out = self.sides(rows, cols)
        inside = None
        if permute_out:
            stream = site.stream(STREAM_SELECT_OUT)
            out = _ops.selections(key, stream, first, count, rows, rows, self.allow_repeats)
            index = rows_of(out[..., None], index).squeeze(3)
            inside = index < base_rows
            index = torch.where(inside, index, 0)
        picked = self.base_rows(index, site, 0, rows, cols, like)
        picked = picked * (rows * cols / (base_rows * base_cols)) ** 0.5
        if inside is not None:
            picked = picked.masked_fill(~inside[..., None], 0)
        if not permute_in:
            return picked
        stream = site.stream(STREAM_SELECT_IN)
        places = _ops.selections(key, stream, first, count, cols, base_cols, self.allow_repeats)
        return noise.scatter_add_(3, places[:, None].expand(picked.shape), picked)


def _planes(x: Tensor, index: Tensor, groups: int, shared: bool) -> Tensor:
    """Gather channels of every group, whole planes at a time.

    Args:
        x: (B, C, *) contiguous; (N, C, *) if ``shared``.
        index: (D, count) channels within a group, alike for all groups.
        groups: of the channels.
        shared: whether to gather from every row for every direction.

    Returns:
        (B or N * D, groups * count, *).
    """
    directions, count = index.shape
    rows = torch.arange(x.shape[0], device=x.device).view(-1, 1 if shared else directions, 1)
    group = rows[..., None] * groups + torch.arange(groups, device=x.device)[:, None]
    plane = group * (x.shape[1] // groups) + index.view(directions, 1, count)
    gathered = x.flatten(0, 1).flatten(1).index_select(0, plane.flatten())
    return gathered.view(-1, groups * count, *x.shape[2:])
