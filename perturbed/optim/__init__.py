"""Optimizers that see losses only. One algorithm a file; ``shaping`` turns losses into weights."""

from .nes import NES
from .shaping import SHAPINGS, centered_rank, identity, nes_utilities, zscore

__all__ = ["NES", "SHAPINGS", "centered_rank", "identity", "nes_utilities", "zscore"]
