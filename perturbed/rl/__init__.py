"""Reinforcement learning for populations: batched environments and their rollouts."""

from .classic import Acrobot, CartPole, MountainCarContinuous, Pendulum
from .env import BatchEnv
from .normalize import ObservationNorm

__all__ = [
    "Acrobot",
    "BatchEnv",
    "CartPole",
    "MountainCarContinuous",
    "ObservationNorm",
    "Pendulum",
]
