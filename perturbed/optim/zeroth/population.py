"""Searches that try several points of one draw: one after the other, or in one forward."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ...model import PerturbedModel
from ..base import member_values, to_numbers
from ..evaluation import Evaluation
from ..strategy import perturbed_parameters
from .base import Point, ScalarOptimizer
from .closure import Closure, call


class Tries(Protocol):
    """The candidates of a draw: a centre plus each of several moves."""

    def single(self, point: Point) -> float:
        """Return the loss of one point."""

    def losses(self, centre: Point, scales: list[float]) -> list[float]:
        """Return the losses of ``centre + move(k)`` for all k.

        Args:
            centre: a point.
            scales: standard deviation of the moves of each parameter.
        """

    def move(self, k: int) -> Point:
        """Return move k of the last :meth:`losses`; nobody else holds it."""


class PopulationSearch(ScalarOptimizer):
    """Base of searches whose several candidates a PerturbedModel can evaluate in one forward.

    Given a :class:`~perturbed.PerturbedModel` instead of parameters, the closure returns losses of
    rows, (B,), or members, (S, D), as for ``NES``, and the moves are the noise of the model's
    layers, whose sigma the search sets. It is called for all members at once, and, where a method
    needs the loss of a single point, for one direction without noise: so it calls ``pm.replicate``
    itself. Everything else is what the search does with the parameters of ``pm.member(d, sign)``
    one after the other; losses are those of another order of sums. With ``chunk`` or ``max_memory``
    the closure is called for some members at a time; see ``docs/memory.md``.

    Args:
        params: parameters, groups of them, or a PerturbedModel, whose perturbed parameters then are
            the only group.
        defaults: options of groups.
        seed: of the random numbers; those of a PerturbedModel have its own.
        count: candidates of a draw.
        chunk: directions of a forward, at most; None for all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.

    Attributes:
        pm: the PerturbedModel, or None.
        evaluation: in which forwards its members are scored, or None.

    Raises:
        TypeError: chunk or max_memory of another type.
        ValueError: a PerturbedModel of Explicit layers; chunk below 1, beside max_memory, or either
            without a PerturbedModel.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        seed: int | None,
        count: int | None,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
    ) -> None:
        """Check the arguments; nothing is drawn yet."""
        self.pm = params if isinstance(params, PerturbedModel) else None
        self.evaluation: Evaluation | None = None
        self._tries: Tries | None = None
        if self.pm is None:
            if chunk is not None or max_memory is not None:
                raise ValueError(
                    "chunk and max_memory bound the forwards of a PerturbedModel; plain parameters "
                    "are tried one point at a time, and they must be None"
                )
            self.count = 1 if count is None else count
        else:
            if self.pm.state.absolute:
                raise ValueError(
                    "params: the layers of a PerturbedModel must have noise, got members that are "
                    "given (Explicit)"
                )
            self.evaluation = Evaluation(self.pm, chunk, max_memory, False, "full")
            self.count = self.pm.population
            params = perturbed_parameters(self.pm)
        super().__init__(params, defaults, seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; a search on a PerturbedModel has one only.

        Raises:
            ValueError: a second group, with a PerturbedModel.
        """
        if self.pm is not None and self.param_groups:
            raise ValueError(
                "param_group: what a PerturbedModel perturbs is the only group of its search"
            )
        super().add_param_group(param_group)

    def _refuse(self, options: dict[str, Any]) -> None:
        """Raise ValueError for options other than None that a PerturbedModel decides."""
        given = [name for name, value in options.items() if value is not None]
        if self.pm is not None and given:
            raise ValueError(
                f"{', '.join(given)}: leave out with a PerturbedModel, whose directions and noise "
                "are the candidates; penalties belong into the closure"
            )

    def _turn(self) -> AbstractContextManager[Any]:
        return super()._turn() if self.pm is None else self.pm.state.turn.taken()

    def _run(self, home: Point, closure: Closure) -> tuple[Point, float]:
        if self.evaluation is None:
            self._tries = Looped(self, closure)
        else:
            self._tries = Batched(self, self.evaluation, closure)
        try:
            return self._search(home, self._tries.single)
        finally:
            self._tries = None

    @property
    def tries(self) -> Tries:
        """The candidates of the step under way."""
        assert self._tries is not None
        return self._tries

    def _snapshot(self) -> Any:
        noise = None if self.pm is None else self.pm.get_extra_state()
        return super()._snapshot(), noise

    def _restore(self, snapshot: Any) -> None:
        progress, noise = snapshot
        super()._restore(progress)
        if self.pm is not None:
            self.pm.set_extra_state(noise)

    def _others(self) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.evaluation is not None:
            own["noise"] = self.evaluation.pm.get_extra_state()
            own["memory"] = self.evaluation.memory_state()
        return {**super()._others(), **own}

    def _load_others(self, state: dict[str, Any]) -> None:
        super()._load_others(state)
        if self.evaluation is not None:
            self.evaluation.pm.set_extra_state(state["noise"])
            self.evaluation.load_memory_state(state["memory"])


class Looped:
    """Candidates one after the other; their moves are drawn again where they are needed."""

    def __init__(self, search: PopulationSearch, closure: Closure) -> None:
        """Store the arguments."""
        self.search, self.closure = search, closure

    def single(self, point: Point) -> float:
        """See :class:`Tries`."""
        return self.search._try(point, self.closure)

    def losses(self, centre: Point, scales: list[float]) -> list[float]:
        """See :class:`Tries`."""
        self.like, self.scales = centre, scales
        self.draw = self.search._next_draw()
        return [
            self.single(list(torch._foreach_add(centre, self.move(k))))
            for k in range(self.search.count)
        ]

    def move(self, k: int) -> Point:
        """See :class:`Tries`."""
        noise = self.search._sample(self.like, self.draw, k)
        torch._foreach_mul_(noise, self.scales)
        return noise


class Batched:
    """The members of a population, many in a forward: candidate s D + d is member (s, d)."""

    def __init__(self, search: PopulationSearch, evaluation: Evaluation, closure: Closure) -> None:
        """Store the arguments."""
        self.search, self.evaluation, self.pm = search, evaluation, evaluation.pm
        self.closure = closure

    def single(self, point: Point) -> float:
        """See :class:`Tries`; one direction, all of whose signs are alike without noise."""
        self.search._place(point)
        pm, sigma = self.pm, self.pm.sigma
        if not pm.state.drawn:
            pm.set_noise()
        try:
            pm.set_noise_scale(0.0)
            with pm.window(0, 1):
                loss = float(self._losses(self.evaluation.call(self._values)).mean())
        finally:
            pm.set_noise_scale(sigma)
        self.search._note(loss, lambda: [p.detach().clone() for p in self._parameters()])
        return loss

    def losses(self, centre: Point, scales: list[float]) -> list[float]:
        """See :class:`Tries`."""
        self.search._next_draw()
        self.search._place(centre)
        self.pm.set_noise(scales[0])
        self.like = centre
        device = self._parameters()[0].device
        values = self._losses(self.evaluation.score(self._values, device))
        losses = values.flatten().tolist()
        for k, loss in enumerate(losses):
            self.search._note(loss, functools.partial(self._member, k))
        return losses

    def move(self, k: int) -> Point:
        """See :class:`Tries`."""
        return [n.to(t.dtype) for n, t in zip(self._noise(k), self.like, strict=True)]

    def weighted_sum(self, weights: Tensor) -> Point:
        """Return the sum of ``weights[d] E_d``, leaving ``.grad`` as it is.

        Args:
            weights: (D,) float64 on the CPU.
        """
        parameters = self._parameters()
        held = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            self.pm.set_grad(weights.to(parameters[0].device))
            found = [p.grad for p in parameters]
            return [g.to(t) for g, t in zip(found, self.like, strict=True) if g is not None]
        finally:
            for p, grad in zip(parameters, held, strict=True):
                p.grad = grad

    def _values(self) -> Tensor:
        """Return what the closure says, wide: a mean in float32 rounds small moves away."""
        return to_numbers(call(self.closure), self._parameters()[0].device).double()

    def _losses(self, values: Tensor) -> Tensor:
        """Bring values of rows or members to those of members, (S, D), on the CPU."""
        return member_values(values, self.pm, values.device).cpu()

    def _parameters(self) -> list[Tensor]:
        return [p for _, p in self.search._trained()]

    def _noise(self, k: int) -> Point:
        """Return what candidate k adds to the parameters, in their dtypes."""
        sign, d = divmod(k, self.pm.population)
        scale = -self.pm.sigma if sign else self.pm.sigma
        found = {
            id(p): layer.parameter_noise(name, d, 1)[0] * scale
            for p, (layer, name) in self.pm._perturbed().values()
        }
        return [found[id(p)] for p in self._parameters()]

    def _member(self, k: int) -> Point:
        """Return the parameters of candidate k, as ``pm.member`` has them."""
        return list(torch._foreach_add(self._parameters(), self._noise(k)))
