"""ObservationNorm: running mean and standard deviation of observations, shared by all members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import as_count, check_number
from ..distributed import Processes
from .env import kind
from .moments import Moments, exact_sum, merged, moments

_PARTS = ("count", "mean", "m2")


class ObservationNorm(nn.Module):
    """Normalise observations by the mean and standard deviation of all seen so far.

    What :meth:`update` sees is set aside and changes nothing until :meth:`sync`. So all members of
    a population, in all steps of a generation, see the same function; a rollout that is given one
    updates it and syncs at its end. An optimizer that is given one (``normalizer=norm``) holds it
    for the generation, however many rollouts that has, and syncs it in ``tell`` with the norms of
    all processes.

    A rollout sets every lane's moments aside as a part of their own, and parts are added up
    exactly, in integers: the statistic does not depend on how a population was split over forwards
    and processes, to the last bit, and all processes have the same.

    In evaluation mode (``norm.eval()``, or ``with norm.frozen():``) updates do nothing. Rows with
    numbers that are not finite are left out. Before any data it is the identity; an element that
    has not varied is centred and not scaled.

    Moments are merged as Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979) do, in float64, whatever dtype the module is moved to. For
    what it is worth in control: Mania, Guy, Recht, "Simple Random Search Provides a Competitive
    Approach to Reinforcement Learning" (2018), versions V2.

    Args:
        size: numbers in an observation.
        eps: standard deviations up to this count as not varying.

    Attributes:
        count: () float64, number of observations.
        mean: (size,) float64.
        m2: (size,) float64, sums of squared deviations.
        pending_count: (k,) float64, what is not yet synced: first what :meth:`update` saw, then the
            parts of :meth:`set_aside`.
        pending_mean: (k, size) float64, of the same.
        pending_m2: (k, size) float64, of the same.
        held: whether :meth:`sync` waits for :meth:`release`.

    Shapes:
        input (*, size) floating point; output the same, in its dtype.

    Raises:
        ValueError: size below 1, eps negative or not finite; observations of another size.
        TypeError: observations that are not floating point.

    Example:
        >>> import torch
        >>> from perturbed.rl import ObservationNorm
        >>> norm = ObservationNorm(2)
        >>> norm.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> norm.sync()
        >>> norm(torch.tensor([[3.0, 20.0]]))
        tensor([[1., 0.]])
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    pending_count: Tensor
    pending_mean: Tensor
    pending_m2: Tensor

    def __init__(self, size: int, eps: float = 1e-8) -> None:
        """Start without data."""
        super().__init__()
        self.size = as_count("size", size)
        self.eps = check_number("eps", eps)
        self.held = False
        for name, part in zip(_PARTS, self._zeros("cpu"), strict=True):
            self.register_buffer(name, part)
            self.register_buffer("pending_" + name, part[None].clone())

    def _zeros(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        count = torch.zeros((), dtype=torch.float64, device=device)
        return count, count.new_zeros(self.size), count.new_zeros(self.size)

    def _apply(self, fn: Callable, recurse: bool = True) -> ObservationNorm:
        """Follow a move to another device, but not to another dtype."""
        device = fn(torch.empty(0, device=self.count.device)).device
        for name, buffer in list(self._buffers.items()):
            self._buffers[name] = None if buffer is None else buffer.to(device)
        return self

    # ---- use -----------------------------------------------------------------------------------

    def affine(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return ``(mean, 1 / std)`` of the synced data, (size,) each, ready for many steps.

        Raises:
            TypeError: a dtype that is not floating point.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        std = (self.m2 / self.count.clamp(min=1)).sqrt()
        scale = torch.where(std > self.eps, 1 / std, 1.0)
        return self.mean.to(dtype), scale.to(dtype)

    def forward(self, observations: Tensor) -> Tensor:
        """Return ``(observations - mean) / std``."""
        self._check(observations)
        mean, scale = self.affine(observations.dtype)
        return (observations - mean) * scale

    @torch.no_grad()
    def update(self, observations: Tensor, mask: Tensor | None = None) -> None:
        """Set observations aside for the next :meth:`sync`; nothing in evaluation mode.

        Args:
            observations: (*, size) floating point.
            mask: (*) bool, those that count; default all.
        """
        self._check(observations)
        shape = observations.shape[:-1]
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a bool tensor of shape {tuple(shape)}, got {kind(mask)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            raise ValueError(
                f"mask must be a bool tensor of shape {tuple(shape)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        if not self.training:
            return
        rows = observations.reshape(-1, self.size).to(self.mean)
        valid = None if mask is None else mask.reshape(-1).to(rows.device)
        count, mean, m2 = self._pending()
        parts = merged((count[0], mean[0], m2[0]), moments(rows, valid))
        self._set_pending(
            torch.cat((part[None], old[1:]))
            for part, old in zip(parts, self._pending(), strict=True)
        )

    @torch.no_grad()
    def set_aside(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        """Set moments of k parts aside for the next :meth:`sync`; nothing in evaluation mode.

        Args:
            count: (k,) float64, observations of each part.
            mean: (k, size) float64.
            m2: (k, size) float64, sums of squared deviations.
        """
        if self.training:
            self._set_pending(
                torch.cat((old, part.to(old)))
                for old, part in zip(self._pending(), (count, mean, m2), strict=True)
            )

    @contextmanager
    def frozen(self) -> Iterator[ObservationNorm]:
        """Switch updates off for a block."""
        before = self.training
        self.eval()
        try:
            yield self
        finally:
            self.train(before)

    # ---- merging -------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, processes: Processes | None = None) -> dict[str, Tensor]:
        """Take out what was set aside: count (), mean and m2 (size,), float64.

        Args:
            processes: take it out of the norms of all processes, which all call this.
        """
        count, mean, m2 = self._pending()
        (total,) = exact_sum(count[:, None], processes)
        centre = exact_sum(count[:, None] * mean, processes) / total.clamp(min=1)
        spread = exact_sum(m2 + count[:, None] * (mean - centre).square(), processes)
        self._set_pending(part[None] for part in self._zeros(self.count.device))
        return dict(zip(_PARTS, (total, centre, spread), strict=True))

    def merge(self, other: ObservationNorm | dict[str, Tensor]) -> None:
        """Take other data in: what :meth:`collect` returned, or the synced data of another norm.

        Raises:
            TypeError: neither of the two.
            ValueError: entries missing, unknown, of another shape or not finite.
        """
        if isinstance(other, ObservationNorm):
            other = {name: getattr(other, name) for name in _PARTS}
        if not isinstance(other, dict):
            raise TypeError(
                f"other must be an ObservationNorm or a dict of collect, got {kind(other)}"
            )
        if set(other) != set(_PARTS):
            raise ValueError(f"other must have the entries {_PARTS}, got {sorted(other)}")
        parts: list[Tensor] = []
        for name in _PARTS:
            part, own = torch.as_tensor(other[name]).to(self.mean), getattr(self, name)
            if part.shape != own.shape:
                raise ValueError(
                    f"other[{name!r}] must have shape {tuple(own.shape)}, got {tuple(part.shape)}"
                )
            if not part.isfinite().all():
                raise ValueError(f"other[{name!r}] must be finite, got {part.tolist()}")
            parts.append(part)
        own = self.count, self.mean, self.m2
        self.count, self.mean, self.m2 = merged(own, (parts[0], parts[1], parts[2]))

    def sync(self, processes: Processes | None = None) -> None:
        """Merge what was set aside: from here on it counts. While held, nothing.

        Args:
            processes: merge what the norms of all processes have set aside; all call this, and all
                end with the same numbers.
        """
        if not self.held:
            self.merge(self.collect(processes))

    def hold(self, on: bool = True) -> None:
        """Let nothing count until :meth:`release`, whoever calls :meth:`sync`.

        Args:
            on: False ends it without a sync.
        """
        self.held = on

    def release(self, processes: Processes | None = None) -> None:
        """End :meth:`hold` and :meth:`sync`."""
        self.held = False
        self.sync(processes)

    # ---- parts ---------------------------------------------------------------------------------

    def _pending(self) -> Moments:
        """Return what is set aside: (k,), (k, size), (k, size)."""
        return self.pending_count, self.pending_mean, self.pending_m2

    def _set_pending(self, parts: Iterable[Tensor]) -> None:
        """Replace what is set aside, by new tensors: copies that share the old ones stay."""
        for name, part in zip(_PARTS, tuple(parts), strict=True):
            setattr(self, "pending_" + name, part)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take any number of parts that are set aside."""
        saved = [state_dict.get(f"{prefix}pending_{name}") for name in _PARTS]
        shapes = [part.shape for part in saved if isinstance(part, Tensor) and part.numel()]
        tails = [part.shape[1:] for part in self._pending()]
        # Else they are of another norm, or damaged, and torch says so.
        if [shape[1:] for shape in shapes] == tails and len({shape[:1] for shape in shapes}) == 1:
            self._set_pending(
                own.new_zeros(shape) for own, shape in zip(self._pending(), shapes, strict=True)
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, observations: Tensor) -> None:
        if not isinstance(observations, Tensor) or not observations.is_floating_point():
            raise TypeError(
                f"observations must be a floating-point tensor, got {kind(observations)}"
            )
        if observations.dim() == 0 or observations.shape[-1] != self.size:
            raise ValueError(
                f"observations must have shape (*, {self.size}), got {tuple(observations.shape)}"
            )

    def extra_repr(self) -> str:
        """Say the size."""
        return f"{self.size}, eps={self.eps}"
