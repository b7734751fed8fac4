"""What the optimizers of a population share: ask and tell, the rules for NaN, numbers for a log."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..checks import check_flag, check_like, undone_by
from ..description import describe, outline
from ..model import PerturbedModel
from ..noise.state import check_draw
from .share import Share


class PopulationOptimizer(ABC):
    """Base of optimizers that score a population and learn from its losses.

    A subclass says how a population is drawn (:meth:`_draw`), what its losses change
    (:meth:`_update`), and what else a resumed run needs (:meth:`_state`, :meth:`_load_state`).

    ``step(closure)`` does all of it; ``ask()`` and ``tell(values)`` are its two halves, for losses
    that come from elsewhere. Losses that are NaN or infinite never win and never poison an update;
    ``stats`` counts them.

    Args:
        maximize: whether values are to be raised instead of lowered; the sign is flipped on
            arrival.

    Attributes:
        steps: populations told so far.
        evaluations: members scored so far.
        evaluation: what this process scores of a population; a subclass sets it.
    """

    evaluation: Share

    def __init__(self, maximize: bool) -> None:
        """Check and store; nothing is drawn yet."""
        self.maximize = check_flag("maximize", maximize)
        self.steps = 0
        self.evaluations = 0
        self._asked = False
        self._agreed = False
        # Of the last step: numbers, or what they are to be read from: member values, how many of
        # them are finite, their mean. On the model's device, so that tell() waits for nothing.
        self._last: dict[str, float | int] = {"mean": math.nan, "best": math.nan, "nonfinite": 0}
        self._unread: tuple[Tensor, Tensor, Tensor] | None = None
        # Of all steps: members recorded, and how many of them were finite.
        self._recorded = 0
        self._finite: Tensor | int = 0

    # ---- what a subclass says ------------------------------------------------------------------

    @abstractmethod
    def _module(self) -> nn.Module:
        """Return the plain model, whose parameters are what is learned."""

    @abstractmethod
    def _draw(self) -> Any:
        """Make the next population; return what ``ask`` returns."""

    @abstractmethod
    def _members(self, values: Any) -> Tensor:
        """Bring what ``tell`` got to floating-point member values, or say what is wrong with it."""

    @abstractmethod
    def _update(self, losses: Tensor) -> None:
        """Learn from the member losses, lower is better; some may not be finite."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return the entries of ``state_dict`` beside the counters; its tensors are copied."""

    @abstractmethod
    def _load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`_state`, or raise and change nothing; the entries are all there."""

    def _snapshot(self) -> Any:
        """Return what :meth:`_restore` needs to undo a draw."""
        return None

    def _restore(self, snapshot: Any) -> None:  # noqa: B027 (some draw nothing)
        """Undo the draws since :meth:`_snapshot`."""

    def _score(self, closure: Callable[..., Any]) -> Any:
        """Have ``closure`` score the population."""
        return closure()

    # ---- one step ------------------------------------------------------------------------------

    def ask(self) -> Any:
        """Make the next population, to be scored and told.

        Raises:
            ProcessError: at the first step of processes that do not train the same thing.
        """
        self._agree()
        population = self._draw()
        self._asked = True
        return population

    @torch.no_grad()
    def tell(self, values: Any) -> Tensor:
        """Learn from what the population of the last ``ask`` scored.

        Args:
            values: one per row, (B,), which are averaged per member, or one per member. A tensor or
                what ``torch.as_tensor`` takes; integers and booleans are converted, so counts of
                errors will do.

        Returns:
            () mean over the finite members, in the sign of ``values``; NaN if there is none.

        Raises:
            RuntimeError: no ``ask`` since the last ``tell``.
            ValueError: another number of values.
            TypeError: values that are no real numbers.
        """
        if not self._asked:
            raise RuntimeError("tell: there is no population to score; call ask() first")
        members = self._members(values)
        self._update(-members if self.maximize else members)
        numbers = self._numbers(members)
        self._told(members.numel(), numbers, self._finite + numbers[1])
        return numbers[2]

    def step(self, closure: Callable[..., Any]) -> Tensor:
        """Ask, score with ``closure`` and tell; without recording gradients.

        If ``closure`` raises, the draw goes back to where it was and nothing else has changed: the
        next step uses the noise that this one would have used.

        Args:
            closure: returns the values that :meth:`tell` takes, usually row losses of ``pm(x)``.

        Returns:
            () mean over the finite members, as :meth:`tell`.
        """
        with self.evaluation.turn.taken():
            before, asked, steps = self._snapshot(), self._asked, self.steps
            try:
                self.ask()
                with torch.no_grad():
                    values = self._score(closure)
                return self.tell(values)
            except BaseException:
                if self.steps == steps:  # nothing has been learned
                    self._restore(before)
                    self._asked = asked
                raise

    def _agree(self) -> None:
        """Once, make sure that all processes train the same thing."""
        processes = self.evaluation.processes
        if self._agreed or processes is None:
            return
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        state = self._entries()
        state.pop("memory", None)  # what this process's share takes
        # What a person recognises comes first: a message shows the first differences alone.
        processes.agree(
            {
                **describe(self),
                "kernels": _C.cpu_capability(),  # others round sums in another way
                "torch": str(torch.__version__),
                "directions of each process": self.evaluation.split.sizes,
                **outline(own),
                "state": outline(state),
                "model": outline(self._module().state_dict()),
            }
        )
        self._agreed = True

    def _numbers(self, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a copy of the member values, how many are finite, and the mean of those."""
        count = members.isfinite().sum()
        return members.clone(), count, members.nan_to_num(0.0, 0.0, 0.0).sum() / count

    def _told(
        self, evaluations: int, numbers: tuple[Tensor, Tensor, Tensor], finite: Tensor
    ) -> None:
        """Count a step, and keep what :attr:`stats` are read from.

        Args:
            evaluations: member values of the step.
            numbers: of :meth:`_numbers`.
            finite: () finite members of all steps.
        """
        self._asked = False
        self.steps += 1
        self.evaluations += evaluations
        self._recorded += numbers[0].numel()
        self._unread, self._finite = numbers, finite

    def _read(self) -> dict[str, float | int]:
        """Return the numbers of the last step; waits for the device where they are new."""
        if self._unread is not None:
            members, finite, mean = self._unread
            worst = -torch.inf if self.maximize else torch.inf
            usable = members.nan_to_num(worst, worst, worst)
            best = usable.amax() if self.maximize else usable.amin()
            nonfinite = members.numel() - int(finite)
            self._last = {"mean": float(mean), "best": float(best), "nonfinite": nonfinite}
            self._unread = None
        return self._last

    # ---- what happened so far ------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, float | int]:
        """Numbers for a log. Reading them waits for the device; ``tell`` does not.

        ``steps`` and ``evaluations`` (members scored) so far; ``mean`` and ``best`` member value of
        the last step, in the sign of the values, over its finite members; ``nonfinite``, how many
        were not, and ``nonfinite_total`` of all steps.
        """
        return {
            "steps": self.steps,
            "evaluations": self.evaluations,
            **self._read(),
            "nonfinite_total": self._recorded - int(self._finite),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model's parameters.

        Plain numbers and tensors, which ``torch.load(weights_only=True)`` takes. A learning-rate
        scheduler has a ``state_dict`` of its own. Tensors are copies, but for the torch
        optimizer's, whose ``state_dict`` shares them.
        """
        return {n: v if n == "optimizer" else _copied(v) for n, v in self._entries().items()}

    def _entries(self) -> dict[str, Any]:
        """Return the entries of ``state_dict`` with the tensors that are in use."""
        return {
            "class": type(self).__name__,
            "maximize": self.maximize,
            **self._state(),
            "memory": self.evaluation.memory_state(),
            "asked": self._asked,
            "stats": self.stats,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the parameters are restored as well.

        Raises:
            TypeError: no dictionary.
            ValueError: entries missing or unknown, or those of another kind of run. Then nothing
                has changed.
        """
        name = type(self).__name__
        if not isinstance(state, dict):
            raise TypeError(
                f"state must be a dict from {name}.state_dict, got {type(state).__name__}"
            )
        own = self._entries()
        if set(state) != set(own):
            raise ValueError(f"state must have the entries {sorted(own)}, got {sorted(state)}")
        for part in ("class", "maximize"):
            if state[part] != own[part]:
                raise ValueError(f"state is of {part} {state[part]}, this one is {own[part]}")
        for part in ("stats", "noise", "optimizer"):
            if part in own and not isinstance(state[part], dict):
                raise TypeError(f"state[{part!r}] must be a dict, got {type(state[part]).__name__}")
            missing = set(own.get(part, ())) - set(state.get(part, ()))
            if missing:
                raise ValueError(f"state[{part!r}] must have the entries {sorted(missing)}")
        for part in ("stats", "asked"):
            check_like(f"state[{part!r}]", state[part], own[part])
        if "noise" in own:
            noise = state["noise"]
            check_draw(noise["seed"], noise["generation"], noise.get("sigma", 0.0))
        learnt = self.evaluation.memory_state()
        with undone_by(lambda: self.evaluation.load_memory_state(learnt)):
            self.evaluation.load_memory_state(state["memory"])
            self._load_state(state)
        self._agreed = False
        self._asked = bool(state["asked"])
        stats = state["stats"]
        self.steps = int(stats["steps"])
        self.evaluations = int(stats["evaluations"])
        self._recorded, self._finite = int(stats["nonfinite_total"]), 0
        self._last = {
            "mean": float(stats["mean"]),
            "best": float(stats["best"]),
            "nonfinite": int(stats["nonfinite"]),
        }
        self._unread = None


def _copied(value: Any) -> Any:
    """Return a value with copies of its tensors, which may be in dictionaries."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


# ---- what subclasses check ---------------------------------------------------------------------


def check_model(pm: object) -> PerturbedModel:
    """Return ``pm`` if it is a PerturbedModel."""
    if not isinstance(pm, PerturbedModel):
        raise TypeError(f"pm must be a PerturbedModel, got {type(pm).__name__}")
    return pm


def to_numbers(values: Any, device: torch.device | None = None) -> Tensor:
    """Bring values to a floating-point tensor on ``device`` (their own), wide enough to average.

    Raises:
        TypeError: what is no tensor of real numbers.
    """
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"values must be a tensor of numbers, got {type(values).__name__} ({error})"
        ) from None
    if values.is_complex():
        raise TypeError(f"values must be real numbers, got {values.dtype}")
    if values.is_meta:
        raise TypeError("values must be numbers, got a tensor on the device meta, which has none")
    # Wide enough to average without overflow, and for counts to stay exact.
    if not values.is_floating_point():
        values = values.to(torch.float64)
    elif values.itemsize < 4:
        values = values.to(torch.float32)
    return values.detach().to(device)  # None: where they are


def member_values(values: Any, pm: PerturbedModel, device: torch.device) -> Tensor:
    """Bring values, one per row or one per member, to (S, D) member values on ``device``.

    Args:
        values: (B,), averaged per member, or (S, D); what :func:`to_numbers` takes.
        pm: whose population they are of.
        device: of the result.

    Raises:
        ValueError: another number of values.
        TypeError: what is no tensor of real numbers.
    """
    values = to_numbers(values, device)
    d, antithetic = pm.directions, pm.state.antithetic
    signs = {None: (1, 2), True: (2,), False: (1,)}[antithetic]
    if values.dim() == 2 and values.shape[1] == d and values.shape[0] in signs:
        return values
    if values.dim() == 1 and values.numel() > 0 and values.numel() % d == 0:
        return pm.member_mean(values)
    raise ValueError(
        f"values must be one per row, (B,) with B a multiple of D = {d} directions, or one per "
        f"member, (S, D) with S = {' or '.join(map(str, signs))}, got {tuple(values.shape)}"
    )
