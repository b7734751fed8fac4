"""Reinforcement learning for populations: batched environments and their rollouts."""

from .classic import Acrobot, CartPole, MountainCarContinuous, Pendulum
from .env import BatchEnv
from .gym import GymEnv
from .mujoco import MujocoEnv
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
    "GymEnv",
    "MountainCarContinuous",
    "MujocoEnv",
    "ObservationNorm",
    "Pendulum",
    "Rollout",
    "Window",
    "evaluate",
    "rollout",
]
