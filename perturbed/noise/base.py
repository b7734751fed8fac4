"""What every noise family knows: the four things layers and models ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .state import NoiseState

# Streams of one layer in the noise contract (csrc/noise/counters.h).
STREAM_WEIGHT = 0
STREAM_BIAS = 1


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
    """

    state: NoiseState
    weight: int = -1
    bias: int = -1


class NoiseFamily(ABC):
    """A distribution of ``E_d`` and the operators that apply it.

    A family is a value: it has options but no noise, layers may share it, and families with the
    same options are equal.
    """

    def __eq__(self, other: object) -> bool:
        """Compare class and options."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        """Agree with ``==``."""
        return hash((type(self), tuple(sorted(self.__dict__.items()))))

    @abstractmethod
    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """Return ``y + s sigma (E_d x + e_d)``; may write into ``y``.

        Args:
            y: (B, T, out) contiguous, the base product; freshly made, nobody else holds it.
            x: (B, T, in), or (N, T, in) if ``shared``.
            site: the layer's noise.
            shared: whether every member sees the same N rows.
        """

    @abstractmethod
    def estimate_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, stream: int, accumulate: bool
    ) -> None:
        """Write or add ``sum_d weights[d] E_d`` (sigma included) to ``grad``, (rows, cols)."""

    @abstractmethod
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

    def allocate(self, weight: Tensor, site: LayerNoise) -> None:  # noqa: B027 (most hold nothing)
        """Materialise what the family holds for this weight until the next draw, if anything.

        A layer calls it before every perturbed product.
        """

    def held_bytes(self, site: LayerNoise) -> int:
        """Bytes of noise held for this layer."""
        held = site.state.held.get(site.weight)
        return 0 if held is None else held.nbytes


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """A parameter as the noise contract sees it: a vector is a matrix of one row."""
    if parameter.dim() <= 1:
        return 1, parameter.numel()
    return parameter.shape[0], parameter[0].numel() if parameter.shape[0] else 0
