"""Operands of list arithmetic, checked and handed to ``torch._foreach_*``.

torch's list kernels do many tensors in one launch, but they zip without naming what does not fit
and take scalars in several forms. Here an operand is checked once and brought to one of four:
a number, a 0-dim tensor, a list of numbers, a list of tensors. What torch has no list kernel for
runs tensor by tensor.

Functions without a trailing underscore return a new list and work on any sequence of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

#: A number, a 0-dim tensor, or a sequence as long as the list: of numbers, or of tensors each of
#: which is 0-dim or has the shape of its counterpart.
Operand = Any

# Their _foreach form takes a 0-dim tensor beside the list: no wait for the device, one launch.
_TAKES_TENSOR = ("add", "mul", "div")


def operand(name: str, tensors: Sequence[Tensor], other: Operand) -> Any:
    """Check what stands beside a list and bring it to one of the four forms.

    Args:
        name: of the argument, for error messages.
        tensors: the list, length n.
        other: number, 0-dim tensor, or sequence of n numbers or n tensors.

    Returns:
        A Python number, a 0-dim tensor, a list of n Python numbers or a list of n tensors.

    Raises:
        TypeError: something else.
        ValueError: another length, or, naming the first index, another shape or device.
    """
    if isinstance(other, Number):
        return _python(other)
    if isinstance(other, Tensor):
        if other.dim():
            raise ValueError(
                f"{name} must be a number, a 0-dim tensor or a sequence of tensors or numbers, got "
                f"a tensor of shape {tuple(other.shape)}"
            )
        if other.device.type != "cpu":  # torch takes CPU scalars beside tensors of any device
            for i, t in enumerate(tensors):
                if t.device != other.device:
                    _refuse_device(name, i, t, other)
        return other
    if not isinstance(other, Iterable) or isinstance(other, (str, bytes, dict, set)):
        raise TypeError(
            f"{name} must be a number, a 0-dim tensor or a sequence of tensors or numbers, got "
            f"{type(other).__name__}"
        )
    if getattr(other, "ndim", 1) == 0:  # a NumPy scalar in an array
        return _python(other.item())  # type: ignore[attr-defined]
    items = list(other)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"the list must hold tensors, got {type(t).__name__} at index {i}")
    _check_length(name, tensors, items)
    if all(isinstance(o, Tensor) for o in items):
        for i, (t, o) in enumerate(zip(tensors, items, strict=True)):
            if o.shape != t.shape and o.dim():
                raise ValueError(
                    f"{name} must have the shapes of the list or be 0-dim; at index {i} expected "
                    f"{tuple(t.shape)}, got {tuple(o.shape)}"
                )
            if o.device != t.device and (o.dim() or o.device.type != "cpu"):
                _refuse_device(name, i, t, o)
        return items
    for i, o in enumerate(items):
        if not isinstance(o, Number):
            raise TypeError(
                f"{name} must hold only tensors or only numbers, got {type(o).__name__} at index "
                f"{i}"
            )
    return [_python(o) for o in items]


def tensors_like(
    name: str, tensors: Sequence[Tensor], other: Iterable[Tensor], any_device: bool = False
) -> list[Tensor]:
    """Check a sequence that must match the list tensor by tensor, and return it as a list.

    Args:
        name: of the argument, for error messages.
        tensors: the list.
        other: as many tensors of the same shapes.
        any_device: whether the devices may differ, as in a copy.

    Raises:
        TypeError: something else.
        ValueError: another length, or, naming the first index, another shape or device.
    """
    if isinstance(other, (Tensor, Number, str)) or not isinstance(other, Iterable):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(other).__name__}")
    items = list(other)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"the list must hold tensors, got {type(t).__name__} at index {i}")
    _check_length(name, tensors, items)
    for i, (t, o) in enumerate(zip(tensors, items, strict=True)):
        if not isinstance(o, Tensor):
            raise TypeError(f"{name} must hold tensors, got {type(o).__name__} at index {i}")
        if o.shape != t.shape:
            raise ValueError(
                f"{name} must have the shapes of the list; at index {i} expected "
                f"{tuple(t.shape)}, got {tuple(o.shape)}"
            )
        if o.device != t.device and not any_device:
            _refuse_device(name, i, t, o)
    return items


def spread(value: Any, count: int) -> list[Any]:
    """Return ``count`` operands, one a tensor, of a checked operand."""
    return value if isinstance(value, list) else [value] * count


def unary(op: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Apply ``torch._foreach_<op>``."""
    return list(getattr(torch, f"_foreach_{op}")(list(tensors))) if len(tensors) else []


def binary(op: str, tensors: Sequence[Tensor], other: Operand) -> list[Tensor]:
    """Return ``op(tensor, other)``; ``op`` is add, sub, mul, div, pow, maximum or minimum."""
    other = operand("other", tensors, other)
    if len(tensors) == 0:
        return []
    return list(getattr(torch, f"_foreach_{op}")(tensors, _beside(op, tensors, other)))


def binary_(op: str, tensors: Sequence[Tensor], other: Operand) -> None:
    """Write ``op(tensor, other)`` into the tensors, or raise before any of them has changed."""
    other = operand("other", tensors, other)
    if len(tensors) == 0:
        return
    check_writable(tensors)
    if not _fits(tensors, other):
        _check_casts(op, tensors, binary(op, tensors, other))
    getattr(torch, f"_foreach_{op}_")(tensors, _beside(op, tensors, other))


def reflected(op: str, tensors: list[Tensor], other: Operand) -> list[Tensor]:
    """Return ``op(other, tensor)`` for sub, div and pow: what torch gives, bit for bit."""
    other = operand("other", tensors, other)
    if len(tensors) == 0:
        return []
    if not isinstance(other, (list, Tensor)):
        if op == "pow":
            return list(torch._foreach_pow(other, tensors))
        if op == "div":  # as Tensor.__rtruediv__ does it
            return _then("mul", list(torch._foreach_reciprocal(tensors)), other)
        if all(t.is_floating_point() for t in tensors):
            # -x + a is a - x exactly; unsigned integers would wrap.
            return _then("add", list(torch._foreach_neg(tensors)), other)
    others = spread(other, len(tensors))
    if all(isinstance(o, Tensor) for o in others):
        return list(getattr(torch, f"_foreach_{op}")(others, tensors))
    function: Any = {"sub": operator.sub, "div": operator.truediv, "pow": torch.pow}[op]
    return [function(o, t) for o, t in zip(others, tensors, strict=True)]


def _then(op: str, fresh: list[Tensor], number: Any) -> list[Tensor]:
    """Apply ``op`` to intermediate results: into their memory, unless autograd needs them."""
    if any(t.requires_grad for t in fresh) or not _fits(fresh, number):
        return list(getattr(torch, f"_foreach_{op}")(fresh, number))
    getattr(torch, f"_foreach_{op}_")(fresh, number)
    return fresh


def each(function: Callable[..., Any], tensors: Sequence[Tensor], *others: Operand) -> list[Any]:
    """Call ``function(tensor, *others)`` tensor by tensor, with checked operands."""
    checked = [operand("other", tensors, o) for o in others]
    columns = [spread(o, len(tensors)) for o in checked]
    return [function(*row) for row in zip(tensors, *columns, strict=True)]


def check_writable(tensors: Sequence[Tensor]) -> None:
    """Raise before an in-place operation would stop half-way through the list."""
    if torch.is_grad_enabled():
        for i, t in enumerate(tensors):
            if t.requires_grad and t.is_leaf:
                raise RuntimeError(
                    f"tensor {i} is a leaf that requires grad, which cannot change in place; work "
                    "under torch.no_grad()"
                )


def wide_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return a dtype that sums of these tensors fit: theirs promoted, at least float32."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def unary_(op: str, tensors: Sequence[Tensor]) -> None:
    """Apply ``torch._foreach_<op>_``, or raise before any tensor has changed."""
    if len(tensors) == 0:
        return
    check_writable(tensors)
    if not all(t.is_floating_point() for t in tensors):
        _check_casts(op, tensors, unary(op, tensors))
    getattr(torch, f"_foreach_{op}_")(tensors)


def where(tensors: Sequence[Tensor], condition: Operand, other: Operand) -> list[Tensor]:
    """Return each tensor where its condition holds, else the other operand."""
    masks = spread(operand("condition", tensors, condition), len(tensors))
    for i, mask in enumerate(masks):
        if not isinstance(mask, bool) and getattr(mask, "dtype", None) != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"condition must hold bools, got {got} at index {i}")
    others = spread(operand("other", tensors, other), len(tensors))
    rows = zip(tensors, masks, others, strict=True)
    return [torch.where(torch.as_tensor(m, device=t.device), t, o) for t, m, o in rows]


def clip(tensors: Sequence[Tensor], low: Operand | None, high: Operand | None) -> list[Tensor]:
    """Limit to [low, high], either of which may be None."""
    _check_bounds(low, high)
    clipped = list(tensors) if low is None else binary("maximum", tensors, low)
    return clipped if high is None else binary("minimum", clipped, high)


def clip_(tensors: Sequence[Tensor], low: Operand | None, high: Operand | None) -> None:
    """Limit to [low, high] in place, or raise before any tensor has changed."""
    _check_bounds(low, high)
    if not all(t.is_floating_point() for t in tensors):
        _check_casts("clip", tensors, clip(tensors, low, high))
    if high is not None:
        high = operand("max", tensors, high)
    if low is not None:
        binary_("maximum", tensors, low)
    if high is not None:
        binary_("minimum", tensors, high)


def lerp(op: str, tensors: Sequence[Tensor], end: Any, weight: Operand) -> list[Tensor]:
    """Apply ``torch._foreach_lerp`` or ``torch._foreach_lerp_``."""
    end = tensors_like("end", tensors, end)
    _check_dtypes("end", tensors, end)
    weight = operand("weight", tensors, weight)
    if op.endswith("_"):
        check_writable(tensors)
    if len(tensors) == 0:
        return []
    if isinstance(weight, Tensor):
        weight = [weight] * len(tensors)
    if isinstance(weight, list) and isinstance(weight[0], Tensor):
        weight = [w.to(t).expand_as(t) for w, t in zip(weight, tensors, strict=True)]
    return getattr(torch, f"_foreach_{op}")(tensors, end, weight) or []


def fused(op: str, tensors: Sequence[Tensor], a: Any, b: Any, value: Operand) -> list[Tensor]:
    """Apply ``torch._foreach_addcmul`` or ``addcdiv``, or their in-place twins."""
    a, b = tensors_like("a", tensors, a), tensors_like("b", tensors, b)
    _check_dtypes("a", tensors, a)
    _check_dtypes("b", tensors, b)
    value = operand("value", tensors, value)
    if isinstance(value, Tensor) or (
        value and isinstance(value, list) and isinstance(value[0], Tensor)
    ):
        raise TypeError("value must be a number or a sequence of numbers, got tensors")
    if op.endswith("_"):
        check_writable(tensors)
    return (getattr(torch, f"_foreach_{op}")(tensors, a, b, value) or []) if len(tensors) else []


def copy_(tensors: Sequence[Tensor], other: Iterable[Tensor]) -> None:
    """Write the values of ``other`` into the tensors, or raise before any has changed."""
    items = tensors_like("other", tensors, other, any_device=True)
    check_writable(tensors)
    if items:
        torch._foreach_copy_(list(tensors), items)


def draw(
    tensors: Sequence[Tensor], generator: torch.Generator | int, method: str, *args: float
) -> list[Tensor]:
    """Return ``torch.empty_like(t).<method>(*args)`` with numbers from ``generator``."""
    for i, t in enumerate(tensors):
        if not t.is_floating_point():
            raise TypeError(f"random numbers need floating-point tensors, got {t.dtype} at {i}")
    devices = list(dict.fromkeys(t.device for t in tensors))
    if isinstance(generator, torch.Generator):
        for i, t in enumerate(tensors):
            if t.device.type != generator.device.type:
                raise ValueError(
                    f"generator must be on the devices of the list; at index {i} expected "
                    f"{t.device}, got {generator.device}"
                )
        generators = dict.fromkeys(devices, generator)
    elif isinstance(generator, int) and not isinstance(generator, bool):
        # Another seed a device: the devices of one kind would draw the same numbers.
        generators = {
            device: torch.Generator(device).manual_seed((generator + k) % 2**63)
            for k, device in enumerate(devices)
        }
    else:
        raise TypeError(
            f"generator must be a torch.Generator or a seed, got {type(generator).__name__}"
        )
    return [
        getattr(torch.empty_like(t, requires_grad=False), method)(
            *args, generator=generators[t.device]
        )
        for t in tensors
    ]


def _beside(op: str, tensors: Sequence[Tensor], other: Any) -> Any:
    """Return a checked operand in a form that ``torch._foreach_<op>`` takes without waiting."""
    if not isinstance(other, Tensor):
        return other
    # The derivative of the 0-dim form is wrong in torch 2.13, and other dtypes are promoted as if
    # it were a number; a list is right in both. Other ops would read it back from the device.
    one = all(t.device == tensors[0].device and t.dtype == other.dtype for t in tensors)
    if op in _TAKES_TENSOR and one and not other.requires_grad:
        return other.to(tensors[0].device)
    return [other] * len(tensors)


def _fits(tensors: Sequence[Tensor], other: Any) -> bool:
    """Whether any result certainly fits the list: floating-point tensors and real operands."""
    if not all(t.is_floating_point() for t in tensors):
        return False
    return not any(
        o.is_complex() if isinstance(o, Tensor) else isinstance(o, complex)
        for o in (other if isinstance(other, list) else [other])
    )


def _python(number: Any) -> bool | int | float | complex:
    """Return a Python number of what may be NumPy's."""
    return number.item() if hasattr(number, "item") else number


def _check_length(name: str, tensors: Sequence[Tensor], items: Sequence[Any]) -> None:
    if len(items) != len(tensors):
        raise ValueError(
            f"{name} must have as many entries as the list, {len(tensors)}, got {len(items)}; the "
            f"first without a counterpart has index {min(len(items), len(tensors))}"
        )


def _refuse_device(name: str, index: int, tensor: Tensor, other: Tensor) -> None:
    raise ValueError(
        f"{name} must be on the devices of the list; at index {index} expected {tensor.device}, "
        f"got {other.device}"
    )


def _check_casts(op: str, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Raise where a result in place would be of a wider kind than the tensor."""
    for i, (t, new) in enumerate(zip(tensors, results, strict=True)):
        if not torch.can_cast(new.dtype, t.dtype):
            raise TypeError(f"{op} in place: tensor {i} holds {t.dtype}, the result is {new.dtype}")


def _check_dtypes(name: str, tensors: Sequence[Tensor], items: Sequence[Tensor]) -> None:
    for i, (t, o) in enumerate(zip(tensors, items, strict=True)):
        if t.dtype != o.dtype:
            raise TypeError(
                f"{name} must have the dtypes of the list; at index {i} expected {t.dtype}, got "
                f"{o.dtype}"
            )


def _check_bounds(low: Operand | None, high: Operand | None) -> None:
    if low is None and high is None:
        raise ValueError("clip needs min or max, got neither")
