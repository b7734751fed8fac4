"""Perturbed twins of torch's layers, and the conversion of whole models."""

from .base import PerturbedLayer
from .convert import convert, revert
from .linear import PerturbedLinear

__all__ = ["PerturbedLayer", "PerturbedLinear", "convert", "revert"]
