"""Conversion of whole models: swap torch layers for their perturbed twins and back, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from .base import PerturbedLayer
from .plan import Plan
from .select import NoiseChoice, Selector, check_model
from .twins import TWINS as TWINS
from .twins import qualified_name

NAMED_IN_WARNING = 4


def convert(
    model: nn.Module,
    directions: int,
    noise: NoiseChoice = None,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> nn.Module:
    """Give every layer of ``model`` that has a perturbed twin its twin's behaviour.

    Layers keep their identity: the same module and Parameter objects, hooks, training flags and
    ``state_dict``; tied parameters stay tied and have one noise. Layers that are perturbed already
    are left alone. So are layers without a twin, such as subclasses of torch's layers, which may
    do anything in their forward; layers whose weight a parametrization or pruning computes; layers
    that share a parameter with one that stays as it is; and the output layer of an attention that
    does. :func:`perturbed.conversion_report` lists them with the reason, and a UserWarning says so
    if trainable parameters stay without noise that nobody left out.

    A layer is perturbed where it is called. A module that reads ``layer.weight`` instead sees the
    unperturbed weight; ``pm.summary(example_input)`` says which layers are not called.

    A selector is a name pattern as of :mod:`fnmatch` ("encoder.*.proj"), a module type, or a
    predicate ``(name, module) -> bool``. Patterns and types that fit a module hold for all that it
    contains; predicates are asked about every module itself.

    Args:
        model: any module; changed in place.
        directions: D.
        noise: the family of every converted layer, default ``Dense()``; or a mapping from
            selectors to families, where the first that fits counts, None leaves a layer as it is,
            and layers that nothing fits get ``Dense()``; "*" fits all.
        include: a selector or several; only what one of them fits is converted.
        exclude: a selector or several; nothing that one of them fits is converted.

    Returns:
        ``model``.

    Raises:
        ValueError: a model with no layer to perturb; a layer to be converted that is lazy and has
            no weight yet, is quantised, has a size that does not fit its family, or parameters on
            another device or of another dtype than the rest; other noise for layers that share a
            parameter; a pattern that fits no name; a PerturbedModel. Nothing is changed then.
        TypeError: arguments of another type.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2), nn.Linear(2, 2))
        >>> noise = {"0": perturbed.LowRank(1), "*": perturbed.Dense("rademacher")}
        >>> net = perturbed.convert(net, directions=4, noise=noise, exclude="3")
        >>> net[0].noise, net[2].noise, type(net[3]).__name__
        (LowRank(1), Dense('rademacher'), 'Linear')
    """
    plan = Plan(model, directions, noise, include, exclude)
    for module, twin, family in plan.changes:
        # A change of class, not of object: whoever holds the layer keeps holding it.
        before = type(module)
        module.__class__ = twin
        assert isinstance(module, PerturbedLayer)
        module.init_noise(plan.directions, family)
        module.original_class = before
    if plan.missed:
        warnings.warn(_what_was_missed(plan), UserWarning, stacklevel=2)
    return model


def _what_was_missed(plan: Plan) -> str:
    """Say which trainable parameters have no noise for want of a perturbed version."""
    named = [f"{plan.tree.label(m)} ({type(m).__name__})" for m, _ in plan.missed]
    more = len(named) - NAMED_IN_WARNING
    names = ", ".join(named[:NAMED_IN_WARNING]) + (f" and {more} more" if more > 0 else "")
    return (
        f"convert left {sum(n for _, n in plan.missed):,} parameters without noise: {names}; "
        "perturbed.conversion_report(model) says why"
    )


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`, in place: every perturbed layer becomes what it was again.

    Layers that were made perturbed become their torch parent; your own subclasses of perturbed
    layers keep their class and are no longer perturbed. Hooks, flags and parameters stay. A
    PerturbedModel that served the layers refuses to work from then on.

    Args:
        model: any module; changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: no module.

    Example:
        >>> from torch import nn
        >>> import perturbed
        >>> net = perturbed.convert(nn.Sequential(nn.Linear(8, 8)), directions=4)
        >>> type(perturbed.revert(net)[0]).__name__
        'Linear'
    """
    check_model(model)
    package = __name__.partition(".")[0]
    for module in model.modules():
        if not isinstance(module, PerturbedLayer):
            continue
        module.release()
        original = module.original_class
        # The package's own classes differ from their torch parents in their noise alone.
        if original is None and qualified_name(type(module)).startswith(f"{package}."):
            original = module.torch_class
        if original is not None:
            attributes = module.noise_attributes
            module.__class__ = original  # type: ignore[assignment]
            for name in attributes:
                module.__dict__.pop(name, None)
    return model
