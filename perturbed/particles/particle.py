"""Particle arithmetic: the parameters of any module as one value that can be computed with.

After Nytorch (2024), whose particles inherit from a class of their own and make a network with
every operation. Here any ``nn.Module`` is a particle, and networks are made where one is asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import foreach
from .combine import MOST_TERMS, Combination, compute, compute_into, leaf, overlap
from .structure import Structure, check_same
from .tensor_list import TensorList

#: A number (a 0-dim tensor, too, for which a device is waited for), a product or a module.
Operand = Any


def detached(function: Callable) -> Callable:
    """Run a function without autograd, and with ordinary tensors where inference mode is on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


class Product:
    """The parameters of a module as one value; made by :func:`~perturbed.particles.product`.

    ``+ - * / **`` and unary ``-`` take numbers, products and modules of the same structure, on
    either side. A network is only made by :meth:`module`. What ``product(module)`` returns stands
    for the module: its in-place forms (``p += q``) write into the module's parameters, so that
    optimizers over them stay valid. Every other product is a value of its own. All of it happens
    under ``torch.no_grad()``.

    Sums, differences and multiples are kept as coefficients and computed in one pass where they are
    used, rounded once. They have the value they had when they were written: after a change of a
    particle in them they refuse to be computed, unless :meth:`clone` computed them before. Two
    weights that add up to 1 are computed as ``torch.lerp`` does it.

    Where modules differ in more than parameters, it is the module of the first product of an
    expression that results are copies of.

    Attributes:
        names: of the parameters, as in ``module.named_parameters()``; a tied one has one name.

    Raises:
        TypeError: from operators, an operand of another type.
        ValueError: from operators, particles of different structure, naming the first parameter
            that differs in presence, shape, dtype or device. Nothing has changed then.
        RuntimeError: a combination whose particles have changed, or a module whose parameters were
            replaced after ``product()`` looked at them.

    Example:
        >>> import torch
        >>> from perturbed.particles import product
        >>> a, b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> c = (0.25 * product(a) + 0.75 * product(b)).module()
        >>> torch.allclose(c.weight, 0.25 * a.weight + 0.75 * b.weight)
        True
        >>> p = product(a)
        >>> p -= b  # in the parameters of a
        >>> (p + b).module()
        Linear(in_features=2, out_features=1, bias=True)
    """

    # NumPy's numbers would take the product for an array; None makes them leave it to us.
    __array_ufunc__ = None

    def __init__(
        self,
        structure: Structure,
        tensors: list[Tensor] | None = None,
        combination: Combination | None = None,
    ) -> None:
        """Take a value; with neither of both, stand for the structure's module.

        Args:
            structure: which parameters of which module.
            tensors: values, of which nobody else knows.
            combination: or what they are to be computed from.
        """
        self._structure = structure
        self._bound = tensors is None and combination is None
        self._tensors: list[Tensor] | None = tensors
        if self._bound:
            self._tensors = list(structure.parameters)
        self._combination = combination

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return self._structure.names

    def __repr__(self) -> str:
        """Say what it is, without numbers."""
        count = sum(t.numel() for t in self._like())
        kind = type(self._structure.module).__name__
        return f"{type(self).__name__}({kind}, {len(self.names)} parameters of {count:,} numbers)"

    # ---- what comes out ------------------------------------------------------------------------

    @detached
    def module(self) -> nn.Module:
        """Return a new module with these parameters.

        It is a deep copy of the product's module: buffers, hooks, Python attributes and frozen
        parameters are copied, shared with nobody; tied parameters are tied; ``requires_grad`` and
        attributes of parameters stay.
        """
        self._structure.check_current()
        parameters, values = self._structure.parameters, self._computed()
        memo: dict[int, Any] = {}
        for parameter, value in zip(parameters, values, strict=True):
            if type(parameter) is nn.Parameter:
                fresh = nn.Parameter(value.to(parameter), parameter.requires_grad)
            else:
                fresh = copy.deepcopy(parameter)
                fresh.copy_(value)
            memo[id(parameter)] = fresh
        for parameter in parameters:  # torch's deepcopy would drop them
            memo[id(parameter)].__dict__.update(copy.deepcopy(parameter.__dict__, memo))
        return copy.deepcopy(self._structure.module, memo)

    @detached
    def tensors(self) -> TensorList:
        """Return the values in the order of ``names``, in memory of their own."""
        return TensorList(self._computed())

    @detached
    def clone(self) -> Product:
        """Return the value, computed now, in memory of its own; also ``+p``."""
        return self._made(tensors=self._computed())

    __pos__ = clone

    def detach(self) -> Product:
        """Return the value without its module: in-place forms make it a value of its own.

        Until then it shares memory, and refuses to be computed after a change of the module.
        """
        return self._made(self._written())

    # ---- arithmetic ----------------------------------------------------------------------------

    def __add__(self, other: Operand) -> Product:
        return self._plus(self._linear(other), 1.0, 1.0)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Product:
        return self._plus(self._linear(other), 1.0, -1.0)

    def __rsub__(self, other: Operand) -> Product:
        return self._plus(self._linear(other), -1.0, 1.0)

    def __neg__(self) -> Product:
        return self._made(self._written().scaled(-1.0))

    def __mul__(self, other: Operand) -> Product:
        number = _number(other)
        if number is None:
            return self._each("mul", other)
        return self._made(self._written().scaled(number))

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Product:
        number = _number(other)
        if not number:  # another particle; or 0, where torch knows what to do
            return self._each("div", other)
        return self._made(self._written().scaled(1.0 / number))

    def __rtruediv__(self, other: Operand) -> Product:
        return self._each("div", other, foreach.reflected)

    def __pow__(self, other: Operand) -> Product:
        return self._each("pow", other)

    def __rpow__(self, other: Operand) -> Product:
        return self._each("pow", other, foreach.reflected)

    def __iadd__(self, other: Operand) -> Product:
        return self._write(self + other)

    def __isub__(self, other: Operand) -> Product:
        return self._write(self - other)

    def __imul__(self, other: Operand) -> Product:
        return (
            self._write(self * other) if _number(other) is not None else self._each_("mul", other)
        )

    def __itruediv__(self, other: Operand) -> Product:
        if not _number(other):
            return self._each_("div", other)
        return self._write(self / other)

    def __ipow__(self, other: Operand) -> Product:
        return self._each_("pow", other)

    @detached
    def unary(self, function: Callable[[Tensor, str], Tensor]) -> Product:
        """Return ``function(values, name)`` of every parameter.

        Args:
            function: returns a tensor of the shape, dtype and device of its argument, in which it
                writes nothing.

        Raises:
            TypeError: a result that is no tensor.
            ValueError: one of another shape, dtype or device, naming the parameter.

        Example:
            >>> import torch
            >>> from perturbed.particles import product
            >>> p = product(torch.nn.Linear(3, 2))
            >>> decayed = p.unary(lambda w, name: w if name == "bias" else 0.9 * w).module()
        """
        return self._apply(function, self._values())

    @detached
    def binary(self, function: Callable[[Tensor, Tensor, str], Tensor], other: Operand) -> Product:
        """Return ``function(values, other's values, name)`` of every parameter.

        Args:
            function: as in :meth:`unary`.
            other: a product or a module of the same structure.

        Raises:
            TypeError: a result that is no tensor, or another operand.
            ValueError: a result or an operand that does not fit, naming the parameter.
        """
        operand = self._particle(other)
        if operand is None:
            raise TypeError(f"other must be a product or a module, got {type(other).__name__}")
        return self._apply(function, self._values(), operand._values())

    # ---- inside --------------------------------------------------------------------------------

    def _made(
        self, combination: Combination | None = None, tensors: list[Tensor] | None = None
    ) -> Product:
        """Return another value of the same structure."""
        if combination is not None and len(combination.terms) > MOST_TERMS:
            combination.check_current(self.names)
            with torch.inference_mode(False), torch.no_grad():
                tensors, combination = compute(combination), None
        return type(self)(self._structure, tensors, combination)

    def _bind(self, module: nn.Module) -> Product:
        """Return the product that stands for a module, with the same choice of parameters."""
        same = module is self._structure.module
        return type(self)(self._structure if same else self._structure.of(module))

    def _like(self) -> list[Tensor]:
        """Return tensors of the shapes of the values."""
        if self._combination is not None:
            return self._combination.terms[0].tensors
        assert self._tensors is not None
        return self._tensors

    def _written(self) -> Combination:
        """Return the value as a combination."""
        if self._combination is not None:
            return self._combination
        if self._bound:
            self._structure.check_current()
        return leaf(self._like())

    def _values(self) -> list[Tensor]:
        """Return the values to be read, possibly the parameters themselves."""
        return self._like() if self._combination is None else self._computed()

    def _computed(self) -> list[Tensor]:
        """Return the values in memory of their own."""
        return compute(self._current())

    def _current(self) -> Combination:
        """Return the value as a combination that can be computed now."""
        combination = self._written()
        if self._combination is not None:
            combination.check_current(self.names)
        return combination

    def _particle(self, other: Operand) -> Product | None:
        """Return an operand that is a particle as a product that fits; None for other things."""
        if isinstance(other, nn.Module):
            other = self._bind(other)
        if not isinstance(other, Product):
            return None
        check_same(self._structure, other._structure)
        return other

    def _linear(self, other: Operand) -> Combination | None:
        number = _number(other)
        if number is not None:
            return Combination((), number)
        particle = self._particle(other)
        return None if particle is None else particle._written()

    def _plus(self, other: Combination | None, mine: float, theirs: float) -> Product:
        if other is None:
            return NotImplemented
        return self._made(self._written().scaled(mine).plus(other.scaled(theirs)))

    def _other(self, other: Operand) -> Any:
        """Return a number, a list of tensors or None."""
        number = _number(other)
        if number is not None:
            return number
        particle = self._particle(other)
        return None if particle is None else particle._values()

    @detached
    def _each(self, op: str, other: Operand, function: Callable = foreach.binary) -> Product:
        """Compute what is no linear combination."""
        operand = self._other(other)
        if operand is None:
            return NotImplemented
        return self._made(tensors=function(op, self._values(), operand))

    @detached
    def _each_(self, op: str, other: Operand) -> Product:
        operand = self._other(other)
        if operand is None:
            return NotImplemented
        if self._combination is not None:
            self._tensors, self._combination = self._computed(), None
        target = self._like()
        if isinstance(operand, list) and operand is not target and overlap(target, operand):
            operand = [t.clone() for t in operand]  # tied or shared parts in other places
        self._written()
        foreach.binary_(op, target, operand)
        return self

    @detached
    def _write(self, result: Product) -> Product:
        """Take the value of a result that was computed from this product."""
        if result is NotImplemented:
            return result
        if self._combination is not None:
            self._tensors, self._combination = result._values(), None
        else:
            compute_into(self._like(), result._current())
        return self

    def _apply(self, function: Callable, *values: list[Tensor]) -> Product:
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        results = []
        for name, *tensors in zip(self.names, *values, strict=True):
            result = function(*[t.detach() for t in tensors], name)
            if not isinstance(result, Tensor):
                raise TypeError(
                    f"function must return a tensor for {name}, got {type(result).__name__}"
                )
            for what in ("shape", "dtype", "device"):
                wanted, got = getattr(tensors[0], what), getattr(result, what)
                if wanted != got:
                    raise ValueError(
                        f"function must keep the {what} of {name}, {wanted}, got {got}"
                    )
            results.append(result.clone() if overlap([result], tensors) else result.detach())
        return self._made(tensors=results)

    def __getstate__(self) -> tuple:
        return self._structure, None if self._bound else list(self.tensors())

    def __setstate__(self, state: tuple) -> None:
        structure, tensors = state
        Product.__init__(self, structure, tensors)


def _number(other: Operand) -> float | None:
    """Return a real number as a float; None for what is none."""
    if isinstance(other, Real) or (
        isinstance(other, Tensor) and other.dim() == 0 and not other.is_complex()
    ):
        return float(other)
    return None
