"""Optimizers that see losses only. One algorithm a file; ``shaping`` turns losses into weights."""

from .ars import ARS
from .clipup import ClipUp
from .groups import group_baseline, group_zscore
from .nes import NES
from .shaping import SHAPINGS, centered_rank, identity, nes_utilities, zscore

__all__ = [
    "ARS",
    "NES",
    "SHAPINGS",
    "ClipUp",
    "centered_rank",
    "group_baseline",
    "group_zscore",
    "identity",
    "nes_utilities",
    "zscore",
]
