"""What rollouts return."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Cost:
    """What a rollout took.

    Attributes:
        steps: environment steps of lanes that were at an episode.
        episodes: that ended.
        policy_seconds: of the host, in the policy, normalisation included. On a GPU, what is
            launched there goes on in the background.
        env_seconds: of the host, in the environment.
    """

    steps: int = 0
    episodes: int = 0
    policy_seconds: float = 0.0
    env_seconds: float = 0.0


@dataclass
class Episodes:
    """What :func:`~perturbed.rl.rollout` returns; S signs, D directions, E episodes of each member.

    Attributes:
        returns: (S, D) float64, mean over episodes of the sum of ``reward - reward_shift``: what to
            maximise. NaN where a reward was NaN or the policy's output unusable.
        raw_returns: the same without the shift.
        episode_returns: (S, D, E), without the shift.
        lengths: (S, D, E) steps of the episodes.
        cost: steps, episodes and seconds.
    """

    returns: Tensor
    raw_returns: Tensor
    episode_returns: Tensor
    lengths: Tensor
    cost: Cost


@dataclass
class Window:
    """What ``Rollout.run`` returns: a stretch of steps, whatever episodes it cuts.

    Attributes:
        returns: (S, D) float64, sum of ``reward - reward_shift`` over the window, mean over the
            member's lanes.
        raw_returns: the same without the shift.
        ended: (k,) lanes whose episodes ended in the window, in order of time.
        episode_returns: (k,) their whole sums without the shift.
        lengths: (k,) their steps.
        cost: steps, episodes and seconds.
    """

    returns: Tensor
    raw_returns: Tensor
    ended: Tensor
    episode_returns: Tensor
    lengths: Tensor
    cost: Cost


@dataclass
class Evaluation:
    """What :func:`~perturbed.rl.evaluate` returns.

    Attributes:
        mean: of the returns.
        std: of the returns, over the episodes (divisor E).
        returns: (E,) float64.
        lengths: (E,) steps of the episodes.
        cost: steps, episodes and seconds.
    """

    mean: float
    std: float
    returns: Tensor
    lengths: Tensor
    cost: Cost = field(repr=False)
