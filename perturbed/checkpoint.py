"""Checkpoints that survive anything: written atomically, checked when read.

``save_checkpoint`` and ``load_checkpoint`` take whatever has a ``state_dict``; :class:`Checkpoints`
keeps the last few of a run and finds the newest good one. A process killed at any moment leaves the
previous file, whole; a file that was cut or changed is noticed when it is read.

The file is what ``torch.load(weights_only=True)`` reads: a dictionary of plain values and tensors.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .description import describe, differences, digest
from .distributed import is_first
from .noise.state import as_int

FORMAT = "perturbed checkpoint"
VERSION = 1
PLAIN = (type(None), bool, int, float, complex, str)


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or is of another run than it is to continue."""


# ---- one file ------------------------------------------------------------------------------------


def save_checkpoint(path: str | os.PathLike, **parts: Any) -> None:
    """Write a checkpoint, or leave what is there: never half of one.

    The bytes go to a partial file beside it, are forced to the disk (fsync) and renamed.

    Args:
        path: of the file; its folder is made.
        **parts: by name: objects with ``state_dict`` and ``load_state_dict`` (models, optimizers,
            schedulers, NES, ARS, PSO), torch Generators, and plain values (numbers, strings, None,
            tensors, lists, tuples and dictionaries of them), which ``load_checkpoint`` returns.

    Raises:
        TypeError: a part of another type.

    Example:
        >>> import tempfile, torch
        >>> from perturbed.checkpoint import load_checkpoint, save_checkpoint
        >>> net = torch.nn.Linear(2, 1)
        >>> file = tempfile.mkdtemp() + "/run.pt"
        >>> save_checkpoint(file, net=net, epoch=3)
        >>> load_checkpoint(file, net=net)
        {'epoch': 3}
    """
    path = Path(path)
    states = {name: _state(name, part) for name, part in parts.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "description": {name: describe(part) for name, part in parts.items() if _is_object(part)},
        "parts": states,
    }
    content["digest"] = digest(content)  # torch does not read the archive's own checksums
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint that is whole: ``parts``, ``description``, ...

    Args:
        path: of the file.
        map_location: where its tensors go, as in ``torch.load``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that is cut, changed, no checkpoint, or of a newer version.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # whatever a damaged archive makes of the reader
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise CheckpointError(
                f"{path} is truncated, corrupted or no checkpoint ({what})"
            ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this package")
    version = content.get("version")
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version}, this package reads {VERSION}")
    if content.pop("digest", None) != digest(content):
        raise CheckpointError(f"{path} is corrupted: its content does not match its digest")
    return content


def load_checkpoint(
    path: str | os.PathLike, map_location: Any = "cpu", **parts: Any
) -> dict[str, Any]:
    """Restore objects from a checkpoint: all of them, or none if anything does not fit.

    Args:
        path: of the file.
        map_location: where its tensors go first, as in ``torch.load``; a ``load_state_dict`` copies
            them to the devices of its object.
        **parts: the objects to restore, by the names they were saved under.

    Returns:
        The parts that are plain values, by name.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a damaged file, parts missing, or objects that differ from those saved in
            architecture, noise family or population (the message names what differs).

    """
    content = read_checkpoint(path, map_location)
    saved: dict[str, Any] = content["parts"]
    objects = set(content["description"])
    if objects != set(parts):
        raise CheckpointError(
            f"{path} holds the objects {sorted(objects)}, got {sorted(parts)} to restore"
        )
    for name, part in parts.items():
        _state(name, part)  # of a type that can be restored
        for place, was, now in differences(content["description"][name], describe(part)):
            raise CheckpointError(
                f"{path}: {name} is of another run: {place} was {was} and is {now} here"
            )
    before = {name: copy.deepcopy(_state(name, part)) for name, part in parts.items()}
    done = []
    try:
        for name, part in parts.items():
            done.append(name)
            _restore(part, saved[name])
    except BaseException as error:
        for name in done:
            _restore(parts[name], before[name])
        if isinstance(error, (ValueError, KeyError, RuntimeError, TypeError)):
            raise CheckpointError(f"{path}: {done[-1]} cannot be restored: {error}") from error
        raise
    return {name: value for name, value in saved.items() if name not in objects}


# ---- the files of a run --------------------------------------------------------------------------


class Checkpoints:
    """The last few checkpoints of a run, in one folder.

    Under ``torch.distributed`` every process calls it and the first one writes.

    Args:
        folder: of the files, ``step-<number>.pt``; made when needed.
        every: steps between two checkpoints.
        keep: how many to keep; older ones are removed once a newer one is written.
        **parts: what to save, as in :func:`save_checkpoint`.

    Raises:
        TypeError: every or keep that are no integers.
        ValueError: every or keep below 1.

    Example:
        >>> import tempfile, torch
        >>> from perturbed.checkpoint import Checkpoints
        >>> net = torch.nn.Linear(2, 1)
        >>> saved = Checkpoints(tempfile.mkdtemp(), every=10, net=net)
        >>> start = saved.resume()  # 0: nothing there yet
        >>> for step in range(start, 25):
        ...     saved.after(step)
        >>> saved.resume()  # after step 19, so that step 20 is the next
        20
    """

    def __init__(
        self, folder: str | os.PathLike, every: int = 1, keep: int = 2, **parts: Any
    ) -> None:
        """Check and store the arguments; nothing is written yet."""
        self.folder = Path(folder)
        self.every, self.keep = as_int("every", every), as_int("keep", keep)
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.parts = parts

    def files(self) -> list[tuple[int, Path]]:
        """Return the step count and file of each checkpoint, newest first."""
        found = [
            (int(match[1]), file)
            for file in (self.folder.iterdir() if self.folder.is_dir() else ())
            if (match := re.fullmatch(r"step-(\d+)\.pt", file.name))
        ]
        return sorted(found, reverse=True)

    def after(self, step: int) -> None:
        """Save if it is time after step number ``step`` (0 for the first)."""
        if (step + 1) % self.every == 0:
            self.save(step + 1)

    def save(self, steps: int) -> None:
        """Save now, ``steps`` steps being done."""
        if not is_first():
            return
        save_checkpoint(self.folder / f"step-{steps}.pt", **self.parts)
        for _, file in self.files()[self.keep :]:
            file.unlink(missing_ok=True)

    def resume(self) -> int:
        """Restore the newest whole checkpoint; return how many steps were done, 0 if there is none.

        Raises:
            CheckpointError: the checkpoints are of another run, or none of several is whole.
        """
        damaged: list[str] = []
        for steps, file in self.files():
            try:
                read_checkpoint(file)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            load_checkpoint(file, **{n: p for n, p in self.parts.items() if _is_object(p)})
            return steps
        if damaged:
            raise CheckpointError("; ".join(damaged))
        return 0


# ---- its parts -----------------------------------------------------------------------------------


def _is_object(part: Any) -> bool:
    return isinstance(part, torch.Generator) or hasattr(part, "load_state_dict")


def _state(name: str, part: Any) -> Any:
    """Return what is saved of a part, or say why it cannot be."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if hasattr(part, "load_state_dict"):
        part = part.state_dict()
    _check_plain(name, part)
    return part


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


def _check_plain(name: str, value: Any) -> None:
    """Raise TypeError for what torch.load(weights_only=True) would not give back."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(f"{name}[{i}]", item)
    elif not isinstance(value, Tensor) and type(value) not in PLAIN:
        raise TypeError(
            f"{name} must have a state_dict or be a plain value (a number, a string, a tensor, "
            f"lists and dictionaries of them), got {type(value).__name__}"
        )


def _sync_folder(folder: Path) -> None:
    """Force the folder's entries to the disk, where the system lets one."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
