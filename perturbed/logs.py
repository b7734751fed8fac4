"""Where the numbers of a run go: a CSV file, TensorBoard, a progress bar.

A log is called with the record of a step, a dictionary of numbers with the entry "step"; so any
function of a record is one (``print``). :func:`perturbed.train` opens, calls and closes those it is
given; a loop of your own may do the same.
"""

from __future__ import annotations

import csv
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import check_path

if TYPE_CHECKING:
    from .optim.base import PopulationOptimizer

Record = dict[str, Any]


class Log(ABC):
    """A log that begins and ends with a run.

    Attributes:
        everywhere: whether all processes of a run need it, because it measures rather than writes;
            it is then called as soon as a step is done, and what it adds to the record is logged.
            Logs that write do so in the first process alone.
    """

    everywhere = False

    def open(self, optimizer: PopulationOptimizer, steps: int | None = None) -> None:  # noqa: B027
        """Begin, or go on after ``optimizer.steps`` steps.

        Args:
            optimizer: that is trained.
            steps: how many there will be in all; None if nobody knows.
        """

    @abstractmethod
    def __call__(self, record: Record) -> None:
        """Take the record of a step."""

    def close(self) -> None:  # noqa: B027
        """End; called once for every ``open``, whatever happened since."""


def plain(value: Any) -> Any:
    """Return the number of a tensor of one element; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


# ---- a file --------------------------------------------------------------------------------------


class CSVLog(Log):
    """A CSV file with a row for each record and a column for each name.

    A run that is resumed goes on with its file: rows of later steps than the one it resumes from,
    and a row that was cut when the process died, are dropped. A run from the start replaces the
    file. A name that is new gets a column; earlier rows are empty there. Every row is written
    out at once. Floats have all their digits.

    Args:
        path: of the file; its folder is made.

    Raises:
        ValueError: (from ``open``) a file that is no such log, which is left as it is.

    Example:
        >>> import tempfile, torch, perturbed
        >>> net = torch.nn.Linear(2, 1)
        >>> pso = perturbed.PSO(net, particles=4)
        >>> file = tempfile.mkdtemp() + "/run.csv"
        >>> log = [perturbed.CSVLog(file)]
        >>> for record in perturbed.train(pso, lambda net: net.bias.item(), steps=3, log=log):
        ...     pass
        >>> [line.split(",")[0] for line in open(file)]
        ['step', '1', '2', '3']
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Store the path; nothing is written yet."""
        self.path = check_path("path", path)
        self._columns: list[str] = []
        self._file: Any = None

    def open(self, optimizer: PopulationOptimizer, steps: int | None = None) -> None:
        """Open the file and drop rows after ``optimizer.steps``."""
        columns, rows = self._read()
        kept = [row for row in rows if int(row["step"]) <= optimizer.steps]
        self._write(columns if kept else [], kept)

    def __call__(self, record: Record) -> None:
        """Write a row."""
        if self._file is None:
            raise RuntimeError(f"the log {self.path} is closed: call open() first")
        if "step" not in record:
            raise ValueError(f"record must have the entry 'step', got {list(record)}")
        new = [name for name in record if name not in self._columns]
        if new:
            columns = self._columns or ["step"]
            self._write([*columns, *(n for n in new if n not in columns)], self._read()[1])
        self._rows([record])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[str], list[Record]]:
        """Return the columns and the whole rows of the file; none, where there is no file."""
        if not self.path.exists():
            return [], []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        if text and text[:4] + text[4:5].strip("\n") not in ("step", "step,"):
            raise ValueError(
                f"{self.path} is no log of a run: its first column must be 'step', got "
                f"{text.splitlines()[0][:40]!r}"
            )
        whole = text[: text.rfind("\n") + 1]  # without a line that was cut
        columns, *lines = csv.reader(io.StringIO(whole)) if whole else [[]]
        if lines and len(lines[-1]) != len(columns):  # cut inside of a text of several lines
            lines.pop()
        rows = []
        for number, line in enumerate(lines, 2):
            if len(line) != len(columns) or not line[0].isdigit():
                raise ValueError(
                    f"{self.path} is no log of a run: row {number} must have a step and "
                    f"{len(columns)} columns, got {line}"
                )
            rows.append(dict(zip(columns, line, strict=True)))
        return columns, rows

    def _write(self, columns: list[str], rows: list[Record]) -> None:
        """Replace the file, in one move, and leave it open for more rows."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        self._columns = columns
        self._file = open(partial, "w", newline="", encoding="utf-8")
        try:
            self._rows([{name: name for name in columns}, *rows] if columns else [])
            os.replace(partial, self.path)  # the file stays open, under its new name
        except BaseException:
            self.close()
            partial.unlink(missing_ok=True)
            raise

    def _rows(self, rows: Iterable[Record]) -> None:
        writer = csv.writer(self._file, lineterminator="\n")
        writer.writerows([plain(row.get(name, "")) for name in self._columns] for row in rows)
        self._file.flush()


# ---- a screen ------------------------------------------------------------------------------------


class Progress(Log):
    """A progress bar, by tqdm.

    Args:
        show: entries of the record to show beside it, where a record has them.
        **options: of ``tqdm.tqdm``, such as ``desc`` or ``file``.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, show: Sequence[str] = ("mean", "best"), **options: Any) -> None:
        """Store what to show; the bar appears with the run."""
        try:
            import tqdm
        except ImportError as error:
            raise ImportError('Progress needs tqdm: pip install "perturbed[log]"') from error
        names = list(show) if isinstance(show, (list, tuple)) else [None]
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"show must be a list of names, got {show!r}")
        self.show = tuple(show)
        self.options = {"unit": "step", **options}
        self._make = tqdm.tqdm
        self._bar: Any = None

    def open(self, optimizer: PopulationOptimizer, steps: int | None = None) -> None:
        """Show the bar, at ``optimizer.steps`` of ``steps``."""
        self._bar = self._make(total=steps, initial=optimizer.steps, **self.options)

    def __call__(self, record: Record) -> None:
        """Move the bar."""
        shown = {name: plain(record[name]) for name in self.show if name in record}
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(record["step"] - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TensorBoard(Log):
    """Scalars for TensorBoard: ``tensorboard --logdir runs``.

    Points of later steps than the one that a run resumes from disappear from its curves.

    Args:
        folder: of the run; runs beside each other in a folder are compared.
        prefix: of the scalars' names, such as "train/".

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike, prefix: str = "") -> None:
        """Store the folder; nothing is written yet."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard needs the package tensorboard: pip install "perturbed[log]"'
            ) from error
        self.folder, self.prefix = check_path("folder", folder), prefix
        self._make = SummaryWriter
        self._writer: Any = None

    def open(self, optimizer: PopulationOptimizer, steps: int | None = None) -> None:
        """Open a file of events, which ends the curves of older ones at ``optimizer.steps``."""
        first = optimizer.steps + 1
        # Seconds until events are written out; what a killed process loses.
        self._writer = self._make(str(self.folder), purge_step=first, flush_secs=10)

    def __call__(self, record: Record) -> None:
        """Write the record's numbers."""
        for name, value in record.items():
            value = plain(value)
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(self.prefix + name, value, record["step"])

    def close(self) -> None:
        """Write out and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
