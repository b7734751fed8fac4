"""PerturbedEmbedding: nn.Embedding with its own table for every row of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import NoiseFamily
from ..noise.base import needs_grad, wide_like
from ..noise.state import NoiseState
from ..replicate import replicate_rows
from .base import PerturbedLayer, Slot


class PerturbedEmbedding(PerturbedLayer, nn.Embedding):
    """An Embedding that evaluates a population: ``y[b, t] = (W + s E_d)[index[b, t]]``.

    Of E_d, only the rows that are looked up are drawn (in some families a little more). The first
    dimension is the batch: position numbers that all rows share must be (1, T), which stands for
    (B, T), and not (T,).

    The row of ``padding_idx``, which torch never trains, has no noise: not in the forward, nor in
    members or estimates. It has noise like any other where the weight also serves a layer that
    trains it in torch too, such as an output Linear, so that all users of the weight see one E_d.

    Args:
        num_embeddings: V, rows of the table.
        embedding_dim: n.
        directions: D.
        padding_idx: a row without noise, as in nn.Embedding; negative numbers count from the end.
        noise: the family of E_d, a (V, n) matrix, default ``Dense()``.
        device, dtype: as in nn.Embedding.

    Shapes:
        input (B, *) integers, B = R * D rows, or (1, *) for indices that all rows share.
        output (B, *, n).

    Raises:
        ValueError: a family whose options do not fit the table's size; in the forward, rows that
            are no multiple of D, an odd R > 1 with antithetic sampling.
        TypeError: indices that are no integers.
        IndexError: an index outside the table (on a CPU; a GPU asserts, as for nn.Embedding).

    Example:
        >>> import torch
        >>> from perturbed import PerturbedEmbedding, PerturbedModel
        >>> layer = PerturbedEmbedding(100, 8, directions=16)
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.zeros(32, 5, dtype=torch.long)).shape
        torch.Size([32, 5, 8])
    """

    torch_class = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        directions: int,
        padding_idx: int | None = None,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Embedding does."""
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.init_noise(directions, noise)

    @classmethod
    def why_not_convertible(cls, module: nn.Module) -> str | None:
        """Name an option that has no meaning for a population."""
        if getattr(module, "max_norm", None) is not None:
            return "max_norm changes the weights in the forward"
        for option in ("sparse", "scale_grad_by_freq"):
            if getattr(module, option, False):
                return f"{option}=True is an option of its gradient"
        return None

    def slots(self) -> list[Slot]:
        """See :meth:`PerturbedLayer.slots`."""
        return [("weight", None)]

    def fixed_row(self, name: str) -> int | None:
        """See :meth:`PerturbedLayer.fixed_row`: the padding."""
        return self.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Look up, with noise if the layer's model says so."""
        if not self.is_perturbed:
            return super().forward(input)
        if input.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input must be int64 or int32 indices, got {input.dtype}")
        if input.dim() == 0:
            raise ValueError("input must be (B, *) with B = R * D rows, got a single index")
        rows, short = self.enter(input)
        batch = (rows if short is None else short).shape[0]
        if short is None and batch != input.shape[0]:
            rows = input  # one row that all members see
        base = F.embedding(rows, self.weight, self.padding_idx)
        self.noise.allocate(self.weight.detach(), self.site)
        return self._add_noise(base, rows, batch)

    def _add_noise(self, base: Tensor, rows: Tensor, batch: int) -> Tensor:
        """``base`` plus the noise of its rows, for all rows of the batch.

        Args:
            base: (M, *, n), the rows of W.
            rows: (M, *) indices: M = B, or N rows that every member sees, B = R * D and N | R.
            batch: B.
        """
        site = self.site
        state, directions = site.state, site.state.directions
        shared = rows.shape[0] != batch
        repeats = batch // directions
        sources = rows.shape[0] if shared else repeats
        copies, tail = repeats // max(1, sources), base.shape[1:]
        if batch == 0 or site.weight < 0:
            return replicate_rows(base, copies, directions) if shared else base
        index = rows.to(torch.int64).reshape(rows.shape[0], -1)
        if shared:  # each row for every direction
            index = index[:, None].expand(-1, directions, -1).flatten(0, 1)
        size, cols = self.weight.shape
        if self.noise.absolute:
            own = self.noise.lookup(index, site, size, cols, base)
            own = own.view(1, sources * directions, *tail)
            return own.expand(copies, -1, *tail).flatten(0, 1)
        _, sigma = state.tensors(base.device)
        like = base.detach().new_empty((), dtype=wide_like(base))
        noise = self.noise.lookup(index, site, size, cols, like)  # (sources * D, T, n)
        if site.fixed_row is not None:
            noise = noise.masked_fill_((index == site.fixed_row)[..., None], 0)
        # (copies, sources, D, *, n); s belongs to a repeat, which is a copy of a source.
        noise = noise.view(1, sources, directions, *tail)
        here = base.view(1, sources, 1 if shared else directions, *tail)
        scale = repeat_scales(state, repeats, sigma.to(like.dtype)).view(
            copies, sources, *[1] * (1 + len(tail))
        )
        if not shared and base.dtype == like.dtype and not needs_grad(base):
            here.addcmul_(noise, scale)
            return base
        # Half precision is summed in float32 and rounded once.
        return torch.addcmul(here, noise, scale).to(base.dtype).flatten(0, 2)

    def parameter_noise(self, name: str, first: int, count: int) -> Tensor:
        """See :meth:`PerturbedLayer.parameter_noise`."""
        noise, row = super().parameter_noise(name, first, count), self.site.fixed_row
        if row is not None:
            noise = noise.clone()  # it may be what the family holds
            noise[:, row] = 0
        return noise

    def add_estimate(self, name: str, grad: Tensor, weights: Tensor, accumulate: bool) -> None:
        """See :meth:`PerturbedLayer.add_estimate`."""
        row = self.site.fixed_row
        kept = grad[row].clone() if row is not None and accumulate else 0
        super().add_estimate(name, grad, weights, accumulate)
        if row is not None:
            grad[row] = kept


def repeat_scales(state: NoiseState, repeats: int, sigma: Tensor) -> Tensor:
    """Return ``s sigma`` of every repeat, (R,)."""
    scales = sigma.expand(repeats).clone()
    if state.is_antithetic(repeats):
        scales[repeats // 2 :].neg_()
    return scales
