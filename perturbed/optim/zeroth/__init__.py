"""Searches that a closure of one loss drives, as optimizers of torch. One algorithm a file."""

from .annealing import SimulatedAnnealing, ThresholdAccepting
from .base import ScalarOptimizer
from .grid import GridSearch
from .random_grad import RandomBestGrad, RandomGrad
from .random_search import RandomSearch, ShrinkingRandomSearch
from .random_walk import RandomWalk
from .samplers import SAMPLERS
from .sequential import SequentialSearch
from .spsa import RDSA, SPSA

__all__ = [
    "RDSA",
    "SAMPLERS",
    "SPSA",
    "GridSearch",
    "RandomBestGrad",
    "RandomGrad",
    "RandomSearch",
    "RandomWalk",
    "ScalarOptimizer",
    "SequentialSearch",
    "ShrinkingRandomSearch",
    "SimulatedAnnealing",
    "ThresholdAccepting",
]
