"""The layers that the behaviour tests run over: a new family joins with one line."""

from collections.abc import Callable

import torch

from perturbed import (
    Dense,
    LowRank,
    Permuted,
    PerturbedLinear,
    PerturbedModel,
    SignFlip,
    Sparse,
)
from perturbed.nn import PerturbedLayer
from perturbed.noise import NoiseFamily


def _linear(noise: NoiseFamily) -> Callable[..., PerturbedLayer]:
    def make(inputs: int, outputs: int, directions: int, **arguments) -> PerturbedLayer:
        return PerturbedLinear(inputs, outputs, directions, noise=noise, **arguments)

    return make


SIGMA = 0.3
IN, OUT, D = 6, 5, 3

# Name -> noise family.
FAMILIES: dict[str, NoiseFamily] = {
    "dense-normal": Dense(),
    "dense-rademacher": Dense("rademacher"),
    "dense-normal-stored": Dense(storage="stored"),
    "dense-rademacher-stored": Dense("rademacher", storage="stored"),
    "low-rank-1": LowRank(),
    "low-rank-3": LowRank(3),
    "low-rank-signs": LowRank(2, "rademacher"),
    "sparse-1": Sparse(1),
    "sparse-auto": Sparse(),
    "sparse-all-signs": Sparse(1.0, "rademacher"),
    "permuted-in": Permuted("in"),
    "permuted-out": Permuted("out", distribution="rademacher"),
    "permuted-both": Permuted(),
    "permuted-in-few": Permuted("in", in_sparsity=4),
    "permuted-out-few": Permuted("out", out_sparsity=0.5),
    "permuted-both-few": Permuted(in_sparsity=3, out_sparsity=4),
    "permuted-in-repeats": Permuted("in", in_sparsity=5, allow_repeats=True),
    "permuted-out-repeats": Permuted("out", allow_repeats=True),
    "permuted-both-repeats": Permuted("both", 3, 0.9, allow_repeats=True, storage="stored"),
    "sign-flip-in": SignFlip("in"),
    "sign-flip-out": SignFlip("out", distribution="rademacher"),
    "sign-flip-both": SignFlip(),
    "sign-flip-in-bases": SignFlip("in", bases=2),
    "sign-flip-both-bases": SignFlip("both", bases=2, storage="stored"),
    "sign-flip-out-bases": SignFlip("out", bases=4),
}

# Name -> function of (in_features, out_features, directions, bias=, dtype=).
LINEAR = {name: _linear(noise) for name, noise in FAMILIES.items()}

# (R, antithetic as the user gives it, whether the second half of the repeats is negated)
REPEATS = [
    (1, None, False),
    (2, None, True),
    (2, False, False),
    (3, False, False),
    (4, True, True),
    (8, None, True),
    (33, False, False),  # beyond GEMM_ROWS: matrix products from scratch
]


def signs(rows: int, directions: int, negated: bool) -> torch.Tensor:
    """s_b of every row, from the definition."""
    repeats = rows // directions
    s = [-1.0 if negated and b // directions >= repeats / 2 else 1.0 for b in range(rows)]
    return torch.tensor(s, dtype=torch.float64)


def population(family="dense-normal", antithetic=None, directions=D, **arguments):
    """Make a layer of a family, float64 unless told otherwise, and its model with noise drawn."""
    arguments = {"dtype": torch.float64, **arguments}
    layer = LINEAR[family](IN, OUT, directions, **arguments)
    pm = PerturbedModel(layer, directions, antithetic=antithetic, sigma=SIGMA, seed=5)
    pm.set_noise()
    return layer, pm
