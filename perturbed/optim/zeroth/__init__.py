"""Searches that a closure of one loss drives, as optimizers of torch. One algorithm a file."""

from .base import ScalarOptimizer
from .random_search import RandomSearch, ShrinkingRandomSearch
from .samplers import SAMPLERS

__all__ = ["SAMPLERS", "RandomSearch", "ScalarOptimizer", "ShrinkingRandomSearch"]
