"""ObservationNorm: running mean and standard deviation of observations, shared by all members."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .env import kind, positive

_PARTS = ("count", "mean", "m2")


class ObservationNorm(nn.Module):
    """Normalise observations by the mean and standard deviation of all seen so far.

    What :meth:`update` sees is set aside and changes nothing until :meth:`sync`. So all members of
    a population, in all steps of a generation, see the same function; a rollout that is given one
    updates it in every step and syncs at its end. Several processes exchange what :meth:`collect`
    returns, and :meth:`merge` it in the same order.

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
        count: () number of observations. mean: (size,). m2: (size,) sum of squared deviations. All
            float64; the parts not yet synced are pending_count, pending_mean and pending_m2.

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

    def __init__(self, size: int, eps: float = 1e-8) -> None:
        """Start without data."""
        super().__init__()
        self.size = positive("size", size)
        if not math.isfinite(eps) or eps < 0:
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.eps = eps
        for prefix in ("", "pending_"):
            for name, part in zip(_PARTS, self._zeros("cpu"), strict=True):
                self.register_buffer(prefix + name, part)

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
        """Return ``(mean, 1 / std)`` of the synced data, (size,) each, ready for many steps."""
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
        if mask is not None and (mask.dtype != torch.bool or mask.shape != observations.shape[:-1]):
            raise ValueError(
                f"mask must be a bool tensor of shape {tuple(observations.shape[:-1])}, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}"
            )
        if not self.training:
            return
        rows = observations.reshape(-1, self.size).to(self.mean)
        valid = rows.isfinite().all(1)
        if mask is not None:
            valid &= mask.reshape(-1).to(valid.device)
        count = valid.sum().to(torch.float64)
        rows = torch.where(valid[:, None], rows, 0.0)
        mean = rows.sum(0) / count.clamp(min=1)
        m2 = torch.where(valid[:, None], rows - mean, 0.0).square().sum(0)
        self._add("pending_", count, mean, m2)

    @contextmanager
    def frozen(self) -> Iterator[ObservationNorm]:
        """Switch updates off for a block."""
        before = self.training
        self.eval()
        try:
            yield self
        finally:
            self.train(before)

    @property
    def pending(self) -> dict[str, Tensor]:
        """What :meth:`collect` would return; assign what it was before to forget the rest."""
        return {name: getattr(self, "pending_" + name) for name in _PARTS}

    @pending.setter
    def pending(self, parts: dict[str, Tensor]) -> None:
        for name in _PARTS:
            setattr(self, "pending_" + name, parts[name])

    # ---- merging -------------------------------------------------------------------------------

    def collect(self) -> dict[str, Tensor]:
        """Take out what :meth:`update` has set aside: count (), mean and m2 (size,), float64."""
        taken = self.pending
        self.pending = dict(zip(_PARTS, self._zeros(self.count.device), strict=True))
        return taken

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
        self._add("", *parts)

    def sync(self) -> None:
        """Merge what was set aside: from here on it counts."""
        self.merge(self.collect())

    def _add(self, prefix: str, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        """Merge moments into a set of buffers, which are replaced and not written to."""
        own_count, own_mean, own_m2 = (getattr(self, prefix + name) for name in _PARTS)
        total = own_count + count
        share = count / total.clamp(min=1)
        delta = mean - own_mean
        setattr(self, prefix + "count", total)
        setattr(self, prefix + "mean", own_mean + delta * share)
        setattr(self, prefix + "m2", own_m2 + m2 + delta.square() * own_count * share)

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
