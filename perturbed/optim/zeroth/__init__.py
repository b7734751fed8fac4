"""Searches that a closure of one loss drives, as optimizers of torch. One algorithm a file."""

from .annealing import SimulatedAnnealing, ThresholdAccepting
from .base import ScalarOptimizer
from .differences import FDSA, ResidualFeedback
from .grid import GridSearch
from .random_grad import RandomBestGrad, RandomGrad
from .random_search import AcceleratedRandomSearch, RandomSearch, ShrinkingRandomSearch
from .random_walk import RandomWalk
from .restoration import Restoration
from .samplers import SAMPLERS
from .sequential import SequentialSearch
from .spsa import RDSA, SPSA

__all__ = [
    "FDSA",
    "RDSA",
    "SAMPLERS",
    "SPSA",
    "AcceleratedRandomSearch",
    "GridSearch",
    "RandomBestGrad",
    "RandomGrad",
    "RandomSearch",
    "RandomWalk",
    "ResidualFeedback",
    "Restoration",
    "ScalarOptimizer",
    "SequentialSearch",
    "ShrinkingRandomSearch",
    "SimulatedAnnealing",
    "ThresholdAccepting",
]
