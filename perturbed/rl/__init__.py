"""Reinforcement learning for populations: batched environments and their rollouts."""

from .env import BatchEnv

__all__ = ["BatchEnv"]
