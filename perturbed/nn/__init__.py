"""Perturbed twins of torch's layers, and the conversion of whole models."""

from .affine import Affine, PerturbedAffine
from .base import PerturbedLayer
from .convert import convert, revert
from .embedding import PerturbedEmbedding
from .linear import (
    LowRankLinear,
    PermutedLinear,
    PerturbedLinear,
    SignFlipLinear,
    SparsePerturbedLinear,
)
from .norm import (
    PerturbedBatchNorm1d,
    PerturbedBatchNorm2d,
    PerturbedBatchNorm3d,
    PerturbedGroupNorm,
    PerturbedLayerNorm,
    PerturbedRMSNorm,
)
from .report import ConversionReport, conversion_report
from .twins import register_twin

__all__ = [
    "Affine",
    "ConversionReport",
    "LowRankLinear",
    "PermutedLinear",
    "PerturbedAffine",
    "PerturbedBatchNorm1d",
    "PerturbedBatchNorm2d",
    "PerturbedBatchNorm3d",
    "PerturbedEmbedding",
    "PerturbedGroupNorm",
    "PerturbedLayer",
    "PerturbedLayerNorm",
    "PerturbedLinear",
    "PerturbedRMSNorm",
    "SignFlipLinear",
    "SparsePerturbedLinear",
    "conversion_report",
    "convert",
    "register_twin",
    "revert",
]
