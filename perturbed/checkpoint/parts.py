"""What a checkpoint is made of: states and plain values, and how objects get their states back."""

from __future__ import annotations

import copy
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..description import describe, differences

# What torch.load(weights_only=True) gives back; no subclasses, which it refuses.
SCALARS = (type(None), bool, int, float, complex, str)
MAPPINGS = (dict, OrderedDict, Counter)  # a MultiStepLR has a Counter
SEQUENCES = (list, tuple, torch.Size)
TENSORS = (Tensor, nn.Parameter)

SHOWN = 4  # differences that a message tells


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or is of another run than it is to continue."""


def is_object(part: Any) -> bool:
    """Whether a part has a state, and is no plain value."""
    return isinstance(part, torch.Generator) or (
        hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    )


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is saved of all parts."""
    if "map_location" in parts:
        raise ValueError("map_location is an argument of load_checkpoint, not a name for a part")
    return {name: _state(name, part) for name, part in parts.items()}


def _state(name: str, part: Any) -> Any:
    """Return what is saved of a part, or say why it cannot be."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if is_object(part):
        part = part.state_dict()
    _check_plain(name, part)
    return part


def _check_plain(name: str, value: Any) -> None:
    """Raise TypeError for what torch.load(weights_only=True) would not give back."""
    kind = type(value)
    if kind in MAPPINGS:
        for key, item in value.items():
            _check_plain(f"a key of {name}", key)
            _check_plain(f"{name}[{key!r}]", item)
    elif kind in SEQUENCES:
        for i, item in enumerate(value):
            _check_plain(f"{name}[{i}]", item)
    elif kind in TENSORS:
        if value.layout != torch.strided or value.is_meta:
            raise TypeError(
                f"{name} must be a dense tensor with data, got {value.layout} on {value.device}"
            )
    elif kind not in SCALARS:
        raise TypeError(
            f"{name} must have a state_dict or be a plain value (a number, a string, a tensor, "
            f"lists, tuples and dictionaries of them), got {kind.__name__}"
        )


def restore(path: str | os.PathLike, content: dict[str, Any], parts: Mapping) -> dict:
    """Restore all parts from what a file holds, or none.

    Args:
        path: of the file, for messages.
        content: what ``read_checkpoint`` returns.
        parts: the objects to restore, by name.

    Returns:
        The plain values in the file, by name.

    Raises:
        CheckpointError: other parts than those of the file, of another run, or that refuse.
        TypeError: a part that is no object with a state.
    """
    states: dict[str, Any] = content["parts"]
    described: dict[str, Any] = content["description"]
    if set(described) != set(parts):
        missing, unknown = sorted(set(described) - set(parts)), sorted(set(parts) - set(described))
        raise CheckpointError(
            f"{path} holds the objects {sorted(described)}, got {sorted(parts)} to restore: "
            f"missing {missing}, unknown {unknown}"
        )
    before = copy.deepcopy(states_of(parts))
    for name, part in parts.items():
        found = [
            f"{place} was {was}, here it is {now}"
            for place, was, now in differences(described[name], describe(part))
        ]
        if found:
            more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
            raise CheckpointError(
                f"{path}: {name} is of another run: {'; '.join(found[:SHOWN])}{more}"
            )
    name = ""
    try:
        for name in _order(parts):
            _load(parts[name], states[name])
    except BaseException as error:
        lost = _put_back(parts, before)
        if not isinstance(error, Exception):
            raise
        rest = f"; nor could what {' and '.join(lost)} held before" if lost else ""
        raise CheckpointError(f"{path}: {name} cannot be restored: {error}{rest}") from error
    return {name: value for name, value in states.items() if name not in described}


def _order(parts: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over the names of parts in the order of restoring, whatever order they came in.

    Modules come before what reads their parameters (the members of SNES and PGPE), and again after
    what writes them (PSO, whose best they are).
    """
    modules = [name for name, part in parts.items() if isinstance(part, nn.Module)]
    yield from modules
    yield from (name for name in parts if name not in modules)
    yield from modules


def _load(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


def _put_back(parts: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Undo a restoration; return the names of parts that refuse even their own state."""
    lost = []
    for name in _order(parts):
        try:
            _load(parts[name], before[name])
        except Exception:
            lost.append(name)
    return list(dict.fromkeys(lost))
