"""The methods of scipy.optimize that Minimize runs, and what each of them takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SCIPY = (1, 15)  # the first that takes ``rng`` everywhere


@dataclass(frozen=True)
class Method:
    """What a method of scipy asks for and takes.

    Attributes:
        name: as scipy spells it.
        derivatives: 0 losses only, 1 gradients, 2 the Hessian too.
        matrix: whether it needs the Hessian as a matrix, instead of products with vectors.
        bounds: whether it takes bounds.
        constraints: whether it takes constraints.
        function: of scipy.optimize, for what is not a method of ``minimize``.
        needs_bounds: whether it searches within finite bounds of all parameters.
        local: whether it starts local searches, by the method ``local``.
        random: whether it draws random numbers.
    """

    name: str
    derivatives: int = 0
    matrix: bool = False
    bounds: bool = False
    constraints: bool = False
    function: str = "minimize"
    needs_bounds: bool = False
    local: bool = False
    random: bool = False

    @property
    def is_global(self) -> bool:
        """Whether it searches beyond the valley of the start."""
        return self.function != "minimize"


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("CG", 1),
        Method("BFGS", 1),
        Method("L-BFGS-B", 1, bounds=True),
        Method("SLSQP", 1, bounds=True, constraints=True),
        Method("TNC", 1, bounds=True),
        Method("Newton-CG", 2),
        Method("trust-ncg", 2),
        Method("trust-krylov", 2),
        Method("trust-exact", 2, matrix=True),
        Method("trust-constr", 2, bounds=True, constraints=True),
        Method("dogleg", 2, matrix=True),
        Method("Nelder-Mead", bounds=True),
        Method("Powell", bounds=True),
        Method("COBYLA", bounds=True, constraints=True),
        Method("COBYQA", bounds=True, constraints=True),
        Method("basinhopping", bounds=True, function="basinhopping", local=True, random=True),
        Method(
            "differential_evolution",
            bounds=True,
            constraints=True,
            function="differential_evolution",
            needs_bounds=True,
            local=True,
            random=True,
        ),
        Method(
            "shgo",
            bounds=True,
            constraints=True,
            function="shgo",
            needs_bounds=True,
            local=True,
        ),
        Method(
            "dual_annealing",
            bounds=True,
            function="dual_annealing",
            needs_bounds=True,
            local=True,
            random=True,
        ),
        Method("direct", bounds=True, function="direct", needs_bounds=True),
    )
}
"""The methods that ``Minimize`` knows, by their names."""

# shgo hands bounds on to these alone.
SHGO_LOCAL = ("L-BFGS-B", "TNC", "SLSQP", "COBYQA")

# What shgo takes in a dictionary of its own.
SHGO_OPTIONS = {
    "maxiter", "maxfev", "maxev", "maxtime", "f_min", "f_tol", "minhgrd", "symmetry",
    "minimize_every_iter", "local_iter", "infty_constraints", "disp",
}  # fmt: skip

# What Minimize itself hands to a global method; the rest of its arguments are options.
OWN = {
    "func", "args", "bounds", "constraints", "callback", "x0", "rng", "seed", "random_state",
    "minimizer_kwargs", "vectorized", "workers", "polish", "options",
}  # fmt: skip


def load_scipy() -> ModuleType:
    """Return scipy.optimize.

    Raises:
        ImportError: no scipy, or an old one; says what to install.
    """
    wanted = 'pip install "perturbed[scipy]"'
    try:
        import scipy
        import scipy.optimize
    except ImportError as error:
        raise ImportError(f"Minimize needs scipy: {wanted} ({error})") from error
    if tuple(int(part) for part in scipy.__version__.split(".")[:2]) < SCIPY:
        needed = ".".join(map(str, SCIPY))
        raise ImportError(f"Minimize needs scipy {needed} or newer, got {scipy.__version__}")
    return scipy.optimize


def find_method(name: str, value: object) -> Method:
    """Return the method of a name, in whatever case.

    Args:
        name: of the argument, for messages.
        value: what came.

    Raises:
        TypeError: no string.
        ValueError: a name of no method.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be the name of a method, got {value!r}")
    by_lower = {known.lower(): method for known, method in METHODS.items()}
    if value.lower() not in by_lower:
        raise ValueError(f"{name} must be of {', '.join(METHODS)}, got {value!r}")
    return by_lower[value.lower()]


def find_local(method: Method, local: object, constrained: bool) -> Method | None:
    """Return the method of the local searches of ``method``; None if there are none.

    Args:
        method: the global one.
        local: what came: a name or None.
        constrained: whether there are constraints.

    Raises:
        TypeError: neither a name nor None.
        ValueError: a method that has no local searches, or none that can do them.
    """
    if local is None:
        if not method.local or method.name == "differential_evolution":
            return None
        local = "SLSQP" if constrained else "L-BFGS-B"
    found = find_method("local", local)
    if not method.local:
        able = [name for name, m in METHODS.items() if m.local]
        raise ValueError(
            f"local is for {', '.join(able)}, which start local searches; {method.name} does "
            f"not, and it must be None, got {local!r}"
        )
    if found.is_global:
        raise ValueError(f"local must be a local method, got {local!r}")
    if method.name == "shgo" and found.name not in SHGO_LOCAL:
        raise ValueError(f"local must be of {', '.join(SHGO_LOCAL)} for shgo, got {local!r}")
    return found


def check_limits(
    method: Method, local: Method | None, bounded: bool, finite: bool, constrained: bool
) -> None:
    """Refuse bounds and constraints that a method ignores, and the lack of those that it needs.

    Args:
        method: that is to run.
        local: of its local searches.
        bounded: whether a parameter has a bound.
        finite: whether all parameters have finite bounds on both sides.
        constrained: whether there are constraints.
    """

    def able(what: str) -> str:
        return ", ".join(name for name, m in METHODS.items() if getattr(m, what))

    if method.needs_bounds and not finite:
        raise ValueError(
            f"bounds must be finite for every parameter with method={method.name!r}, which "
            "searches all of the space between them"
        )
    for one in (method, local):
        if one is None:
            continue
        if bounded and not one.bounds:
            raise ValueError(
                f"bounds must be None: {one.name} takes none; of the methods, {able('bounds')} do"
            )
        if constrained and not one.constraints:
            raise ValueError(
                f"constraints must be empty: {one.name} takes none; of the methods, "
                f"{able('constraints')} do"
            )


def check_options(
    name: str, method: Method | None, options: object, optimize: ModuleType
) -> dict[str, Any]:
    """Return a copy of the options, which scipy checks itself for a local method.

    Args:
        name: of the argument, for messages.
        method: whose options they are; None for none.
        options: what came.
        optimize: the module scipy.optimize.

    Raises:
        TypeError: no mapping from names.
        ValueError: what the function of a global method does not take.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise TypeError(f"{name} must map names of options to values, got {options!r}")
    if method is not None and method.is_global:
        known = set(inspect.signature(getattr(optimize, method.function)).parameters)
        if method.name == "shgo":
            known |= SHGO_OPTIONS
        known -= OWN
        unknown = [key for key in options if key not in known]
        if unknown:
            raise ValueError(
                f"{name} of {method.name} must be of {', '.join(sorted(known))}, got {unknown}"
            )
    return dict(options)
