"""The layers that the behaviour tests run over: a new family joins with one line."""

from collections.abc import Callable

import torch

from perturbed import Dense, PerturbedLinear, PerturbedModel
from perturbed.nn import PerturbedLayer


def _linear(**options) -> Callable[..., PerturbedLayer]:
    def make(inputs: int, outputs: int, directions: int, **arguments) -> PerturbedLayer:
        return PerturbedLinear(inputs, outputs, directions, noise=Dense(**options), **arguments)

    return make


SIGMA = 0.3
IN, OUT, D = 6, 5, 3

# Name -> function of (in_features, out_features, directions, bias=, dtype=).
LINEAR: dict[str, Callable[..., PerturbedLayer]] = {
    "dense-normal": _linear(),
    "dense-rademacher": _linear(distribution="rademacher"),
    "dense-normal-stored": _linear(storage="stored"),
    "dense-rademacher-stored": _linear(distribution="rademacher", storage="stored"),
}

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
