"""Optimizers that see losses only. One algorithm a file; ``shaping`` turns losses into weights."""

from .ars import ARS
from .nes import NES
from .shaping import SHAPINGS, centered_rank, identity, nes_utilities, zscore

__all__ = ["ARS", "NES", "SHAPINGS", "centered_rank", "identity", "nes_utilities", "zscore"]
