"""Checks of arguments that several parts of the package share; errors name the argument."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path


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
