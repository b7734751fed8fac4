"""Give every perturbed layer of a model its place in a draw, or its part of given members."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .nn.base import PerturbedLayer
from .nn.survey import slot_parameters
from .noise.explicit import check_members
from .noise.state import NoiseState

# Parameter (by id) -> id of the slot that it draws from, and the first layer that uses it.
Owners = dict[int, tuple[int, PerturbedLayer]]


def attach(model: nn.Module, state: NoiseState) -> None:
    """Have all perturbed layers of ``model`` join ``state``; nothing is changed by what is refused.

    A parameter that several layers share has the stream of the first; a frozen one has none.

    Raises:
        ValueError: no perturbed layer or none with a parameter to perturb, layers with other
            directions, a parameter shared by layers of different noise or with a module without,
            given members beside noise or with antithetic sampling.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, PerturbedLayer)]
    if not layers:
        raise ValueError(
            "model has no perturbed layers; make them with perturbed.convert(model, directions)"
        )
    owners: Owners = {}
    places = []
    slot_id = 0
    for name, layer in layers:
        name = name or type(layer).__name__
        if layer.directions != state.population:
            raise ValueError(
                f"directions must match the layers': got {state.population}, layer {name!r} has "
                f"{layer.directions}"
            )
        ids = []
        for slot in layer.slots():
            weight, bias = (_own(owners, name, layer, key, slot_id) for key in slot)
            ids.append((weight, bias))
            slot_id += 1
        places.append((layer, ids))
    if not owners:
        raise ValueError(
            "model has nothing to perturb: all parameters of its perturbed layers are frozen "
            "(requires_grad=False)"
        )
    _refuse_other_users(model, set(owners))
    _set_kind(state, (first for _, first in owners.values()))
    for layer, ids in places:
        layer.attach(state, ids)
    _fix_rows([layer for layer, _ in places])


def _own(
    owners: Owners, name: str, layer: PerturbedLayer, key: str | None, slot_id: int
) -> int | None:
    """Id of the slot that a parameter draws from: its first owner's; None if it is frozen."""
    if key is None:
        return None
    if key not in layer._parameters:
        raise ValueError(f"{name}.{key} must be a Parameter, but something computes it")
    parameter = layer._parameters[key]
    if parameter is None or not parameter.requires_grad:
        return None
    first_id, first = owners.setdefault(id(parameter), (slot_id, layer))
    if first.noise != layer.noise:
        raise ValueError(
            f"{name}.{key} is shared with a layer of other noise: {layer.noise} and {first.noise}"
        )
    return first_id


def _refuse_other_users(model: nn.Module, perturbed: set[int]) -> None:
    """Raise ValueError if a module without noise uses a perturbed parameter too.

    Its use would not see the noise, unlike that of a member. Modules around a layer may hold its
    parameters.
    """
    for name, module in model.named_modules():
        if isinstance(module, PerturbedLayer):
            continue
        for key, parameter in module._parameters.items():
            if id(parameter) in perturbed and not any(
                isinstance(m, PerturbedLayer) and parameter is p
                for m in module.modules()
                for p in m._parameters.values()
            ):
                raise ValueError(
                    f"{name}.{key} is shared with a perturbed layer, but {name} "
                    f"({type(module).__name__}) is not perturbed; convert both or neither"
                )


def _set_kind(state: NoiseState, owners: Iterable[PerturbedLayer]) -> None:
    """Note whether members are given or drawn, which is the same in all layers."""
    kinds = {layer.noise.absolute: layer.noise for layer in owners}
    if len(kinds) > 1:
        raise ValueError(
            f"layers must all have {kinds[True]}, members that are given, or all have noise, got "
            f"{kinds[False]} too; freeze the parameters that members share"
        )
    absolute = True in kinds
    if absolute and state.antithetic:
        raise ValueError(
            f"antithetic must be False or None, got True: the members of {kinds[True]} have no sign"
        )
    state.absolute = absolute
    if absolute:
        state.antithetic = False


def _fix_rows(layers: list[PerturbedLayer]) -> None:
    """Leave a row of a weight without noise where all layers that use it do.

    Members that are given have all of their rows.
    """
    sites = [
        (site, id(layer._parameters[name]), layer.fixed_row(name))
        for layer in layers
        for site, (name, _) in zip(layer.sites, layer.slots(), strict=True)
        if name is not None
    ]
    agreed: dict[int, int | None] = {}
    for _, parameter, row in sites:
        agreed[parameter] = row if agreed.get(parameter, row) == row else None
    for site, parameter, _ in sites:
        site.fixed_row = None if site.state.absolute else agreed[parameter]


def match_members(
    model: nn.Module, tensors: Mapping[str, Tensor], population: int
) -> tuple[dict[str, Tensor], dict[tuple[PerturbedLayer, str], Tensor]]:
    """Check members that are given, and say what of them every layer reads; nothing is changed.

    Args:
        model: with layers of :class:`~perturbed.Explicit` noise.
        tensors: (D, *shape) of every parameter with noise, by its name in ``model``.
        population: D.

    Returns:
        The members by name, and by layer and its own name of a parameter views of them, in the
        layout of the layer's product.

    Raises:
        TypeError: no mapping from names to tensors.
        ValueError: a parameter that is missing or none of the perturbed ones, or a tensor of
            another shape, dtype, device or layout.
    """
    uses = [
        (layer, key, parameter)
        for layer in model.modules()
        if isinstance(layer, PerturbedLayer)
        for key, parameter in slot_parameters(layer).items()
        if parameter.requires_grad
    ]
    used = {id(parameter) for _, _, parameter in uses}
    wanted = {n: p for n, p in model.named_parameters() if id(p) in used}
    names = {id(p): name for name, p in wanted.items()}
    members = check_members(tensors, wanted, population)
    matrices = {}
    for layer, key, parameter in uses:
        name = names[id(parameter)]
        try:
            matrices[layer, key] = layer.member_matrices(key, members[name])
        except RuntimeError:
            raise ValueError(
                f"tensors[{name!r}] must be contiguous in every member, got strides "
                f"{members[name].stride()} for shape {tuple(members[name].shape)}"
            ) from None
    return members, matrices
