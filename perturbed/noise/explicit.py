"""Explicit members: their parameters are tensors that the caller holds, and no noise at all.

Particles of a swarm, samples of a distribution, checkpoints that are to be compared. The tensors
are read where they are: members are often columns of one (D, N) matrix of flat parameter vectors,
``flat[:, a:b].view(D, out, in)``, which a batched matrix product takes without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..replicate import Replicated, replicate_rows
from .base import LayerNoise, NoiseFamily, assign_total, per_scratch, rows_of, with_tokens
from .convolution import Convolution, PopulationBatch, convolve_kernels, spread


class Explicit(NoiseFamily):
    """Members whose parameters are given: row b sees E_d itself, ``y_b = E_d x_b + e_d``.

    The layer's own parameters, sigma and signs take no part, and nothing is drawn:
    :meth:`perturbed.PerturbedModel.set_members` takes the tensors, and ``antithetic`` is False. A
    frozen parameter (``requires_grad=False``) is not a member's own and serves all of them as it
    is. ``set_grad(w)`` is the plain sum of the tensors, ``sum_d w_d E_d``.

    All perturbed layers of a model have this family, or none has.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=3, noise=perturbed.Explicit())
        >>> pm = perturbed.PerturbedModel(net, directions=3)
        >>> particles = {"weight": torch.randn(3, 4, 8), "bias": torch.randn(3, 4)}
        >>> pm.set_members(particles)
        >>> y = pm(torch.ones(3, 8))                      # row d: member d
        >>> torch.allclose(y[1], particles["weight"][1].sum(1) + particles["bias"][1])
        True
    """

    absolute = True

    def __repr__(self) -> str:
        """Name the family."""
        return "Explicit()"

    def for_vectors(self) -> NoiseFamily:
        """Return the family itself: its tensors can have any shape."""
        return self

    # ---- products ------------------------------------------------------------------------------

    def linear(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: LayerNoise,
        short: Replicated | None = None,
    ) -> Tensor:
        """See :meth:`NoiseFamily.linear`: one batched product, and none with W."""
        explicit, directions = site.state.explicit, site.state.directions
        if site.bias >= 0:
            bias = explicit[site.bias]  # (D, 1, out), else (out,)
        x = with_tokens(rows)
        sources = x.shape[0] if short is not None else x.shape[0] // directions
        tokens, out = x.shape[1], weight.shape[0]
        sizes = sources, directions, tokens, out
        if site.weight < 0:  # what members have of their own is the bias, if anything
            own = site.bias >= 0
            y = F.linear(x, weight, None if own else bias)
            y = y.view(sources, directions if short is None else 1, tokens, out)
            if own and bias is not None:
                y = y + bias.to(y.dtype)  # autocast
            y = y.expand(sizes)
        elif short is None:
            by_member = x.unflatten(0, (sources, directions)).transpose(0, 1).flatten(1, 2)
            y = _products(by_member, explicit[site.weight], bias)
            y = y.view(directions, sources, tokens, out).transpose(0, 1)
        else:
            y = _shared_products(x.flatten(0, 1), explicit[site.weight], bias)
            y = y.view(sources, tokens, directions, out).transpose(1, 2)
        y = y.reshape(sources * directions, *rows.shape[1:-1], out)
        return y if short is None or short.copies == 1 else replicate_rows(y, short.copies, 1)

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        site: LayerNoise,
        conv: Convolution,
        copies: int,
    ) -> Tensor:
        """See :meth:`NoiseFamily.convolve`: a group of the convolution for every member."""
        batch = PopulationBatch.of(x, site.state, copies)
        explicit, directions = site.state.explicit, batch.directions
        offsets = bias if bias is None else bias.expand(directions, -1)
        if site.bias >= 0:
            offsets = explicit[site.bias][:, 0].to(weight.dtype)
        if site.weight >= 0:
            return convolve_kernels(x, explicit[site.weight], offsets, weight.shape, conv, batch)
        y = spread(conv(x, weight), batch)
        if offsets is None:
            return y
        rows = y.unflatten(0, (-1, directions))
        return (rows + offsets.view(*offsets.shape, *[1] * (y.dim() - 2))).flatten(0, 1)

    def add_linear(self, y: Tensor, x: Tensor, site: LayerNoise, shared: bool) -> Tensor:
        """Raise TypeError: there is no base product to add to; :meth:`linear` is the whole."""
        raise TypeError("Explicit members are no noise to be added to a product; see linear()")

    # ---- the members ---------------------------------------------------------------------------

    def materialise(
        self,
        site: LayerNoise,
        stream: int,
        first: int,
        count: int,
        rows: int,
        cols: int,
        like: Tensor,
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`: a view where the dtype is the same."""
        return site.state.explicit[stream][first : first + count].to(like.dtype)

    def materialise_weight(
        self, site: LayerNoise, first: int, count: int, rows: int, cols: int, like: Tensor
    ) -> Tensor:
        """See :meth:`NoiseFamily.materialise`."""
        return self.materialise(site, site.weight, first, count, rows, cols, like)

    def lookup(self, index: Tensor, site: LayerNoise, rows: int, cols: int, like: Tensor) -> Tensor:
        """See :meth:`NoiseFamily.lookup`."""
        by_direction = index.unflatten(0, (-1, site.state.directions))
        return rows_of(site.state.explicit[site.weight], by_direction).to(like.dtype).flatten(0, 1)

    def estimate_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, stream: int, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`: the sum of the tensors themselves."""
        members = site.state.explicit[stream].detach()
        # In the weights' dtype, the accumulator's, with conversions of bounded size.
        total = torch.zeros(grad.numel(), dtype=weights.dtype, device=grad.device)
        each = per_scratch(grad.device, grad.numel() * weights.element_size())
        for part, w in zip(members.split(each), weights.split(each), strict=True):
            total.addmv_(part.flatten(1).to(w.dtype).t(), w)
        assign_total(grad, total.view_as(grad), accumulate)

    def estimate_weight_(
        self, grad: Tensor, weights: Tensor, site: LayerNoise, accumulate: bool
    ) -> None:
        """See :meth:`NoiseFamily.estimate_`."""
        self.estimate_(grad, weights, site, site.weight, accumulate)

    def held_bytes(self, site: LayerNoise) -> int:
        """Bytes of the tensors that were given for this layer."""
        explicit = site.state.explicit
        return sum(explicit[word].nbytes for word in (site.weight, site.bias) if word in explicit)


def _products(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Return every member's product with its own rows, (D, M, out).

    Args:
        x: (D, M, in).
        matrices: (D, out, in).
        bias: (D, 1, out), (out,) or None.
    """
    w = matrices.mT
    return torch.bmm(x, w) if bias is None else torch.baddbmm(bias, x, w)


def _shared_products(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Return every member's product with the same rows, (M, D, out); arguments of _products.

    Args:
        x: (M, in).
        matrices: (D, out, in).
        bias: (D, 1, out), (out,) or None.
    """
    directions, out, cols = matrices.shape
    # One product with the members' matrices on top of each other. Apart in memory they must be
    # copied for it, which pays if that is less than the reordering of the other way's result.
    stacked = matrices.stride(0) == out * matrices.stride(1)
    if not stacked and x.shape[0] < cols:
        return _products(x.expand(directions, *x.shape), matrices, bias).transpose(0, 1)
    w = matrices.reshape(directions * out, cols).t()
    if bias is None:
        y = x @ w
    else:
        y = torch.addmm(bias.expand(directions, 1, out).reshape(-1), x, w)
    return y.view(x.shape[0], directions, out)


# ---- what set_members is given -----------------------------------------------------------------


def check_members(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], directions: int
) -> dict[str, Tensor]:
    """Return the members' tensors if they fit, in the order of the parameters.

    Args:
        tensors: (D, *shape) by name.
        parameters: the parameters to be given, by name.
        directions: D.

    Raises:
        TypeError: no mapping from names to tensors.
        ValueError: missing or unknown names, another shape, dtype or device.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"tensors must map names of parameters to tensors, got {type(tensors).__name__}"
        )
    if set(tensors) != set(parameters):
        missing = [name for name in parameters if name not in tensors]
        unknown = [name for name in tensors if name not in parameters]
        raise ValueError(
            f"tensors must have the perturbed parameters {list(parameters)}, got "
            f"{f'none for {missing}' if missing else ''}{' and ' if missing and unknown else ''}"
            f"{f'{unknown} too, which are none of them' if unknown else ''}"
        )
    for name, parameter in parameters.items():
        tensor, shape = tensors[name], (directions, *parameter.shape)
        if not isinstance(tensor, Tensor) or isinstance(tensor, Replicated):
            raise TypeError(f"tensors[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"tensors[{name!r}] must have shape (D, *parameter.shape) = {shape}, got "
                f"{tuple(tensor.shape)}"
            )
        if (tensor.dtype, tensor.device) != (parameter.dtype, parameter.device):
            raise ValueError(
                f"tensors[{name!r}] must have the parameter's dtype and device, "
                f"{parameter.dtype} on {parameter.device}, got {tensor.dtype} on {tensor.device}"
            )
    return {name: tensors[name] for name in parameters}
