"""Baselines of groups: members compared with others that met the same prompt or episode.

What a member scores depends on what it was shown. Common random numbers (every member sees the same
prompts, or starts of episodes) take that out of the comparison; where members see different ones,
or where prompts differ in how far their scores scatter, the scores of a group are first compared
among themselves. Sarkar et al., "Evolution Strategies at the Hyperscale" (EGGROLL, 2025), with one
group per prompt, after the group advantages of Shao et al., "DeepSeekMath" (GRPO, 2024).

The means are of the values given: where a population takes several forwards or processes, those of
one forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import to_numbers


def group_baseline(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """Subtract from every value the mean of its group, and average per member.

    If every member saw every group the same number of times, this only shifts all members by the
    same amount, which the centred shapings do not see; it matters where ``groups`` differ.

    Args:
        values: (S, D, G, ...): score of each member in each of G groups, or any number of scores
            there, in the sign of your choice. ``pm.member_rows`` makes (S, D, n) of rows.
        groups: integers, broadcastable to the shape of ``values``: which group each value belongs
            to; any numbers. Default: the third dimension counts the groups.

    Returns:
        (S, D) for ``tell``. A member with a value that is not finite gets NaN, which loses there;
        such values are left out of the means.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: values that are no real numbers, groups that are no integers.

    Example:
        >>> import torch
        >>> from perturbed.optim import group_baseline
        >>> values = torch.tensor([[[1.0], [3.0], [10.0], [14.0]]])  # (S, D, n) = (1, 4, 1)
        >>> prompts = torch.tensor([[[0], [0], [1], [1]]])  # two members saw prompt 0, two prompt 1
        >>> group_baseline(values, prompts)
        tensor([[-1.,  1., -2.,  2.]])
    """
    return _relative(values, groups, scale=False)


def group_zscore(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """Subtract the mean of its group, divide by its standard deviation, and average per member.

    Every group then has the same say, however far its scores scatter. The deviation has the number
    of finite values in the group as its divisor; a group of equal values counts as zeros. To share
    one deviation among all groups, use :func:`group_baseline` and ``shaping="zscore"``.

    Args:
        values: as for :func:`group_baseline`.
        groups: as for :func:`group_baseline`.

    Returns:
        (S, D) for ``tell``, NaN for members with a value that is not finite.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: values that are no real numbers, groups that are no integers.

    Example:
        >>> import torch, perturbed
        >>> from perturbed.optim import group_zscore
        >>> net = perturbed.convert(torch.nn.Linear(8, 1), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> nes = perturbed.NES(pm, torch.optim.SGD(net.parameters(), lr=0.1), maximize=True)
        >>> prompts = pm.replicate(torch.randn(5, 8))  # each member answers the same 5 prompts
        >>> score = nes.step(lambda: group_zscore(pm.member_rows(pm(prompts)[:, 0])))
    """
    return _relative(values, groups, scale=True)


def _relative(values: Tensor, groups: Tensor | None, scale: bool) -> Tensor:
    """Values relative to their groups, averaged over the third and later dimensions."""
    values = to_numbers(values)
    if values.dim() < 3 or 0 in values.shape:
        raise ValueError(
            "values must have shape (S, D, G) with members first and groups last, none of them 0, "
            f"got {tuple(values.shape)}"
        )
    wide = values.to(torch.float64)
    finite = wide.isfinite()
    ids = _group_numbers(values, groups)
    count = values.numel()

    def each(reduce: str, source: Tensor, start: float) -> Tensor:
        """Reduce ``source`` within groups; every value gets its group's result."""
        total = torch.full((count,), start, dtype=torch.float64, device=wide.device)
        if reduce == "sum":  # whose order is fixed on every device, unlike that of scatter
            total.index_put_((ids,), source.flatten(), accumulate=True)
        else:
            total.scatter_reduce_(0, ids, source.flatten(), reduce)
        return total[ids].view_as(wide)

    # Halved, so that no difference leaves the range of a double.
    low = each("amin", torch.where(finite, wide, torch.inf), torch.inf)
    offset = torch.where(finite, wide / 2 - low / 2, 0.0)
    members = each("sum", finite.double(), 0.0)
    if scale:  # to [0, 1], where no square does either
        high = each("amax", offset, 0.0)
        offset = torch.where(high > 0, offset / high, 0.0)
    relative = torch.where(finite, offset - each("sum", offset, 0.0) / members, 0.0)
    if scale:
        std = (each("sum", relative.square(), 0.0) / members).sqrt()
        relative = torch.where(high > 0, relative / std, 0.0)
    else:
        relative = 2 * relative
    relative = torch.where(finite, relative, torch.nan)
    return relative.flatten(2).mean(2).to(values.dtype)


def _group_numbers(values: Tensor, groups: Tensor | None) -> Tensor:
    """Return the group of every value, flat, as numbers below the number of values."""
    shape, device = values.shape, values.device
    if groups is None:
        third = torch.arange(shape[2], device=device).view(-1, *(1,) * (values.dim() - 3))
        return third.expand(shape).flatten()
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"groups must be a tensor of integers, got {got}")
    try:
        numbers = groups.to(device).expand(shape).flatten()
    except RuntimeError:
        raise ValueError(
            f"groups must broadcast to the values' shape {tuple(shape)}, got {tuple(groups.shape)}"
        ) from None
    # Numbered in the order of their size, by sorting: torch.unique would wait for the device.
    ordered, order = numbers.sort()
    fresh = torch.ones_like(ordered, dtype=torch.int64)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(fresh).scatter_(0, order, fresh.cumsum(0) - 1)
