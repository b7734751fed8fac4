"""Noise families: what the perturbation ``E_d`` of a parameter is. One file per family."""

from .base import NoiseFamily
from .dense import Dense
from .low_rank import LowRank
from .permuted import Permuted
from .sign_flip import SignFlip
from .sparse import Sparse
from .state import NoiseState

__all__ = ["Dense", "LowRank", "NoiseFamily", "NoiseState", "Permuted", "SignFlip", "Sparse"]
