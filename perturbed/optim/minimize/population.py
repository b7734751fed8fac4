"""A generation of differential evolution in one forward of a PerturbedModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...model import PerturbedModel
from ..swarm import Swarm
from .problem import Problem

LEAST = 5  # members that differential evolution needs to combine


class Population:
    """The members of a PerturbedModel with Explicit layers, as differential evolution wants them.

    Args:
        pm: whose members are the generation.
        closure: called without arguments, returns values of the rows or members of ``pm``.
        problem: of the same parameters; keeps the best point.
    """

    def __init__(self, pm: PerturbedModel, closure: Callable[[], Any], problem: Problem) -> None:
        """Find where each parameter is in the members' vectors."""
        self.swarm = Swarm(pm, distributed=False)
        self.closure, self.problem = closure, problem
        sizes = [p.numel() for p in problem.parameters]
        firsts = dict(zip(map(id, problem.parameters), np.cumsum([0, *sizes]), strict=False))
        columns = [
            np.arange(firsts[id(p)], firsts[id(p)] + p.numel())
            for p in self.swarm.parameters.values()
        ]
        self.order = np.concatenate(columns)

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """Return a Latin hypercube of as many points as members, (D, N), within the bounds."""
        members, size = self.swarm.positions.shape
        ranks = np.stack([rng.permutation(members) for _ in range(size)], axis=1)
        share = (ranks + rng.random((members, size))) / members
        low, high = self.problem.lower, self.problem.upper
        return low + share * (high - low)

    @torch.no_grad()
    def losses(self, points: np.ndarray) -> np.ndarray:
        """Return the losses of points that are columns, (N, S) with any S: (S,)."""
        points = np.asarray(points).reshape(len(self.order), -1).T
        members = self.swarm.particles
        parts = [points[i : i + members] for i in range(0, len(points), members)]
        return np.concatenate([self._losses(part) for part in parts])

    def _losses(self, points: np.ndarray) -> np.ndarray:
        """Return the losses of at most D points, (S, N): (S,)."""
        count = len(points)
        positions = self.swarm.positions
        vectors = torch.from_numpy(np.ascontiguousarray(points[:, self.order]))
        vectors = vectors.to(positions.dtype).to(positions.device)
        positions[:count] = vectors
        positions[count:] = vectors[0]  # no points left: members that nobody asks about
        self.swarm.publish()
        self.problem.restore_buffers()
        values = self.swarm.values(self.swarm.score(self.closure))[:count]
        losses = values.to("cpu", torch.float64).numpy()
        losses = np.where(np.isfinite(losses), losses, np.inf)
        self.problem.evaluations += count
        least = int(losses.argmin())
        if losses[least] < self.problem.best_loss:
            self.problem.best_loss = float(losses[least])
            self.problem.best = np.array(points[least], dtype=np.float64)
        return losses


def check_population(
    pm: PerturbedModel, parameters: Sequence[Tensor], options: Mapping[str, Any]
) -> None:
    """Refuse a model that cannot be the population of these parameters, and another size of it."""
    if not pm.state.absolute:
        raise ValueError(
            "the layers of model must have noise=Explicit(): make it with "
            "perturbed.convert(net, directions, perturbed.Explicit())"
        )
    if set(options) & {"popsize", "init"}:
        raise ValueError("options must leave popsize and init to the model, whose members they are")
    if pm.population < LEAST:
        raise ValueError(
            f"model must have at least {LEAST} directions for differential_evolution, got "
            f"{pm.population}"
        )
    own = {id(p) for p in pm.model.parameters() if p.requires_grad}
    if own != {id(p) for p in parameters}:
        raise ValueError("params must be all trainable parameters of the PerturbedModel")
