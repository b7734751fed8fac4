"""What every noise family knows: the four things layers and models ask of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops
from ..checks import as_int
from ..replicate import Replicated, replicate_rows
from .convolution import Convolution, PopulationBatch, convolve_members, spread
from .products import add_products, sum_noise
from .scratch import SCRATCH_BYTES as SCRATCH_BYTES
from .scratch import needs_grad as needs_grad
from .scratch import per_scratch as per_scratch
from .scratch import repeat_signs as repeat_signs
from .scratch import wide_like as wide_like
from .scratch import with_tokens as with_tokens
from .state import NoiseState

# Streams of one layer in the noise contract (csrc/noise/counters.h).
STREAM_WEIGHT = 0
STREAM_BIAS = 1
STREAM_FACTOR_A = 2
STREAM_FACTOR_B = 3
STREAM_SHARED = 4
STREAM_FLIP_IN = 5
STREAM_FLIP_OUT = 6
STREAM_SELECT_IN = 7
STREAM_SELECT_OUT = 8
STREAM_COLUMNS = 9
STREAM_VALUES = 10
STREAM_SWARM = 11
STREAM_SWARM_START = 12
STREAM_SWARM_OTHER = 13
STREAM_SWARM_JIGGLE = 14
STREAM_TRIALS = 15
STREAM_CHOICES = 16
STREAM_PARTICLE = 17
# The layer id under which optimizers draw; layers count up from 0, so the two never meet.
OPTIMIZER_ID = (1 << 24) - 1

DISTRIBUTIONS = ("normal", "rademacher")
STORAGES = ("regenerate", "stored")

# Factors of an estimate drawn at once. More than SCRATCH_BYTES: every chunk costs a pass over the
# gradient.
OUTER_BYTES = 32 << 20


def stream_word(layer_id: int, stream: int) -> int:
    """Philox counter word c0 of a tensor."""
    return layer_id << 8 | stream


@dataclass
class LayerNoise:
    """Where one layer's noise lives: the shared draw and the streams of its parameters.

    Attributes:
        state: the draw.
        weight: counter word of the weight's noise, -1 if the weight is not perturbed.
        bias: the same of the bias.
        window: columns of the weight's matrix that belong to one channel, which families that
            flip or permute channels keep together: the taps of a convolution's kernel.
        groups: blocks of rows of the matrix, each with channels of its own.
        fixed_row: a row of the weight that has no noise, such as an embedding's padding.
    """

    state: NoiseState
    weight: int = -1
    bias: int = -1
    window: int = 1
    groups: int = 1
    fixed_row: int | None = None

    def stream(self, stream: int) -> int:
        """Counter word of another tensor of the weight's noise."""
        return self.weight & ~0xFF | stream


class NoiseFamily(ABC):
    """A distribution of ``E_d`` and the operators that apply it.

    A family is a value: it has options but no noise, layers may share it, and families with the
    same options are equal. What is said of ``E_d`` holds for weights, which are matrices; the noise
    of a vector, such as a bias, is independent in every element in all families.

    A subclass has to write :meth:`materialise_weight` alone. Everything else follows from it, in
    chunks of directions, and is overridden where there is a cheaper way.

    Attributes:
        distribution: "normal" or "rademacher", of the random numbers that make ``E_d``; the noise
            of vectors has it, too.
        by_channel: whether the columns of a channel share what makes ``E_d`` (class attribute).
        absolute: whether ``E_d`` is the member's parameter itself, in place of ``W + s sigma E_d``
            wherever that is said: without W, sign and sigma (class attribute).
    """

    distribution: str = "normal"
    by_channel: ClassVar[bool] = False
    absolute: ClassVar[bool] = False

    def __eq__(self, other: object) -> bool:
        """Compare class and options."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        """Agree with ``==``."""
        return hash((type(self), tuple(sorted(self.__dict__.items()))))

    def __repr__(self) -> str:
        """Show the options; never an address, as descriptions of runs are compared."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({options})"

    @property
    def rademacher(self) -> bool:
        """Whether the random numbers are signs."""
        return self.distribution == "rademacher"

    def for_vectors(self) -> NoiseFamily:
        """Return the family of the same numbers whose elements are independent of each other.

        Layers that act element by element, such as norms, use it: there is no product whose
        structure another family could use, and the noise of n elements is small.
        """
        from .dense import Dense

        return Dense(self.distribution)

    # ---- the four things -----------------------------------------------------------------------

    def check(  # noqa: B027 (most take all)
        self, rows: int, cols: int, directions: int, window: int = 1, groups: int = 1
    ) -> None:
        """Raise ValueError if a weight of this shape cannot have this noise.

        Args:
            rows: of the weight as a matrix.
            cols: of the weight as a matrix.
            directions: D.
            window: columns of a channel, see :class:`LayerNoise`.
            groups: blocks of rows, see :class:`LayerNoise`.
        """

    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """Return ``y + s sigma (E_d x + e_d)``; may write into ``y``.

        By default E_d is materialised; families that can do with less override it.

        Args:
            y: (B, T, out) contiguous, the base product; freshly made, nobody else holds it.
            x: (B, T, in), or (N, T, in) if ``shared``.
            site: the layer's noise.
            shared: whether every member sees the same N rows.
        """
        if site.weight >= 0:
            y = add_products(self, y, x, site, shared)
        return self.add_bias(y, site)

    def linear(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: LayerNoise,
        short: Replicated | None = None,
    ) -> Tensor:
        """Return ``(W + s E_d) x_b + bias + s e_d`` of a checked batch, its base product included.

        Args:
            rows: x, (B, *, in); the N rows of ``short`` if that is given.
            weight: (out, in).
            bias: (out,) or None.
            site: the layer's noise.
            short: the Replicated that ``rows`` is the source of.
        """
        base = F.linear(rows, weight, bias)
        if short is not None:
            base = replicate_rows(base, short.copies, short.directions)
        if base.numel() == 0:
            return base
        # The base product is ours alone, so the noise goes into it in place.
        y, x = with_tokens(base).contiguous(), with_tokens(rows)
        if x.dtype != y.dtype:  # autocast
            x = x.to(y.dtype)
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        y = self.add_linear(y, x, site, short is not None)
        return y.squeeze(1) if base.dim() == 2 else y.view(base.shape)

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: LayerNoise,
        conv: Convolution,
        copies: int,
    ) -> Tensor:
        """Return the perturbed convolution of every row, (B, O, *), its base product included.

        Args:
            x: (B, C, *), or (N, C, *) if every member sees the same N rows.
            weight: (O, C / groups, *kernel) contiguous; (C, O / groups, *kernel) if transposed.
            bias: (O,) or None.
            site: the layer's noise.
            conv: what the convolution does besides its weight.
            copies: S if every member sees the same rows, B = S * N * D; 0 otherwise.
        """
        batch = PopulationBatch.of(x, site.state, copies)
        if site.weight >= 0:
            return convolve_members(self, x, weight, bias, site, conv, batch)
        y = spread(conv(x, weight, bias), batch)
        return self.add_channel_bias(y, site, batch)

    def estimate_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, stream: int, accumulate: bool
    ) -> None:
        """Write or add ``sum_d weights[d] E_d`` (sigma included) to ``grad``, (rows, cols)."""
        if stream == site.weight:
            self.estimate_weight_(grad, weights, site, accumulate)
        else:
            key, sigma = site.state.tensors(grad.device)
            _ops.dense_estimate_(grad, weights, key, sigma, stream, self.rademacher, accumulate)

    def materialise(
        self,
        site: LayerNoise,
        stream: int,
        first: int,
        count: int,
        rows: int,
        cols: int,
        like: Tensor,
    ) -> Tensor:
        """Return ``E_d`` without sigma for ``count`` directions: (count, rows, cols)."""
        if stream == site.weight:
            return self.materialise_weight(site, first, count, rows, cols, like)
        key, _ = site.state.tensors(like.device)
        return _ops.dense_materialise(
            key, stream, first, count, rows, cols, self.rademacher, like.dtype
        )

    def allocate(self, weight: Tensor, site: LayerNoise) -> None:  # noqa: B027 (most hold nothing)
        """Materialise what the family holds for this weight until the next draw, if anything.

        A layer calls it before every perturbed product.
        """

    def held_bytes(self, site: LayerNoise) -> int:
        """Bytes of noise held for this layer."""
        held = site.state.held.get(site.weight)
        return 0 if held is None else held.nbytes

    # ---- of weights, by each family ------------------------------------------------------------

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """:meth:`estimate_` of the weight; by default E_d is materialised, as in add_linear."""
        # In the weights' dtype, the accumulator's: half-precision sums would lose what they add up.
        assign_total(grad, sum_noise(self, grad, weights, site), accumulate)

    @abstractmethod
    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """:meth:`materialise` of the weight."""

    # ---- rows of weights -----------------------------------------------------------------------

    def lookup(self, index: Tensor, site: LayerNoise, rows: int, cols: int, like: Tensor) -> Tensor:
        """Return the rows ``index[b, t]`` of E_d without sigma, d = b % D: (B, T, cols).

        Args:
            index: (B, T) int64, from 0 to ``rows - 1``.
            site: the layer's noise; its weight is perturbed.
            rows: of the weight.
            cols: of the weight.
            like: a tensor of the result's dtype and device.
        """
        directions, size = site.state.directions, self.lookup_elements(rows, cols)
        each = per_scratch(index.device, size * like.element_size())
        by_direction = index.view(index.shape[0] // directions, directions, index.shape[1])
        parts = [
            self.lookup_directions(part, site, first, rows, cols, like)
            for first, part in zip(
                range(0, directions, each), by_direction.split(each, 1), strict=True
            )
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).flatten(0, 1)

    def lookup_elements(self, rows: int, cols: int) -> int:
        """Numbers that :meth:`lookup_directions` makes for a direction, besides its result."""
        return rows * cols

    def lookup_directions(
        self, index: Tensor, site: LayerNoise, first: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """:meth:`lookup` of the directions from ``first`` on: (R, count, T) -> (R, count, T, cols).

        Every E_d is materialised; families that can do with less do so.
        """
        noise = self.materialise_weight(site, first, index.shape[1], rows, cols, like)
        return rows_of(noise, index)

    # ---- of vectors ----------------------------------------------------------------------------

    def add_bias(self, y: Tensor, site: LayerNoise) -> Tensor:
        """Return ``y + s sigma e_d``, (B, T, out), the bias noise alone; may write into ``y``."""
        if site.bias < 0:
            return y
        state = site.state
        key, sigma = state.tensors(y.device)
        antithetic = state.is_antithetic(y.shape[0] // state.directions)
        arguments = (key, sigma, -1, site.bias, state.directions, antithetic, self.rademacher)
        x = y[..., :0]
        if needs_grad(y):
            return _ops.dense_linear(y, x, *arguments)
        _ops.dense_linear_(y, x, *arguments)
        return y

    def bias_noise(
        self, site: LayerNoise, first: int, count: int, size: int, like: Tensor
    ) -> Tensor:
        """Return ``sigma e_d`` of ``count`` directions, (count, size), in the dtype of ``like``."""
        _, sigma = site.state.tensors(like.device)
        wide = like.new_empty((), dtype=wide_like(like))
        noise = self.materialise(site, site.bias, first, count, 1, size, wide)
        return (noise.squeeze(1) * sigma).to(like.dtype)

    def add_channel_bias(self, y: Tensor, site: LayerNoise, batch: PopulationBatch) -> Tensor:
        """Return ``y + s sigma e_d`` for channels, y (B, O, *); may write into ``y``."""
        if site.bias < 0 or y.numel() == 0:
            return y
        noise = self.bias_noise(site, 0, batch.directions, y.shape[1], y)
        noise = repeat_signs(y, batch.directions, batch.antithetic)[..., 0] * noise  # (R, D, O)
        noise = noise.view(*y.shape[:2], *[1] * (y.dim() - 2))
        return y + noise if needs_grad(y) else y.add_(noise)


# ---- options -----------------------------------------------------------------------------------


def check_count(name: str, value: object, none_is_zero: bool = False) -> int | float:
    """Return a count (int >= 1) or a fraction (float in (0, 1]); 0 too if ``none_is_zero``."""
    if isinstance(value, float):
        if not (0 < value <= 1 or (none_is_zero and value == 0)):
            raise ValueError(f"{name} as a fraction must be in (0, 1], got {value}")
        return value
    count = as_int(name, value)
    if count < (0 if none_is_zero else 1):
        raise ValueError(f"{name} as a count must be at least 1, got {count}")
    return count


def resolve_count(name: str, value: int | float, size: int, of: str) -> int:
    """A count or fraction of ``size`` as a count, at least 1 of them if there are any."""
    if isinstance(value, float):
        return min(size, max(1, int(value * size)))
    if value > size:
        raise ValueError(f"{name} must be at most {of} = {size}, got {value}")
    return value


# ---- what families share -----------------------------------------------------------------------


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """A parameter as the noise contract sees it: a vector is a matrix of one row."""
    if parameter.dim() <= 1:
        return 1, parameter.numel()
    return parameter.shape[0], math.prod(parameter.shape[1:]) if parameter.shape[0] else 0


def rows_of(matrices: Tensor, index: Tensor) -> Tensor:
    """Return rows of every direction's own matrix, (R, count, T, n).

    Args:
        matrices: (count, rows, n).
        index: (R, count, T).
    """
    direction = torch.arange(index.shape[1], device=index.device)[:, None]
    return matrices[direction, index]


def assign_total(grad: Tensor, total: Tensor, accumulate: bool) -> None:
    """Write or add to ``grad`` a total that was summed in a wider dtype."""
    grad.copy_(grad + total if accumulate else total)


def add_outer_products(
    total: Tensor,
    left: Callable[[int, int], Tensor],
    right: Callable[[int, int], Tensor],
    weights: Tensor,
    rank: int = 1,
    accumulate: bool = False,
    groups: int = 1,
) -> None:
    """Write or add ``sum_d weights[d] left_d^T right_d`` to ``total``, a chunk of d at a time.

    Args:
        total: (m, n) in the weights' dtype.
        left: (first, count) -> matrices of these directions, (count, rank, m).
        right: the same, (count, rank, groups * n).
        weights: (D,).
        rank: rows of a direction's matrices.
        accumulate: add to what ``total`` holds.
        groups: blocks of rows of ``total``, each with n columns of its own of ``right``.
    """
    directions = weights.shape[0]
    bytes_each = rank * (total.shape[0] + groups * total.shape[1]) * total.element_size()
    each = max(1, OUTER_BYTES // max(1, bytes_each))
    for first in range(0, directions, each):
        count = min(each, directions - first)
        # The smaller factor takes the weights.
        a, b = left(first, count), right(first, count)
        (a if a.shape[2] <= b.shape[2] else b).mul_(weights[first : first + count, None, None])
        beta = 1 if accumulate or first > 0 else 0
        if groups == 1:
            total.addmm_(a.flatten(0, 1).t(), b.flatten(0, 1), beta=beta)
        else:
            of_groups = a.reshape(-1, groups, total.shape[0] // groups).permute(1, 2, 0)
            b = b.reshape(-1, groups, total.shape[1]).transpose(0, 1)
            total.view(groups, -1, total.shape[1]).baddbmm_(of_groups, b, beta=beta)
