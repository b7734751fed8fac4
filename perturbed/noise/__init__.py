"""Noise families: what the perturbation ``E_d`` of a parameter is. One file per family."""

from .base import NoiseFamily
from .dense import Dense
from .explicit import Explicit
from .low_rank import LowRank
from .permuted import Permuted
from .sign_flip import SignFlip
from .sparse import Sparse
from .state import NoiseState

__all__ = [
    "Dense",
    "Explicit",
    "LowRank",
    "NoiseFamily",
    "NoiseState",
    "Permuted",
    "SignFlip",
    "Sparse",
]
