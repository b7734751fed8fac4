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
        held: materialised weight noise of ``storage="stored"``, with the draw it belongs to.
    """

    state: NoiseState
    weight: int = -1
    bias: int = -1
    held: tuple[tuple[int, ...], Tensor] | None = None

    def __getstate__(self) -> dict:
        """Held noise is not part of a saved model."""
        return {**self.__dict__, "held": None}


class NoiseFamily(ABC):
    """A distribution of ``E_d`` and the operators that apply it.

    A family is a value: it has options but no noise, and layers may share it.
    """

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
        """Materialise now what the family holds between forwards, if anything."""

    def held_bytes(self, site: LayerNoise) -> int:
        """Bytes of noise held for this layer."""
        return 0 if site.held is None else site.held[1].numel() * site.held[1].element_size()


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
