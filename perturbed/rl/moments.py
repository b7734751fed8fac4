"""Count, mean and sum of squared deviations: of rows, merged, and added up exactly.

Sums here do not depend on what else is summed beside them: every column is added up in the same
order whatever the number of columns, and :func:`exact_sum` in any order. torch's own sums choose
their order by shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Processes

Moments = tuple[Tensor, Tensor, Tensor]

# exact_sum writes a number in two digits of this many bits, so that 2^24 of them fit in 63.
_DIGIT = 38


def moments(rows: Tensor, mask: Tensor | None = None) -> Moments:
    """Return count (*), mean and m2 (*, size) of rows over their first dimension.

    Rows with numbers that are not finite are left out.

    Args:
        rows: (T, *, size) float64.
        mask: (T, *) bool, those that count; default all.
    """
    valid = rows.isfinite().all(-1)
    if mask is not None:
        valid = valid & mask
    count = valid.sum(0).to(torch.float64)
    valid = valid[..., None]
    mean = _column_sums(torch.where(valid, rows, 0.0)) / count.clamp(min=1)[..., None]
    return count, mean, _column_sums(torch.where(valid, rows - mean, 0.0).square())


def merged(one: Moments, other: Moments) -> Moments:
    """Return the moments of both, by Chan, Golub and LeVeque (1979); any leading dimensions."""
    (count, mean, m2), (more, more_mean, more_m2) = one, other
    total = count + more
    share = (more / total.clamp(min=1))[..., None]
    delta = more_mean - mean
    spread = delta.square() * count[..., None] * share
    return total, mean + delta * share, m2 + more_m2 + spread


def _column_sums(rows: Tensor) -> Tensor:
    """Add up over the first dimension, (T, ...) -> (...), pairwise: halves, then their halves.

    Rows of zeros at the end change nothing, to the last bit.
    """
    if len(rows) == 0:
        return rows.new_zeros(rows.shape[1:])
    while len(rows) > 1:
        half = 1 << (len(rows) - 1).bit_length() - 1
        rest = rows[half:]
        rows = torch.cat((rows[: len(rest)] + rest, rows[len(rest) : half]))
    return rows[0]


def exact_sum(values: Tensor, processes: Processes | None = None) -> Tensor:
    """Add up over the first dimension, (k, n) -> (n,) float64, to the same bits in any order.

    Numbers are rounded to multiples of 2^-76 of the largest of their column, and these are added up
    as integers.

    Args:
        values: (k, n) float64, finite; k at least 1, and fewer than 2^24 over all processes.
        processes: add up the values of all of them.

    Example:
        >>> import torch
        >>> from perturbed.rl.moments import exact_sum
        >>> exact_sum(torch.tensor([[1e17], [1.0], [-1e17]], dtype=torch.float64))
        tensor([1.], dtype=torch.float64)
    """
    largest = values.abs().amax(0)
    if processes is not None:
        largest = processes.maximum(largest)
    # Smaller numbers are added up as if the largest were 2^-900: their digits would not fit.
    exponent = torch.frexp(largest).exponent.clamp(min=-900)
    scaled = values * _power(_DIGIT - exponent)
    high = scaled.round()
    low = ((scaled - high) * 2.0**_DIGIT).round()
    digits = torch.stack((high, low)).to(torch.int64).sum(1)
    if processes is not None:
        processes.add_up([digits])
    high, low = digits.to(torch.float64)
    return (high + low * 2.0**-_DIGIT) * _power(exponent - _DIGIT)


def _power(exponent: Tensor) -> Tensor:
    """Return 2 to integers from -1022 to 1023, exactly: torch's own powers may round."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
