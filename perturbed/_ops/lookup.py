"""Rows of dense noise, for embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import ops


def dense_lookup(
    index: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    rows: int,
    cols: int,
    rademacher: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return row ``index[b, t]`` of E_d without sigma, d = b % D: (B, T, cols).

    Not differentiable: an index has no derivative.

    Args:
        index: (B, T) int64 contiguous, from 0 to ``rows - 1``. A CPU checks that; a GPU does not,
            and draws for others noise that no matrix has.
        key: (3,) int64: seed after splitmix64, generation, global index of the first direction.
        stream: Philox counter word of the matrix.
        directions: D.
        rows: of the matrix E_d.
        cols: of the matrix E_d.
        rademacher: signs instead of normals.
        dtype: of the result.
    """
    return ops.dense_lookup.default(index, key, stream, directions, rows, cols, rademacher, dtype)


@torch.library.register_fake("perturbed::dense_lookup")
def _(index, key, stream, directions, rows, cols, rademacher, dtype):
    return key.new_empty((*index.shape, cols), dtype=dtype)
