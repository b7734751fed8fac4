"""Reference twin of the lookup of rows of dense noise."""

from __future__ import annotations

import torch
from torch import Tensor

from . import noise
from .rows import chunks, repeats_of


def dense_lookup(
    index: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    rows: int,
    cols: int,
    rademacher: bool,
    dtype: torch.dtype,
    *,
    exact: bool = True,
) -> Tensor:
    """Row ``index[b, t]`` of E_d without sigma, d = b % D: [B, T, cols].

    Args:
        index: [B, T] int64.
        key: [3] int64: mixed seed, generation, global index of the first direction.
        stream: counter word c0 of E_d.
        directions: D.
        rows: of E_d.
        cols: of E_d.
        rademacher: signs instead of normals.
        dtype: of the result.
        exact: see :mod:`.noise`.

    Raises:
        ValueError: the rows of the index do not fit D.
        IndexError: an index outside 0 .. rows - 1.
    """
    repeats = repeats_of("dense_lookup", "index", index.shape[0], directions, False)
    by_direction = index.reshape(repeats, directions, index.shape[1])
    parts = [torch.empty(repeats, 0, index.shape[1], cols, dtype=dtype, device=index.device)]
    for first, count in chunks(directions, rows * cols):
        matrix = noise.dense_materialise(
            key, stream, first, count, rows, cols, rademacher, dtype, exact=exact
        )
        d = torch.arange(count, device=index.device)[None, :, None]
        parts.append(matrix[d, by_direction[:, first : first + count]])
    return torch.cat(parts, 1).reshape(*index.shape, cols)
