"""Inputs that every member sees: the same n rows for each, held once."""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten

# Operators that treat every row alike and take no other row-shaped tensor.
_POINTWISE = {
    _aten.abs.default, _aten.neg.default, _aten.sign.default, _aten.relu.default,
    _aten.tanh.default, _aten.sigmoid.default, _aten.exp.default, _aten.log.default,
    _aten.sqrt.default, _aten.gelu.default, _aten.silu.default, _aten.clamp.default,
    _aten.clone.default, _aten.detach.default, _aten.alias.default, _aten._to_copy.default,
    _aten.to.dtype,
}  # fmt: skip
_SCALAR = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.pow.Tensor_Scalar,
    _aten.add.Scalar, _aten.sub.Scalar, _aten.mul.Scalar, _aten.div.Scalar,
}  # fmt: skip
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}


class Replicated(Tensor):
    """Rows that every member sees: ``(n, ...)`` held, ``(S * n * D, ...)`` to the outside.

    Row ``b`` is ``source[b // D % n]``, the row order of a batch with ``R = S * n`` repeats. A
    perturbed layer that receives one computes the unperturbed product once for the n rows instead
    of once per member, and draws each direction once for both signs. Row-wise operations (views
    that keep the first dimension, casts, pointwise functions, arithmetic with numbers) keep the
    short form; anything else sees a full copy. It cannot be written to.

    ``pm.replicate(x)`` makes one.

    Args:
        source: (n, ...).
        copies: S, how often the n rows repeat.
        directions: D.
    """

    source: Tensor
    copies: int
    directions: int

    @staticmethod
    def __new__(cls, source: Tensor, copies: int, directions: int) -> Replicated:
        """Wrap ``source``; no row is copied.

        Raises:
            TypeError: no tensor, or numbers that are no integers.
            ValueError: a tensor without rows, or numbers below 0.
        """
        if not isinstance(source, Tensor):
            raise TypeError(f"source must be a tensor (n, ...), got {type(source).__name__}")
        if source.dim() == 0 or source.layout != torch.strided:
            raise ValueError(
                f"source must be a dense tensor (n, ...), got {source.layout} of shape "
                f"{tuple(source.shape)}"
            )
        for name, count in (("copies", copies), ("directions", directions)):
            if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
                raise TypeError(f"{name} must be an int, got {count!r}")
            if count < 0:
                raise ValueError(f"{name} must be at least 0, got {count}")
        shape = (copies * source.shape[0] * directions, *source.shape[1:])
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=source.dtype, device=source.device, layout=source.layout
        )
        self.source, self.copies, self.directions = source, copies, directions
        return self

    def full(self) -> Tensor:
        """Return the plain tensor with all its rows."""
        return replicate_rows(self.source, self.copies, self.directions)

    def __setitem__(self, index, value) -> None:
        """Refuse, as every write in place is refused; it would go into a copy of the rows."""
        raise RuntimeError("cannot write into replicated rows; use x.full() for rows of their own")

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        """Name the source and the factors."""
        return f"Replicated(S={self.copies}, D={self.directions}, source={self.source!r})"

    def __deepcopy__(self, memo) -> Replicated:
        """Copy the source only."""
        return Replicated(self.source.clone(), self.copies, self.directions)

    def __reduce_ex__(self, protocol):
        """Pickle the source only."""
        return Replicated, (self.source, self.copies, self.directions)

    def __tensor_flatten__(self):
        """Tell torch.compile what this is made of."""
        return ["source"], (self.copies, self.directions)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride) -> Replicated:
        """Rebuild from :meth:`__tensor_flatten__`."""
        return Replicated(inner["source"], *context)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        """Keep row-wise operations short, run all others on the full rows."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for declared, value in zip(func._schema.arguments, args, strict=False):
                if isinstance(value, Replicated) and declared.is_write:
                    # The rows share one source; torch refuses expanded tensors for the same reason.
                    raise RuntimeError(
                        f"{func} writes in place into replicated rows; use x.full() for rows of "
                        "their own"
                    )
        first = args[0] if args else None
        if isinstance(first, Replicated):
            short = _on_source(func, first, args[1:], kwargs)
            if short is not None:
                return Replicated(short, first.copies, first.directions)

        def plain(value):
            return value.full() if isinstance(value, Replicated) else value

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs))
        return func(*args, **kwargs)


def replicate_rows(source: Tensor, copies: int, directions: int) -> Tensor:
    """Return a new tensor of copies * n * directions rows, row b = source[b // directions % n]."""
    rows = source[None, :, None].expand(copies, -1, directions, *source.shape[1:])
    return rows.reshape(copies * source.shape[0] * directions, *source.shape[1:])


def _on_source(func, x: Replicated, rest: tuple, kwargs: dict) -> Tensor | None:
    """The operator's result on the n source rows, or None if it is not row-wise."""
    if any(isinstance(value, Tensor) for value in (*rest, *kwargs.values())):
        return None
    if func in _POINTWISE or func in _SCALAR:
        return func(x.source, *rest, **kwargs)
    if func in _RESHAPES and x.numel() > 0:
        size = list(rest[0])
        if -1 in size:
            known = -torch.Size(size).numel()
            size[size.index(-1)] = x.numel() // max(known, 1)
        if size and size[0] == x.shape[0]:
            return x.source.reshape(x.source.shape[0], *size[1:])
    return None
