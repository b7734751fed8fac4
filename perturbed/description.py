"""What a run is of, in plain values: whether two runs, or a run and a file, fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .model import PerturbedModel


def describe(part: Any) -> dict[str, Any]:
    """Return what must agree for a state to fit: classes, parameters, noise, population.

    Args:
        part: a module, or what has a PerturbedModel as ``pm`` or a Swarm as ``swarm``, such as an
            optimizer of a population; of anything else the class.
    """
    found: dict[str, Any] = {"class": type(part).__name__}
    # vars and not getattr, by which modules and PerturbedModels offer other objects' names.
    own = {} if isinstance(part, nn.Module) else getattr(part, "__dict__", {})
    model: Any = part if isinstance(part, nn.Module) else own.get("pm")
    swarm: Any = own.get("swarm")
    if isinstance(getattr(swarm, "positions", None), Tensor):
        found["particles"] = len(swarm.positions)
        model = swarm.module if swarm.pm is None else swarm.pm
    if isinstance(own.get("optimizer"), torch.optim.Optimizer):
        found["optimizer"] = type(own["optimizer"]).__name__
    if isinstance(own.get("maximize"), bool):
        found["maximize"] = own["maximize"]
    if isinstance(model, PerturbedModel):
        found["directions"] = model.population
        found["antithetic"] = model.state.antithetic
        names = {id(module): name for name, module in model.model.named_modules()}
        found["noise"] = {names[id(layer)]: repr(layer.noise) for layer in model.layers()}
        model = model.model
    if isinstance(model, nn.Module):
        found["modules"] = {name: type(m).__name__ for name, m in model.named_modules()}
        found["parameters"] = {
            name: f"{tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()
        }
    return found


def differences(first: Any, second: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Iterate over what differs between two descriptions: place, value in each.

    Args:
        first: plain values, in dictionaries.
        second: plain values, in dictionaries.
        where: the place that they are from.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in [*first, *(k for k in second if k not in first)]:
            place = f"{where} {key!r}" if where else str(key)
            missing = "nothing"
            yield from differences(first.get(key, missing), second.get(key, missing), place)
    elif first != second:
        yield where, first, second


def outline(value: Any) -> Any:
    """Return what one can compare and read of any value: plain values, in dictionaries.

    Args:
        value: tensors become the start of their digest, lists and tuples dictionaries by number,
            functions their name, torch optimizers their class and options, other objects their
            class.
    """
    if isinstance(value, Tensor):
        return digest(value)[:16]
    if isinstance(value, Mapping):
        return {key: outline(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return dict(enumerate(outline(item) for item in value))
    if isinstance(value, float) and value != value:
        return "nan"  # which is not equal to itself
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.optim.Optimizer):
        groups = [{k: v for k, v in g.items() if k != "params"} for g in value.param_groups]
        return {"class": type(value).__name__, "groups": outline(groups)}
    return getattr(value, "__qualname__", type(value).__name__)


def digest(content: Any) -> str:
    """Return the SHA-256 of plain values and tensors, in dictionaries and lists."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().resolve_conj().resolve_neg()
            # Torch lets the stride of a single number be anything; a view in bytes needs 1.
            flat = plain.contiguous().as_strided((plain.numel(),), (1,))
            hashed.update(f"{tuple(value.shape)}{value.dtype}".encode())
            hashed.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            hashed.update(b"{%d" % len(value))
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, (list, tuple)):
            hashed.update(b"[%d" % len(value))
            for item in value:
                add(item)
        else:
            hashed.update(f"{type(value).__name__}:{value!r};".encode())

    add(content)
    return hashed.hexdigest()
