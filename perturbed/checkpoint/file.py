"""One checkpoint: a file that is written whole or not at all, and checked when it is read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from ..checks import check_path
from ..description import describe, digest
from .parts import CheckpointError, is_object, restore, states_of

FORMAT = "perturbed checkpoint"
VERSION = 1


class DamagedCheckpointError(CheckpointError):
    """A file that was cut or changed since it was written, or that is something else altogether."""


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
    path = check_path("path", path)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "parts": states_of(parts),
        "description": {name: describe(part) for name, part in parts.items() if is_object(part)},
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
    with open(check_path("path", path), "rb") as file:
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
        >>> try:
        ...     load_checkpoint(file, net=torch.nn.Linear(2, 1, dtype=torch.float64, bias=False))
        ... except ValueError as error:
        ...     print(str(error).partition("run.pt: ")[2])
        net is of another run: parameters 'weight' was (1, 2) torch.float32, here it is (1, 2)
        torch.float64; parameters 'bias' was (1,) torch.float32, here it is nothing
    """
    return restore(path, read_checkpoint(path, map_location), parts)


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
