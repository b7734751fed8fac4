"""Checkpoints that survive anything: written atomically, checked when read.

``save_checkpoint`` and ``load_checkpoint`` take whatever has a ``state_dict``; :class:`Checkpoints`
keeps the last few of a run and finds the newest good one. A process killed at any moment leaves the
previous file, whole; a file that was cut or changed is noticed when it is read.

The file is what ``torch.load(weights_only=True)`` reads: a dictionary of plain values and tensors.
docs/checkpoints.md has the rest.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .description import describe, differences, digest
from .distributed import is_first
from .noise.state import as_int

FORMAT = "perturbed checkpoint"
VERSION = 1

# What torch.load(weights_only=True) gives back; no subclasses, which it refuses.
SCALARS = (type(None), bool, int, float, complex, str)
MAPPINGS = (dict, OrderedDict, Counter)  # a MultiStepLR has a Counter
SEQUENCES = (list, tuple, torch.Size)
TENSORS = (Tensor, nn.Parameter)

SHOWN = 4  # differences that a message tells


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or is of another run than it is to continue."""


class DamagedCheckpointError(CheckpointError):
    """A file that was cut or changed since it was written, or that is something else altogether."""


# ---- one file ------------------------------------------------------------------------------------


def save_checkpoint(path: str | os.PathLike, /, **parts: Any) -> None:
    """Write a checkpoint, or leave what is there: never half of one.

    The bytes go to a partial file beside it, are forced to the disk (fsync), and the file is
    renamed. Every process that calls this writes: of several, let one (:class:`Checkpoints` does).

    Args:
        path: of the file; its folder is made.
        **parts: by name: objects with ``state_dict`` and ``load_state_dict`` (models, optimizers,
            schedulers, NES, ARS, PSO), torch Generators, and plain values (numbers, strings, None,
            tensors, lists, tuples and dictionaries of them), which ``load_checkpoint`` returns.

    Raises:
        TypeError: a part, or something in a state, of another type; the message says where.
        ValueError: a part named map_location, which could not be restored.
        OSError: the file cannot be written; what was there is still there.

    Example:
        >>> import tempfile, torch
        >>> from perturbed import load_checkpoint, save_checkpoint
        >>> net = torch.nn.Linear(2, 1)
        >>> file = tempfile.mkdtemp() + "/run.pt"
        >>> save_checkpoint(file, net=net, epoch=3)
        >>> load_checkpoint(file, net=net)
        {'epoch': 3}
    """
    path = Path(path)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "parts": _states(parts),
        "description": {name: describe(part) for name, part in parts.items() if _is_object(part)},
    }
    content["digest"] = digest(content)  # torch does not read the archive's own checksums
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint that is whole, without restoring anything.

    Args:
        path: of the file.
        map_location: where its tensors go, as in ``torch.load``.

    Returns:
        ``parts``: the states and plain values by name; ``description`` of what the states are of;
        ``torch``: the version that wrote it; ``format`` and ``version``.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: a file that was cut or changed, or is no checkpoint.
        CheckpointError: a checkpoint of another version.

    Example:
        >>> import tempfile, torch
        >>> from perturbed.checkpoint import read_checkpoint, save_checkpoint
        >>> file = tempfile.mkdtemp() + "/run.pt"
        >>> save_checkpoint(file, net=torch.nn.Linear(2, 1), epoch=3)
        >>> read_checkpoint(file)["parts"]["net"]["weight"].shape  # one part alone
        torch.Size([1, 2])
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # whatever a damaged archive makes of the reader
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise DamagedCheckpointError(
                f"{path} is truncated, corrupted or no checkpoint ({what})"
            ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is no checkpoint of this package, or corrupted")
    if content.pop("digest", None) != digest(content):
        raise DamagedCheckpointError(f"{path} is corrupted: its content does not match its digest")
    if content["version"] != VERSION:  # files of all versions are digested alike
        raise CheckpointError(
            f"{path} has version {content['version']}, this package reads {VERSION}"
        )
    return content


def load_checkpoint(
    path: str | os.PathLike, /, map_location: Any = "cpu", **parts: Any
) -> dict[str, Any]:
    """Restore objects from a checkpoint: all of them, or none if anything does not fit.

    While it restores, it holds a copy of the state that it replaces.

    Args:
        path: of the file.
        map_location: where its tensors go first, as in ``torch.load``; a ``load_state_dict`` copies
            them to the devices of its object.
        **parts: the objects to restore, by the names they were saved under, all of them; for one
            alone, see :func:`read_checkpoint`.

    Returns:
        The parts that are plain values, by name.

    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: a file that was cut or changed, or is no checkpoint.
        CheckpointError: parts missing or unknown, or objects that differ from those saved in class,
            architecture, noise family, population or optimizer (the message names what differs), or
            whose ``load_state_dict`` refuses the state.
        TypeError: a part that is no object with a state.

    Example:
        >>> import tempfile, torch
        >>> from perturbed import load_checkpoint, save_checkpoint
        >>> file = tempfile.mkdtemp() + "/run.pt"
        >>> save_checkpoint(file, net=torch.nn.Linear(2, 1))
        >>> load_checkpoint(file, net=torch.nn.Linear(2, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        perturbed.checkpoint.CheckpointError: ...: net is of another run: parameters 'weight' was
        (1, 2) torch.float32, here it is (3, 2) torch.float32; parameters 'bias' was (1,)
        torch.float32, here it is (3,) torch.float32
    """
    return _restore_from(path, read_checkpoint(path, map_location), parts)


# ---- the files of a run --------------------------------------------------------------------------


class Checkpoints:
    """The last few checkpoints of a run, in one folder.

    Under ``torch.distributed`` every process calls it, the first one writes, and all read: the
    folder must be one that all of them see.

    Args:
        folder: of the files, ``step-<number>.pt``; made when needed. For one run alone.
        every: steps between two checkpoints.
        keep: how many to keep; older ones are removed once a newer one is written.
        **parts: what to save, as in :func:`save_checkpoint`.

    Attributes:
        values: the plain values in the checkpoint that :meth:`resume` has found.

    Raises:
        TypeError: every or keep that are no integers, parts that cannot be saved.
        ValueError: every or keep below 1.

    Example:
        >>> import tempfile, torch
        >>> from perturbed import Checkpoints
        >>> net = torch.nn.Linear(2, 1)
        >>> saved = Checkpoints(tempfile.mkdtemp(), every=10, net=net)
        >>> start = saved.resume()  # 0: nothing there yet
        >>> losses = saved.values.get("losses", [])
        >>> for step in range(start, 25):
        ...     losses.append(1 / (1 + step))
        ...     saved.after(step, losses=losses)
        >>> saved.resume()  # after step 19, so that step 20 is the next
        20
        >>> len(saved.values["losses"])
        20
    """

    def __init__(
        self, folder: str | os.PathLike, /, every: int = 1, keep: int = 2, **parts: Any
    ) -> None:
        """Check and store the arguments; nothing is written yet."""
        self.folder = Path(folder)
        self.every, self.keep = as_int("every", every), as_int("keep", keep)
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _states(parts)  # now rather than after hours
        self.parts = parts
        self.values: dict[str, Any] = {}
        self._done: int | None = None  # steps of the last checkpoint; None before there is any
        self._damaged: list[Path] = []

    def files(self) -> list[tuple[int, Path]]:
        """Return the step count and file of each checkpoint, newest first."""
        found = [
            (int(match[1]), file)
            for file in (self.folder.iterdir() if self.folder.is_dir() else ())
            if (match := re.fullmatch(r"step-(\d+)\.pt", file.name))
        ]
        return sorted(found, reverse=True)

    def after(self, step: int, /, **values: Any) -> None:
        """Save if it is time after step number ``step`` (0 for the first); else do nothing.

        Args:
            step: number of the step that is done.
            **values: plain values of the moment, such as the losses so far.

        Raises:
            CheckpointError: before the first step is done: the folder holds another run's files.
            ValueError, TypeError: as :meth:`save`.
        """
        step = as_int("step", step)
        self._claim()
        if (step + 1) % self.every == 0:
            self.save(step + 1, **values)

    def save(self, steps: int, /, **values: Any) -> None:
        """Save now, ``steps`` steps being done.

        Args:
            steps: how many are done; not fewer than at the last checkpoint.
            **values: plain values of the moment, such as the losses so far.

        Raises:
            CheckpointError: the folder holds checkpoints, and :meth:`resume` was not called.
            ValueError: fewer steps than before, a value by the name of a part.
            TypeError: what :func:`save_checkpoint` does not take.
        """
        steps = as_int("steps", steps)
        if taken := sorted(set(values) & set(self.parts)):
            raise ValueError(f"values must have names of their own, got those of parts: {taken}")
        self._claim()
        if steps < (self._done or 0):
            raise ValueError(
                f"steps must be at least {self._done}, those of the last checkpoint, got {steps}"
            )
        self._done = steps
        if not is_first():
            return
        file = self.folder / f"step-{steps}.pt"
        save_checkpoint(file, **self.parts, **values)
        self._tidy(file)

    def resume(self) -> int:
        """Restore the newest whole checkpoint; return how many steps were done, 0 if there is none.

        Damaged files are passed over with a warning, and renamed once a newer one is written.

        Raises:
            CheckpointError: the newest whole checkpoint is of another run or version, or none of
                several is whole. Nothing has changed then.
        """
        objects = {name: part for name, part in self.parts.items() if _is_object(part)}
        damaged: list[tuple[Path, DamagedCheckpointError]] = []
        for steps, file in self.files():
            try:
                content = read_checkpoint(file)
            except DamagedCheckpointError as error:
                damaged.append((file, error))
                continue
            self.values = _restore_from(file, content, objects)
            for _, reason in damaged:
                warnings.warn(f"{reason}; going back to {file.name}", stacklevel=2)
            self._damaged = [file for file, _ in damaged]
            self._done = steps
            return steps
        if damaged:
            raise CheckpointError(
                "no checkpoint is whole: " + "; ".join(str(reason) for _, reason in damaged)
            )
        self._done = 0
        return 0

    def _claim(self) -> None:
        """Make sure that the folder is this run's, before anything in it is written or removed."""
        if self._done is not None:
            return
        if is_first() and (found := self.files()):
            raise CheckpointError(
                f"{self.folder} holds checkpoints of a run ({found[0][1].name}): continue it by "
                "resume(), or name another folder"
            )
        self._done = 0

    def _tidy(self, written: Path) -> None:
        """Put away what the file just written makes superfluous."""
        for file in self._damaged:
            if file != written:  # it would be taken for the newest
                file.rename(file.with_name(f"{file.name}.damaged"))
        self._damaged = []
        for _, file in self.files()[self.keep :]:
            file.unlink(missing_ok=True)
        for file in self.folder.glob(".step-*.pt.partial"):  # of processes that were killed
            file.unlink(missing_ok=True)


# ---- its parts -----------------------------------------------------------------------------------


def _is_object(part: Any) -> bool:
    return isinstance(part, torch.Generator) or (
        hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    )


def _states(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is saved of all parts."""
    if "map_location" in parts:
        raise ValueError("map_location is an argument of load_checkpoint, not a name for a part")
    return {name: _state(name, part) for name, part in parts.items()}


def _state(name: str, part: Any) -> Any:
    """Return what is saved of a part, or say why it cannot be."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if _is_object(part):
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


def _restore_from(path: str | os.PathLike, content: dict[str, Any], parts: Mapping) -> dict:
    """Restore all parts from the content of a file, or none; return its plain values."""
    states: dict[str, Any] = content["parts"]
    described: dict[str, Any] = content["description"]
    if set(described) != set(parts):
        missing, unknown = sorted(set(described) - set(parts)), sorted(set(parts) - set(described))
        raise CheckpointError(
            f"{path} holds the objects {sorted(described)}, got {sorted(parts)} to restore: "
            f"missing {missing}, unknown {unknown}"
        )
    before = copy.deepcopy(_states(parts))
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
            _restore(parts[name], states[name])
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


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


def _put_back(parts: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Undo a restoration; return the names of parts that refuse even their own state."""
    lost = []
    for name in _order(parts):
        try:
            _restore(parts[name], before[name])
        except Exception:
            lost.append(name)
    return list(dict.fromkeys(lost))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sync_folder(folder: Path) -> None:
    """Force the folder's entries to the disk, where the system lets one."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(handle)
    finally:
        os.close(handle)
