"""ScalarOptimizer: what optimizers have in common whose closure returns one loss."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...checks import check_like, check_tensor, undone_by
from ...noise.state import as_seed, check_seed
from .closure import Closure, call, check_closure, to_loss
from .samplers import CANDIDATES, Source, sample

# Stands in a saved state for an option that is a function.
_FUNCTION = "<function>"

Point = list[Tensor]
Trial = Callable[[Point], float]


class ScalarOptimizer(torch.optim.Optimizer, ABC):
    """Base of optimizers that move parameters by the losses that a closure returns.

    ``loss = optimizer.step(closure)``, where ``closure()`` evaluates the model with the parameters
    as they are and returns one loss, a number or a tensor of one element, without ``backward``. It
    is called without gradients, as often as the method needs. Parameters with
    ``requires_grad=False`` stay as they are. Random numbers are those of the noise contract, a
    function of ``seed`` and the number of the draw; torch's global generators are not touched.

    A loss that is NaN or infinite is never an improvement. The best point that any call of the
    closure saw is kept. Where the closure shows other data at each step, losses of different steps
    do not compare, and neither do bests. A step whose closure raises leaves parameters, random
    numbers and counters as they were. Points are computed in float32, in float64 for float64
    parameters, and rounded where they enter a parameter; narrower parameters have a copy of the
    wider numbers here, so that small moves add up.

    A subclass says what a step does (:meth:`_search`), what a group's options may be
    (:meth:`_check_group`), and what it remembers (:meth:`_start`); the loss of the present point,
    if it does, as "loss".

    Attributes:
        seed: of the random numbers.
        progress: what a resumed run needs: plain numbers, tensors and lists of tensors, one for
            each parameter that moves. Entries are replaced, never changed in place, so that a
            shallow copy is a snapshot.

    Args:
        params: parameters or groups of them, as every optimizer of torch takes them.
        defaults: options of groups; has "lr".
        seed: of the random numbers; None takes one from the operating system.

    Raises:
        TypeError: complex parameters, options of another type.
        ValueError: no parameter that requires grad, options out of range.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int | None = 0) -> None:
        """Check the groups; nothing is evaluated yet."""
        self.seed = check_seed(seed)
        self.progress: dict[str, Any] = {}
        # Of the parameters after the last step; torch counts every change in place.
        self._versions: list[int] = []
        super().__init__(params, defaults)
        self.progress = self._new_progress()
        self._trained()

    # ---- what a subclass says ------------------------------------------------------------------

    @abstractmethod
    def _search(self, home: Point, trial: Trial) -> tuple[Point, float]:
        """Do one step.

        Args:
            home: where the parameters are; not to be changed in place.
            trial: puts the parameters at a point and returns the loss there.

        Returns:
            Where the parameters shall be, and the loss that ``step`` returns.
        """

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError if an option of a group is wrong."""

    def _start(self) -> dict[str, Any]:
        """Return what the method remembers, as it is before the first step."""
        return {}

    def _leave(self) -> None:
        """Forget the loss of the present point: somebody else has moved the parameters."""
        if "loss" in self.progress:
            self.progress["loss"] = None

    def _finish(self) -> None:
        """Act on the parameters after they are where ``_search`` wanted them."""

    # ---- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults for what it leaves open.

        What the method remembers starts over, best point included; the counters go on.
        """
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(f"params must be real, got a parameter of {p.dtype}")
        if self.progress:
            self._start_over()

    def _trained(self) -> list[tuple[int, Tensor]]:
        """Return the parameters that move, with the number of their group.

        Raises:
            ValueError: there is none.
        """
        found = [
            (g, p)
            for g, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]
        if not found:
            raise ValueError(
                "params must have a parameter that requires grad, got none: all are frozen"
            )
        return found

    def _of_groups(self) -> Iterator[tuple[int, slice]]:
        """Iterate over the numbers of groups, with the part of a point that belongs to each."""
        numbers = [g for g, _ in self._trained()]
        for g in dict.fromkeys(numbers):
            first = numbers.index(g)
            yield g, slice(first, first + numbers.count(g))

    def _option(self, name: str) -> list[Any]:
        """Return an option of the groups for each parameter that moves."""
        return [self.param_groups[g][name] for g, _ in self._trained()]

    # ---- random numbers ------------------------------------------------------------------------

    def _next_draw(self) -> int:
        """Move on to fresh random numbers; return the number of the draw."""
        self.progress["draws"] += 1
        return self.progress["draws"] - 1

    def _sample(self, like: Point, draw: int, candidate: int = 0) -> Point:
        """Return random tensors like those of a point, from the samplers of the groups.

        Args:
            like: the point.
            draw: a number from :meth:`_next_draw`.
            candidate: which of the draw's candidates, from 0.
        """
        drawn: Point = []
        for g, part in self._of_groups():
            sampler = self.param_groups[g]["sampler"]
            drawn += sample(sampler, like[part], self._source(draw, candidate, g))
        return drawn

    def _source(self, draw: int, candidate: int = 0, group: int = 0) -> Source:
        """Return where the random numbers of a candidate and a group come from."""
        return Source(self.seed, draw, group * CANDIDATES + candidate)

    # ---- one step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Do one step of the method.

        Args:
            closure: returns the loss of the parameters as they are; see the class.

        Returns:
            () float64 on the CPU: a loss of this step; the class says which.

        Raises:
            TypeError: a closure, or what it returned, of another type.
            ValueError: several losses, or no parameter that requires grad.
            RuntimeError: the closure calls ``backward``.
        """
        check_closure(closure)
        with self._turn():
            return self._step(closure)

    def _turn(self) -> AbstractContextManager[Any]:
        """Return the block in which a step needs to be alone."""
        return nullcontext()

    def _step(self, closure: Closure) -> Tensor:
        trained = [p for _, p in self._trained()]
        before = self._snapshot()
        unmoved = self._follow(trained)
        home = self._read(trained)
        try:
            point, loss = self._run(home, closure)
            self.progress["steps"] += 1
            _write(trained, point)
            self._keep_wide(trained, point)
            self._finish()
            self._versions = [p._version for p in trained]
        except BaseException:
            _write(trained, home)
            self._restore(before)
            self._versions = [p._version for p in trained] if unmoved else []
            raise
        return torch.tensor(loss, dtype=torch.float64)

    def _snapshot(self) -> Any:
        """Return what :meth:`_restore` needs to undo a step, apart from the parameters."""
        return dict(self.progress)

    def _restore(self, snapshot: Any) -> None:
        """Go back to a snapshot."""
        self.progress = snapshot

    def _run(self, home: Point, closure: Closure) -> tuple[Point, float]:
        """Do what a step does; a method that does not evaluate points one by one overrides it."""
        return self._search(home, lambda point: self._try(point, closure))

    def _place(self, point: Point) -> None:
        """Put the parameters at a point."""
        _write([p for _, p in self._trained()], point)

    def _try(self, point: Point, closure: Closure) -> float:
        """Return the loss of a point."""
        self._place(point)
        loss = to_loss(call(closure))
        self._note(loss, lambda: [p.detach().clone() for _, p in self._trained()])
        return loss

    def _note(self, loss: float, point: Callable[[], Point]) -> None:
        """Count an evaluation, and keep its point, in the parameters' dtypes, if it is the best."""
        self.progress["evaluations"] += 1
        if math.isfinite(loss) and loss < self.progress["best_loss"]:
            self.progress["best_loss"] = loss
            self.progress["best"] = point()

    def _read(self, trained: list[Tensor]) -> Point:
        """Return where the parameters are, in numbers wide enough to add small moves to."""
        wide = self.progress["wide"] or [None] * len(trained)
        point = []
        for p, held in zip(trained, wide, strict=True):
            # Somebody else may have moved the parameter meanwhile: then what is held is old.
            if held is not None and torch.equal(held.to(p), p.detach()):
                point.append(held.to(p.device))
            else:
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                copied = p.detach().to(dtype, copy=True)
                point.append(copied.contiguous())
        return point

    def _keep_wide(self, trained: list[Tensor], point: Point) -> None:
        narrow = [p.dtype != t.dtype for p, t in zip(trained, point, strict=True)]
        if any(narrow):
            wide = [t if n else None for t, n in zip(point, narrow, strict=True)]
            self.progress["wide"] = wide

    def _follow(self, trained: list[Tensor]) -> bool:
        """Take note of what somebody else did to the parameters since the last step.

        If others are to move than then, what the method remembers starts over.

        Returns:
            Whether the parameters are certainly where the last step put them.
        """
        shapes = [list(p.shape) for p in trained]
        flags = [p.requires_grad for group in self.param_groups for p in group["params"]]
        now = {"shapes": shapes, "flags": flags}
        if self.progress["trained"] not in ({}, now):
            self._start_over()
        self.progress["trained"] = now
        # None are known after a load, which may come before that of the parameters.
        moved = self._versions != [p._version for p in trained]
        if self._versions and moved:
            self._leave()
        return not moved

    def _new_progress(self) -> dict[str, Any]:
        return {
            "steps": 0,
            "evaluations": 0,
            "draws": 0,
            "best_loss": math.inf,
            "best": [],
            "wide": [],
            "trained": {},
            **self._start(),
        }

    def _start_over(self) -> None:
        """Forget all but the counters and the position in the random numbers."""
        kept = {name: self.progress[name] for name in ("steps", "evaluations", "draws")}
        self.progress = {**self._new_progress(), **kept}
        self._versions = []

    # ---- what was found ------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        """Losses evaluated so far: calls of the closure, and members of each that shows several."""
        return self.progress["evaluations"]

    @property
    def best_loss(self) -> float:
        """The lowest loss so far; infinite before any."""
        return self.progress["best_loss"]

    def best(self) -> list[Tensor]:
        """Return a copy of the parameters that had :attr:`best_loss`, in the order of the groups.

        Parameters that do not move, and all before the first finite loss, are as they are.
        """
        found = iter(self.progress["best"] or [p for _, p in self._trained()])
        return [
            (next(found) if p.requires_grad else p).detach().clone()
            for group in self.param_groups
            for p in group["params"]
        ]

    @torch.no_grad()
    def load_best(self) -> None:
        """Set the parameters to :meth:`best`."""
        _write([p for group in self.param_groups for p in group["params"]], self.best())

    # ---- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the parameters: plain numbers and tensors.

        Options that are functions are not in it; the optimizer that loads it keeps its own.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            for name in [n for n, value in group.items() if callable(value)]:
                group[name] = _FUNCTION
        # A state that is held must not move on, though entries are replaced and never changed.
        progress = copy.deepcopy(self.progress)
        return {**state, "progress": progress, "seed": self.seed, **self._others()}

    def _others(self) -> dict[str, Any]:
        """Return the states of other objects that belong to this one's, by name."""
        return {}

    def _load_others(self, state: dict[str, Any]) -> None:
        """Restore :meth:`_others`."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the parameters are restored as well.

        Raises:
            TypeError: no dictionary.
            ValueError: entries missing or unknown, or of other parameters; nothing has changed.
        """
        name = type(self).__name__
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"state_dict must be a dict from {name}.state_dict, got {type(state_dict).__name__}"
            )
        progress, expected = state_dict.get("progress"), self._new_progress()
        missing = [n for n in ("seed", *self._others()) if n not in state_dict]
        if missing or not isinstance(progress, dict) or set(progress) != set(expected):
            got = sorted(progress) if isinstance(progress, dict) else sorted(state_dict)
            also = f"; it lacks {missing}" if missing else ""
            raise ValueError(
                f"state_dict must be one of {name}, with progress of {sorted(expected)}, got "
                f"{got}{also}"
            )
        shapes = [list(p.shape) for _, p in self._trained()]
        check_like("progress", progress, expected)
        saved = progress["trained"].get("shapes", shapes)
        if saved != shapes:
            raise ValueError(f"state_dict must be of parameters of shapes {shapes}, got {saved}")
        self._check_progress(progress)
        as_seed(state_dict["seed"])
        before = self.state_dict()
        with undone_by(lambda: self._load(before)):
            self._load(state_dict)

    def _check_progress(self, progress: dict[str, Any]) -> None:
        """Raise unless what a state remembers, of the right kinds, can be gone on from."""
        if progress["best"]:
            self._check_point("progress['best']", progress["best"])
        if progress["wide"]:  # of parameters that are wide enough themselves, nothing
            self._check_point("progress['wide']", progress["wide"], optional=True)

    def _check_point(self, name: str, point: object, optional: bool = False) -> None:
        """Raise unless ``point`` has a tensor, or None if optional, for each parameter."""
        trained = [p for _, p in self._trained()]
        if not isinstance(point, list) or len(point) != len(trained):
            got = len(point) if isinstance(point, list) else type(point).__name__
            raise ValueError(f"{name} must be a list of {len(trained)} tensors, got {got}")
        for i, (part, p) in enumerate(zip(point, trained, strict=True)):
            if part is not None or not optional:
                check_tensor(f"{name}[{i}]", part, p)

    def _load(self, state: dict[str, Any]) -> None:
        self._load_others(state)
        super().load_state_dict({**state, "param_groups": self._with_functions(state)})
        self.seed = state["seed"]
        devices = [p.device for _, p in self._trained()]
        self.progress = _placed(copy.deepcopy(state["progress"]), devices)
        self._versions = []

    def _with_functions(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a state's groups with the functions that stand here where it left them out."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group, own in zip(groups, self.param_groups, strict=False):  # torch checks the number
            for name in [n for n, value in group.items() if value == _FUNCTION]:
                if not callable(own.get(name)):
                    raise ValueError(
                        f"{name} was a function when the state was saved and must be one here, got "
                        f"{own.get(name)!r}"
                    )
                group[name] = own[name]
        return groups

    # ---- copies ------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Take along what this class and its subclasses hold, which torch's does not."""
        return {**own_attributes(self), "_versions": []}


def own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what a copy of an optimizer takes along, attributes of subclasses included.

    Without torch's hooks and the wrapper that a learning-rate scheduler puts around ``step``.
    """
    return {
        name: value
        for name, value in optimizer.__dict__.items()
        if name not in ("step", "_opt_called") and not name.startswith("_optimizer_")
    }


def _write(parameters: list[Tensor], point: Point) -> None:
    """Copy a point into parameters, which stay the tensors that they are."""
    torch._foreach_copy_([p.detach() for p in parameters], point)


def _placed(value: Any, devices: list[torch.device]) -> Any:
    """Bring lists of tensors, one for each parameter that moves, to the parameters' devices."""
    if isinstance(value, dict):
        return {key: _placed(item, devices) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if not any(isinstance(item, Tensor) for item in value):
        return [_placed(item, devices) for item in value]
    pairs = zip(value, devices, strict=True)
    return [item.to(d) if isinstance(item, Tensor) else item for item, d in pairs]
