"""Conversion of whole models: swap torch layers for their perturbed twins and back, in place."""

from __future__ import annotations

from torch import nn

from ..noise import NoiseFamily
from .base import PerturbedLayer
from .linear import PerturbedLinear

# torch layer -> perturbed twin. Subclasses are left alone: they may do anything in their forward.
TWINS: dict[type[nn.Module], type[PerturbedLayer]] = {nn.Linear: PerturbedLinear}


def convert(model: nn.Module, directions: int, noise: NoiseFamily | None = None) -> nn.Module:
    """Give every layer of ``model`` that has a perturbed twin its twin's behaviour.

    Layers keep their identity: the same module and Parameter objects, hooks, training flags and
    ``state_dict``; tied parameters stay tied. Layers that are perturbed already are left as they are.

    Args:
        model: any module; changed in place.
        directions: D.
        noise: the family of every converted layer, default ``Dense()``.

    Returns:
        ``model``.

    Raises:
        ValueError: a model with no layer that could be perturbed.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = perturbed.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), directions=4)
        >>> type(net[0]).__name__
        'PerturbedLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = False
    for module in model.modules():
        twin = TWINS.get(type(module))
        if twin is not None:
            # A change of class, not of object: whoever holds the layer keeps holding it.
            module.__class__ = twin
            module.init_noise(directions, noise)  # type: ignore[operator]
        found = found or isinstance(module, PerturbedLayer)
    if not found:
        names = ", ".join(sorted(t.__name__ for t in TWINS))
        raise ValueError(
            f"model has no layer with a perturbed twin ({names}): {type(model).__name__}"
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`, in place: every perturbed layer becomes its torch parent again.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = perturbed.convert(nn.Sequential(nn.Linear(8, 8)), directions=4)
        >>> type(perturbed.revert(net)[0]).__name__
        'Linear'
    """
    for module in model.modules():
        if isinstance(module, PerturbedLayer):
            module.__class__ = module.torch_class
            for name in ("directions", "noise", "site"):
                module.__dict__.pop(name, None)
    return model
