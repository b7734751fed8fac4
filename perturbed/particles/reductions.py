"""What a list of tensors comes to as a whole: one number, one vector, one answer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import foreach


class Reductions(list[Tensor]):
    """The part of :class:`~perturbed.particles.TensorList` that reduces all elements together.

    Numbers are returned as 0-dim tensors on the device of the first tensor, in the dtypes of the
    list promoted and at least float32, so that sums of half precision do not overflow. Nothing
    waits for the device except where a Python bool is returned.
    """

    def numel(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(t.numel() for t in self)

    def sum(self) -> Tensor:
        """Return the sum of all elements, (); 0 for an empty list."""
        wide = foreach.wide_dtype(self)
        return self._stack([t.sum(dtype=wide) for t in self]).sum()

    def mean(self) -> Tensor:
        """Return the mean of all elements, (); NaN for an empty list."""
        return self.sum() / self.numel()

    def min(self) -> Tensor:
        """Return the smallest element, (); NaN if there is any.

        Raises:
            ValueError: no elements.
        """
        return self._stack([t.amin() for t in self._with_elements()]).amin()

    def max(self) -> Tensor:
        """Return the largest element, (); NaN if there is any.

        Raises:
            ValueError: no elements.
        """
        return self._stack([t.amax() for t in self._with_elements()]).amax()

    def dot(self, other: Iterable[Tensor]) -> Tensor:
        """Return the sum of the products of all elements, ().

        Args:
            other: tensors of the same shapes.
        """
        items = foreach.tensors_like("other", self, other)
        wide = foreach.wide_dtype([*self, *items])
        pairs = zip(self, items, strict=True)
        dots = [a.reshape(-1).to(wide).dot(b.reshape(-1).to(wide)) for a, b in pairs]
        return self._stack(dots, wide).sum()

    def norm(self, ord: float = 2) -> Tensor:
        """Return the vector norm of all elements together, (); 0 without elements.

        Args:
            ord: order; 2 (default), 1, any other positive number, ``inf``, or 0 for the number of
                elements that are not zero.

        Raises:
            ValueError: a negative order.
        """
        if not ord >= 0:
            raise ValueError(f"ord must be at least 0, got {ord}")
        tensors = [t for t in self if t.numel()]
        if not tensors:
            return self._stack([]).sum()
        wide = foreach.wide_dtype(tensors)
        if any(t.dtype != wide for t in tensors):
            tensors = [t.to(wide) for t in tensors]
        norms = self._stack(list(torch._foreach_norm(tensors, ord)))
        return norms.sum() if ord == 0 else torch.linalg.vector_norm(norms, ord)

    def flatten(self) -> Tensor:
        """Return a copy of all elements as one vector, (numel,), in the order of the list.

        The inverse is :meth:`~perturbed.particles.TensorList.from_vector`.
        """
        if len(self) == 0:
            return torch.empty(0)
        return torch.cat([t.reshape(-1).to(self[0].device) for t in self])

    def isfinite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        return bool(self._stack([t.isfinite().all() for t in self], torch.bool).all())

    def equals(self, other: Iterable[Tensor]) -> bool:
        """Return whether ``other`` has the same length, shapes and values; NaN equals nothing.

        Args:
            other: any sequence of tensors.
        """
        items = list(other)
        return len(items) == len(self) and all(map(torch.equal, self, items))

    def allclose(
        self,
        other: Iterable[Tensor],
        rtol: float = 1e-5,
        atol: float = 1e-8,
        equal_nan: bool = False,
    ) -> bool:
        """Return whether ``other`` has the same length and shapes and about the same values.

        Args:
            other: any sequence of tensors.
            rtol: relative tolerance.
            atol: absolute tolerance.
            equal_nan: whether NaN is close to NaN.
        """
        items = list(other)
        return len(items) == len(self) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol, atol, equal_nan)
            for a, b in zip(self, items, strict=True)
        )

    def _with_elements(self) -> list[Tensor]:
        found = [t for t in self if t.numel()]
        if not found:
            raise ValueError("min and max need at least one element, got none")
        return found

    def _stack(self, numbers: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Bring 0-dim tensors together on the first device, (len,)."""
        dtype = dtype or foreach.wide_dtype(numbers)
        if not numbers:
            return torch.zeros(0, dtype=dtype)
        device = numbers[0].device
        return torch.stack([n.to(device, dtype) for n in numbers])
