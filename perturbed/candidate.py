"""Evaluating a Python function of a module for one member after the other.

For losses that a population cannot have in one forward pass: a simulator, a metric of a library, a
module that does not convert. :class:`perturbed.WorkerPool` does the same in worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[nn.Module], Any]


def evaluate_one_by_one(function: Function, model: nn.Module, members: Any) -> Tensor:
    """Evaluate a function of a module for many members, in this process.

    Each evaluation starts from the module's present buffers and train or eval modes, under
    ``torch.no_grad()``. Afterwards the module is as before, also if the function raises.

    Args:
        function: takes the module, returns a number or a 0-dim tensor; NaN is handed on.
        model: any module; the layout of a member is its parameters that require grad, flattened one
            after the other in the order of ``model.parameters()``.
        members: (P, N) floating-point matrix, or an iterable of P vectors.

    Returns:
        (P,) float64, on the CPU.

    Raises:
        TypeError: members that are no floating-point numbers, or a result that is no number.
        ValueError: members of another shape, or a model without parameters.

    Example:
        >>> import torch, perturbed
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> members = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> perturbed.evaluate_one_by_one(lambda m: m(torch.ones(2)), net, members)
        tensor([3., 7.], dtype=torch.float64)
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    with Candidate(model) as candidate:
        matrix = as_matrix(members, candidate.size)
        values = [candidate.evaluate(function, vector) for vector in matrix]
    return torch.tensor(values, dtype=torch.float64)


class Candidate:
    """A module that takes the parameters of one member after the other.

    Every evaluation starts from the module as it was found: its buffers, its frozen parameters and
    its train or eval modes are put back first, so no member sees what another left behind. As a
    context, it also puts back the parameters and their gradients at the end.

    Args:
        model: used as it is, not copied.

    Raises:
        TypeError: no module.
        ValueError: no parameter that requires grad.
    """

    def __init__(self, model: nn.Module) -> None:
        """Note the module's state."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.parameters = trainable(model)
        self.size = sum(p.numel() for p in self.parameters)
        if not self.parameters:
            raise ValueError("model must have a parameter that requires grad, got none")
        own = {id(p) for p in self.parameters}
        # By name as well as by value: `self.count = self.count + 1` binds another tensor.
        self._names: list[tuple[MutableMapping[str, Any], str, Tensor | None]] = []
        values: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    self._names.append((held, name, tensor))
                    if tensor is not None and id(tensor) not in own:
                        values[id(tensor)] = (tensor, tensor.detach().clone())
        self._values = list(values.values())
        self._modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def evaluate(self, function: Function, vector: Tensor) -> float:
        """Return what ``function`` says of the module with the parameters in ``vector``, (N,).

        Raises:
            TypeError: the result is no number.
            Exception: whatever the function raises.
        """
        self._restore()
        vector = vector.to(self.parameters[0].device)
        pieces = vector.split([p.numel() for p in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))
            parameter.grad = None
        return _number(function(self.model))

    @torch.no_grad()
    def _restore(self) -> None:
        for held, name, tensor in self._names:
            held[name] = tensor
        for tensor, value in self._values:
            tensor.copy_(value)
        for module, training in self._modes:
            module.training = training

    def __enter__(self) -> Candidate:
        self._start = [(p, p.detach().clone(), p.grad) for p in self.parameters]
        return self

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        self._restore()
        for parameter, value, gradient in self._start:
            parameter.copy_(value)
            parameter.grad = gradient


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require grad, in the module's order: the layout of a member."""
    return [p for p in model.parameters() if p.requires_grad]


def as_matrix(members: Any, size: int) -> Tensor:
    """Check members and return them as one matrix.

    Args:
        members: (P, N) tensor or array, or an iterable of P vectors (N,).
        size: N.

    Raises:
        TypeError: no numbers, or no floating-point ones.
        ValueError: another shape, naming the member where it is one's.
    """
    if not isinstance(members, Tensor) and not hasattr(members, "__array__"):
        if not isinstance(members, Iterable):
            raise TypeError(
                f"members must be a (P, N) tensor or an iterable of vectors, got "
                f"{type(members).__name__}"
            )
        rows = [_as_tensor(row) for row in members]
        for i, row in enumerate(rows):
            if row.shape != (size,):
                raise ValueError(
                    f"members must hold vectors of shape (N,) = ({size},), got "
                    f"{tuple(row.shape)} as member {i}"
                )
        members = torch.stack(rows) if rows else torch.empty(0, size)
    members = _as_tensor(members).detach()
    if not members.is_floating_point():
        raise TypeError(f"members must be floating-point, got {members.dtype}")
    if members.dim() != 2 or members.shape[1] != size:
        raise ValueError(
            f"members must have shape (P, N) with N = {size}, the number of elements of the "
            f"parameters that require grad, got {tuple(members.shape)}"
        )
    return members


def _as_tensor(numbers: Any) -> Tensor:
    try:
        return torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"members must hold numbers: {error}") from None


def _number(value: Any) -> float:
    """Return a function's result as a float."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(
            f"function must return a number or a 0-dim tensor, got shape {tuple(value.shape)}"
        )
    if not isinstance(value, str):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"function must return a number or a 0-dim tensor, got {type(value).__name__}")
