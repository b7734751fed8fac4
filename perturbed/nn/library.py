"""Twins of layers of libraries that need not be installed; ``twins.py`` finds them by name.

Such a layer has no constructor here: conversion changes the class of an existing one, and
``original_class`` remembers which it was.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import NoiseFamily
from .affine import VectorLayer
from .base import PerturbedLayer, Slot, check_float


class PerturbedTransposedLinear(PerturbedLayer):
    """A Linear layer whose weight is stored as (in, out): ``Conv1D`` of transformers, as in GPT-2.

    ``y_b = x_b (W + s E_d) + bias + s e_d``. The transposed weight is the matrix of the noise
    contract, so that families mean the same as in a Linear layer.

    Shapes:
        input (B, *, in), B = R * D rows; output (B, *, out).
    """

    torch_class = nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def why_not_convertible(cls, module: nn.Module) -> str | None:
        """See :meth:`PerturbedLayer.why_not_convertible`."""
        weight = module._parameters.get("weight")
        return None if weight is not None and weight.dim() == 2 else "its weight is no matrix"

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            assert self.original_class is not None
            return self.original_class.forward(self, x)
        check_float(x)
        if x.dim() < 2:
            raise ValueError(
                f"x must be (B, *, {self.weight.shape[0]}) with B = R * D rows, got "
                f"{tuple(x.shape)}"
            )
        rows, short = self.enter(x)
        weight = self.weight.t()
        self.noise.allocate(weight.detach(), self.site)
        return self.noise.linear(rows, weight, self.bias, self.site, short)

    def check_noise(self, directions: int, noise: NoiseFamily) -> None:
        """See :meth:`PerturbedLayer.check_noise`."""
        inputs, outputs = self.weight.shape
        noise.check(outputs, inputs, directions)

    def parameter_noise(self, name: str, first: int, count: int) -> Tensor:
        """See :meth:`PerturbedLayer.parameter_noise`."""
        if name != "weight":
            return super().parameter_noise(name, first, count)
        site, like = self.place_of(name)[0], self.weight.detach()
        inputs, outputs = like.shape
        noise = self.noise.materialise(site, site.weight, first, count, outputs, inputs, like)
        return noise.mT.contiguous()

    def member_matrices(self, name: str, members: Tensor) -> Tensor:
        """See :meth:`PerturbedLayer.member_matrices`."""
        return members.mT if name == "weight" else super().member_matrices(name, members)

    def add_estimate(self, name: str, grad: Tensor, weights: Tensor, accumulate: bool) -> None:
        """See :meth:`PerturbedLayer.add_estimate`."""
        if name != "weight":
            super().add_estimate(name, grad, weights, accumulate)
            return
        site, total = self.place_of(name)[0], grad.t().contiguous()
        self.noise.estimate_(total, weights, site, site.weight, accumulate)
        grad.copy_(total.t())

    def allocate(self) -> None:
        """See :meth:`PerturbedLayer.allocate`."""
        for site in self.sites:
            self.noise.allocate(self.weight.detach().t(), site)

    def extra_repr(self) -> str:
        """Describe the layer."""
        inputs, outputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, {super().extra_repr()}"


class PerturbedLibraryNorm(VectorLayer):
    """An RMSNorm of a library, with its own formula and a weight of its own for every row.

    There are many formulas: transformers' LlamaRMSNorm normalises in float32 and rounds before it
    scales, GemmaRMSNorm scales by ``1 + weight`` before it rounds. None is repeated here. The
    layer's own forward runs on an object that is the layer except for its weight, which is the
    (S, 1, D, *1, n) tensor of all members and broadcasts against rows (S, R / S, D, *, n). The
    layer itself is not touched, so threads may share it. Whether a class works that way is tried
    before a conversion.

    Shapes:
        input (B, *, n), B = R * D rows; output alike.
    """

    torch_class = nn.Module
    weight: nn.Parameter

    @classmethod
    def why_not_convertible(cls, module: nn.Module) -> str | None:
        """Try whether the layer's own forward takes a weight per row."""
        weight = module._parameters.get("weight")
        state = [*module._parameters.values(), *module._buffers.values(), *module.children()]
        if weight is None or weight.dim() != 1 or sum(s is not None for s in state) != 1:
            return "its state is not just a vector of weights"
        size = weight.numel()
        x = torch.linspace(-1, 2, 12 * size, device=weight.device).view(2, 3, 2, size)
        each = torch.linspace(0.5, 2, 2 * size, device=weight.device).view(2, 1, 1, size)
        kind = type(module)
        try:
            with torch.no_grad():
                together = own_forward(module, kind, each, x)
                apart = [own_forward(module, kind, each[i, 0, 0], x[i]) for i in (0, 1)]
                other = own_forward(module, kind, each[1, 0, 0], x[0])
            works = torch.allclose(together, torch.stack(apart), rtol=1e-4, atol=1e-5)
            works = works and not torch.allclose(other, apart[0], rtol=1e-2, atol=1e-2)
        except Exception as error:  # whatever the code of someone else raises
            return f"its forward takes no weight per row ({type(error).__name__}: {error})"
        return None if works else "its forward takes no weight per row"

    def slots(self) -> list[Slot]:
        """See :meth:`PerturbedLayer.slots`."""
        return [("weight", None)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        kind = self.original_class
        assert kind is not None
        if not self.is_perturbed:
            return own_forward(self, kind, self.weight, x)
        sizes = self.weight.shape
        rows, short, signs = self.enter_rows(x, 2, f"(B, *, {sizes[0]})")
        weight = self.vectors("weight", self.site.weight, sizes, signs, rows.dim())
        assert weight is not None
        y = own_forward(self, kind, weight, self.split_rows(rows, short, signs))
        if weight.dtype != self.weight.dtype:  # half precision, whose noise is float32
            y = y.to(own_forward(self, kind, self.weight, rows[:0]).dtype)
        return self.join_rows(y, signs)


class _WithWeight:
    """A module in all but its weight, to call functions of its class on."""

    def __init__(self, module: nn.Module, kind: type[nn.Module], weight: Tensor) -> None:
        self.module, self.kind, self.weight = module, kind, weight

    def __getattr__(self, name: str) -> Any:
        """Methods of the class, bound to this object so that they see its weight; or attributes."""
        function = getattr(self.kind, name, None)
        if isinstance(function, types.FunctionType):
            return functools.partial(function, self)  # which torch.compile can trace
        return getattr(self.module, name)


def own_forward(module: nn.Module, kind: type[nn.Module], weight: Tensor, x: Tensor) -> Tensor:
    """Return what ``kind``'s forward makes of ``x`` in a module with another weight."""
    return kind.forward(_WithWeight(module, kind, weight), x)
