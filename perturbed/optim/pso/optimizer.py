"""PSO: the swarm of a model, what it remembers, and its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import _C, _ops
from ...checks import check_flag, check_number, check_tensor
from ...model import PerturbedModel
from ...noise.base import OPTIMIZER_ID, STREAM_SWARM_JIGGLE, stream_word
from ...noise.state import as_seed, check_seed
from ..base import PopulationOptimizer, to_numbers
from ..swarm import Swarm
from .classic import Constriction, Inertia
from .free import Accelerated, BareBones, CompetitiveSwarm
from .informed import ComprehensiveLearning, FullyInformed
from .space import Space, start_positions, start_velocities
from .topology import Topology, check_neighbours, resolve_topology
from .variant import Flight, Schedule, Variant, check_schedule, scheduled

VARIANTS: dict[str, type[Variant]] = {
    "constriction": Constriction,
    "inertia": Inertia,
    "bare_bones": BareBones,
    "fully_informed": FullyInformed,
    "comprehensive": ComprehensiveLearning,
    "competitive": CompetitiveSwarm,
    "accelerated": Accelerated,
}
"""Names that ``variant=`` takes, and their classes; an instance of one has options of its own."""


class PSO(PopulationOptimizer):
    """Particle swarm optimisation of a model's parameters, from losses alone.

    Every particle is a whole set of parameters. A :class:`~perturbed.PerturbedModel` of
    :class:`~perturbed.Explicit` layers scores all of them in one forward; any other module is
    scored one particle at a time, or in a :class:`~perturbed.WorkerPool`, by any Python function of
    it.

    After each ``tell`` the module's own parameters are the best ones so far, so ``net(x)`` is the
    best network; they are a copy, no particle moves them. A loss that is NaN or infinite is
    nobody's best. A particle that never had a finite loss has no best of its own to return to;
    where no neighbour has one either it follows strangers, so that a swarm without any finite loss
    keeps searching.

    **Minibatches.** A loss of one minibatch says little about a stored one of another, and a lucky
    batch would be the best for ever. ``best_decay`` lets old luck fade: in every step remembered
    values rise by that share of their distance to the best loss of the step. 0.05 is a good start;
    from 0.5 on good places are forgotten faster than they are found. ``reevaluate=True`` scores the
    remembered bests again in every step, on the same batch, for twice the evaluations: for losses
    that change as a whole, and batches that are not too small, since the bests then follow each of
    them. Fix the batch outside of the closure, which is called twice. The best network is that of
    the remembered values; large batches serve better than either.

    Args:
        model: a PerturbedModel with Explicit layers, or a plain module.
        particles: P; default: the directions of a PerturbedModel. Needed for a plain module.
        variant: name in ``perturbed.optim.VARIANTS``, or an instance with options of its own.
        inertia: weight of ``variant="inertia"``, a number or a function of the step.
        c1: attraction by the own best, of the variants "constriction" and "inertia".
        c2: attraction by the best neighbour, of the same.
        topology: "global", "ring", "von_neumann", or a function (particles, step) -> (P, K) int64
            of every particle's neighbours, called in every step; default: the variant's, "global"
            but for "fully_informed", which has "ring".
        per_dimension: whether every element has random coefficients of its own, as is usual; else
            one pair for each particle and step.
        max_velocity: largest absolute velocity: a number, a vector (N,) or a dict by parameter.
        velocity_fraction: the same as a fraction of the distance between the bounds.
        bounds: walls: a number b for -b to b, a pair (lower, upper) of numbers or vectors (N,), or
            a dict by parameter of numbers or pairs.
        boundary: at a wall, "clip" stops and "reflect" turns the velocity around.
        start: where particles start. "around": the model's own parameters +- ``spread``, the first
            particle at the model itself. "fan_in": weights uniform in +-1 / sqrt(fan_in), vectors
            0. "uniform": anywhere between the bounds. Or a tensor (P, N).
        spread: of ``start="around"``: a number, a vector (N,) or a dict by parameter; default: 1 /
            sqrt(fan_in) of weights, 0.1 of vectors.
        velocity_spread: velocities start uniform in +- this; same forms.
        jiggle: standard deviation of normal noise added to all positions in every step, a number or
            a function of the step; PyTorch-PSO has 0.1 for ever, which never settles.
        antithetic: particles p and p + P / 2 start as mirror images and have mirrored random
            numbers (r and 1 - r; z and -z). "competitive", which has no fixed pairs, mirrors the
            start only.
        reevaluate: whether to score the remembered bests again in every step.
        best_decay: share by which remembered values rise to what a step reaches, 0 to 1.
        maximize: whether values are to be raised instead of lowered.
        seed: of all random numbers; None takes one from the operating system.
        chunk: particles of a forward, at most: the closure is then called several times a step,
            each time for others (``pm.directions`` of them), with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.
        distributed: whether to share the particles with other processes, each scoring its part of
            them: a process group of torch.distributed, True or None for the default group (None: if
            there is one), False for no.

    Raises:
        TypeError: arguments of another type.
        ValueError: arguments out of range or that do not go together.

    Example:
        >>> import torch, perturbed
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> net = perturbed.convert(net, 32, perturbed.Explicit())
        >>> pm = perturbed.PerturbedModel(net, directions=32, antithetic=False)
        >>> pso = perturbed.PSO(pm)
        >>> x = pm.replicate(torch.randn(16, 2))
        >>> for _ in range(30):
        ...     loss = pso.step(lambda: (pm(x) - 1).square().mean(-1))  # one value per row
        >>> pso.best_value < 0.1
        True

        A function of a plain module, here without any tensor:

        >>> net = torch.nn.Linear(2, 1)
        >>> pso = perturbed.PSO(net, particles=10, bounds=4.0, start="uniform")
        >>> for _ in range(20):
        ...     loss = pso.step(lambda net: abs(net.weight[0, 0].item() - 3))
        >>> pso.stats["evaluations"]
        200
    """

    def __init__(
        self,
        model: PerturbedModel | nn.Module,
        particles: int | None = None,
        variant: str | Variant = "constriction",
        *,
        inertia: Schedule | None = None,
        c1: float | None = None,
        c2: float | None = None,
        topology: str | Topology | None = None,
        per_dimension: bool = True,
        max_velocity: Any = None,
        velocity_fraction: float | None = None,
        bounds: Any = None,
        boundary: str = "clip",
        start: str | Tensor = "around",
        spread: Any = None,
        velocity_spread: Any = 0.0,
        jiggle: Schedule = 0.0,
        antithetic: bool = False,
        reevaluate: bool = False,
        best_decay: float = 0.0,
        maximize: bool = False,
        seed: int | None = 0,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
        distributed: torch.distributed.ProcessGroup | bool | None = None,
    ) -> None:
        """Check the arguments and draw the start."""
        super().__init__(maximize)
        self.variant = _resolve(variant, {"weight": inertia, "c1": c1, "c2": c2})
        if topology is None:
            topology = self.variant.topology
        elif not self.variant.social:
            raise ValueError(f"topology: {self.variant} has none, got {topology!r}")
        self.topology = resolve_topology(topology)
        check_schedule("jiggle", jiggle)
        self.jiggle = jiggle
        flags = {"per_dimension": per_dimension, "antithetic": antithetic, "reevaluate": reevaluate}
        for name, flag in flags.items():
            check_flag(name, flag)
        self.reevaluate = reevaluate
        self.best_decay = check_number("best_decay", best_decay, high=1.0)
        if reevaluate and not self.variant.bests:
            raise ValueError(f"reevaluate: particles of {self.variant} remember no bests")
        if reevaluate and best_decay:
            raise ValueError(
                "best_decay is for values that are not measured again; reevaluate does"
            )
        moving = max_velocity is not None or velocity_fraction is not None
        if not self.variant.velocities and (moving or velocity_spread != 0):
            raise ValueError(
                f"max_velocity, velocity_fraction and velocity_spread: {self.variant} has no "
                "velocities"
            )
        self.seed = check_seed(seed)
        self.swarm = Swarm(model, particles, chunk, max_memory, distributed)
        self.evaluation = self.swarm.evaluation
        if antithetic and self.swarm.particles % 2:
            raise ValueError(
                f"antithetic needs an even number of particles, got {self.swarm.particles}"
            )
        space = Space(self.swarm, bounds, boundary, max_velocity, velocity_fraction)
        positions = self.swarm.positions
        device = positions.device
        self._neighbours: Tensor | None = None  # of the last step, on the CPU
        # What the caller's functions said at the last ask, and of which step.
        self._planned: tuple[int, tuple[float, Tensor | None]] = -1, (0.0, None)
        self._key = torch.tensor([_C.splitmix64(self.seed), 0, 0], device=device)
        positions.copy_(start_positions(self.swarm, space, self._key, start, spread, antithetic))
        velocities = positions.new_empty(0, positions.shape[1])
        if self.variant.velocities:
            self._key[1] = 1  # positions are the stream's first draw, velocities its second
            velocities = start_velocities(self.swarm, self._key, velocity_spread, antithetic)
        p = self.swarm.particles
        infinite = torch.full((p,), torch.inf, dtype=torch.float64, device=device)
        self.flight = Flight(
            positions=positions,
            velocities=velocities,
            bests=positions.clone() if self.variant.bests else velocities[:0],
            best_values=infinite,
            record=self.swarm.read().to(positions.dtype),
            record_value=infinite[0].clone(),
            losses=infinite.clone(),
            improved=torch.zeros(p, dtype=torch.bool, device=device),
            key=self._key,
            space=space,
            mirrored=antithetic and self.variant.mirrors,
            per_dimension=per_dimension,
            extra=self.variant.extra(positions),
        )
        self.swarm.publish()

    # ---- one step ------------------------------------------------------------------------------

    def ask(self) -> PerturbedModel | Tensor:
        """Return the population to score: the PerturbedModel, or a copy of the vectors, (P, N).

        Of several processes the vectors are those that this one scores. Nothing changes: particles
        move in ``tell``, and the first population is the start.
        """
        return super().ask()

    def _module(self) -> nn.Module:
        return self.swarm.module

    def _draw(self) -> PerturbedModel | Tensor:
        self._planned = self.steps, self._plan()
        self.swarm.publish()
        pm, here = self.swarm.pm, self.evaluation.here
        return self.swarm.positions[here].clone() if pm is None else pm

    def _plan(self) -> tuple[float, Tensor | None]:
        """Ask the caller's functions for this step, before anything changes."""
        self.variant.numbers(self.steps)
        jiggle = scheduled("jiggle", self.jiggle, self.steps)
        neighbours = None
        if self.variant.social:
            neighbours = self.topology(self.swarm.particles, self.steps)
            neighbours = check_neighbours(neighbours, self.swarm.particles)
        return jiggle, neighbours

    def _score(self, closure: Any) -> Any:
        scores = self.swarm.values(self.swarm.score(closure))
        if not self.reevaluate:
            return scores
        again = self.swarm.values(self.swarm.score(closure, self.flight.bests))
        return torch.stack((scores, again))

    def _members(self, values: Any) -> Tensor:
        if not self.reevaluate:
            return self.swarm.gather(self.swarm.values(values))
        count = self.evaluation.split.count
        if not isinstance(values, Tensor) or values.shape != (2, count):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                "with reevaluate, values must be those of the particles and of their bests, "
                f"(2, P) = (2, {count}), got {got}; step(closure) does it"
            )
        return self.swarm.gather(to_numbers(values, self.swarm.positions.device))

    def _numbers(self, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super()._numbers(members[0] if self.reevaluate else members)

    def _update(self, losses: Tensor) -> None:
        step, plan = self._planned
        jiggle, neighbours = plan if step == self.steps else self._plan()
        flight = self.flight
        losses = losses.nan_to_num(torch.inf, torch.inf, torch.inf)
        if self.reevaluate:
            losses, again = losses
            flight.best_values.copy_(again)
        losses = flight.losses.copy_(losses)  # in double precision
        self._age(losses)
        torch.lt(losses, flight.best_values, out=flight.improved)
        torch.minimum(losses, flight.best_values, out=flight.best_values)
        self._keep_record()
        flight.step = self.steps
        self._key[1].fill_(self.steps)  # a fill needs no synchronisation
        self._connect(neighbours)
        self.variant.move(flight)
        if jiggle:
            self._shake(jiggle)

    def _connect(self, neighbours: Tensor | None) -> None:
        """Bring the neighbours of this step to the device, if they are others."""
        known = self._neighbours
        if neighbours is not None and known is not None and torch.equal(neighbours, known):
            return
        self._neighbours = neighbours
        device = self.flight.positions.device
        self.flight.neighbours = None if neighbours is None else neighbours.to(device)

    def _age(self, losses: Tensor) -> None:
        """Raise remembered values towards what the swarm reaches now: its best loss.

        Not towards its mean or median: early on those are far above, the bests would be forgotten
        before anything comes near them, and the swarm would fly apart.
        """
        if not self.best_decay:
            return
        reached = losses.min()
        for values in (self.flight.best_values, self.flight.record_value):
            rise = (reached - values).clamp_(min=0)
            values.add_(torch.where(rise.isfinite(), rise, 0), alpha=self.best_decay)

    def _keep_record(self) -> None:
        """Remember the best of all, and give it to the module."""
        flight = self.flight
        values = flight.best_values if len(flight.bests) else flight.losses
        value, index = values.min(0)
        place = flight.positions.index_select(0, index)  # [index] would wait for a GPU
        if len(flight.bests):
            # Remembered values may rise, and with them that of the record.
            fresh = flight.improved.index_select(0, index)
            place = torch.where(fresh, place, flight.bests.index_select(0, index))
            keep = value.isposinf()
        else:
            keep = value >= flight.record_value
        torch.where(keep, flight.record, place[0], out=flight.record)
        torch.where(keep, flight.record_value, value, out=flight.record_value)
        self.swarm.write(flight.record)

    def _shake(self, scale: float) -> None:
        flight = self.flight
        n = flight.positions.shape[1]
        word = stream_word(OPTIMIZER_ID, STREAM_SWARM_JIGGLE)
        for rows in flight.chunks(2):
            x = flight.positions[rows]
            count = rows.stop - rows.start
            z = _ops.dense_materialise(self._key, word, rows.start, count, 1, n, False, x.dtype)
            x.add_(z[:, 0], alpha=scale)
            flight.space.place(x)

    # ---- what was found ------------------------------------------------------------------------

    @property
    def best_value(self) -> float:
        """Value of the best, in the sign of the values; infinitely bad before any. Waits for it."""
        value = float(self.flight.record_value)
        return -value if self.maximize else value

    @property
    def best(self) -> Tensor:
        """The best position, (N,), a copy; the model's own parameters before any finite value."""
        return self.flight.record.clone()

    def best_model(self) -> nn.Module:
        """Return a plain copy of the model with the best parameters."""
        return self.swarm.member(self.flight.record)

    @property
    def stats(self) -> dict[str, float | int]:
        """Numbers for a log, as those of every population, and two more.

        ``best_value`` so far, and ``without_best``: particles that have had no finite value yet.
        """
        best_values = self.flight.best_values
        return {
            **super().stats,
            "best_value": self.best_value,
            "without_best": int((~best_values.isfinite()).sum()),
        }

    # ---- resuming ------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        flight = self.flight
        names = ("positions", "velocities", "bests", "best_values", "record", "record_value")
        return {name: getattr(flight, name) for name in names}

    def _state(self) -> dict[str, Any]:
        return {
            "variant": type(self.variant).__name__,
            "seed": self.seed,
            "swarm": self._tensors(),
            "extra": dict(self.flight.extra),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        own = type(self.variant).__name__
        if state["variant"] != own:
            raise ValueError(f"state must be of the variant {own}, got {state['variant']!r}")
        seed = as_seed(state["seed"])
        pairs = []
        for part, mine in (("swarm", self._tensors()), ("extra", self.flight.extra)):
            theirs = state[part]
            if not isinstance(theirs, dict):
                raise TypeError(f"state[{part!r}] must be a dict, got {type(theirs).__name__}")
            if set(theirs) != set(mine):
                raise ValueError(
                    f"state[{part!r}] must have the entries {sorted(mine)}, got {sorted(theirs)}"
                )
            for name, tensor in mine.items():
                check_tensor(name, theirs[name], tensor)
                pairs.append((tensor, theirs[name]))
        for tensor, other in pairs:
            tensor.copy_(other)
        self.flight.told = ()
        self._planned = -1, (0.0, None)
        self.seed = seed
        self._key[0].fill_(_C.splitmix64(seed))
        self.swarm.write(self.flight.record)
        self.swarm.publish()


def _resolve(variant: str | Variant, options: dict[str, Any]) -> Variant:
    """Return the variant of a name with the options that were given, or the one that came."""
    given = {name: value for name, value in options.items() if value is not None}
    shown = ["inertia" if name == "weight" else name for name in given]
    if isinstance(variant, Variant):
        if given:
            raise ValueError(f"{', '.join(shown)}: give them to {variant} itself")
        return variant
    if not isinstance(variant, str):
        raise TypeError(
            f"variant must be a name or a Variant, got {getattr(variant, '__name__', variant)!r}"
        )
    if variant not in VARIANTS:
        raise ValueError(f"variant must be of {', '.join(VARIANTS)}, got {variant!r}")
    takes = {"constriction": ("c1", "c2"), "inertia": ("weight", "c1", "c2")}.get(variant, ())
    if not set(given) <= set(takes):
        raise ValueError(
            "c1 and c2 are options of the variants constriction and inertia, inertia is one of "
            f"inertia alone; {variant} got {', '.join(shown)}"
        )
    return VARIANTS[variant](**given)
