"""Optimizers that see losses only. One algorithm a file; ``shaping`` turns losses into weights."""

from .ars import ARS
from .chain import GradChain, UpdateToGrad, with_momentum
from .clipup import ClipUp
from .combine import AlternatingOpt, OptimizerAverage, RandomOpt, SequentialOpt
from .crossover import CROSSOVERS
from .graphed import GraphedStep
from .groups import group_baseline, group_zscore
from .minimize import Minimize
from .nes import NES
from .opt_members import SignGrad
from .opt_swarm import SwarmOfOptimizers
from .pgpe import PGPE
from .pso import (
    PSO,
    TOPOLOGIES,
    VARIANTS,
    Accelerated,
    BareBones,
    CompetitiveSwarm,
    ComprehensiveLearning,
    Constriction,
    Flight,
    FullyInformed,
    Inertia,
    Variant,
    ring,
    von_neumann,
)
from .quality import EstimateQuality, estimate_quality
from .shaping import SHAPINGS, centered_rank, identity, nes_utilities, zscore
from .snes import SNES
from .swarm import Swarm
from .zeroth import (
    FDSA,
    RDSA,
    SAMPLERS,
    SPSA,
    AcceleratedRandomSearch,
    GridSearch,
    RandomBestGrad,
    RandomGrad,
    RandomSearch,
    RandomWalk,
    ResidualFeedback,
    Restoration,
    ScalarOptimizer,
    SequentialSearch,
    ShrinkingRandomSearch,
    SimulatedAnnealing,
    ThresholdAccepting,
)

__all__ = [
    "ARS",
    "CROSSOVERS",
    "FDSA",
    "NES",
    "PGPE",
    "PSO",
    "RDSA",
    "SAMPLERS",
    "SHAPINGS",
    "SNES",
    "SPSA",
    "TOPOLOGIES",
    "VARIANTS",
    "Accelerated",
    "AcceleratedRandomSearch",
    "AlternatingOpt",
    "BareBones",
    "ClipUp",
    "CompetitiveSwarm",
    "ComprehensiveLearning",
    "Constriction",
    "EstimateQuality",
    "Flight",
    "FullyInformed",
    "GradChain",
    "GraphedStep",
    "GridSearch",
    "Inertia",
    "Minimize",
    "OptimizerAverage",
    "RandomBestGrad",
    "RandomGrad",
    "RandomOpt",
    "RandomSearch",
    "RandomWalk",
    "ResidualFeedback",
    "Restoration",
    "ScalarOptimizer",
    "SequentialOpt",
    "SequentialSearch",
    "ShrinkingRandomSearch",
    "SignGrad",
    "SimulatedAnnealing",
    "Swarm",
    "SwarmOfOptimizers",
    "ThresholdAccepting",
    "UpdateToGrad",
    "Variant",
    "centered_rank",
    "estimate_quality",
    "group_baseline",
    "group_zscore",
    "identity",
    "nes_utilities",
    "ring",
    "von_neumann",
    "with_momentum",
    "zscore",
]
