"""PerturbedMultiheadAttention: nn.MultiheadAttention with its own weights for every row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..noise import NoiseFamily
from ..noise.base import LayerNoise
from ..replicate import Replicated
from .base import PerturbedLayer, Slot, check_float
from .linear import PerturbedLinear
from .masks import attend, merge_masks


class PerturbedMultiheadAttention(PerturbedLayer, nn.MultiheadAttention):
    """Attention that evaluates a population: every row has its own projections.

    Row b attends with the projections ``W + s E_d`` of queries, keys, values and output; all of its
    positions see the same ones. The output projection is a layer of its own, ``out_proj``, a
    :class:`~perturbed.PerturbedLinear`, and so can have other noise. Without noise the layer is
    ``nn.MultiheadAttention`` (Vaswani et al., 2017).

    The packed weight of the in-projections, (3 E, E), has one E_d. Where queries, keys and values
    are not one tensor, it is applied to all their positions at once: noise is drawn once, but up to
    two thirds of the products are not used. ``kdim`` or ``vdim`` other than ``embed_dim`` give
    three weights, each with noise of its own, and use all they compute.

    Attention dropout in training mode is torch's, from torch's random state. As in torch, forward
    hooks of ``out_proj`` are not called.

    Args:
        embed_dim: E.
        num_heads: H, a divisor of E.
        directions: D.
        dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: as in
            nn.MultiheadAttention.
        noise: the family of E_d, default ``Dense()``; ``bias_k`` and ``bias_v`` are vectors.
        device, dtype: as in nn.MultiheadAttention.

    Shapes:
        query (B, L, E), key (B, S, kdim), value (B, S, vdim) with B = R * D rows; (L, B, E) and so
        on if not ``batch_first``. attn_mask (L, S) or (B * H, L, S), key_padding_mask (B, S).
        output as query; weights (B, L, S), or (B, H, L, S) if not averaged.

    Raises:
        ValueError: a family whose options do not fit a weight; in the forward, input without a row
            dimension, rows, lengths, features or masks that do not fit each other, rows that are no
            multiple of D, ``is_causal`` without the mask it is a hint about.
        TypeError: an input that is nested or not floating point.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedModel, PerturbedMultiheadAttention
        >>> layer = PerturbedMultiheadAttention(8, 2, directions=16, batch_first=True)
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> x = torch.ones(32, 5, 8)
        >>> y, weights = pm(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([32, 5, 8]), torch.Size([32, 5, 5]))
    """

    torch_class = nn.MultiheadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        directions: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.MultiheadAttention does; the noise comes with the model."""
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.init_noise(directions, noise)
        # A change of class, as in a conversion, so that the initial weights are torch's.
        out_proj: nn.Module = self.out_proj
        out_proj.__class__ = PerturbedLinear
        assert isinstance(out_proj, PerturbedLinear)
        out_proj.init_noise(directions, noise)
        out_proj.original_class = NonDynamicallyQuantizableLinear

    def slots(self) -> list[Slot]:
        """Return the in-projections; biases that go with several weights have slots of their own.

        See :meth:`PerturbedLayer.slots`.
        """
        bias = None if self.in_proj_bias is None else "in_proj_bias"
        slots: list[Slot]
        if self._qkv_same_embed_dim:
            slots = [("in_proj_weight", bias)]
        else:
            slots = [(name, None) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
            slots += [(None, bias)] if bias else []
        if self.bias_k is not None:
            slots += [(None, "bias_k"), (None, "bias_v")]
        return slots

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal is a hint about attn_mask and needs it: got None; see "
                "nn.Transformer.generate_square_subsequent_mask"
            )
        inputs = self._rows_first(query, key, value)
        heads = self._project(*inputs)
        shape = (*heads[0].shape[:3], heads[1].shape[2])  # (B, H, L, S)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            one_for_all = self.site.state.rows_of(1) == shape[0]
            mask = merge_masks(attn_mask, key_padding_mask, shape, one_for_all, heads[0].dtype)
        (q, k, v), mask = self._extend(heads, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            attended, weights = attend(q, k, v, mask, dropout)
            if average_attn_weights:
                weights = weights.mean(1)
        else:
            attended = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal and mask is None
            )
        y = self._project_out(attended.transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1), weights

    # ---- inputs --------------------------------------------------------------------------------

    def _rows_first(self, *inputs: Tensor) -> list[Tensor]:
        """Check query, key and value, and return them as (B, T, features); what is one stays one.

        "One" means the same object, as torch understands self-attention.
        """
        batch = 0 if self.batch_first else 1
        layout = "(B, T, {})" if self.batch_first else "(T, B, {})"
        sizes = (self.embed_dim, self.kdim, self.vdim)
        for name, x, size in zip(("query", "key", "value"), inputs, sizes, strict=True):
            if x.is_nested:
                raise TypeError(f"{name} must be a padded tensor, got a nested one")
            check_float(x)
            if x.dim() != 3 or x.shape[2] != size:
                raise ValueError(
                    f"{name} must be {layout.format(size)} with B = R * D rows, got "
                    f"{tuple(x.shape)}; give a single row its dimension by "
                    f"{name}.unsqueeze({batch})"
                )
        # One row that all members share stands for as many as the others have.
        rows = {self.site.state.rows_of(x.shape[batch]) for x in inputs}
        query, key, value = inputs
        if len(rows) > 1 or key.shape[1 - batch] != value.shape[1 - batch]:
            raise ValueError(
                "query, key and value must have the same rows, and key and value the same length, "
                f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if self.batch_first:
            return list(inputs)
        moved = {id(x): x.transpose(0, 1) for x in inputs}
        return [moved[id(x)] for x in inputs]

    # ---- projections ---------------------------------------------------------------------------

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values of all heads, (B, H, T, E / H) each."""
        self.allocate()
        if not self._qkv_same_embed_dim:
            parts = self._project_each(query, key, value)
        elif query is key and key is value:
            rows, short = self.enter(query)
            parts = list(self._in_projection(rows, short).chunk(3, -1))
        else:
            # One product for all positions, so that E_d is drawn once.
            distinct = [query, key] if key is value else [query, key, value]
            y = self._in_projection(*self._enter_all(distinct))
            found = list(y.split([x.shape[1] for x in distinct], 1))
            found += [found[1]] if key is value else []
            parts = [part.chunk(3, -1)[i] for i, part in enumerate(found)]
        return [self._split(part) for part in parts]

    def _split(self, x: Tensor) -> Tensor:
        """Return (B, T, E) as (B, H, T, E / H)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _in_projection(self, rows: Tensor, short: Replicated | None) -> Tensor:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        return self.noise.linear(rows, weight, bias, self.site, short)

    def _project_each(self, *inputs: Tensor) -> list[Tensor]:
        """Return queries, keys and values by weights of their own, (B, T, E) each."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        parts = []
        for x, weight, site in zip(inputs, weights, self.sites, strict=False):
            rows, short = self.enter(x)
            parts.append(self.noise.linear(rows, weight, None, site, short))
        if self.in_proj_bias is None:
            return parts
        bias = self._vector(self.in_proj_bias, self.sites[3], parts[0])
        return [p + b for p, b in zip(parts, bias.chunk(3, -1), strict=True)]

    def _enter_all(self, inputs: list[Tensor]) -> tuple[Tensor, Replicated | None]:
        """Check inputs of the same rows and join their positions, in short form if all are."""
        entered = [self.enter(x) for x in inputs]
        shorts = [short for _, short in entered if short is not None]
        if len(shorts) == len(inputs):
            if all(short.copies == shorts[0].copies for short in shorts):
                return torch.cat([rows for rows, _ in entered], 1), shorts[0]
        full = [rows if short is None else short.full() for rows, short in entered]
        return torch.cat(full, 1), None

    def _vector(self, parameter: Tensor, site: LayerNoise, like: Tensor) -> Tensor:
        """Return a vector with the noise of every row, (B, 1, n), in the dtype of ``like``."""
        rows = like.shape[0]
        if self.noise.absolute and site.bias >= 0:
            members = site.state.explicit[site.bias]  # (D, 1, n)
            return members.repeat(rows // len(members), 1, 1).to(like.dtype)
        # A copy, even of one row: the noise may be added in place.
        copies = (
            parameter.view(1, 1, -1)
            .expand(rows, -1, -1)
            .clone(memory_format=torch.contiguous_format)
        )
        return self.noise.add_bias(copies, site).to(like.dtype)

    def _extend(
        self, heads: list[Tensor], mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Append the learnt key and value, and zeros, if the layer has them; nothing masks them."""
        q, k, v = heads
        if self.bias_k is not None and self.bias_v is not None:
            more = [
                self._split(self._vector(parameter, site, q))
                for parameter, site in zip((self.bias_k, self.bias_v), self.sites[-2:], strict=True)
            ]
            k, v = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - heads[1].shape[2]))
        return [q, k, v], mask

    def _project_out(self, attended: Tensor) -> Tensor:
        """Apply ``out_proj`` to (B, L, E); of a layer that is not perturbed only the weight."""
        if isinstance(self.out_proj, PerturbedLinear):
            return self.out_proj.forward(attended)
        return F.linear(attended, self.out_proj.weight, self.out_proj.bias)
