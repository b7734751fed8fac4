"""The names of Nytorch, for programs that use them: thin forms of :mod:`perturbed.particles`.

Nytorch (v1.0, 2024) keeps particles of one "species" apart from all others and shares buffers,
hooks and Python attributes among them. Here whatever has the same structure can be combined, every
particle has its own, and frozen parameters stay where they are. Random particles take a seed.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import draws, modules
from .particle import Operand, Product
from .structure import Structure, choose

if TYPE_CHECKING:
    from typing_extensions import Self


class ParticleProduct(Product):
    """A product that can be asked for a :class:`ParticleModule`, and takes one as an operand."""

    def particle(self) -> ParticleModule:
        """Return a new particle with these parameters."""
        return ParticleModule(self.module())

    def _bind(self, module: nn.Module) -> Product:
        return super()._bind(_root(module))


def _operator(function: Callable[[Any, Any], Any], reflected: bool = False) -> Callable:
    def method(self: _Arithmetic, other: Operand) -> Any:
        mine = self.product()
        return self._wrapped(function(other, mine) if reflected else function(mine, other))

    return method


def _in_place(function: Callable[[Any, Any], Any]) -> Callable:
    def method(self: _Arithmetic, other: Operand) -> Any:
        function(self.product(), other)
        return self

    return method


class _Arithmetic(nn.Module):
    """A module whose operators make modules of its kind."""

    def _kin(self, module: nn.Module) -> Any:
        """Return a module as one of this kind."""
        return module

    def _wrapped(self, value: Product) -> Any:
        return self._kin(value.module())

    def product(self) -> ParticleProduct:
        """Return the parameters that are not frozen as a value to compute with."""
        return ParticleProduct(Structure(_root(self), choose(None, frozen=False)))

    def product_(self, value: Product | nn.Module) -> Self:
        """Write the value of a product into the parameters, which stay the same Parameters.

        Args:
            value: a product or a module of the same structure; no memory is shared with it.
        """
        modules.assign_(self.product(), value)
        return self

    def clone(self) -> Self:
        """Return a copy that shares nothing."""
        return copy.deepcopy(self)

    def clone_from(self, source: nn.Module) -> Self:
        """Return a copy with the parameters and buffers of a module of the same structure.

        Args:
            source: that module.
        """
        return self._kin(modules.clone_from(_root(self), _root(source)))

    def randn(self, seed: int) -> Self:
        """Return a copy with standard normal parameters.

        Args:
            seed: of the random numbers.
        """
        return self._wrapped(draws.randn(self.product(), seed))

    def rand(self, seed: int) -> Self:
        """Return a copy with parameters uniform in (0, 1).

        Args:
            seed: of the random numbers.
        """
        return self._wrapped(draws.rand(self.product(), seed))

    def unary_operator(self, function: Callable[[Tensor, str], Tensor]) -> Self:
        """Return a copy with ``function(values, name)`` of every parameter.

        Args:
            function: see :meth:`Product.unary`.
        """
        return self._wrapped(self.product().unary(function))

    def binary_operator(
        self, other: Operand, function: Callable[[Tensor, Tensor, str], Tensor]
    ) -> Self:
        """Return a copy with ``function(values, other's values, name)`` of every parameter.

        Args:
            other: a particle of the same structure.
            function: see :meth:`Product.binary`.
        """
        return self._wrapped(self.product().binary(function, other))

    def __pos__(self) -> Self:
        return self.clone()

    def __neg__(self) -> Self:
        return self._wrapped(-self.product())

    __add__, __radd__ = _operator(operator.add), _operator(operator.add, reflected=True)
    __sub__, __rsub__ = _operator(operator.sub), _operator(operator.sub, reflected=True)
    __mul__, __rmul__ = _operator(operator.mul), _operator(operator.mul, reflected=True)
    __truediv__ = _operator(operator.truediv)
    __rtruediv__ = _operator(operator.truediv, reflected=True)
    __pow__, __rpow__ = _operator(operator.pow), _operator(operator.pow, reflected=True)
    __iadd__, __isub__ = _in_place(operator.iadd), _in_place(operator.isub)
    __imul__, __itruediv__ = _in_place(operator.imul), _in_place(operator.itruediv)
    __ipow__ = _in_place(operator.ipow)


class NytoModule(_Arithmetic):
    """A module with the arithmetic of :class:`Product`, whose results are modules.

    Any other module has it through :func:`perturbed.particles.product`; inherit from this one for
    programs written for Nytorch.

    Example:
        >>> import torch
        >>> from perturbed.particles.nytorch import NytoModule
        >>> class Net(NytoModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> a, b = Net(), Net()
        >>> child = (a + 2 * b) / 3
        >>> child += 0.1 * child.randn(seed=0)
        >>> child(torch.ones(5, 2)).shape
        torch.Size([5, 1])
    """


class ParticleModule(_Arithmetic):
    """A particle around any module: calls go through to it, operators make particles.

    Args:
        root_module: the module; not copied.

    Raises:
        TypeError: no module.

    Example:
        >>> import torch
        >>> from perturbed.particles.nytorch import ParticleModule
        >>> a, b = (ParticleModule(torch.nn.Linear(2, 1)) for _ in range(2))
        >>> best = a
        >>> moved = (0.5 * b.product() + 0.5 * best.product()).particle()
        >>> b.product_(moved.product())(torch.ones(5, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(self, root_module: nn.Module) -> None:
        """Hold the module."""
        super().__init__()
        if not isinstance(root_module, nn.Module):
            raise TypeError(f"root_module must be an nn.Module, got {type(root_module).__name__}")
        self.root_module = root_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.root_module(*args, **kwargs)

    def _kin(self, module: nn.Module) -> ParticleModule:
        return ParticleModule(module)


def _root(module: nn.Module) -> nn.Module:
    return module.root_module if isinstance(module, ParticleModule) else module
