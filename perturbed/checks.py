"""Checks of arguments that several parts of the package share; errors name the argument."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


def as_int(name: str, value: object) -> int:
    """Return an integer argument, NumPy's and torch's integers included; a bool is no integer."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def as_count(name: str, value: object, least: int = 1) -> int:
    """Return an integer argument that is at least ``least``."""
    count = as_int(name, value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    above: bool = False,
) -> float:
    """Return ``value`` as a float if it is a finite number from ``low`` to ``high``.

    Args:
        name: of the argument, for the message.
        value: what came.
        low: the least value.
        high: the largest value.
        above: whether ``low`` itself is excluded.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be in the range of a float, got a larger integer") from None
    fits = math.isfinite(number) and (low < number if above else low <= number) and number <= high
    if not fits:
        bounds = (
            "" if low == -math.inf else f" and {'greater than' if above else 'at least'} {low:g}"
        )
        bounds += "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be finite{bounds}, got {value}")
    return number


def check_option(name: str, value: object, options: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``options``."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}")
    return str(value)


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_entries(name: str, state: object, entries: Collection[str]) -> None:
    """Raise unless ``state`` is a mapping with all of ``entries``, as a state_dict must be.

    Raises:
        TypeError: no mapping.
        ValueError: an entry that is missing.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{name} must be a dictionary with the entries {sorted(entries)}, got "
            f"{type(state).__name__}"
        )
    missing = [entry for entry in entries if entry not in state]
    if missing:
        raise ValueError(
            f"{name} must have the entries {sorted(entries)}, but there is no {missing[0]!r}"
        )


def check_path(name: str, value: object) -> Path:
    """Return the path of a file or folder; a number would be an open file's."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    path = Path(value)
    if str(value) == "":
        raise ValueError(f"{name} must be a path, got an empty text")
    return path


# ---- saved states --------------------------------------------------------------------------------


def check_like(name: str, value: object, own: object) -> None:
    """Raise unless a saved value is of the kind of the one that it is to replace.

    Args:
        name: of the value, for messages.
        value: from a state.
        own: what is here: a count (at least 0), another number, a text, a flag, a tensor (the same
            shape), a dictionary (of at least these entries), a list (of anything). None, what is
            not known yet: a number, or None.

    Raises:
        TypeError: another kind.
        ValueError: a count that is negative, a number that 64 bits do not hold, a tensor of another
            shape, sparse or without data, an entry that is missing.
    """
    if isinstance(own, dict):
        check_entries(name, value, own)
        assert isinstance(value, Mapping)
        for key, item in own.items():
            check_like(f"{name}[{key!r}]", value[key], item)
    elif isinstance(own, Tensor):
        check_tensor(name, value, own)
    elif isinstance(own, (bool, str, list)):
        if type(value) is not type(own):
            raise TypeError(f"{name} must be a {type(own).__name__}, got {type(value).__name__}")
    elif own is None or isinstance(own, (int, float)):
        if own is None and value is None:
            return
        kinds = (int,) if isinstance(own, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "an int" if isinstance(own, int) else "a number"
            raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
        if (
            isinstance(value, int)
            and not (0 if isinstance(own, int) else -(2**63)) <= value < 2**63
        ):
            raise ValueError(f"{name} must be at least 0 and fit in 64 bits, got {value}")


def check_tensor(name: str, value: object, own: Tensor) -> None:
    """Raise unless a saved tensor can be copied into ``own``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_meta or value.is_complex():
        raise ValueError(
            f"{name} must be a dense real tensor with data, got {value.layout} {value.dtype} on "
            f"{value.device}"
        )
    if value.shape != own.shape:
        raise ValueError(f"{name} must have shape {tuple(own.shape)}, got {tuple(value.shape)}")


@contextlib.contextmanager
def undone_by(undo: Callable[[], None]) -> Iterator[None]:
    """Load other objects' states: ``undo`` is called if one refuses.

    Raises:
        ValueError: in place of what else objects raise for a state that does not fit.
    """
    try:
        yield
    except BaseException as error:
        undo()
        if not isinstance(error, Exception) or isinstance(error, (TypeError, ValueError)):
            raise
        raise ValueError(f"state does not fit: {type(error).__name__}: {error}") from error
