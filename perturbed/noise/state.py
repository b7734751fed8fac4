"""Which noise is being drawn now: seed, generation, scale, and how rows map to members."""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

from .. import _C


class NoiseState:
    """The draw that all perturbed layers of one model share.

    Seed, generation and scale reach the kernels in two small tensors per device that are updated in
    place, so ``torch.compile`` compiles once and a replayed CUDA graph draws what they hold then.

    Attributes:
        directions: D, independent draws.
        antithetic: True, False, or None for "on where the number of repeats is even".
        seed: the user's seed.
        generation: number of the current draw, -1 before the first.
        first_direction: global index of this process's first direction.
        sigma: noise scale, the elementwise standard deviation of ``E_d``.
        active: whether the layers add their noise.
    """

    def __init__(
        self,
        directions: int,
        antithetic: bool | None = None,
        sigma: float = 0.02,
        seed: int | None = 0,
    ) -> None:
        """Check and store the arguments; ``seed=None`` takes one from the operating system."""
        self.directions = check_directions(directions)
        if antithetic is not None and not isinstance(antithetic, bool):
            raise TypeError(f"antithetic must be True, False or None, got {antithetic!r}")
        self.antithetic = antithetic
        self.sigma = check_sigma(sigma)
        self.seed = check_seed(seed)
        self.generation = -1
        self.first_direction = 0
        self.active = False
        # Rows of the forward under way (None: not known yet); a layer that sees another number was
        # handed rows in another order than ours.
        self.rows: int | None = None
        self._tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict:
        """Leave the device tensors out: they are rebuilt from the numbers."""
        return {**self.__dict__, "_tensors": {}, "active": False, "rows": None}

    # ---- the current draw ----------------------------------------------------------------------

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``key`` ((3,) int64) and ``sigma`` (() float64) on ``device``."""
        if device not in self._tensors:
            # Not inference tensors, whatever the caller is in: they are updated in place later.
            with torch.inference_mode(False):
                key = torch.tensor(self._key(), dtype=torch.int64, device=device)
                sigma = torch.tensor(self.sigma, dtype=torch.float64, device=device)
            self._tensors[device] = key, sigma
        return self._tensors[device]

    def _key(self) -> list[int]:
        return [_C.splitmix64(self.seed), max(self.generation, 0), self.first_direction]

    def next_generation(self, sigma: float | None = None) -> None:
        """Move on to fresh noise."""
        if sigma is not None:
            self.sigma = check_sigma(sigma)
        self.generation += 1
        self.publish()

    def publish(self) -> None:
        """Bring the device tensors up to date, without a synchronisation."""
        for key, sigma in self._tensors.values():
            for i, value in enumerate(self._key()):
                key[i].fill_(value)
            sigma.fill_(self.sigma)

    def drop_tensors(self) -> None:
        """Forget the device tensors."""
        self._tensors.clear()

    # ---- rows and members ----------------------------------------------------------------------

    def repeats(self, rows: int) -> int:
        """Return R for a batch of ``rows`` rows, or say what is wrong with it."""
        d = self.directions
        if rows % d != 0:
            raise ValueError(
                f"the batch must have R * D rows, D = {d} directions, got {rows} rows; lay them out "
                "as (R, D, ...) and pass x.flatten(0, 1)"
            )
        if self.rows is not None and rows != self.rows:
            raise ValueError(
                f"a layer got {rows} rows in a forward of {self.rows}: rows must stay the first "
                "dimension throughout, (B, T, in) and not (B * T, in), because row b belongs to "
                f"direction b % {d}"
            )
        repeats = rows // d
        if repeats % 2 == 1 and (self.antithetic or (self.antithetic is None and repeats > 1)):
            raise ValueError(
                f"antithetic sampling needs an even number of repeats R, got R = {repeats} ({rows} "
                f"rows, D = {d} directions); pass x.flatten(0, 1) of an (R, D, ...) batch with even "
                "R, or antithetic=False"
            )
        return repeats

    def is_antithetic(self, repeats: int) -> bool:
        """Whether the second half of ``repeats`` uses -E_d."""
        return repeats > 1 and repeats % 2 == 0 if self.antithetic is None else self.antithetic

    def enter_rows(self, rows: int) -> tuple[int, bool]:
        """Check a layer's batch; return R and whether pairs are antithetic."""
        repeats = self.repeats(rows)
        if self.generation < 0:
            raise RuntimeError("no noise has been drawn yet: call set_noise() first")
        return repeats, self.is_antithetic(repeats)


def check_directions(directions: int) -> int:
    """Return ``directions`` if it is a positive int."""
    if isinstance(directions, bool) or not isinstance(directions, int):
        raise TypeError(f"directions must be an int, got {directions!r}")
    if not 0 < directions < 2**32:
        raise ValueError(f"directions must be between 1 and 2^32 - 1, got {directions}")
    return directions


def check_sigma(sigma: float) -> float:
    """Return ``sigma`` as a float if it is finite and not negative."""
    try:
        value = float(sigma)
    except (TypeError, ValueError):
        raise TypeError(f"sigma must be a number, got {sigma!r}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    return value


def check_seed(seed: int | None) -> int:
    """Return ``seed``, or one from the operating system for None."""
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or None, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed
