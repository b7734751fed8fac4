"""What families share: how much noise is materialised at once, and sums over rows and signs."""

from __future__ import annotations

import torch
from torch import Tensor

# Noise materialised at once where a matrix product needs it: what stays in the second-level cache
# of a CPU (up to a quarter faster than 16 MB), and enough to fill a GPU.
SCRATCH_BYTES = {"cpu": 2 << 20, "cuda": 16 << 20}


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def per_scratch(device: torch.device, direction_bytes: int) -> int:
    """Directions whose noise fits in the scratch; one at least."""
    scratch = SCRATCH_BYTES.get(device.type, SCRATCH_BYTES["cpu"])
    return max(1, scratch // max(1, direction_bytes))


def repeat_signs(y: Tensor, directions: int, antithetic: bool) -> Tensor:
    """Return s of every repeat, (R, 1, 1, 1), for a batch ``y``."""
    repeats = y.shape[0] // directions
    signs = torch.ones(repeats, 1, 1, 1, dtype=y.dtype, device=y.device)
    if antithetic:
        signs[repeats // 2 :] = -1
    return signs


def with_tokens(rows: Tensor) -> Tensor:
    """Return (B, *, n) as (B, T, n); T is 1 without further dimensions."""
    return rows.unsqueeze(1) if rows.dim() == 2 else rows.flatten(1, -2)


def wide_like(like: Tensor) -> torch.dtype:
    """Return the dtype in which an estimate is summed."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32
