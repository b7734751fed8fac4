"""Conversion of whole models: swap torch layers for their perturbed twins and back, in place."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from ..noise import NoiseFamily
from ..noise.base import matrix_shape
from ..noise.state import check_directions
from .base import PerturbedLayer, check_family
from .linear import (
    LowRankLinear,
    PermutedLinear,
    PerturbedLinear,
    SignFlipLinear,
    SparsePerturbedLinear,
)

# torch layer -> perturbed twin. Subclasses are left alone: they may do anything in their forward.
TWINS: dict[type[nn.Module], type[PerturbedLayer]] = {nn.Linear: PerturbedLinear}
# Classes that become their torch parent again; they differ from a twin in their arguments alone.
REVERTIBLE = {*TWINS.values(), LowRankLinear, PermutedLinear, SignFlipLinear, SparsePerturbedLinear}

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
        ValueError: a model with no layer that could be perturbed, with a lazy layer that has no
            weight yet, or with one whose size does not fit the family. Nothing is changed then.
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
    layers = []
    for name, module in model.named_modules():
        if type(module) in TWINS and _PARAMETERS <= module._parameters.keys():
            try:
                noise.check(*matrix_shape(module.weight), directions)
            except ValueError as error:
                raise ValueError(f"{name or type(module).__name__}: {error}") from None
            layers.append(module)
    for module in layers:
        # A change of class, not of object: whoever holds the layer keeps holding it.
        module.__class__ = TWINS[type(module)]
        module.init_noise(directions, noise)
    if not any(isinstance(module, PerturbedLayer) for module in model.modules()):
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
            if type(module) in REVERTIBLE:
                module.__class__ = module.torch_class  # type: ignore[assignment]
                for name in ("directions", "noise", "sites"):
                    del module.__dict__[name]
    return model
