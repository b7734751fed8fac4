"""The checkpoints of a run: which files are kept, and which one it goes on from."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from ..checks import as_count, as_int, check_path
from ..distributed import is_first
from .file import DamagedCheckpointError, read_checkpoint, save_checkpoint
from .parts import CheckpointError, is_object, restore, states_of


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
        self.folder = check_path("folder", folder)
        self.every, self.keep = as_count("every", every), as_count("keep", keep)
        states_of(parts)  # now rather than after hours
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
        objects = {name: part for name, part in self.parts.items() if is_object(part)}
        damaged: list[tuple[Path, DamagedCheckpointError]] = []
        for steps, file in self.files():
            try:
                content = read_checkpoint(file)
            except DamagedCheckpointError as error:
                damaged.append((file, error))
                continue
            self.values = restore(file, content, objects)
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
