"""Conversion of whole models: swap torch layers for their perturbed twins and back, in place."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from ..noise import NoiseFamily
from ..noise.state import check_directions
from .base import PerturbedLayer, check_family
from .linear import PerturbedLinear

# torch layer -> perturbed twin. Subclasses are left alone: they may do anything in their forward.
TWINS: dict[type[nn.Module], type[PerturbedLayer]] = {nn.Linear: PerturbedLinear}

# Absent from a module's parameters if a hook or a parametrization computes them.
_PARAMETERS = {"weight", "bias"}


def convert(model: nn.Module, directions: int, noise: NoiseFamily | None = None) -> nn.Module:
    """Give every layer of ``model`` that has a perturbed twin its twin's behaviour.

    Layers keep their identity: the same module and Parameter objects, hooks, training flags and
    ``state_dict``; tied parameters stay tied. Left as they are: layers that are perturbed already,
    subclasses of torch's layers, and layers whose weight a parametrization or pruning computes.

    A layer is perturbed where it is called. Modules that read ``layer.weight`` instead, as
    nn.MultiheadAttention does, see the unperturbed weight; ``pm.summary()`` lists what is not
    perturbed.

    Args:
        model: any module; changed in place.
        directions: D.
        noise: the family of every converted layer, default ``Dense()``.

    Returns:
        ``model``.

    Raises:
        ValueError: a model with no layer that could be perturbed, or with a lazy layer that has no
            weight yet.
        TypeError: arguments of another type.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = perturbed.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), directions=4)
        >>> type(net[0]).__name__
        'PerturbedLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    directions, noise = check_directions(directions), check_family(noise)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"model must have its parameters, but {name} is lazy; run one forward first"
            )
    found = False
    for module in model.modules():
        twin = TWINS.get(type(module))
        if twin is not None and _PARAMETERS <= module._parameters.keys():
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

    Your own subclasses of perturbed layers keep their class and are no longer perturbed. A
    PerturbedModel that served the layers refuses to work from then on.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = perturbed.convert(nn.Sequential(nn.Linear(8, 8)), directions=4)
        >>> type(perturbed.revert(net)[0]).__name__
        'Linear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, PerturbedLayer):
            module.release()
            if type(module) in TWINS.values():
                module.__class__ = module.torch_class  # type: ignore[assignment]
                for name in ("directions", "noise", "site"):
                    del module.__dict__[name]
    return model
