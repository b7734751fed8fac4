"""Calling scipy: what each method is handed of a problem, and callbacks that are all alike."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .methods import SHGO_OPTIONS, Method
from .population import Population
from .problem import Problem

STOPPED = 99  # scipy's status of a run that its callback has ended


@dataclass(frozen=True)
class Search:
    """What a run of scipy is made of, beside the problem.

    Attributes:
        optimize: the module scipy.optimize.
        method: to run.
        local: method of the local searches of a global one.
        options: of ``method``; for a global one, arguments of its function.
        local_options: of ``local``.
        tol: of ``minimize``, for ``method`` or else for ``local``.
        constraints: as scipy takes them.
        callback: the user's.
        rng: for the methods that draw.
    """

    optimize: ModuleType
    method: Method
    local: Method | None
    options: dict[str, Any]
    local_options: dict[str, Any]
    tol: float | None
    constraints: Any
    callback: Callable[[Any], Any] | None
    rng: np.random.Generator

    def run(self, problem: Problem, population: Population | None) -> Any:
        """Minimise; return scipy's result.

        Args:
            problem: what to minimise; counts its evaluations and keeps its best point.
            population: for differential evolution, what evaluates a generation in one forward.

        Raises:
            ValueError: options that the method does not know.
        """
        watch = _watch(self, problem)
        with warnings.catch_warnings():
            # Told before anything is evaluated.
            warnings.filterwarnings(
                "error", "Unknown solver options", self.optimize.OptimizeWarning
            )
            try:
                if not self.method.is_global:
                    return self.optimize.minimize(
                        problem.value,
                        problem.start,
                        callback=watch,
                        **self._local(self.method, self.options, problem),
                    )
                return getattr(self, f"_{self.method.function}")(problem, watch, population)
            except self.optimize.OptimizeWarning as error:
                raise ValueError(f"options of {self.method.name}: {error}") from None
            except TypeError as error:
                if not str(error).startswith("_minimize_"):  # scipy's own functions
                    raise
                raise ValueError(f"options of {self.method.name}: {error}") from None
            except _Stop as stop:
                return self.optimize.OptimizeResult(
                    stop.progress,
                    success=False,
                    status=STOPPED,
                    message="callback has ended the run",
                )

    # ---- minimize ------------------------------------------------------------------------------

    def _local(self, method: Method, options: dict[str, Any], problem: Problem) -> dict[str, Any]:
        """Return the arguments of ``minimize`` for a method, beside function and start."""
        arguments: dict[str, Any] = {"method": method.name, "options": dict(options)}
        if method.derivatives > 0:
            arguments["jac"] = problem.gradient
        if method.derivatives > 1 and not method.matrix:
            arguments["hessp"] = problem.product
        if method.matrix:
            convex = method.name == "dogleg"
            arguments["hess"] = problem.convex_hessian if convex else problem.hessian
        if method.bounds and self._bounded(problem):
            arguments["bounds"] = self._bounds(problem)
        if method.constraints and given(self.constraints):
            arguments["constraints"] = self.constraints
        if self.tol is not None:
            arguments["tol"] = self.tol
        if method.name == "TNC":
            # It differentiates the gradient by differences, for which the default step would be
            # lost in the rounding of narrower parameters.
            eps = max(torch.finfo(p.dtype).eps for p in problem.parameters)
            arguments["options"].setdefault("accuracy", math.sqrt(eps))
        return arguments

    def _bounded(self, problem: Problem) -> bool:
        return bool(np.isfinite(problem.lower).any() or np.isfinite(problem.upper).any())

    def _bounds(self, problem: Problem) -> Any:
        return self.optimize.Bounds(problem.lower, problem.upper)

    def _searches(self, problem: Problem) -> dict[str, Any]:
        """Return the arguments of the local searches of a global method."""
        assert self.local is not None
        return self._local(self.local, self.local_options, problem)

    # ---- global methods, each with the spelling of its own function ----------------------------

    def _basinhopping(self, problem: Problem, watch: Any, _: Population | None) -> Any:
        return self.optimize.basinhopping(
            problem.value,
            problem.start,
            minimizer_kwargs=self._searches(problem),
            callback=watch,
            rng=self.rng,
            **self.options,
        )

    def _dual_annealing(self, problem: Problem, watch: Any, _: Population | None) -> Any:
        return self.optimize.dual_annealing(
            problem.value,
            self._bounds(problem),
            x0=problem.start,
            minimizer_kwargs=self._searches(problem),
            callback=watch,
            rng=self.rng,
            **self.options,
        )

    def _shgo(self, problem: Problem, watch: Any, _: Population | None) -> Any:
        own = {key: value for key, value in self.options.items() if key in SHGO_OPTIONS}
        rest = {key: value for key, value in self.options.items() if key not in SHGO_OPTIONS}
        return self.optimize.shgo(
            problem.value,
            self._bounds(problem),
            constraints=self.constraints if given(self.constraints) else None,
            minimizer_kwargs=self._searches(problem),
            callback=watch,
            options=own,
            **rest,
        )

    def _direct(self, problem: Problem, watch: Any, _: Population | None) -> Any:
        return self.optimize.direct(
            problem.value_or_inf, self._bounds(problem), callback=watch, **self.options
        )

    def _differential_evolution(
        self, problem: Problem, watch: Any, population: Population | None
    ) -> Any:
        options = dict(self.options)
        function: Callable[[np.ndarray], Any] = problem.value_or_inf
        if population is not None:
            function = population.losses
            options["init"] = population.start(self.rng)
            options.setdefault("updating", "deferred")
        raised: list[BaseException] = []

        def noted(points: np.ndarray) -> Any:
            try:
                return function(points)
            except BaseException as error:
                raised.append(error)
                raise

        try:
            result = self.optimize.differential_evolution(
                noted,
                self._bounds(problem),
                constraints=self.constraints if given(self.constraints) else (),
                x0=problem.start,
                callback=watch,
                polish=False,  # scipy would do it by differences
                vectorized=population is not None,
                rng=self.rng,
                **options,
            )
        except RuntimeError:
            if raised:  # scipy makes RuntimeErrors of them, which blame its own arguments
                raise raised[0] from None
            raise
        if self.local is None:
            return result
        polished = self.optimize.minimize(problem.value, result.x, **self._searches(problem))
        return polished if polished.fun < result.fun else result


# ---- callbacks -----------------------------------------------------------------------------------


class _Stop(Exception):
    """A callback has ended the run."""

    def __init__(self, progress: Any) -> None:
        super().__init__("stopped")
        self.progress = progress


def _watch(search: Search, problem: Problem) -> Callable[..., None] | None:
    """Return what scipy is to call: the user's callback, told the same by every method."""
    callback = search.callback
    if callback is None:
        return None

    def tell(point: Any, loss: float | None = None) -> None:
        point = np.array(point, dtype=np.float64)
        if loss is None:
            known = np.array_equal(point, problem.best)
            loss = problem.best_loss if known else problem.value(point)
        problem.write(point)
        progress = search.optimize.OptimizeResult(
            x=point, fun=float(loss), nfev=problem.evaluations
        )
        try:
            stop = callback(progress)
        except StopIteration:
            stop = True
        if stop:
            raise _Stop(progress)

    # scipy looks at the signature.
    if search.method.name in ("TNC", "shgo", "direct"):
        return lambda x: tell(x)
    if search.method.name in ("basinhopping", "dual_annealing"):
        return lambda x, f, _: tell(x, f)
    return lambda intermediate_result: tell(intermediate_result.x, intermediate_result.fun)


def given(constraints: Any) -> bool:
    """Return whether there are constraints."""
    return not (constraints is None or (isinstance(constraints, (list, tuple)) and not constraints))
