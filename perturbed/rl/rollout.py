"""rollout and evaluate: whole episodes of a population, and of one policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..model import PerturbedModel
from .env import BatchEnv
from .normalize import ObservationNorm
from .results import Episodes, Evaluation
from .runner import Rollout

# In place of the generation, so that no training episode has the seed of one that evaluates.
_EVALUATION = 2**62


def rollout(
    policy: Callable[..., Any],
    env: BatchEnv,
    episodes: int = 1,
    *,
    pm: PerturbedModel | None = None,
    seed: int = 0,
    generation: int | None = None,
    seeds: str | Tensor = "common",
    norm: ObservationNorm | None = None,
    sync: bool = True,
    state: Any = None,
    act: Callable[[Any], Tensor] | None = None,
    reward_shift: float = 0.0,
    max_steps: int | None = None,
) -> Episodes:
    """Run whole episodes with every member of a population.

    Members that have finished theirs idle until all have; a return does not depend on how many
    lanes share a member's episodes.

    Args:
        policy: a PerturbedModel or a function of observations; see :class:`Rollout`, as for all
            that follows.
        env: with R * D lanes.
        episodes: E, of each member.
        pm: the population, where ``policy`` is a function around one.
        seed: of the episodes.
        generation: of the episodes; default: that of the population's draw.
        seeds: which members share episodes: "common", "pairs" or "members"; or the seeds.
        norm: of the observations, updated unless in evaluation mode.
        sync: whether the norm is synced at the end.
        state: of a recurrent policy at the start of an episode.
        act: makes actions of the policy's output.
        reward_shift: taken from every reward of ``returns``.
        max_steps: ends episodes early.

    Raises:
        ValueError, TypeError, RuntimeError: as Rollout; episodes below 1.

    Example:
        >>> import torch, perturbed
        >>> from perturbed.rl import CartPole, rollout
        >>> net = perturbed.PerturbedLinear(4, 2, directions=8)
        >>> pm = perturbed.PerturbedModel(net, 8, sigma=0.5)
        >>> nes = perturbed.NES(pm, torch.optim.Adam(net.parameters(), 0.1), maximize=True)
        >>> env = CartPole(lanes=32)  # 2 signs, 2 lanes a member
        >>> mean = nes.step(lambda: rollout(pm, env, episodes=2).returns)
        >>> nes.stats["evaluations"]
        16
    """
    return Rollout(
        policy,
        env,
        pm=pm,
        seed=seed,
        generation=generation,
        seeds=seeds,
        norm=norm,
        sync=sync,
        state=state,
        act=act,
        reward_shift=reward_shift,
        max_steps=max_steps,
    ).episodes(episodes)


def evaluate(
    policy: Callable[..., Any],
    env: BatchEnv,
    episodes: int = 100,
    *,
    seed: int = 0,
    norm: ObservationNorm | None = None,
    state: Any = None,
    act: Callable[[Any], Tensor] | None = None,
    max_steps: int | None = None,
) -> Evaluation:
    """Run episodes with one policy, without noise, reward shift or updates of the norm.

    The episodes are others than any that a rollout of the same seed trains on.

    Args:
        policy: a function of observations, or a PerturbedModel, whose unperturbed model acts.
        env: with any number of lanes.
        episodes: E in all.
        seed: of the episodes.
        norm: of the observations; not updated.
        state: of a recurrent policy at the start of an episode.
        act: makes actions of the policy's output.
        max_steps: ends episodes early.

    Raises:
        ValueError, TypeError, RuntimeError: as Rollout; episodes below 1.

    Example:
        >>> import torch
        >>> from perturbed.rl import CartPole, evaluate
        >>> result = evaluate(torch.nn.Linear(4, 2), CartPole(lanes=10), episodes=20)
        >>> result.returns.shape, result.cost.episodes
        (torch.Size([20]), 20)
    """
    if isinstance(policy, PerturbedModel):
        policy = policy.model
    runner = Rollout(
        policy,
        env,
        seed=seed,
        generation=_EVALUATION,
        norm=norm,
        state=state,
        act=act,
        max_steps=max_steps,
    )
    with nullcontext() if norm is None else norm.frozen():
        result = runner.episodes(episodes)
    returns = result.episode_returns.flatten()
    mean, std = returns.mean().item(), returns.std(correction=0).item()
    return Evaluation(mean, std, returns, result.lengths.flatten(), result.cost)
