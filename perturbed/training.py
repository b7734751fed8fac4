"""A loop over steps, with what a long run needs around it: logs, checkpoints, an end.

``train`` is an iterator and no framework: the body of the loop is the caller's, who may look, add
to what is logged, and break.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .checkpoint import Checkpoints
from .checks import as_count, check_number
from .distributed import is_first
from .logs import Log, Record
from .optim.base import PopulationOptimizer
from .optim.distribution import SeparableSearch
from .optim.strategy import EvolutionStrategy


def train(
    optimizer: PopulationOptimizer,
    closure: Any,
    steps: int | None = None,
    seconds: float | None = None,
    every: int = 1,
    log: Sequence[Callable[[Record], Any]] = (),
    schedulers: Sequence[Any] = (),
    checkpoints: Checkpoints | None = None,
) -> Iterator[Record]:
    """Iterate over the steps of a run: train, log, save; go on where a checkpoint says.

    Each step yields its record, a dictionary of numbers:

    - ``step``: steps done, 1 after the first
    - ``evaluations``: members scored so far
    - ``seconds``: since the run began; where a checkpoint was resumed, without the time in which
      nothing ran and that of steps that were lost
    - ``lr``: learning rate of the step; ``lr_0``, ``lr_1`` ... of several groups
    - ``mean``, ``best``, ...: the optimizer's ``stats``, such as ``nonfinite``
    - ``evaluations_per_second``: over the steps since the last such number, without the time that
      logs, checkpoints and the loop's body take
    - ``sigma``: noise scale; the mean standard deviation of SNES and PGPE

    The last three wait for the device. They are there after every ``every`` steps and after the
    last one, and those records are logged. What the loop's body adds to a record is logged with it,
    and logs it if it were not.

    A checkpoint is written after the body has run, when it is time, when the run ends and when the
    loop is left by ``break`` or an error of the body; not after an error of the step itself, which
    leaves the last one. Logs are closed whatever happens.

    Under torch.distributed every process runs the loop, and the first one writes. Where processes
    share the population, leave it in all of them at the same step.

    Args:
        optimizer: NES, ARS, SNES, PGPE, PSO.
        closure: what its ``step`` takes: called without arguments, or a pool. Where data changes
            from step to step, let it follow from ``optimizer.steps``, the number of the step under
            way, and a resumed run sees the same.
        steps: after which the run ends, counted from its beginning, and not from where it resumes;
            None for no such end.
        seconds: after which this call ends; None for no such end. Processes that share a population
            compare their clocks after every ``every`` steps.
        every: steps between two records with all numbers.
        log: called with records: :class:`~perturbed.logs.CSVLog`, ``Progress``, ``TensorBoard``,
            :class:`~perturbed.optim.quality.EstimateQuality`, any function.
        schedulers: of learning rates, stepped after every step; those that want a metric get the
            mean value.
        checkpoints: which the run is resumed from, at the first iteration, and saved to. They must
            hold the model, the optimizer and the schedulers.

    Yields:
        The record of a step.

    Raises:
        TypeError: arguments of another type.
        ValueError: steps or every below 1, seconds not positive, checkpoints that lack a part of
            the run.
        CheckpointError: (at the first iteration) checkpoints of another run, or damaged ones.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> x = pm.replicate(torch.ones(4, 8))
        >>> for record in perturbed.train(nes, lambda: pm(x).square().mean(-1), steps=20):
        ...     if record["step"] % 10 == 0:
        ...         record["test"] = net(torch.ones(8)).item() ** 2
        >>> record["step"], record["evaluations"], record["lr"], record["test"] < 0.1
        (20, 640, 0.1, True)
    """
    if not isinstance(optimizer, PopulationOptimizer):
        raise TypeError(
            "optimizer must be one of a population (NES, ARS, SNES, PGPE, PSO), got "
            f"{type(optimizer).__name__}"
        )
    if not callable(closure) and not hasattr(closure, "evaluate"):
        raise TypeError(f"closure must be a function or a pool, got {type(closure).__name__}")
    as_count("every", every)
    if steps is not None:
        as_count("steps", steps)
    if seconds is not None:
        check_number("seconds", seconds, above=True)
    log, schedulers = _list("log", log), _list("schedulers", schedulers)
    for entry in log:
        if not callable(entry) or isinstance(entry, type):
            raise TypeError(f"log must hold logs or functions of a record, got {entry!r}")
    for scheduler in schedulers:
        if not hasattr(scheduler, "step") or not hasattr(scheduler, "state_dict"):
            raise TypeError(f"schedulers must hold learning-rate schedulers, got {scheduler!r}")
    if checkpoints is not None:
        _check_parts(checkpoints, optimizer, schedulers)
    return _run(optimizer, closure, steps, seconds, every, log, schedulers, checkpoints)


def _run(
    optimizer: PopulationOptimizer,
    closure: Any,
    steps: int | None,
    seconds: float | None,
    every: int,
    log: list[Any],
    schedulers: list[Any],
    checkpoints: Checkpoints | None,
) -> Iterator[Record]:
    before = 0.0  # seconds of earlier calls
    if checkpoints is not None and checkpoints.resume():
        before = float(checkpoints.values.get("training", {}).get("seconds", 0.0))
    if steps is not None and optimizer.steps >= steps:
        return
    measures = [entry for entry in log if getattr(entry, "everywhere", False)]
    writers = [entry for entry in log if entry not in measures] if is_first() else []
    with ExitStack() as stack:
        for entry in (*measures, *writers):
            if isinstance(entry, Log):
                entry.open(optimizer, steps)
                stack.callback(entry.close)
        start = time.perf_counter()
        rate = _Rate(optimizer.evaluations)
        last = False
        while not last:
            rate.start()
            value = optimizer.step(closure)
            step, rates = optimizer.steps, _learning_rates(optimizer)
            for scheduler in schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(value)
                else:
                    scheduler.step()
            reached = steps is not None and step >= steps
            due = reached or step % every == 0
            last = reached or _out_of_time(optimizer, seconds, time.perf_counter() - start, due)
            record: Record = {"step": step, "evaluations": optimizer.evaluations}
            record["seconds"] = before + time.perf_counter() - start
            record.update(rates)
            if due or last:
                stats = optimizer.stats  # waits for the device
                record.update({k: v for k, v in stats.items() if k not in ("steps", *record)})
                record["evaluations_per_second"] = rate.read(optimizer.evaluations)
                record.update(_sigma(optimizer))
            rate.stop()
            size = len(record)
            for measure in measures:
                measure(record)
            left = True
            try:
                yield record
                left = False
            finally:  # where the body breaks or raises, too: the step is done
                if due or last or len(record) > size:
                    for write in writers:
                        write(record)
                if checkpoints is not None and (last or left or step % checkpoints.every == 0):
                    now = before + time.perf_counter() - start
                    checkpoints.save(step, training={"seconds": now})


# ---- numbers of a record -------------------------------------------------------------------------


class _Rate:
    """Members scored per second, while the clock runs."""

    def __init__(self, evaluations: int) -> None:
        self.evaluations, self.seconds, self.since = evaluations, 0.0, 0.0

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.since

    def read(self, evaluations: int) -> float:
        """Return the rate since the last reading."""
        self.stop()
        rate = (evaluations - self.evaluations) / self.seconds if self.seconds else float("inf")
        self.evaluations, self.seconds = evaluations, 0.0
        self.start()
        return rate


def _learning_rates(optimizer: PopulationOptimizer) -> Record:
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        return {}
    rates = [float(group["lr"]) for group in inner.param_groups if "lr" in group]
    if len(rates) == 1:
        return {"lr": rates[0]}
    return {f"lr_{i}": rate for i, rate in enumerate(rates)}


def _sigma(optimizer: PopulationOptimizer) -> Record:
    if isinstance(optimizer, EvolutionStrategy):
        return {"sigma": optimizer.pm.sigma}
    if isinstance(optimizer, SeparableSearch):
        return {"sigma": float(optimizer.std.mean())}
    return {}


def _out_of_time(
    optimizer: PopulationOptimizer, seconds: float | None, taken: float, due: bool
) -> bool:
    """Whether to end, the same in all processes that share the population."""
    if seconds is None:
        return False
    processes = optimizer.evaluation.processes
    if processes is None:
        return taken >= seconds
    # One number and one answer for all, whatever their clocks and limits say.
    over = torch.tensor(taken - seconds, dtype=torch.float64)
    return due and bool(processes.maximum(over) >= 0)


# ---- checks --------------------------------------------------------------------------------------


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def _check_parts(
    checkpoints: object, optimizer: PopulationOptimizer, schedulers: Sequence[Any]
) -> None:
    """Refuse checkpoints that a run could not go on from."""
    if not isinstance(checkpoints, Checkpoints):
        raise TypeError(f"checkpoints must be Checkpoints, got {type(checkpoints).__name__}")
    parts = checkpoints.parts
    if "training" in parts:
        raise ValueError("checkpoints must have no part called 'training': train() has one itself")
    held = {id(part) for part in parts.values()}
    for part in (optimizer, *schedulers):
        if id(part) not in held:
            raise ValueError(
                f"checkpoints must hold the {type(part).__name__} of this run, to go on from it; "
                f"got the parts {sorted(parts)}"
            )
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    kept = {id(p) for module in modules for p in module.parameters()}
    own = optimizer._module().named_parameters()
    missing = [name for name, p in own if p.requires_grad and id(p) not in kept]
    if missing:
        raise ValueError(
            f"checkpoints must hold the model, to go on from it: no part has its parameters "
            f"{missing[:3]}; got the parts {sorted(parts)}"
        )
