"""Reinforcement learning for populations: batched environments and their rollouts."""

from .classic import Acrobot, CartPole, MountainCarContinuous, Pendulum
from .env import BatchEnv
from .normalize import ObservationNorm
from .results import Cost, Episodes, Evaluation, Window
from .rollout import evaluate, rollout
from .runner import Rollout

__all__ = [
    "Acrobot",
    "BatchEnv",
    "CartPole",
    "Cost",
    "Episodes",
    "Evaluation",
    "MountainCarContinuous",
    "ObservationNorm",
    "Pendulum",
    "Rollout",
    "Window",
    "evaluate",
    "rollout",
]
