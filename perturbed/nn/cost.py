"""Where a model's arithmetic is: multiply-adds of its perturbed layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .base import PerturbedLayer
from .fused import without_fused_layers


def multiply_adds(layer: PerturbedLayer, input: Any = None, output: Any = None) -> int:
    """Count the multiply-adds of one unperturbed call of a layer.

    What counts is its weights; attention between positions, for example, does not. An embedding
    counts one per element that it looks up.

    Args:
        layer: the layer.
        input: its input, of which the first tensor counts.
        output: its output, alike. None stands for a call in which each weight is used once.
    """
    names = [name for name, _ in layer.slots() if name is not None]
    weights = [w for name in names if (w := layer._parameters.get(name)) is not None]
    elements = sum(w.numel() for w in weights)
    y = _first_tensor(output)
    if y is None:
        return elements
    if isinstance(layer, nn.Embedding) or all(w.dim() <= 1 for w in weights):
        return y.numel()
    x = _first_tensor(input)
    if isinstance(layer, _ConvTransposeNd) and x is not None:  # applied to every input position
        return elements * (x.numel() // max(1, layer.in_channels))
    channels = layer.out_channels if isinstance(layer, _ConvNd) else y.shape[-1]
    return elements * (y.numel() // max(1, channels))


def _first_tensor(value: Any) -> Tensor | None:
    leaves = torch.utils._pytree.tree_leaves(value)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)


@torch.no_grad()
def count_multiply_adds(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[int, int]:
    """Count the multiply-adds of every perturbed layer in ``model(*args, **kwargs)``, by id.

    The model runs unperturbed and in evaluation mode, so that it stays as it is: no running
    statistics, no dropout. Layers that are not called are absent.
    """
    counts: dict[int, int] = {}

    def record(layer: nn.Module, inputs: tuple, output: Any) -> None:
        assert isinstance(layer, PerturbedLayer)
        counts[id(layer)] = counts.get(id(layer), 0) + multiply_adds(layer, inputs, output)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PerturbedLayer):
                stack.callback(module.register_forward_hook(record).remove)
        # torch's fused layers do not call their parts.
        stack.enter_context(without_fused_layers())
        stack.enter_context(_evaluation(model))
        model(*args, **kwargs)
    return counts


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a block, and every module back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
