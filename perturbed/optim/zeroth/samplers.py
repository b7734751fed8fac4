"""Random tensors for searches: named distributions of the noise contract, or any function.

Every number is a function of (seed, generation, direction, place in the parameters): a generation
is a draw, a direction one of its candidates. The parameters of a group count as one flat row, as in
``SNES``, whatever device or dtype they have. All named distributions have mean 0 and, but for
"constant" and "randrect", independent elements of variance 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _C, _ops
from ...noise.base import OPTIMIZER_ID, STREAM_CHOICES, STREAM_TRIALS, stream_word

# Directions of a draw: this many for every parameter group.
CANDIDATES = 1 << 20

Sampler = str | Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Source:
    """One candidate of one draw: where its random numbers come from.

    Attributes:
        seed: of the optimizer.
        generation: number of the draw, from 0.
        direction: which candidate of the draw.
    """

    seed: int
    generation: int
    direction: int

    def _key(self, device: torch.device) -> Tensor:
        numbers = [_C.splitmix64(self.seed), self.generation, self.direction]
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def normals(self, tensors: Sequence[Tensor], rademacher: bool = False) -> list[Tensor]:
        """Return normals, or signs, of the shapes, dtypes and devices of ``tensors``."""
        word = stream_word(OPTIMIZER_ID, STREAM_TRIALS)

        def draw(device: torch.device, size: int) -> Tensor:
            key = self._key(device)
            noise = _ops.dense_materialise(key, word, 0, 1, 1, size, rademacher, torch.float32)
            return noise.view(-1)

        return _spread(draw, tensors)

    def uniforms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return numbers strictly between 0 and 1, odd multiples of 2^-24."""
        word = stream_word(OPTIMIZER_ID, STREAM_TRIALS)

        def draw(device: torch.device, size: int) -> Tensor:
            return _ops.uniforms(self._key(device), word, 0, 1, size, torch.float32).view(-1)

        return _spread(draw, tensors)

    def numbers(self, count: int) -> list[float]:
        """Return uniform numbers for decisions, independent of all others."""
        word = stream_word(OPTIMIZER_ID, STREAM_CHOICES)
        key = self._key(torch.device("cpu"))
        return _ops.uniforms(key, word, 0, 1, count, torch.float64)[0].tolist()

    def generator(self, device: torch.device) -> torch.Generator:
        """Return torch's generator for what is drawn by a function of the user."""
        high, low = (int(u * 2**24) for u in self.numbers(2))  # 23 random bits each
        return torch.Generator(device).manual_seed(high << 24 | low)


def _spread(draw: Callable[[torch.device, int], Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat row into tensors; each device draws the whole row and takes its parts."""
    sizes = [t.numel() for t in like]
    rows = {
        device: draw(device, sum(sizes)).split(sizes)
        for device in dict.fromkeys(t.device for t in like)
    }
    return [rows[t.device][i].to(t.dtype).view(t.shape) for i, t in enumerate(like)]


# ---- named samplers ----------------------------------------------------------------------------


def _uniform(like: Sequence[Tensor], source: Source) -> list[Tensor]:
    half = math.sqrt(3)  # variance 1
    return [u.mul_(2 * half).sub_(half) for u in source.uniforms(like)]


def _sphere(like: Sequence[Tensor], source: Source) -> list[Tensor]:
    drawn = source.normals(like)
    squares = sum(float(z.double().square().sum()) for z in drawn)
    count = sum(z.numel() for z in drawn)
    return [z.mul_(math.sqrt(count / max(squares, 1e-300))) for z in drawn]


def _constant(like: Sequence[Tensor], source: Source) -> list[Tensor]:
    drawn = source.normals([t.new_empty(()) for t in like])
    return [z.expand(t.shape).clone() for z, t in zip(drawn, like, strict=True)]


def _randrect(like: Sequence[Tensor], source: Source) -> list[Tensor]:
    numbers = iter(source.numbers(2 * sum(t.dim() for t in like)))
    filled = _constant(like, source)
    for t in filled:
        inside = torch.zeros_like(t)
        box = inside
        for dim, size in enumerate(t.shape):
            # Two cuts between 0 and size, drawn again as neighbours where they are the same.
            a, b = (min(int(next(numbers) * (size + 1)), size) for _ in range(2))
            if a == b:
                a, b = (a, b + 1) if b < size else (a - 1, b)
            box = box.narrow(dim, min(a, b), abs(a - b)) if size else box
        box.fill_(1)
        t.mul_(inside)
    return filled


NAMED: dict[str, Callable[[Sequence[Tensor], Source], list[Tensor]]] = {
    "normal": lambda like, source: source.normals(like),
    "rademacher": lambda like, source: source.normals(like, rademacher=True),
    "uniform": _uniform,
    "sphere": _sphere,
    "constant": _constant,
    "randrect": _randrect,
}
SAMPLERS = tuple(NAMED)
"""Names that ``sampler=`` takes.

"normal": N(0, 1). "rademacher": +-1. "uniform": between -sqrt 3 and sqrt 3. "sphere": uniform on
the sphere of radius sqrt N around 0, N the parameters of the group. "constant": one normal number
for every tensor. "randrect": the same, but 0 outside of a random box of each tensor.
"""


def check_sampler(sampler: object) -> Sampler:
    """Return ``sampler`` if it is one of ``SAMPLERS`` or a function."""
    if isinstance(sampler, str) and sampler in NAMED:
        return sampler
    if callable(sampler):
        return sampler
    raise ValueError(
        f"sampler must be one of {SAMPLERS} or a function (tensor, generator) -> tensor, got "
        f"{sampler!r}"
    )


def sample(sampler: Sampler, like: Sequence[Tensor], source: Source) -> list[Tensor]:
    """Return random tensors of the shapes, dtypes and devices of ``like``; nobody else holds them.

    Args:
        sampler: a name of ``SAMPLERS``, or a function that is called with each tensor and a
            generator of its device and returns random numbers of its shape.
        like: the parameters of one group.
        source: where the numbers come from.

    Raises:
        TypeError: a function that returns no tensor.
        ValueError: a function that returns another shape, or complex numbers.
    """
    if isinstance(sampler, str):
        return NAMED[sampler](like, source) if like else []
    generators = {t.device: source.generator(t.device) for t in like}
    drawn = []
    for t in like:
        z = sampler(t, generators[t.device])
        if not isinstance(z, Tensor):
            raise TypeError(f"sampler must return a tensor, got {type(z).__name__}")
        if z.shape != t.shape or z.is_complex():
            raise ValueError(
                f"sampler must return real numbers of the tensor's shape {tuple(t.shape)}, got "
                f"{tuple(z.shape)} of {z.dtype}"
            )
        drawn.append(z.detach().to(t, copy=True))
    return drawn
