"""Which row of a batch belongs to which member of a population."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .noise.state import NoiseState
from .replicate import Replicated, replicate_rows

if TYPE_CHECKING:
    from typing_extensions import Self


class MemberRows:
    """The part of :class:`PerturbedModel` that sorts rows and values, and never sees a weight.

    All of it follows from the state's numbers of directions and signs.
    """

    state: NoiseState

    @property
    def directions(self) -> int:
        """D: the directions that a forward evaluates; the whole population outside of windows."""
        return self.state.directions

    @property
    def population(self) -> int:
        """The number of directions of the whole population."""
        return self.state.population

    @property
    def first_direction(self) -> int:
        """Number of the first direction that a forward evaluates; 0 outside of windows."""
        return self.state.first_direction

    @contextmanager
    def window(self, first: int, count: int) -> Iterator[Self]:
        """Evaluate, for a block, only ``count`` directions of the population, from ``first`` on.

        In it ``directions`` is ``count``, and forwards, ``replicate``, ``member_mean``,
        ``set_grad`` and ``member`` see these directions, each with the noise it has in the whole
        population. For populations that do not fit in memory or are spread over processes.

        Raises:
            ValueError: directions outside of the population.
            TypeError: numbers that are no integers.

        Example:
            >>> import torch, perturbed
            >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=16)
            >>> pm = perturbed.PerturbedModel(net, directions=16, antithetic=False)
            >>> pm.set_noise()
            >>> whole = pm(torch.ones(16, 8))
            >>> with pm.window(12, 4):
            ...     torch.allclose(pm(torch.ones(4, 8)), whole[12:])
            True
        """
        with self.state.turn.taken():
            before = self.state.first_direction, self.state.directions
            try:
                self.state.show(first, count)
                yield self
            finally:
                self.state.show(*before)

    @property
    def signs(self) -> int:
        """S of :meth:`replicate`: 2 with antithetic pairs, else 1."""
        return 1 if self.state.antithetic is False else 2

    def replicate(self, x: Tensor) -> Tensor:
        """Show every member the same n rows: (n, ...) -> (S * n * D, ...), without copying them.

        The result is a :class:`perturbed.Replicated`: the first perturbed layer computes the
        unperturbed product once for the n rows and each direction once for both signs.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of shape (n, ...), got {type(x).__name__}")
        if x.dim() == 0:
            raise ValueError("x must have shape (n, ...), got a tensor without dimensions")
        if x.layout != torch.strided:
            raise TypeError(f"x must be a dense tensor, got one of layout {x.layout}")
        if isinstance(x, Replicated):
            x = x.full()
        if x.requires_grad and torch.is_grad_enabled():
            return replicate_rows(x, self.signs, self.directions)
        return Replicated(x.detach(), self.signs, self.directions)

    def window_rows(self, x: Tensor) -> Tensor:
        """Take the rows of the directions that a forward evaluates out of those of the population.

        For rows that are each member's own, in a closure that several forwards or processes call;
        what all members see comes from :meth:`replicate`.

        Args:
            x: (R * P, ...) for a population of P directions.

        Returns:
            (R * D, ...); ``x`` itself where all directions are evaluated.

        Raises:
            ValueError: rows that are no multiple of P.
            TypeError: no tensor.

        Example:
            >>> import torch, perturbed
            >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=6)
            >>> pm = perturbed.PerturbedModel(net, directions=6)
            >>> x = torch.arange(12).view(2, 6).flatten()  # R = 2
            >>> with pm.window(1, 2):
            ...     pm.window_rows(x)
            tensor([1, 2, 7, 8])
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor of shape (R * P, ...), got {type(x).__name__}")
        population, first = self.population, self.first_direction
        if x.dim() == 0 or x.shape[0] % population != 0:
            raise ValueError(
                f"x must have R * P rows, P = {population} directions of the whole population, got "
                f"{tuple(x.shape)}"
            )
        if self.directions == population:
            return x
        if isinstance(x, Replicated):
            if x.directions == population:
                return Replicated(x.source, x.copies, self.directions)
            x = x.full()
        rows = x.unflatten(0, (-1, population))
        return rows[:, first : first + self.directions].flatten(0, 1)

    def member_mean(self, values: Tensor) -> Tensor:
        """Average what belongs to a member: (B, ...) row values -> (S, D) member values.

        S is 2 if the batch's repeats form antithetic pairs, else 1. Counts and booleans are
        averaged as floating-point numbers.

        Raises:
            TypeError: values that are no tensor.
            ValueError: rows that are no multiple of D, an odd R > 1 with antithetic sampling.
        """
        signs, repeats = self._check_rows(values)
        if not values.is_floating_point():
            values = values.to(torch.get_default_dtype())
        if values.dim() == 1 and repeats == signs:
            return values.reshape(signs, self.directions) + 0.0  # what a mean of one number does
        # In double precision, where the order of a sum, which follows from shapes, is not seen:
        # values of a member are then the same in forwards of fewer directions.
        wide = values.to(torch.float64)
        per_row = wide.flatten(1).mean(1) if values.dim() > 1 else wide
        members = per_row.reshape(signs, repeats // signs, self.directions).mean(1)
        return members.to(values.dtype)

    def member_rows(self, values: Tensor) -> Tensor:
        """Sort what belongs to a member: (B, ...) row values -> (S, D, n, ...), n = R / S.

        With the rows of :meth:`replicate`, entry [s, d, i] is of member (s, d) and row i of its
        input, so that the third dimension counts what all members saw alike (see
        :func:`perturbed.optim.group_zscore`). A view where that is possible.

        Raises:
            TypeError: values that are no tensor.
            ValueError: rows that are no multiple of D, an odd R > 1 with antithetic sampling.
        """
        signs, repeats = self._check_rows(values)
        rest = values.shape[1:]
        return values.reshape(signs, repeats // signs, self.directions, *rest).transpose(1, 2)

    def _check_rows(self, values: Tensor) -> tuple[int, int]:
        """Return S and R of values with one entry per row."""
        if not isinstance(values, Tensor):
            raise TypeError(
                f"values must be a tensor with one entry per row, got {type(values).__name__}"
            )
        if values.dim() == 0:
            raise ValueError("values must have one entry per row, got a tensor without dimensions")
        if values.layout != torch.strided:
            raise TypeError(f"values must be a dense tensor, got one of layout {values.layout}")
        repeats = self.state.repeats(values.shape[0])
        return 2 if self.state.is_antithetic(repeats) else 1, repeats
