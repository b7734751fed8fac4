"""TensorList: arithmetic over tensors of different sizes, as if they were one vector.

The idea and the older names (``multi_copy_``, ``equals``, ``clip``, the ``*_like`` makers) are
those of PyTorch-PSO (K. Garre, 2024), where it holds a particle: the parameters of one network.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor, nn

from . import foreach
from .foreach import Operand
from .reductions import Reductions

Binary = Callable[[Any, Operand], "TensorList"]
Unary = Callable[[Any], "TensorList"]


def _named(function: Any, name: str, sentence: str = "") -> Any:
    """Give a made method its name and docstring."""
    function.__name__, function.__qualname__ = name, f"TensorList.{name}"
    function.__doc__ = sentence or None
    return function


def _unary(op: str, sentence: str) -> tuple[Unary, Unary]:
    """Make the method of ``torch._foreach_<op>`` and its in-place twin."""

    def new(self: Sequence[Tensor]) -> TensorList:
        return TensorList(foreach.unary(op, self))

    def in_place(self: TensorList) -> TensorList:
        foreach.unary_(op, self)
        return self

    return _named(new, op, f"{sentence}."), _named(in_place, f"{op}_", f"{sentence}, in place.")


def _binary(op: str, name: str, sentence: str = "") -> tuple[Binary, Binary]:
    """Make the method of ``foreach.binary(op)`` and its in-place twin."""

    def new(self: Sequence[Tensor], other: Operand) -> TensorList:
        return TensorList(foreach.binary(op, self, other))

    def in_place(self: TensorList, other: Operand) -> TensorList:
        foreach.binary_(op, self, other)
        return self

    twin = f"__i{name[2:]}" if name.startswith("__") else f"{name}_"
    return _named(new, name, sentence), _named(in_place, twin, sentence and f"{sentence} In place.")


def _reflected(op: str, name: str) -> Binary:
    def new(self: TensorList, other: Operand) -> TensorList:
        return TensorList(foreach.reflected(op, self, other))

    return _named(new, name)


def _mask(compare: Callable[[Any, Any], Any], name: str, sentence: str = "") -> Binary:
    def new(self: Sequence[Tensor], other: Operand) -> TensorList:
        return TensorList(foreach.each(compare, self, other))

    return _named(new, name, sentence)


class TensorList(Reductions):
    """A list of tensors with the arithmetic of a vector, on ``torch._foreach_*``.

    ``+ - * / **``, negation and ``abs`` work tensor by tensor, also reflected (``2 - t``) and in
    place (``t += u`` writes into the tensors that are there). The other operand is a number, a
    0-dim tensor, or a sequence of equal length: of numbers, or of tensors that are 0-dim or have
    the shape of their counterpart. dtypes are promoted and gradients recorded as torch does it. A
    method with a trailing underscore works in place and returns the list. The tensors of a list
    that is changed in place must not share memory with each other.

    In everything else it is a ``list`` (append, iteration, pickling; optimizers and
    ``torch._foreach_*`` take it). Mind that ``+`` and ``*`` are not concatenation and repetition:
    that is ``extend``. ``< <= > >=`` give masks for :meth:`where`; ``==`` is refused, because it
    could mean :meth:`eq` or :meth:`equals`, and so is the truth of masks (``if x > 0:``).

    Args:
        tensors: any sequence of tensors. They are held, not copied.

    Raises:
        TypeError: an entry that is no tensor. Operators: an operand of another type, or a result
            in place of a wider dtype than the list has.
        ValueError: from operators: another length, or another shape or device, naming the first
            index that differs. Nothing has changed then.

    Example:
        >>> import torch
        >>> from perturbed.particles import TensorList
        >>> x = TensorList([torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])])
        >>> 2 - x / [1, 2]
        TensorList([tensor([1., 0.]), tensor([[0.]])])
        >>> x -= x.ones_like()
        >>> x.flatten()
        tensor([0., 1., 3.])
        >>> x.norm()
        tensor(3.1623)
    """

    # NumPy's operators would take the list apart; None makes them leave it to ours.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """Hold the tensors."""
        super().__init__(tensors)
        for i, tensor in enumerate(self):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"tensors must hold tensors, got {type(tensor).__name__} at index {i}"
                )

    @classmethod
    def from_module(cls, module: nn.Module) -> TensorList:
        """Return the parameters of ``module`` that require grad, themselves and in its order."""
        return cls(p for p in module.parameters() if p.requires_grad)

    # ---- as a list -----------------------------------------------------------------------------

    @overload
    def __getitem__(self, index: SupportsIndex) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> TensorList: ...
    def __getitem__(self, index: Any) -> Any:
        """Return a tensor, or for a slice a TensorList of the same tensors."""
        item = super().__getitem__(index)
        return TensorList(item) if isinstance(index, slice) else item

    def __repr__(self) -> str:
        return f"TensorList({super().__repr__()})"

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors as a plain list."""
        return list(self)

    @property
    def shapes(self) -> list[torch.Size]:
        """The shape of each tensor."""
        return [t.shape for t in self]

    shape = shapes  # as PyTorch-PSO calls it

    def map(self, function: Callable[..., Tensor], *others: Operand) -> TensorList:
        """Return ``function(tensor, *others)`` tensor by tensor, operands as those of operators.

        Args:
            function: returns a tensor.
            others: operands, each a number, a 0-dim tensor or a sequence.
        """
        return TensorList(foreach.each(function, self, *others))

    # ---- arithmetic; list's own + and * mean something else, hence the ignores -----------------

    __add__, __iadd__ = _binary("add", "__add__")  # type: ignore[assignment]
    __sub__, __isub__ = _binary("sub", "__sub__")
    __mul__, __imul__ = _binary("mul", "__mul__")
    __truediv__, __itruediv__ = _binary("div", "__truediv__")
    __pow__, __ipow__ = _binary("pow", "__pow__")
    __radd__, __rmul__ = __add__, __mul__
    __rsub__ = _reflected("sub", "__rsub__")
    __rtruediv__ = _reflected("div", "__rtruediv__")
    __rpow__ = _reflected("pow", "__rpow__")

    abs, abs_ = _unary("abs", "Absolute values")
    neg, neg_ = _unary("neg", "Negated values")
    sqrt, sqrt_ = _unary("sqrt", "Square roots; NaN for negative numbers")
    exp, exp_ = _unary("exp", "Exponentials")
    log, log_ = _unary("log", "Natural logarithms; NaN for negative numbers")
    sign, sign_ = _unary("sign", "-1, 0 or 1; 0 for NaN, as torch.sign")
    reciprocal, reciprocal_ = _unary("reciprocal", "1 / value")
    round, round_ = _unary("round", "Nearest integers, halves to even")
    tanh, tanh_ = _unary("tanh", "Hyperbolic tangents")
    __abs__ = abs
    __neg__ = neg

    maximum, maximum_ = _binary("maximum", "maximum", "The larger of both; NaN where either is.")
    minimum, minimum_ = _binary("minimum", "minimum", "The smaller of both; NaN where either is.")

    lt = _mask(operator.lt, "lt", "Masks, True where self < other.")
    le = _mask(operator.le, "le", "Masks, True where self <= other.")
    gt = _mask(operator.gt, "gt", "Masks, True where self > other.")
    ge = _mask(operator.ge, "ge", "Masks, True where self >= other.")
    eq = _mask(operator.eq, "eq", "Masks, True where self == other.")
    ne = _mask(operator.ne, "ne", "Masks, True where self != other.")
    __lt__, __le__, __gt__, __ge__ = lt, le, gt, ge  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TypeError("== on a TensorList is ambiguous: eq() gives masks, equals() one answer")

    def __ne__(self, other: object) -> bool:
        raise TypeError("!= on a TensorList is ambiguous: ne() gives masks, equals() one answer")

    def __bool__(self) -> bool:
        if any(t.dtype == torch.bool for t in self):
            raise ValueError(
                "the truth of masks is ambiguous: flatten().all() or flatten().any() is one answer"
            )
        return len(self) > 0

    def where(self, condition: Operand, other: Operand) -> TensorList:
        """Return ``self`` where ``condition`` holds, else ``other``.

        Args:
            condition: masks of the shapes of the list, as a comparison gives; or one bool, or one
                a tensor.
            other: operand.

        Example:
            >>> import torch
            >>> from perturbed.particles import TensorList
            >>> x = TensorList([torch.tensor([-1.0, 2.0]), torch.tensor([-3.0])])
            >>> x.where(x > 0, 0)
            TensorList([tensor([0., 2.]), tensor([0.])])
        """
        return TensorList(foreach.where(self, condition, other))

    def clip(self, min: Operand | None = None, max: Operand | None = None) -> TensorList:
        """Limit the values to [min, max]; NaN stays, and ``max`` wins where min > max.

        Args:
            min: lower bounds, an operand; None: no bound.
            max: upper bounds, likewise.

        Raises:
            ValueError: neither is given.
        """
        return TensorList(foreach.clip(self, min, max))

    def clip_(self, min: Operand | None = None, max: Operand | None = None) -> TensorList:
        """Limit the values to [min, max] in place; arguments as those of :meth:`clip`."""
        foreach.clip_(self, min, max)
        return self

    clamp, clamp_ = clip, clip_

    def lerp(self, end: Iterable[Tensor], weight: Operand) -> TensorList:
        """Return ``self + weight * (end - self)``.

        Args:
            end: tensors of the same shapes and dtypes.
            weight: operand, usually a number in [0, 1].
        """
        return TensorList(foreach.lerp("lerp", self, end, weight))

    def lerp_(self, end: Iterable[Tensor], weight: Operand) -> TensorList:
        """Move the values by ``weight`` towards ``end`` in place; as :meth:`lerp`."""
        foreach.lerp("lerp_", self, end, weight)
        return self

    def addcmul(self, a: Iterable[Tensor], b: Iterable[Tensor], value: Operand = 1) -> TensorList:
        """Return ``self + value * a * b``.

        Args:
            a: tensors of the same shapes and dtypes.
            b: likewise.
            value: a number, or a number for each tensor.
        """
        return TensorList(foreach.fused("addcmul", self, a, b, value))

    def addcmul_(self, a: Iterable[Tensor], b: Iterable[Tensor], value: Operand = 1) -> TensorList:
        """Add ``value * a * b`` in place; arguments as those of :meth:`addcmul`."""
        foreach.fused("addcmul_", self, a, b, value)
        return self

    def addcdiv(self, a: Iterable[Tensor], b: Iterable[Tensor], value: Operand = 1) -> TensorList:
        """Return ``self + value * a / b``; arguments as those of :meth:`addcmul`."""
        return TensorList(foreach.fused("addcdiv", self, a, b, value))

    def addcdiv_(self, a: Iterable[Tensor], b: Iterable[Tensor], value: Operand = 1) -> TensorList:
        """Add ``value * a / b`` in place; arguments as those of :meth:`addcmul`."""
        foreach.fused("addcdiv_", self, a, b, value)
        return self

    # ---- copies and new lists; these work on any sequence: TensorList.zeros_like(parameters) ----

    def clone(self) -> TensorList:
        """Return a copy with memory of its own; gradients flow through it."""
        return TensorList(t.clone() for t in self)

    __pos__ = clone

    def detach(self) -> TensorList:
        """Return the same memory without autograd's record."""
        return TensorList(t.detach() for t in self)

    def to(self, *args: Any, **kwargs: Any) -> TensorList:
        """Return the list in another dtype or on another device.

        Args:
            args: as ``Tensor.to`` takes them.
            kwargs: likewise.
        """
        return TensorList(t.to(*args, **kwargs) for t in self)

    def requires_grad_(self, requires_grad: bool = True) -> TensorList:
        """Set whether autograd records operations on the tensors; return the list.

        Args:
            requires_grad: True or False.
        """
        for tensor in self:
            tensor.requires_grad_(requires_grad)
        return self

    @property
    def grad(self) -> TensorList:
        """The gradients of the tensors, zeros where there is none.

        Assigning a sequence of tensors of the same shapes sets them.
        """
        return TensorList(torch.zeros_like(t) if t.grad is None else t.grad for t in self)

    @grad.setter
    def grad(self, gradients: Iterable[Tensor]) -> None:
        for tensor, gradient in zip(
            self, foreach.tensors_like("grad", self, gradients), strict=True
        ):
            tensor.grad = gradient

    def copy_(self, other: Iterable[Tensor]) -> TensorList:
        """Write the values of ``other`` into the tensors, from any device and dtype.

        Args:
            other: as many tensors of the same shapes.

        Raises:
            ValueError: another length or, naming the first index, another shape.
        """
        foreach.copy_(self, other)
        return self

    multi_copy_ = copy_

    def fill_(self, value: float) -> TensorList:
        """Write ``value`` into every element.

        Args:
            value: a number.
        """
        foreach.check_writable(self)
        for tensor in self:
            tensor.fill_(value)
        return self

    def zero_(self) -> TensorList:
        """Write 0 into every element."""
        return self.fill_(0)

    def from_vector(self, vector: Tensor) -> TensorList:
        """Return a vector cut into the shapes of this list; the inverse of :meth:`flatten`.

        Args:
            vector: (numel,); the new tensors are views of it where dtype and device agree with
                those of the list, else converted.

        Raises:
            ValueError: another shape.
        """
        if not isinstance(vector, Tensor) or vector.shape != (self.numel(),):
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(f"vector must have shape (numel,) = ({self.numel()},), got {got}")
        pieces = vector.split([t.numel() for t in self]) if self else ()
        pairs = zip(self, pieces, strict=True)
        return TensorList(p.reshape(t.shape).to(t.device, t.dtype) for t, p in pairs)

    def empty_like(self) -> TensorList:
        """Return tensors of the same shapes, dtypes and devices, not initialised."""
        return TensorList(torch.empty_like(t) for t in self)

    def zeros_like(self) -> TensorList:
        """Return zeros of the same shapes, dtypes and devices."""
        return TensorList(torch.zeros_like(t) for t in self)

    def ones_like(self) -> TensorList:
        """Return ones of the same shapes, dtypes and devices."""
        return TensorList(torch.ones_like(t) for t in self)

    def uniform_like(
        self, low: float = 0.0, high: float = 1.0, *, generator: torch.Generator | int
    ) -> TensorList:
        """Return uniform numbers in [low, high) of the same shapes, dtypes and devices.

        Args:
            low: lower end.
            high: upper end.
            generator: where the numbers come from: a generator on the device of the tensors, or a
                seed, the same numbers at every call. There is no default: torch's global generator
                stays untouched.

        Raises:
            TypeError: tensors that are not floating-point, or a generator of another type.
            ValueError: bounds that are not finite or out of order, or a generator on another
                device.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"low and high must be finite and in order, got {low} and {high}")
        return TensorList(foreach.draw(self, generator, "uniform_", low, high))

    def normal_like(
        self, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | int
    ) -> TensorList:
        """Return normal numbers of the same shapes, dtypes and devices.

        Args:
            mean: mean.
            std: standard deviation, at least 0.
            generator: as that of :meth:`uniform_like`.

        Raises:
            TypeError: as :meth:`uniform_like`.
            ValueError: a standard deviation that is negative, values that are not finite, or a
                generator on another device.
        """
        if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
            raise ValueError(f"mean and std must be finite and std at least 0, got {mean}, {std}")
        return TensorList(foreach.draw(self, generator, "normal_", mean, std))


def multi_copy(list1: Sequence[Tensor], list2: Iterable[Tensor]) -> None:
    """Write the values of ``list2`` into the tensors of ``list1``; any sequences of tensors.

    Args:
        list1: the tensors that change.
        list2: as many tensors of the same shapes.

    Raises:
        ValueError: another length or, naming the first index, another shape. PyTorch-PSO copied
            what it could and said nothing.
    """
    foreach.copy_(list(list1), list2)
