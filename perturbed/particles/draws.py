"""Random particles, from the noise contract's counters (docs/conventions.md, stream 17)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _C, _ops
from ..checks import as_int
from ..noise.base import OPTIMIZER_ID, STREAM_PARTICLE, stream_word
from ..noise.state import check_seed
from .modules import product
from .particle import Product, detached

# key, counter word, number of the parameter, its elements, dtype -> (1, ..., elements)
Numbers = Callable[[Tensor, int, int, int, torch.dtype], Tensor]


def randn(like: nn.Module | Product, seed: int, draw: int = 0) -> Product:
    """Return a particle of standard normal numbers.

    They are a function of seed, draw, the number of the parameter in ``names`` and the element, and
    the same on every device; torch's generators are neither read nor written.

    Args:
        like: the module, or a product of it, of whose parameters the shapes, dtypes and devices
            are.
        seed: of the random numbers.
        draw: which of the seed's draws, from 0: they are independent of each other.

    Raises:
        TypeError: arguments of another type.
        ValueError: a seed of more than 64 bits, a draw below 0 or of more than 32 bits.

    Example:
        >>> import torch
        >>> from perturbed.particles import product, randn
        >>> net = torch.nn.Linear(4, 3)
        >>> p = product(net)
        >>> p += 0.1 * randn(net, seed=0, draw=7)
    """

    def normals(key: Tensor, word: int, i: int, count: int, dtype: torch.dtype) -> Tensor:
        return _ops.dense_materialise(key, word, i, 1, 1, count, False, dtype)

    return _drawn(like, seed, draw, normals)


def rand(like: nn.Module | Product, seed: int, draw: int = 0) -> Product:
    """Return a particle of uniform numbers, strictly between 0 and 1 (in half precision, up to 1).

    Args:
        like: as in :func:`randn`.
        seed: of the random numbers.
        draw: which of the seed's draws, from 0.

    Raises:
        TypeError: arguments of another type.
        ValueError: a seed of more than 64 bits, a draw below 0 or of more than 32 bits.
    """

    def uniforms(key: Tensor, word: int, i: int, count: int, dtype: torch.dtype) -> Tensor:
        return _ops.uniforms(key, word, i, 1, count, dtype)

    return _drawn(like, seed, draw, uniforms)


@detached
def _drawn(like: nn.Module | Product, seed: int, draw: int, numbers: Numbers) -> Product:
    if not isinstance(like, (Product, nn.Module)):
        raise TypeError(f"like must be an nn.Module or a product, got {type(like).__name__}")
    p = like if isinstance(like, Product) else product(like)
    if seed is None:
        raise TypeError("seed must be an int, got None")
    seed, draw = check_seed(seed), as_int("draw", draw)
    if not 0 <= draw < 2**32:
        raise ValueError(f"draw must be between 0 and 2^32 - 1, got {draw}")
    word, drawn = stream_word(OPTIMIZER_ID, STREAM_PARTICLE), []
    keys: dict[torch.device, Tensor] = {}
    for i, (name, t) in enumerate(zip(p.names, p._like(), strict=True)):
        if t.is_complex():
            raise TypeError(f"{name} must be real for random numbers, got {t.dtype}")
        if t.device not in keys:
            keys[t.device] = torch.tensor([_C.splitmix64(seed), draw, 0], device=t.device)
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        values = numbers(keys[t.device], word, i, t.numel(), wide)
        drawn.append(values.reshape(t.shape).to(t.dtype))
    return p._made(tensors=drawn)
