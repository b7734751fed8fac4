"""Perturbed twins of torch's layers, and the conversion of whole models."""

from .affine import Affine, PerturbedAffine
from .attention import PerturbedMultiheadAttention
from .base import PerturbedLayer
from .cells import PerturbedGRUCell, PerturbedLSTMCell, PerturbedRNNCell
from .conv import PerturbedConv1d, PerturbedConv2d, PerturbedConv3d
from .conv_families import LowRankConv2d, PermutedConv2d, SignFlipConv2d
from .conv_transpose import (
    PerturbedConvTranspose1d,
    PerturbedConvTranspose2d,
    PerturbedConvTranspose3d,
)
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
from .recurrent import PerturbedGRU, PerturbedLSTM, PerturbedRNN
from .report import ConversionReport, conversion_report
from .twins import register_twin

__all__ = [
    "Affine",
    "ConversionReport",
    "LowRankConv2d",
    "LowRankLinear",
    "PermutedConv2d",
    "PermutedLinear",
    "PerturbedAffine",
    "PerturbedBatchNorm1d",
    "PerturbedBatchNorm2d",
    "PerturbedBatchNorm3d",
    "PerturbedConv1d",
    "PerturbedConv2d",
    "PerturbedConv3d",
    "PerturbedConvTranspose1d",
    "PerturbedConvTranspose2d",
    "PerturbedConvTranspose3d",
    "PerturbedEmbedding",
    "PerturbedGRU",
    "PerturbedGRUCell",
    "PerturbedGroupNorm",
    "PerturbedLSTM",
    "PerturbedLSTMCell",
    "PerturbedLayer",
    "PerturbedLayerNorm",
    "PerturbedLinear",
    "PerturbedMultiheadAttention",
    "PerturbedRMSNorm",
    "PerturbedRNN",
    "PerturbedRNNCell",
    "SignFlipConv2d",
    "SignFlipLinear",
    "SparsePerturbedLinear",
    "conversion_report",
    "convert",
    "register_twin",
    "revert",
]
