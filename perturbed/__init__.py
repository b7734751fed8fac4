"""Batched perturbed layers for PyTorch: one forward evaluates a whole population.

Every row of the batch sees its own weights ``W + s E_d``, and no ``E_d`` is ever stored.
``docs/conventions.md`` has the words, shapes and the noise contract.
"""

import os

import torch  # noqa: F401  (the extension links against its libraries)

try:
    from ._C import cpu_capabilities as _cpu_capabilities  # loading _C registers the operators
except ImportError as error:
    raise ImportError(
        "perturbed: the compiled extension is missing or does not fit this torch; build it with\n"
        "  pip install --no-build-isolation -e .    (or, in a checkout, make build)\n"
        f"({error})"
    ) from error

if os.environ.get("PERTURBED_CPU", "") not in ("", *_cpu_capabilities()):
    raise ImportError(
        f"PERTURBED_CPU must be one of {_cpu_capabilities()} on this processor, got "
        f"{os.environ['PERTURBED_CPU']!r}"
    )

from . import _ops as _ops  # registers fake kernels and derivatives before the first call
from . import rl as rl
from .candidate import evaluate_one_by_one
from .checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from .logs import CSVLog, Progress, TensorBoard
from .model import PerturbedModel
from .nn import (
    LowRankConv2d,
    LowRankLinear,
    PermutedConv2d,
    PermutedLinear,
    PerturbedAffine,
    PerturbedBatchNorm1d,
    PerturbedBatchNorm2d,
    PerturbedBatchNorm3d,
    PerturbedConv1d,
    PerturbedConv2d,
    PerturbedConv3d,
    PerturbedConvTranspose1d,
    PerturbedConvTranspose2d,
    PerturbedConvTranspose3d,
    PerturbedEmbedding,
    PerturbedGroupNorm,
    PerturbedGRU,
    PerturbedGRUCell,
    PerturbedLayerNorm,
    PerturbedLinear,
    PerturbedLSTM,
    PerturbedLSTMCell,
    PerturbedMultiheadAttention,
    PerturbedRMSNorm,
    PerturbedRNN,
    PerturbedRNNCell,
    SignFlipConv2d,
    SignFlipLinear,
    SparsePerturbedLinear,
    conversion_report,
    convert,
    register_twin,
    revert,
)
from .noise import Dense, Explicit, LowRank, Permuted, SignFlip, Sparse
from .optim import (
    ARS,
    NES,
    PGPE,
    PSO,
    SNES,
    ClipUp,
    EstimateQuality,
    GraphedStep,
    Minimize,
    estimate_quality,
)
from .particles import TensorList
from .pool import WorkerError, WorkerPool
from .replicate import Replicated
from .training import train

__version__ = "0.1.0"

__all__ = [
    "ARS",
    "NES",
    "PGPE",
    "PSO",
    "SNES",
    "CSVLog",
    "CheckpointError",
    "Checkpoints",
    "ClipUp",
    "Dense",
    "EstimateQuality",
    "Explicit",
    "GraphedStep",
    "LowRank",
    "LowRankConv2d",
    "LowRankLinear",
    "Minimize",
    "Permuted",
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
    "PerturbedLayerNorm",
    "PerturbedLinear",
    "PerturbedModel",
    "PerturbedMultiheadAttention",
    "PerturbedRMSNorm",
    "PerturbedRNN",
    "PerturbedRNNCell",
    "Progress",
    "Replicated",
    "SignFlip",
    "SignFlipConv2d",
    "SignFlipLinear",
    "Sparse",
    "SparsePerturbedLinear",
    "TensorBoard",
    "TensorList",
    "WorkerError",
    "WorkerPool",
    "conversion_report",
    "convert",
    "estimate_quality",
    "evaluate_one_by_one",
    "load_checkpoint",
    "register_twin",
    "revert",
    "save_checkpoint",
    "train",
]
