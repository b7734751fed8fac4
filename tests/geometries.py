"""The convolutions that behaviour tests run over: a new geometry joins with one line."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perturbed import (
    PerturbedConv1d,
    PerturbedConv2d,
    PerturbedConv3d,
    PerturbedConvTranspose1d,
    PerturbedConvTranspose2d,
    PerturbedConvTranspose3d,
    PerturbedModel,
)
from perturbed.nn import PerturbedLayer
from perturbed.noise import NoiseFamily

D = 3
SIGMA = 0.3


@dataclass(frozen=True)
class Geometry:
    """One kind of convolution: channels and kernel, further arguments, size of the input."""

    size: tuple[int, ...]
    kernel: int | tuple[int, ...] = 3
    channels: tuple[int, int] = (6, 5)
    options: dict[str, Any] = field(default_factory=dict)
    layer: Callable[..., PerturbedLayer] = PerturbedConv2d

    def make(self, noise: NoiseFamily, directions: int = D, **more: Any) -> PerturbedLayer:
        """Make a layer of a family, float64 unless told otherwise."""
        arguments = {"noise": noise, "dtype": torch.float64, **self.options, **more}
        return self.layer(*self.channels, self.kernel, directions, **arguments)

    def population(
        self, noise: NoiseFamily, antithetic: bool | None = None, directions: int = D, **more: Any
    ) -> tuple[PerturbedLayer, PerturbedModel]:
        """Make a layer and its model, with noise drawn."""
        layer = self.make(noise, directions, **more)
        pm = PerturbedModel(layer, directions, antithetic=antithetic, sigma=SIGMA, seed=5)
        pm.set_noise()
        return layer, pm

    def inputs(self, rows: int) -> Tensor:
        """Random images."""
        return torch.randn(rows, self.channels[0], *self.size, dtype=torch.float64)


def _with(size: tuple[int, ...], kernel: int | tuple[int, ...] = 3, **options: Any) -> Geometry:
    return Geometry(size, kernel, options=options)


# Every group has 6 inputs and 5 outputs, so that all families of families.py fit.
GEOMETRIES = {
    "3x3": _with((5, 6)),
    "strided": _with((6, 5), padding=1, stride=(2, 1)),
    "dilated": _with((6, 7), (3, 2), dilation=(2, 3), padding=(2, 1)),
    "same": _with((4, 5), (2, 4), padding="same"),
    "valid": _with((4, 5), (2, 3), padding="valid", bias=False),
    "reflect": _with((4, 5), padding=1, padding_mode="reflect"),
    "replicate": _with((4, 5), padding=(0, 2), padding_mode="replicate", stride=2),
    "circular": _with((4, 5), (2, 3), padding="same", padding_mode="circular"),
    "groups": Geometry((4, 5), 3, (12, 10), {"groups": 2, "padding": 1}),
    "depthwise": Geometry((4, 5), 3, (6, 12), {"groups": 6}),
    "pointwise": _with((4, 5), 1),
    "pointwise_strided": _with((4, 5), 1, stride=(2, 3), bias=False),
    "pointwise_padded": _with((3, 2), 1, padding=1),
    "pointwise_groups": Geometry((3, 4), 1, (12, 10), {"groups": 2}),
    "pixel": _with((1, 1), 1),
    "whole": _with((3, 2), (3, 2)),
    "1d": Geometry((9,), 3, options={"stride": 2, "padding": 2}, layer=PerturbedConv1d),
    "3d": Geometry((3, 4, 3), 2, options={"dilation": (1, 2, 1)}, layer=PerturbedConv3d),
    "transposed": Geometry(
        (3, 4),
        (3, 2),
        (5, 6),
        {"stride": 2, "padding": 1, "output_padding": (1, 0), "dilation": (1, 2)},
        PerturbedConvTranspose2d,
    ),
    "transposed_groups": Geometry((2, 3), 2, (10, 12), {"groups": 2}, PerturbedConvTranspose2d),
    "transposed_1d": Geometry((4,), 3, (5, 6), {"bias": False}, PerturbedConvTranspose1d),
    "transposed_3d": Geometry((2, 2, 3), 2, (5, 6), {"stride": 2}, PerturbedConvTranspose3d),
}
