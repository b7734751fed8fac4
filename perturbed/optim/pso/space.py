"""The space a swarm flies in: walls, the largest velocity, and where particles start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import _ops
from ..._ops.swarm import CLIP, REFLECT, UNBOUNDED
from ...checks import check_number
from ...noise.base import OPTIMIZER_ID, STREAM_SWARM_START, stream_word
from ..swarm import Swarm

BOUNDARIES = {"clip": CLIP, "reflect": REFLECT}
STARTS = ("around", "fan_in", "uniform")
VECTOR_SPREAD = 0.1  # of biases and other vectors, around their own values; PyTorch-PSO's range


class Space:
    """Walls and the largest velocity, as the operators take them.

    Attributes:
        lower: (1,) or (N,), or None: no walls.
        upper: the same.
        limit: (1,) or (N,), largest absolute velocity; infinity for none.
        mode: of ``swarm_move_``: 0 no walls, 1 clip, 2 reflect.
    """

    def __init__(
        self,
        swarm: Swarm,
        bounds: Any,
        boundary: str,
        max_velocity: Any,
        velocity_fraction: float | None,
    ) -> None:
        """Bring what the user gave to tensors."""
        if not isinstance(boundary, str) or boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be of {', '.join(BOUNDARIES)}, got {boundary!r}")
        self.lower: Tensor | None = None
        self.upper: Tensor | None = None
        if bounds is not None:
            self.lower, self.upper = _walls(swarm, bounds)
        self.mode = UNBOUNDED if bounds is None else BOUNDARIES[boundary]
        if velocity_fraction is not None:
            if max_velocity is not None:
                raise ValueError("give max_velocity or velocity_fraction, not both")
            share = check_number("velocity_fraction", velocity_fraction, above=True)
            if self.lower is None or self.upper is None:
                raise ValueError("velocity_fraction is one of bounds, and there are none")
            self.limit = share * (self.upper - self.lower)
        elif max_velocity is None:
            self.limit = swarm.positions.new_full((1,), math.inf)
        else:
            self.limit = per_element(swarm, "max_velocity", max_velocity, math.inf)
            if not (self.limit > 0).all():
                raise ValueError(f"max_velocity must be greater than 0, got {max_velocity!r}")

    def hold(self, positions: Tensor) -> None:
        """Put positions that are outside on the walls, in place."""
        if self.lower is not None:
            positions.clamp_(self.lower, self.upper)

    def advance(self, x: Tensor, v: Tensor) -> None:
        """Clamp v and move x by it within the walls, in place; as ``swarm_move_`` does it."""
        v.clamp_(-self.limit, self.limit)
        x.add_(v)
        if self.lower is None or self.upper is None:
            return
        outside = (x < self.lower) | (x > self.upper)
        if self.mode == BOUNDARIES["clip"]:
            v.masked_fill_(outside, 0.0)
        else:
            self.mirror(x)
            v.copy_(torch.where(outside, -v, v))
        self.hold(x)

    def mirror(self, x: Tensor) -> None:
        """Mirror what is outside at its wall, once and in place; stay on a wall passed even so."""
        if self.lower is None or self.upper is None:
            return
        mirrored = torch.where(x < self.lower, self.lower + (self.lower - x), x)
        x.copy_(torch.where(x > self.upper, self.upper - (x - self.upper), mirrored))
        self.hold(x)

    def place(self, x: Tensor) -> None:
        """Bring positions of a particle without velocity back inside, in place."""
        if self.mode == BOUNDARIES["reflect"]:
            self.mirror(x)
        else:
            self.hold(x)


# ---- where particles start ---------------------------------------------------------------------


def start_positions(
    swarm: Swarm,
    space: Space,
    key: Tensor,
    start: str | Tensor,
    spread: Any,
    mirrored: bool,
) -> Tensor:
    """Return where the particles start, (P, N); see PSO for the arguments."""
    like = swarm.positions
    if isinstance(start, Tensor):
        if start.shape != like.shape or not start.is_floating_point():
            raise ValueError(
                f"start must have shape (P, N) = {tuple(like.shape)} and floating-point numbers, "
                f"got {tuple(start.shape)} of {start.dtype}"
            )
        if not start.isfinite().all():
            raise ValueError("start must be finite")
        if mirrored:
            raise ValueError("antithetic pairs are drawn, not given: start must be a name")
        positions = start.to(like, copy=True).contiguous()
        space.hold(positions)
        return positions
    if not isinstance(start, str) or start not in STARTS:
        raise ValueError(f"start must be of {', '.join(STARTS)} or a tensor (P, N), got {start!r}")
    if start != "around" and spread is not None:
        raise ValueError('spread is that of start="around"')
    model = swarm.read().to(like.dtype)
    if start == "uniform":
        low, high = space.lower, space.upper
        if low is None or high is None or not (high - low).isfinite().all():
            raise ValueError('start="uniform" needs finite bounds of all parameters')
        centre, half = (low + high) / 2, (high - low) / 2
    elif start == "fan_in":
        centre, half = torch.zeros_like(model), fan_in_ranges(swarm, 0.0)
    elif spread is None:
        centre, half = model, fan_in_ranges(swarm, VECTOR_SPREAD)
    else:
        centre, half = model, per_element(swarm, "spread", spread, 0.0)
        if not (half >= 0).all() or not half.isfinite().all():
            raise ValueError(f"spread must be finite and at least 0, got {spread!r}")
    positions = _symmetric(swarm, key, mirrored).mul_(half).add_(centre)
    if start == "around" and not mirrored:
        positions[0] = model  # so that the best is never worse than the model was
    space.hold(positions)
    return positions


def start_velocities(swarm: Swarm, key: Tensor, spread: Any, mirrored: bool) -> Tensor:
    """Return uniform velocities of a spread, (P, N); zeros for 0."""
    half = per_element(swarm, "velocity_spread", spread, 0.0)
    if not (half >= 0).all() or not half.isfinite().all():
        raise ValueError(f"velocity_spread must be finite and at least 0, got {spread!r}")
    if not half.any():
        return torch.zeros_like(swarm.positions)
    return _symmetric(swarm, key, mirrored).mul_(half)


def _symmetric(swarm: Swarm, key: Tensor, mirrored: bool) -> Tensor:
    """Return uniform numbers in (-1, 1), (P, N), the second half mirrored if so."""
    particles, size = swarm.positions.shape
    drawn = particles // 2 if mirrored else particles
    word = stream_word(OPTIMIZER_ID, STREAM_SWARM_START)
    u = _ops.uniforms(key, word, 0, drawn, size, swarm.positions.dtype).mul_(2).sub_(1)
    return torch.cat((u, -u)) if mirrored else u


def fan_in_ranges(swarm: Swarm, vectors: float) -> Tensor:
    """Return 1 / sqrt(fan_in) for every element of a weight, ``vectors`` for those of vectors."""
    parts = [
        p.new_full(
            (p.numel(),),
            (p.shape[0] / p.numel()) ** 0.5 if p.dim() > 1 and p.numel() else vectors,
            dtype=swarm.positions.dtype,
        )
        for p in swarm.parameters.values()
    ]
    return torch.cat(parts)


# ---- numbers for elements ----------------------------------------------------------------------


def per_element(swarm: Swarm, name: str, value: Any, absent: float) -> Tensor:
    """Bring a number for all, a vector (N,) or a dict by parameter to (1,) or (N,).

    Args:
        swarm: whose parameters.
        name: of the argument, for messages.
        value: what came. A dict gives a number, or a tensor that broadcasts to the parameter.
        absent: for parameters that a dict does not name.
    """
    like = swarm.positions
    if isinstance(value, Mapping):
        _check_names(swarm, name, value)
        parts = [
            _broadcast(f"{name}[{key!r}]", value.get(key, absent), p, like)
            for key, p in swarm.parameters.items()
        ]
        return torch.cat(parts)
    result = _to_tensor(name, value, like)
    if result.dim() == 0:
        return result.view(1)
    if result.shape != (like.shape[1],):
        raise ValueError(
            f"{name} must be a number, a vector (N,) = ({like.shape[1]},) or a dict by parameter, "
            f"got shape {tuple(result.shape)}"
        )
    return result


def _walls(swarm: Swarm, bounds: Any) -> tuple[Tensor, Tensor]:
    if isinstance(bounds, Mapping):
        _check_names(swarm, "bounds", bounds)
        pairs = {key: _pair(f"bounds[{key!r}]", value) for key, value in bounds.items()}
        low = per_element(swarm, "bounds", {key: pair[0] for key, pair in pairs.items()}, -math.inf)
        high = per_element(swarm, "bounds", {key: pair[1] for key, pair in pairs.items()}, math.inf)
    else:
        low, high = (per_element(swarm, "bounds", end, math.nan) for end in _pair("bounds", bounds))
    if not (low <= high).all():  # NaN is caught here too
        raise ValueError("bounds must have lower ends that are at most the upper ones")
    # A wall at infinity on one side only is fine; elements without any are simply free.
    return low, high


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """Return the two ends: of a number b, -b and b."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return -check_number(name, value, above=True), value
    try:
        low, high = value
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a number or a pair (lower, upper), got {value!r}"
        ) from None
    return low, high


def _check_names(swarm: Swarm, name: str, value: Mapping) -> None:
    unknown = [key for key in value if key not in swarm.parameters]
    if unknown:
        raise ValueError(f"{name} must name parameters of {list(swarm.parameters)}, got {unknown}")


def _to_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    try:
        # In double, so that a Python number is rounded once.
        wide = None if isinstance(value, Tensor) else torch.float64
        result = torch.as_tensor(value, dtype=wide)
        if result.is_complex() or result.dtype == torch.bool:
            raise TypeError(f"no real numbers: {result.dtype}")
        result = result.detach().to(like, copy=True)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must be a number or a tensor, got {value!r} ({error})") from None
    if result.isnan().any():
        raise ValueError(f"{name} must not be NaN")
    return result


def _broadcast(name: str, value: Any, parameter: nn.Parameter, like: Tensor) -> Tensor:
    result = _to_tensor(name, value, like)
    try:
        return result.expand(parameter.shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to {tuple(parameter.shape)}, got {tuple(result.shape)}"
        ) from None
