"""Reinforcement learning for populations: batched environments and their rollouts."""

from .classic import Acrobot, CartPole, MountainCarContinuous, Pendulum
from .env import BatchEnv
from .gym import GymEnv
from .mujoco import MujocoEnv
from .normalize import ObservationNorm

__all__ = [
    "Acrobot",
    "BatchEnv",
    "CartPole",
    "GymEnv",
    "MountainCarContinuous",
    "MujocoEnv",
    "ObservationNorm",
    "Pendulum",
]
