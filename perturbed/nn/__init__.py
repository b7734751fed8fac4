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
from .report import ConversionReport, conversion_report
from .twins import register_twin

__all__ = [
    "ConversionReport",
    "LowRankLinear",
    "PermutedLinear",
    "PerturbedLayer",
    "PerturbedLinear",
    "SignFlipLinear",
    "SparsePerturbedLinear",
    "conversion_report",
    "convert",
    "register_twin",
    "revert",
]
