"""Perturbed twins of torch's layers, and the conversion of whole models."""

from .base import PerturbedLayer
from .convert import convert, revert
from .linear import (
    LowRankLinear,
    PermutedLinear,
    PerturbedLinear,
    SignFlipLinear,
    SparsePerturbedLinear,
)

__all__ = [
    "LowRankLinear",
    "PermutedLinear",
    "PerturbedLayer",
    "PerturbedLinear",
    "SignFlipLinear",
    "SparsePerturbedLinear",
    "convert",
    "revert",
]
