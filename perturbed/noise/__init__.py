"""Noise families: what the perturbation ``E_d`` of a parameter is. One file per family."""

from .base import NoiseFamily
from .dense import Dense
from .state import NoiseState

__all__ = ["Dense", "NoiseFamily", "NoiseState"]
