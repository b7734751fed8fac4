"""A run as a file: everything that its tables and plots are made of, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import Result, Sharing, Work
from bench.variance import Cosine

SCHEMA = 2  # raise it when a field changes its meaning; new fields have defaults


@dataclasses.dataclass
class Run:
    """What a run measured, and where.

    Attributes:
        results: rows of all suites but ``variance``, in the order of the tables.
        machine: facts, by name; of the peers' interpreter those that differ, beginning "peers".
        roofs: rates that bound the rows, see bench/machine.py.
        settings: options of the command line.
        cosines: of suite ``variance``.
        notes: remarks on suites.
        errors: suite -> why it has no results.
    """

    results: list[Result] = dataclasses.field(default_factory=list)
    machine: dict[str, str] = dataclasses.field(default_factory=dict)
    roofs: dict[str, float] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    cosines: list[Cosine] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.machine

    @property
    def failed(self) -> bool:
        """Whether something that should have run did not."""
        return bool(self.errors) or any(result.failed for result in self.results)


def write_json(path: Path, run: Run) -> None:
    """Write a run; a ratio without its base is null."""
    document = {"schema": SCHEMA, **dataclasses.asdict(run)}
    text = json.dumps(_without_nan(document), indent=1, allow_nan=False)
    partial = path.with_name(path.name + ".partial")  # a run that is killed leaves the last whole
    partial.write_text(text + "\n")
    partial.replace(path)


def _without_nan(value: Any) -> Any:
    """Put None, which JSON has, for NaN."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _made(kind: Callable[..., Any], fields: dict[str, Any]) -> Any:
    """A record whose fields hold null for NaN."""
    return kind(**{k: math.nan if v is None else v for k, v in fields.items()})


def _result(fields: dict[str, Any]) -> Result:
    sharing, work = fields.pop("sharing", None), fields.pop("work", None)
    result = _made(Result, fields)
    result.sharing = None if sharing is None else _made(Sharing, sharing)
    result.work = None if work is None else _made(Work, work)
    return result


def read_json(path: Path) -> Run:
    """What :func:`write_json` wrote.

    Raises:
        ValueError: a file that cannot be read, is no JSON, or of another schema.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a file of `python -m bench --save`: {error}") from None
    schema = document.pop("schema", None) if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} must be a file of `python -m bench --save` with schema {SCHEMA}, got {schema}"
        )
    document["settings"] = document.pop("options", None) or document.get("settings", {})
    results = [_result(fields) for fields in document.pop("results")]
    cosines = [_made(Cosine, fields) for fields in document.pop("cosines")]
    known = {field.name for field in dataclasses.fields(Run)}
    rest = {name: value for name, value in document.items() if name in known}
    return Run(results=results, cosines=cosines, **rest)
