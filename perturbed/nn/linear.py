"""PerturbedLinear: nn.Linear with its own weights for every row of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import LowRank, NoiseFamily, Permuted, SignFlip, Sparse
from .base import PerturbedLayer, check_float


class PerturbedLinear(PerturbedLayer, nn.Linear):
    """A Linear layer that evaluates a population: ``y_b = (W + s E_d) x_b + (bias + s e_d)``.

    Row b of the flat batch belongs to direction ``d = b % D``; its sign s is -1 in the second half
    of the repeats if the sampling is antithetic. Without noise (outside ``pm(...)`` and
    ``pm.perturbed()``) it is ``nn.Linear``. Frozen parameters (``requires_grad=False``) are not
    perturbed.

    After NESgpu's layer of the same name (Amand, 2020); the noise is drawn in the kernel instead of
    stored.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        directions: D.
        bias: whether to learn (and perturb) a bias.
        noise: the family of E_d, default ``Dense()``.
        device, dtype: as in nn.Linear.

    Shapes:
        input (B, *, in_features), B = R * D rows; every position of ``*`` sees row b's weights.
        output (B, *, out_features).

    Raises:
        ValueError: a family whose options do not fit the layer's size; in the forward, rows that
            are no multiple of D, an odd R > 1 with antithetic sampling.
        TypeError: an input that is not floating point.

    Example:
        >>> import torch
        >>> from perturbed import PerturbedLinear, PerturbedModel
        >>> layer = PerturbedLinear(8, 4, directions=16)
        >>> pm = PerturbedModel(layer, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> pm(torch.ones(32, 8)).shape  # R = 2: antithetic pairs
        torch.Size([32, 4])
    """

    torch_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        directions: int,
        bias: bool = True,
        noise: NoiseFamily | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Linear does; the noise comes with the model that wraps it."""
        super().__init__(in_features, out_features, bias, device, dtype)
        self.init_noise(directions, noise)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, perturbed if its model says so."""
        if not self.is_perturbed:
            return F.linear(input, self.weight, self.bias)
        check_float(input)
        if input.dim() < 2:
            raise ValueError(
                f"input must be (B, *, {self.in_features}) with B = R * D rows, got "
                f"{tuple(input.shape)}"
            )
        rows, short = self.enter(input)
        self.noise.allocate(self.weight, self.site)
        return self.noise.linear(rows, self.weight, self.bias, self.site, short)


class SparsePerturbedLinear(PerturbedLinear):
    """A PerturbedLinear with :class:`~perturbed.Sparse` noise: each direction perturbs k columns.

    After NESgpu's layer of the same name (Amand, 2020).

    Args:
        in_features, out_features, directions, bias, device, dtype: as in PerturbedLinear.
        sparsity: k as a count or a fraction of the inputs, or "auto" for max(1, in // D).
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedLinear.

    Raises:
        ValueError: a sparsity below 1 or above ``in_features``, a fraction outside (0, 1].
        TypeError: a sparsity that is no number.

    Example:
        >>> from perturbed import SparsePerturbedLinear
        >>> SparsePerturbedLinear(8, 4, directions=16, sparsity=2).noise
        Sparse(2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        directions: int,
        bias: bool = True,
        sparsity: int | float | str = "auto",
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Linear does."""
        noise = Sparse(sparsity, distribution)
        super().__init__(in_features, out_features, directions, bias, noise, device, dtype)


class PermutedLinear(PerturbedLinear):
    """A PerturbedLinear with :class:`~perturbed.Permuted` noise: one matrix in permuted places.

    After NESgpu's layer of the same name (Amand, 2020).

    Args:
        in_features, out_features, directions, bias, device, dtype: as in PerturbedLinear.
        permutation: "in", "out", "both" or "auto".
        in_sparsity: non-zero columns of E_d as a count or a fraction, 0 for all.
        out_sparsity: non-zero rows of E_d as a count or a fraction, 0 for all.
        allow_repeats: draw with replacement instead of permuting.
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedLinear.

    Raises:
        ValueError: an unknown permutation, a sparsity above its size or a fraction outside (0, 1],
            no side longer than 1 to permute.
        TypeError: a sparsity that is no number.

    Example:
        >>> from perturbed import PermutedLinear
        >>> PermutedLinear(8, 4, directions=16, permutation="in").noise
        Permuted('in')
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        directions: int,
        bias: bool = True,
        permutation: str = "auto",
        in_sparsity: int | float = 0,
        out_sparsity: int | float = 0,
        allow_repeats: bool = False,
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Linear does."""
        noise = Permuted(permutation, in_sparsity, out_sparsity, allow_repeats, distribution)
        super().__init__(in_features, out_features, directions, bias, noise, device, dtype)


class SignFlipLinear(PerturbedLinear):
    """A PerturbedLinear with :class:`~perturbed.SignFlip` noise: one matrix with flipped signs.

    After Flipout (Wen et al., 2018) and NESgpu's SyntheticLinear (Amand, 2020).

    Args:
        in_features, out_features, directions, bias, device, dtype: as in PerturbedLinear.
        flip: "in", "out", "both" or "auto".
        bases: G, how many matrices the directions share; more of them lower the variance.
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedLinear.

    Raises:
        ValueError: an unknown flip, ``bases`` below 1.
        TypeError: ``bases`` that is no integer.

    Example:
        >>> from perturbed import SignFlipLinear
        >>> SignFlipLinear(8, 4, directions=16, flip="out").noise
        SignFlip('out')
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        directions: int,
        bias: bool = True,
        flip: str = "auto",
        bases: int = 1,
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Linear does."""
        noise = SignFlip(flip, bases, distribution)
        super().__init__(in_features, out_features, directions, bias, noise, device, dtype)


class LowRankLinear(PerturbedLinear):
    """A PerturbedLinear with :class:`~perturbed.LowRank` noise: a product of two thin matrices.

    After EGGROLL (Sarkar et al., 2025).

    Args:
        in_features, out_features, directions, bias, device, dtype: as in PerturbedLinear.
        rank: r, from 1 to min(in, out).
        distribution: "normal" or "rademacher".

    Shapes:
        as PerturbedLinear.

    Raises:
        ValueError: a rank below 1 or above min(in, out).
        TypeError: a rank that is no integer.

    Example:
        >>> from perturbed import LowRankLinear
        >>> LowRankLinear(8, 4, directions=16, rank=2).noise
        LowRank(2)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        directions: int,
        bias: bool = True,
        rank: int = 1,
        distribution: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise as nn.Linear does."""
        noise = LowRank(rank, distribution)
        super().__init__(in_features, out_features, directions, bias, noise, device, dtype)
