"""Convolutions of a population: their geometry, and the ways that serve every noise family.

A chunk of directions is one grouped convolution, whose groups are members: x of (R, D, C, *) is
viewed as (R, D * C, *), and the kernels of D members follow each other. A library's grouped
convolution costs about what the unperturbed one costs, so in a dtype that holds ``W + s E_d`` the
sum is formed, chunk by chunk, and no base product is computed: :func:`_sums`. Elsewhere the noise
would drown in the rounding of W, and its product is added to the base product: :func:`_products`.
So it is where all members see the same rows, as one convolution with the kernels of all directions
then serves all rows and both signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replicate import replicate_rows
from .conv_kernel import convolve_, empty_output, has_kernel, padded
from .scratch import needs_grad, per_scratch, repeat_signs
from .state import NoiseState

if TYPE_CHECKING:
    from .base import LayerNoise, NoiseFamily

_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

# Output positions (pixels times rows) that share kernels, from which on a convolution with summed
# kernels beats a base product and a product with noise of another form: kernels cost a few passes
# over W, the second product one multiplication per position. Measured on two Zen 4 cores with 3x3
# kernels of 16 to 512 channels, the two meet at 100 (low rank, sign flips) to 300 (permutations).
SUM_POSITIONS = 150


@dataclass(frozen=True)
class Convolution:
    """What a convolution does besides its weight, with one entry per spatial dimension.

    Attributes:
        stride: of the window.
        padding: zeros on both sides; other padding is part of the input.
        dilation: distance of the kernel's taps.
        groups: blocks of channels that do not see each other.
        transposed: whether it is the transpose of such a convolution.
        output_padding: of a transposed one.
        channels_last: whether the output of two dimensions is to lie so in memory.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    channels_last: bool = False

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, copies: int = 1
    ) -> Tensor:
        """Convolve the channels of ``copies`` members, which follow each other in all arguments."""
        groups = self.groups * copies
        dims = len(self.stride)
        if self.transposed:
            return _TRANSPOSED[dims - 1](
                x, weight, bias, self.stride, self.padding, self.output_padding, groups,
                self.dilation,
            )  # fmt: skip
        return _PLAIN[dims - 1](x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def output_size(self, size: torch.Size, kernel: torch.Size) -> list[int]:
        """Spatial size of the output for that of the input; of no transposed convolution."""
        return [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]

    def windows(self, x: Tensor, kernel: torch.Size) -> Tensor:
        """Return what the kernel sees at every position: (B, C, *) -> (B, T, C * prod(kernel)).

        A convolution of one group is a Linear of these; of no transposed one.
        """
        dims = len(kernel)
        if x.shape[2:] == kernel and not any(self.padding):
            return x.flatten(1).unsqueeze(1)
        x = F.pad(x, [p for pad in reversed(self.padding) for p in (pad, pad)])
        for axis, (k, s, d) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        return x.flatten(1 + dims).flatten(1, dims)

    def is_pointwise(self, kernel: torch.Size) -> bool:
        """Whether it is a product of matrices, pixel by pixel."""
        return (
            not self.transposed
            and self.groups == 1
            and all(k == 1 for k in kernel)
            and not any(self.padding)
        )


@dataclass(frozen=True)
class PopulationBatch:
    """How the rows of a batch belong to members.

    Attributes:
        directions: D.
        repeats: R, of the output.
        antithetic: whether the second half of them uses -E_d.
        copies: S if every member sees the same N = R / S rows, else 0.
    """

    directions: int
    repeats: int
    antithetic: bool
    copies: int

    @staticmethod
    def of(x: Tensor, state: NoiseState, copies: int) -> PopulationBatch:
        """Describe the batch of an input, (B, ...) or (N, ...)."""
        repeats = x.shape[0] * copies if copies else x.shape[0] // state.directions
        return PopulationBatch(state.directions, repeats, state.is_antithetic(repeats), copies)

    @property
    def shared(self) -> bool:
        """Whether every member sees the same rows."""
        return self.copies > 0

    def split(self, y: Tensor) -> Tensor:
        """View rows as (S, N, D | 1, ...), or without copies as (1, R, D | 1, ...)."""
        sources = self.repeats // max(1, self.copies)
        of_members = y.shape[0] == self.repeats * self.directions
        copies = max(1, self.copies) if of_members else 1
        return y.view(copies, sources, y.shape[0] // (copies * sources), *y.shape[1:])

    def signs(self, like: Tensor) -> Tensor:
        """Signs of the repeats, (S, N, 1, 1, 1) or (1, R, 1, 1, 1)."""
        template = like.new_empty((), dtype=like.dtype).expand(self.repeats)
        signs = repeat_signs(template, 1, self.antithetic)
        return signs.view(max(1, self.copies), -1, 1, 1, 1)


def spread(y: Tensor, batch: PopulationBatch) -> Tensor:
    """Repeat the outputs of shared rows for every member, (N, ...) -> (B, ...)."""
    return replicate_rows(y, batch.copies, batch.directions) if batch.shared else y


def _multiplies_exactly(device: str) -> bool:
    """Whether convolutions and products of float32 keep its mantissa (unlike TF32)."""
    backends: Any = torch.backends
    convolution = backends.cudnn.conv if device == "cuda" else backends.mkldnn.conv
    matmul = backends.cuda.matmul if device == "cuda" else backends.mkldnn.matmul
    return not {"tf32", "bf16"} & {convolution.fp32_precision, matmul.fp32_precision}


# What torch.compiler.assume_constant_result does, which imports torch's compiler, a second of every
# `import perturbed`. tests/test_compile.py would notice another name of it.
_multiplies_exactly._dynamo_marked_constant = True  # type: ignore[attr-defined]


def holds_sums(x: Tensor) -> bool:
    """Whether noise survives in ``W + s E_d`` of the dtype in which ``x`` is multiplied."""
    if x.dtype == torch.float32:
        return _multiplies_exactly(x.device.type)
    return x.dtype == torch.float64


def sums_are_cheap(x: Tensor, weight: Tensor, conv: Convolution, batch: PopulationBatch) -> bool:
    """Whether a family with a cheap product of its own does better with :func:`convolve_members`.

    On a GPU, where grouped convolutions are slow and the sums' dtype is rare, it does not.
    """
    if conv.transposed:
        return True
    if x.device.type != "cpu" or not holds_sums(x):
        return False
    pixels = math.prod(conv.output_size(x.shape[2:], weight.shape[2:]))
    rows = batch.repeats // 2 if batch.antithetic else batch.repeats
    return rows * pixels >= SUM_POSITIONS


def convolve_members(
    family: NoiseFamily,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: LayerNoise,
    conv: Convolution,
    batch: PopulationBatch,
) -> Tensor:
    """Convolve every row with its own kernels, from materialised noise of bounded size.

    Arguments as of :meth:`NoiseFamily.convolve`, whose weight is perturbed.
    """
    if batch.shared or not holds_sums(x):
        x = x.contiguous()
        return _products(family, x, weight, bias, site, conv, batch)
    return _sums(family, x, weight, bias, site, conv, batch)


def convolve_kernels(
    x: Tensor,
    kernels: Tensor,
    offsets: Tensor | None,
    shape: torch.Size,
    conv: Convolution,
    batch: PopulationBatch,
) -> Tensor:
    """Convolve every row with kernels that are held for every direction, (B, O, *).

    Args:
        x: (B, C, *), or the N rows that all members see.
        kernels: (D, *) of the matrices; any stride between members.
        offsets: (D, O) or None.
        shape: of the weight.
        conv: what the convolution does besides its weight.
        batch: how rows belong to members; not antithetic.
    """
    directions, shared = batch.directions, batch.shared
    in_place = not needs_grad(x, kernels, offsets)
    if in_place and has_kernel(x, shape, conv, batch):
        y = empty_output(x, shape, conv, batch)
        rows = padded(x, conv).unflatten(0, (-1, 1 if shared else directions))
        convolve_(y, rows, kernels, shape, offsets, conv)
        return y.flatten(0, 1)
    x = x.contiguous()
    rows = x if shared else x.view(batch.repeats, directions, *x.shape[1:])

    def parts() -> Iterator[tuple[int, int, Tensor]]:
        # Kernels that do not follow each other in memory are copied, a chunk at a time.
        in_line = kernels.is_contiguous() and not (shared and conv.groups > 1)
        bytes_each = kernels[0].numel() * kernels.element_size()
        each = directions if in_line else per_scratch(x.device, bytes_each)
        for first in range(0, directions, each):
            here = slice(first, first + each)
            small = None if offsets is None else offsets[here]
            if shared:
                yield 0, first, _of_shared(conv, rows, kernels[here], shape, small)
            else:
                for r, part in _each(conv, rows[:, here], kernels[here], shape, small):
                    yield r, first, part

    repeats = x.shape[0] if shared else batch.repeats
    y = _assemble(parts(), repeats, directions, in_place).flatten(0, 1)
    return replicate_rows(y, batch.copies, 1) if batch.copies > 1 else y


# ---- the two ways ------------------------------------------------------------------------------


def _sums(
    family: NoiseFamily,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: LayerNoise,
    conv: Convolution,
    batch: PopulationBatch,
) -> Tensor:
    """Convolve with ``W + s E_d``."""
    directions, repeats = batch.directions, batch.repeats
    _, sigma = site.state.tensors(x.device)
    scale = sigma.to(x.dtype)
    shape = (weight.shape[0], weight[0].numel())
    half = repeats // 2 if batch.antithetic else repeats
    blocks = [(slice(0, half), scale)]
    if batch.antithetic:
        blocks.append((slice(half, repeats), -scale))

    def summed() -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Kernels and biases of some directions, and the repeats that see them."""
        each = per_scratch(x.device, len(blocks) * weight.nbytes)
        for first in range(0, directions, each):
            count = min(each, directions - first)
            here = slice(first, first + count)
            noise = family.materialise_weight(site, first, count, *shape, x)
            small = None
            if bias is not None and site.bias >= 0:
                small = family.materialise(site, site.bias, first, count, 1, len(bias), x)[:, 0]
            for block, signed in blocks:
                kernels = torch.addcmul(weight.view(shape), noise, signed)
                offsets = None
                if bias is not None:
                    offsets = bias.expand(count, -1)
                    if small is not None:
                        offsets = torch.addcmul(offsets, small, signed)
                yield block, here, kernels, offsets

    in_place = not needs_grad(x, weight, bias)
    if in_place and has_kernel(x, weight.shape, conv, batch):
        y = empty_output(x, weight.shape, conv, batch)
        rows = padded(x, conv).unflatten(0, (repeats, directions))
        for block, here, kernels, offsets in summed():
            convolve_(y[block, here], rows[block, here], kernels, weight.shape, offsets, conv)
        return y.flatten(0, 1)
    rows = x.contiguous().view(repeats, directions, *x.shape[1:])

    def parts() -> Iterator[tuple[int, int, Tensor]]:
        for block, here, kernels, offsets in summed():
            for r, part in _each(conv, rows[block, here], kernels, weight.shape, offsets):
                yield block.start + r, here.start, part

    return _assemble(parts(), repeats, directions, in_place).flatten(0, 1)


def _products(
    family: NoiseFamily,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    site: LayerNoise,
    conv: Convolution,
    batch: PopulationBatch,
) -> Tensor:
    """Convolve with W and with E_d, and add."""
    directions = batch.directions
    _, sigma = site.state.tensors(x.device)
    rows = x if batch.shared else x.view(batch.repeats, directions, *x.shape[1:])
    base = conv(x, weight, bias).contiguous()
    shape = (weight.shape[0], weight[0].numel())
    out = base.shape[1]

    def parts() -> Iterator[tuple[int, int, Tensor]]:
        each = per_scratch(x.device, weight.nbytes)
        for first in range(0, directions, each):
            count = min(each, directions - first)
            noise = family.materialise_weight(site, first, count, *shape, x) * sigma
            small = None
            if site.bias >= 0:
                small = family.bias_noise(site, first, count, out, x)
            if batch.shared:
                yield 0, first, _of_shared(conv, rows, noise, weight.shape, small)
            else:
                here = rows[:, first : first + count]
                for r, part in _each(conv, here, noise, weight.shape, small):
                    yield r, first, part

    return add_products(base, parts(), batch.signs(base), batch, not needs_grad(x, weight, bias))


def _each(
    conv: Convolution, rows: Tensor, kernels: Tensor, shape: torch.Size, bias: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Convolve rows with the kernels of their directions.

    Args:
        conv: the convolution.
        rows: (R, count, C, *).
        kernels: (count, *) of the matrices.
        shape: of the weight.
        bias: (count, O) or None.

    Yields:
        The first repeat of a part of the output, and the part, (R' <= R, count, O, *).
    """
    count = kernels.shape[0]
    if conv.is_pointwise(shape[2:]):
        # A batch of matrix products beats the convolution, and reads x where it is.
        matrices = kernels.view(count, *shape[:2])
        for axis, step in enumerate(conv.stride, 3):
            rows = rows[(slice(None),) * axis + (slice(None, None, step),)]
        for r in range(rows.shape[0]):
            x = rows[r]
            flat = x.flatten(2)
            if bias is None:
                y = torch.bmm(matrices, flat)
            else:
                y = torch.baddbmm(bias[:, :, None], matrices, flat)
            yield r, y.view(1, count, shape[0], *x.shape[2:])
        return
    y = conv(
        rows.flatten(1, 2),
        kernels.reshape(-1, *shape[1:]),
        None if bias is None else bias.reshape(-1),
        count,
    )
    yield 0, y.reshape(rows.shape[0], count, -1, *y.shape[2:])


def _of_shared(
    conv: Convolution, rows: Tensor, kernels: Tensor, shape: torch.Size, bias: Tensor | None
) -> Tensor:
    """Convolve rows with the kernels of all directions: (N, C, *) -> (N, count, O, *).

    Arguments as of :func:`_each`.
    """
    count, groups = kernels.shape[0], conv.groups
    # A library wants the kernels of a group together: (groups, count, ...).
    if conv.transposed:  # and of one input channel: (groups, C / groups, count, O / groups, *)
        by_group = kernels.view(count, groups, shape[0] // groups, *shape[1:])
        by_group = by_group.permute(1, 2, 0, *range(3, by_group.dim()))
        grouped = by_group.reshape(shape[0], count * shape[1], *shape[2:])
        out = shape[1]
    else:
        by_group = kernels.view(count, groups, shape[0] // groups, *shape[1:])
        grouped = by_group.transpose(0, 1).reshape(-1, *shape[1:])
        out = shape[0] // groups
    if bias is not None:
        bias = bias.view(count, groups, out).transpose(0, 1).reshape(-1)
    y = conv(rows, grouped, bias)
    y = y.view(rows.shape[0], groups, count, out, *y.shape[2:]).transpose(1, 2)
    return y.flatten(2, 3) if groups > 1 else y.squeeze(2)


# ---- parts of an output ------------------------------------------------------------------------


def _assemble(
    parts: Iterable[tuple[int, int, Tensor]], repeats: int, directions: int, in_place: bool
) -> Tensor:
    """Put parts (R', count, O, *), at a repeat and a direction, together: (R, D, O, *)."""
    if not in_place:
        blocks: dict[int, list[Tensor]] = {}
        for start, _, part in parts:
            blocks.setdefault(start, []).append(part)
        return torch.cat([torch.cat(block, 1) for block in blocks.values()])
    y: Tensor | None = None
    for start, first, part in parts:
        if part.shape[:2] == (repeats, directions):
            return part
        if y is None:
            y = part.new_empty(repeats, directions, *part.shape[2:])
        y[start : start + part.shape[0], first : first + part.shape[1]] = part
    assert y is not None
    return y


def add_products(
    base: Tensor,
    parts: Iterable[tuple[int, int, Tensor]],
    factor: Tensor,
    batch: PopulationBatch,
    in_place: bool,
) -> Tensor:
    """Return base products plus ``factor`` times the products with noise, (B, O, *).

    Args:
        base: (B, O, *), or (N, O, *) of shared rows; contiguous, and ours to write into.
        parts: first repeat, first direction and the part, (R' or N, count, O, *).
        factor: broadcast to (S, N, D, O, 1), or (1, R, D, O, 1) without copies.
        batch: of the output.
        in_place: whether autograd does not look.
    """
    size = base.shape[1:]
    flat = batch.split(base.flatten(2))  # (1, R, D, O, P) or (1, N, 1, O, P)
    if not in_place:
        product = _assemble(parts, flat.shape[1], batch.directions, False).flatten(3)
        return torch.addcmul(flat, product[None], factor).view(-1, *size)
    y = flat
    if batch.shared:
        shape = (batch.copies, flat.shape[1], batch.directions, *flat.shape[3:])
        y = base.new_empty(shape)
    for start, first, part in parts:
        rows, here = slice(start, start + part.shape[0]), slice(first, first + part.shape[1])
        scale = factor if factor.shape[2] == 1 else factor[:, :, here]
        scale = scale if scale.shape[1] == 1 else scale[:, rows]
        source = flat[:, rows] if batch.shared else flat[:, rows, here]
        torch.addcmul(source, part.flatten(3)[None], scale, out=y[:, rows, here])
    return y.view(-1, *size)
