"""Minimize: scipy.optimize behind torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import _C
from ...checks import check_like, check_number
from ...model import PerturbedModel
from ...noise.state import as_seed, check_seed
from ..zeroth.closure import Closure, check_closure
from .bounds import bound_vectors, check_names
from .methods import check_limits, check_options, find_local, find_method, load_scipy
from .population import Population, check_population
from .problem import Problem
from .search import Search, given

NUMBERS = ("steps", "evaluations", "best_loss", "seed")


class Minimize(torch.optim.Optimizer):
    """Minimise a deterministic loss with a method of scipy.optimize.

    One ``step(closure)`` is a whole minimisation, from where the parameters are, until the method's
    own criteria or limits end it. scipy sees one vector of float64 numbers, the trainable
    parameters flattened in the order of the groups; the model is evaluated in its own dtypes, and
    its parameters are changed in place.

    Gradients and Hessian-vector products are exact, by automatic differentiation of what the
    closure returns; that includes penalties that the closure adds itself. The loss, the gradient
    and the products at a point take one forward together.

    - of gradients: CG, BFGS, L-BFGS-B (b), SLSQP (bc), TNC (b)
    - of products of the Hessian with vectors: Newton-CG, trust-ncg, trust-krylov,
      trust-constr (bc)
    - of the Hessian as a matrix, N products and N^2 numbers: trust-exact, dogleg
    - of losses: Nelder-Mead (b), Powell (b), COBYLA (bc), COBYQA (bc)
    - global: basinhopping (b), dual_annealing (B), shgo (Bc), differential_evolution (Bc),
      direct (B)

    b: takes bounds; B: needs finite ones; c: takes constraints. dogleg is for convex losses; where
    the Hessian has eigenvalues that are not positive, it is given one with their absolute values.

    A loss that is NaN or infinite counts as worse than all finite ones, and a step ends with the
    best point that was evaluated, also where scipy would return a later one (with constraints, at
    scipy's own point, since others may violate them). Sums that a float32 model rounds limit how
    far a method gets; a model and data in float64 (``net.double()``) do not have that limit. There
    is no option for it: parameters alone in float64 would not fit the float32 data that a closure
    holds.

    Args:
        params: parameters, ``net.named_parameters()``, or groups of them. float32 and float64, on
            any devices. Those with ``requires_grad=False`` are left alone.
        method: one of the above, in any case.
        bounds: of every element of the parameters: a pair (lower, upper) for all, or a dict of
            pairs by name. An end is a number, None for no bound, or a tensor that broadcasts to the
            parameter. An option of groups as well. A start outside is moved to the nearest point
            inside.
        constraints: as scipy takes them, functions of the vector.
        tol: scipy's one number for the tolerances of a local method.
        callback: called after every iteration with a result that has ``x`` (N,), ``fun`` (the loss
            there) and ``nfev``; the parameters then hold that point. If it returns True or raises
            StopIteration, the run ends.
        options: of the method, as in scipy's documentation (``maxiter``, ``gtol``, ...); for a
            global method, arguments of its function (``niter``, ``popsize``, ``n``, ...).
        local: method of a global method's local searches; default: L-BFGS-B, with constraints
            SLSQP. differential_evolution searches from its best member at the end if ``local`` is
            given, and otherwise needs no gradient.
        local_options: of ``local``.
        model: a module whose buffers (of batch normalisation, say) every evaluation is to find as
            they were before the step, and which are left as the best point's evaluation made them.
            For differential_evolution also a PerturbedModel with :class:`~perturbed.Explicit`
            layers: its D members are the population, a generation is one forward, and the closure
            returns the values of its rows or members.
        seed: of basinhopping, dual_annealing and differential_evolution. The global random state is
            not used.

    Attributes:
        result: scipy's OptimizeResult of the last step, or None. Not part of ``state_dict``.
        steps: how many were done.
        evaluations: of the closure, in all steps; of members, with a PerturbedModel.
        best_loss: the least loss of all steps, infinite before any.

    Raises:
        ImportError: no scipy; says what to install.
        TypeError: arguments of another type, parameters that are complex.
        ValueError: an unknown method or option, bounds or constraints that the method does not
            take or that do not fit, half-precision parameters, nothing to train.

    Example:
        >>> import torch, perturbed
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Linear(3, 1)
        >>> x = torch.randn(20, 3)
        >>> optimizer = perturbed.Minimize(net.parameters(), "L-BFGS-B")
        >>> loss = optimizer.step(lambda: (net(x) - x.sum(1, keepdim=True)).square().mean())
        >>> bool(loss < 1e-8), optimizer.result.success
        (True, True)
        >>> torch.allclose(net.weight, torch.ones(1, 3), atol=1e-3)
        True
    """

    def __init__(
        self,
        params: Any,
        method: str = "L-BFGS-B",
        *,
        bounds: Any = None,
        constraints: Any = (),
        tol: float | None = None,
        callback: Callable[[Any], Any] | None = None,
        options: Mapping[str, Any] | None = None,
        local: str | None = None,
        local_options: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        seed: int | None = 0,
    ) -> None:
        """Check that all of it fits together; nothing is evaluated yet."""
        optimize = load_scipy()
        self._method = find_method("method", method)
        self._local = find_local(self._method, local, given(constraints))
        self.constraints = constraints
        none = local_options is None or (isinstance(local_options, Mapping) and not local_options)
        if self._local is None and not none:
            raise ValueError("local_options are of local searches, and there are none")
        self.tol = tol if tol is None else check_number("tol", tol)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
        self.callback = callback
        self.options = check_options("options", self._method, options, optimize)
        self.local_options = check_options("local_options", self._local, local_options, optimize)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module or None, got {type(model).__name__}")
        self.model = model
        self.seed = check_seed(seed)
        self.steps = self.evaluations = 0
        self.best_loss = math.inf
        self.result: Any = None
        by_name = bounds if isinstance(bounds, Mapping) else None
        super().__init__(params, {"bounds": None if by_name is not None else bounds})
        if by_name is not None:
            self._distribute(by_name)
        self._check()

    # ---- groups --------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The method's name, as scipy spells it."""
        return self._method.name

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may have ``bounds`` of its own.

        Raises:
            TypeError: parameters that are no real floating-point numbers.
            ValueError: half precision, or bounds that do not fit.
        """
        before = list(self.param_groups)
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for parameter in group["params"]:
                if not parameter.is_floating_point():
                    raise TypeError(f"params must be real numbers, got {parameter.dtype}")
                if parameter.itemsize < 4:
                    raise ValueError(
                        "params must be float32 or float64, whose loss can be told apart between "
                        f"near points, got {parameter.dtype}"
                    )
            check_names(group)
            bound_vectors([group])
        except BaseException:
            self.param_groups[:] = before
            raise

    def _distribute(self, bounds: Mapping[str, Any]) -> None:
        """Give each group its part of bounds by name."""
        left = dict(bounds)
        for group in self.param_groups:
            check_names({**group, "bounds": {}})
            names = group["param_names"]
            if group["bounds"] is None:
                group["bounds"] = {name: left.pop(name) for name in names if name in left} or None
        if left:
            names = [name for group in self.param_groups for name in group["param_names"]]
            raise ValueError(
                f"bounds must name parameters of {names} that have no others, got {list(left)}"
            )

    def _trainable(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _check(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds if the run fits together; parameters may have changed since."""
        parameters = self._trainable()
        if sum(p.numel() for p in parameters) == 0:
            raise ValueError("params have nothing to train: none has requires_grad=True")
        lower, upper = bound_vectors(self.param_groups)
        ends = np.isfinite([lower, upper])
        check_limits(
            self._method, self._local, bool(ends.any()), bool(ends.all()), given(self.constraints)
        )
        if isinstance(self.model, PerturbedModel):
            if self.method != "differential_evolution" or self._local is not None:
                raise ValueError(
                    "model must be a plain module: only differential_evolution without local "
                    f"evaluates a population, not {self.method}"
                    f"{'' if self._local is None else f' with local={self._local.name!r}'}"
                )
            check_population(self.model, parameters, self.options)
        return lower, upper

    # ---- the run -------------------------------------------------------------------------------

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Minimise the closure's loss from where the parameters are.

        If the closure or the callback raises, parameters, buffers and counters are as they were.
        The parameters' ``.grad`` is what it was before in any case.

        Args:
            closure: returns the loss, a 0-dim tensor or a number, the same whenever the parameters
                are the same. For methods with gradients either with its graph, to be differentiated
                here, or as in other optimizers of torch after ``zero_grad()`` and ``backward()``;
                for those with the Hessian, and local searches, the former. Methods that use losses
                alone call it without recording gradients.

        Returns:
            () float64 on the CPU, the loss at the parameters that the step ends with.

        Raises:
            TypeError: no closure, or one that returns no real number.
            ValueError: a closure that returns several numbers, has no gradient though the method
                needs one, or calls ``backward`` though the method needs the Hessian; a loss that is
                not finite where a local method starts.
            RuntimeError: a closure that calls ``backward`` for a method that uses losses alone.
        """
        check_closure(closure)
        optimize = load_scipy()
        lower, upper = self._check()
        derivatives = max(m.derivatives for m in (self._method, self._local) if m is not None)
        pm = self.model if isinstance(self.model, PerturbedModel) else None
        module = self.model if pm is None else pm.model
        problem = Problem(closure, self._trainable(), derivatives, (lower, upper), module)
        search = Search(
            optimize,
            self._method,
            self._local,
            self.options,
            self.local_options,
            self.tol,
            self.constraints,
            self.callback,
            np.random.Generator(np.random.Philox(key=[_C.splitmix64(self.seed), self.steps])),
        )
        try:
            population = None if pm is None else Population(pm, closure, problem)
            if not self._method.needs_bounds and not math.isfinite(problem.loss(problem.start)):
                raise ValueError(
                    f"closure must return a finite loss at the start of {self.method}, got "
                    f"{problem.loss(problem.start)}"
                )
            result = search.run(problem, population)
            point, loss = self._choose(result, problem)
        except BaseException:
            problem.undo()
            raise
        problem.finish(point)
        self.result = result
        self.steps += 1
        self.evaluations += problem.evaluations
        feasible = not given(self.constraints) or bool(result.success)
        if feasible and loss < self.best_loss:
            self.best_loss = loss
            for parameter in problem.parameters:
                self.state[parameter]["best"] = parameter.detach().clone()
        return torch.tensor(loss, dtype=torch.float64)

    def _choose(self, result: Any, problem: Problem) -> tuple[np.ndarray, float]:
        """Return where a run ends, and the loss there."""
        if given(self.constraints) and result.x is not None:
            point = np.array(result.x, dtype=np.float64)
            return point, problem.loss(point)
        return problem.best, problem.best_loss

    # ---- what is kept --------------------------------------------------------------------------

    def best(self) -> list[Tensor]:
        """Return a copy of the parameters that had ``best_loss``, in the order of the groups.

        Parameters that no step has trained are as they are.
        """
        return [
            self.state.get(p, {}).get("best", p).detach().clone()
            for group in self.param_groups
            for p in group["params"]
        ]

    @torch.no_grad()
    def load_best(self) -> None:
        """Set the parameters to :meth:`best`."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, best in zip(parameters, self.best(), strict=True):
            parameter.copy_(best)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model's parameters: numbers and tensors."""
        return {**super().state_dict(), **{name: getattr(self, name) for name in NUMBERS}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the parameters are restored as well.

        Raises:
            TypeError: counters or a seed that are no integers.
            ValueError: entries missing, or groups of other sizes.
        """
        missing = [name for name in NUMBERS if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict must have the entries {list(NUMBERS)}, {missing} missing")
        for name in ("steps", "evaluations", "best_loss"):
            check_like(name, state_dict[name], getattr(self, name))
        steps, evaluations = state_dict["steps"], state_dict["evaluations"]
        best_loss, seed = state_dict["best_loss"], as_seed(state_dict["seed"])
        super().load_state_dict(state_dict)
        self.steps, self.evaluations = steps, evaluations
        self.best_loss, self.seed = best_loss, seed

    def __getstate__(self) -> dict[str, Any]:
        """Take along what this class holds, which torch's does not; its hooks stay behind."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}
