"""Particle swarm optimisation: the optimizer, the ways a swarm moves, and who hears of whom."""

from .classic import Constriction, Inertia
from .free import Accelerated, BareBones, CompetitiveSwarm
from .informed import ComprehensiveLearning, FullyInformed
from .optimizer import PSO, VARIANTS
from .topology import TOPOLOGIES, ring, von_neumann
from .variant import Flight, Variant

__all__ = [
    "PSO",
    "TOPOLOGIES",
    "VARIANTS",
    "Accelerated",
    "BareBones",
    "CompetitiveSwarm",
    "ComprehensiveLearning",
    "Constriction",
    "Flight",
    "FullyInformed",
    "Inertia",
    "Variant",
    "ring",
    "von_neumann",
]
