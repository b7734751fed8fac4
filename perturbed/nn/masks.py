"""What attention does between its projections: masks, and weights for those who ask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replicate import Replicated


def merge_masks(
    attn_mask: Tensor | None,
    padding: Tensor | None,
    shape: tuple[int, ...],
    one_for_all: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return one mask to add to the scores that broadcasts to ``shape``, or None.

    Args:
        attn_mask: (L, S) or (B * H, L, S); True or a number to add.
        padding: (B, S), the same of keys.
        shape: (B, H, L, S).
        one_for_all: whether one row may stand for all B.
        dtype: of the scores.

    Raises:
        ValueError: a mask of another shape, an ``attn_mask`` whose heads were replicated as rows.
        TypeError: a mask that is neither boolean nor floating point.
    """
    rows, heads, length, source = shape
    allowed = [rows, 1] if one_for_all else [rows]
    if attn_mask is not None:
        if isinstance(attn_mask, Replicated) and attn_mask.dim() == 3:
            raise ValueError(
                "attn_mask of (B * H, L, S) must have the heads of a row together, which "
                "replicating (n * H, L, S) does not give: pass "
                f"pm.replicate(mask.unflatten(0, (-1, {heads}))).flatten(0, 1)"
            )
        shapes = [(length, source), *((n * heads, length, source) for n in allowed)]
        if tuple(attn_mask.shape) not in shapes:
            raise ValueError(
                f"attn_mask must be (L, S) = {(length, source)} or (B * H, L, S) = "
                f"{(rows * heads, length, source)}, got {tuple(attn_mask.shape)}"
            )
        parts = (1, 1) if attn_mask.dim() == 2 else (attn_mask.shape[0] // heads, heads)
        attn_mask = additive("attn_mask", attn_mask, dtype).reshape(*parts, length, source)
    if padding is not None:
        if tuple(padding.shape) not in [(n, source) for n in allowed]:
            raise ValueError(
                f"key_padding_mask must be (B, S) = {(rows, source)}, got {tuple(padding.shape)}"
            )
        padding = additive("key_padding_mask", padding, dtype)[:, None, None]
    if attn_mask is None or padding is None:
        return padding if attn_mask is None else attn_mask
    return attn_mask + padding


def additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores: a boolean one is -inf where it is True."""
    mask = mask.full() if isinstance(mask, Replicated) else mask
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating point, got {mask.dtype}")
    return mask.to(dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return attention and its weights, which torch's fused operator does not give.

    Args:
        q: (B, H, L, n).
        k: (B, H, S, n).
        v: (B, H, S, n).
        mask: to add to the scores, broadcasts to (B, H, L, S).
        dropout: probability; as in torch, the weights are returned with it.
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    weights = F.softmax(scores if mask is None else scores + mask, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights
