"""SwarmOfOptimizers: several optimizers, each with parameters of its own, that live and die.

After torchzero's class of the same name: members age; an old one that is not the best for too long
is replaced by a child of the best two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C, _ops
from ..checks import as_int, check_entries, check_like, check_number, check_tensor, undone_by
from ..model import PerturbedModel
from ..noise.base import OPTIMIZER_ID, STREAM_TRIALS, stream_word
from ..noise.state import as_seed, check_seed
from .composite import Optimizer
from .crossover import check_crossover, cross
from .opt_members import Batch, Members, OneByOne, SignGrad
from .swarm import Swarm
from .zeroth.closure import Closure, check_closure
from .zeroth.samplers import Source

AGGREGATIONS = ("best", "mean", "last")


class SwarmOfOptimizers(Optimizer):
    """Let optimizers search from different points, and replace those that fall behind.

    Each member has its own parameters, its own optimizer state and, one by one, its own buffers. In
    every step all members step once, are ranked by the loss that they had when they began it, and
    grow older. A member is old after ``old_steps``; an old one that is not the best for more than
    ``die_after`` steps on end dies. In its place comes a child of the best two, with age 0 and a
    fresh optimizer. A member whose loss is NaN or infinite is replaced at once, if any is finite.

    **In a batch or one by one.** Given a :class:`~perturbed.PerturbedModel` of
    :class:`~perturbed.Explicit` layers, all members are evaluated in one forward: ``closure()``
    returns the losses of its rows, and one optimizer moves all members. It sees each as one flat
    vector, so it must work element by element, like SGD, Adam, AdamW or Lion. Any other module, or
    a list of Parameters, is evaluated one member at a time: the module then is that member, and
    ``closure()`` returns its loss, as any optimizer of torch takes it.

    All members start where the model is. After a step the model's own parameters are those of the
    best member, or what ``agg_mode`` says; they are a copy.

    Args:
        model: a PerturbedModel, a module, or Parameters.
        optimizers: a function, parameters -> optimizer, or, one by one, a list of functions or of
            optimizers of the model's parameters, one for each member. Members that draw random
            numbers need seeds of their own.
        members: how many; default: the directions of the PerturbedModel, or the length of the list.
        gradients: where the optimizers' gradients come from. "closure": the closure calls
            ``zero_grad`` and ``backward``, or the optimizer needs none (one by one only, and its
            default). "backward": the swarm differentiates what the closure returns (default in a
            batch). A :class:`SignGrad`: signs of random moves, without any derivative.
        old_steps: age from which members can die; None: never.
        die_after: steps in which an old member may not be the best.
        crossover_p: for each tensor of a child the chance of a crossover, else it is the best's.
        crossover: a name of ``CROSSOVERS`` or a function (best, second, generator) -> tensor.
        gravity: strength of ``p -= gravity sign(d) |d|^gravity_p`` before each step, d the distance
            from ``gravity_mode``; None: none.
        gravity_mode: "best" member or "mean" of them.
        gravity_p: the power.
        noise: standard deviation of noise on the parameters before each step; None: none.
        noise_sampler: "normal" or "rademacher".
        mean_momentum: share of the last move of the members' mean that all members repeat; None:
            none.
        agg_mode: "best", "mean" or "last" member that the model becomes.
        smoothing: 0 up to, but not, 1: rank by a moving average of losses, for small batches.
        seed: of noise, signs and crossovers; None takes one from the operating system.

    Raises:
        TypeError: arguments of another type.
        ValueError: arguments out of range or that do not go together; parameters narrower than
            float32, one by one; no parameter that requires grad.

    Example:
        In a batch, without a derivative:

        >>> import torch, perturbed
        >>> from perturbed.optim import SignGrad, SwarmOfOptimizers
        >>> net = perturbed.convert(torch.nn.Linear(4, 1), 10, perturbed.Explicit())
        >>> pm = perturbed.PerturbedModel(net, directions=10)
        >>> swarm = SwarmOfOptimizers(
        ...     pm, lambda p: torch.optim.AdamW(p, 0.03), gradients=SignGrad(1e-3), old_steps=5
        ... )
        >>> x = pm.replicate(torch.eye(4))
        >>> for _ in range(200):
        ...     loss = swarm.step(lambda: (pm(x) - 1).square().mean(1))
        >>> bool(loss < 0.1)
        True

        One by one, as torchzero's:

        >>> net = torch.nn.Linear(4, 1)
        >>> swarm = SwarmOfOptimizers(net, lambda p: torch.optim.SGD(p, 0.1), 3, noise=0.01)
        >>> def closure():
        ...     net.zero_grad()
        ...     loss = (net(torch.eye(4)) - 1).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(50):
        ...     loss = swarm.step(closure)
        >>> bool(loss < 0.1)
        True
    """

    def __init__(
        self,
        model: PerturbedModel | nn.Module | Sequence[nn.Parameter],
        optimizers: Callable[..., Optimizer] | Sequence[Any],
        members: int | None = None,
        *,
        gradients: str | SignGrad | None = None,
        old_steps: int | None = None,
        die_after: int = 10,
        crossover_p: float = 1.0,
        crossover: Any = "mixed",
        gravity: float | None = None,
        gravity_mode: str = "best",
        gravity_p: float = 1.0,
        noise: float | None = None,
        noise_sampler: str = "normal",
        mean_momentum: float | None = None,
        agg_mode: str = "best",
        smoothing: float = 0.0,
        seed: int | None = 0,
    ) -> None:
        """Make the members; nothing is evaluated yet."""
        self.old_steps = None if old_steps is None else _count("old_steps", old_steps)
        self.die_after = _count("die_after", die_after)
        self.crossover_p = check_number("crossover_p", crossover_p, high=1.0)
        self.crossover = check_crossover(crossover)
        self.gravity = None if gravity is None else check_number("gravity", gravity)
        self.gravity_mode = _choice("gravity_mode", gravity_mode, ("best", "mean"))
        self.gravity_p = check_number("gravity_p", gravity_p)
        self.noise = None if noise is None else check_number("noise", noise)
        self.noise_sampler = _choice("noise_sampler", noise_sampler, ("normal", "rademacher"))
        self.mean_momentum = None
        if mean_momentum is not None:
            self.mean_momentum = check_number("mean_momentum", mean_momentum, high=1.0)
        self.agg_mode = _choice("agg_mode", agg_mode, AGGREGATIONS)
        self.smoothing = check_number("smoothing", smoothing, high=1.0)
        if self.smoothing == 1.0:
            raise ValueError("smoothing must be below 1, got 1")
        self.seed = check_seed(seed)
        if members is None and isinstance(optimizers, Sequence):
            members = len(optimizers)
        module = model if isinstance(model, nn.Module) else _as_module(model)
        self.swarm = Swarm(module, members, distributed=False)
        kind = OneByOne if self.swarm.pm is None else Batch
        self._made = False
        super().__init__(list(self.swarm.parameters.values()), {})
        self._made = True
        self.inner: Members = kind(self.swarm, optimizers, gradients)
        self.progress = self._start()
        self.param_groups = self.inner.groups()

    def _start(self) -> dict[str, Any]:
        count = self.swarm.particles
        return {
            "steps": 0,
            "evaluations": 0,
            "draws": 0,
            "best_loss": math.inf,
            "best_point": None,
            "leader": 0,
            "ages": [0] * count,
            "streaks": [0] * count,
            "deaths": 0,
            "scores": [math.nan] * count,
            "drift": None,
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the parameters are those of the model.

        Raises:
            RuntimeError: always, once the swarm is made.
        """
        if self._made:
            raise RuntimeError("a swarm's parameters are those of its model; make another swarm")
        super().add_param_group(param_group)

    # ---- random numbers ------------------------------------------------------------------------

    def _next_draw(self) -> int:
        self.progress["draws"] += 1
        return self.progress["draws"] - 1

    def _random(self, draw: int, rows: slice, rademacher: bool) -> Tensor:
        """Return (members, N) normals or signs of some members."""
        x = self.swarm.positions
        key = torch.tensor([_C.splitmix64(self.seed), draw, 0], device=x.device)
        word = stream_word(OPTIMIZER_ID, STREAM_TRIALS)
        count, size = rows.stop - rows.start, x.shape[1]
        noise = _ops.dense_materialise(key, word, rows.start, count, 1, size, rademacher, x.dtype)
        return noise[:, 0]

    # ---- one step ------------------------------------------------------------------------------

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Step all members once, and replace those that have had their time.

        Args:
            closure: in a batch, the losses of the rows of ``pm(...)`` or of the members; else the
                loss of the model as it is. See the class.

        Returns:
            () float64 on the CPU: the lowest loss that a member had when it began the step; NaN if
            none is finite.

        Raises:
            TypeError: a closure, or what it returned, of another type.
            ValueError: another number of losses.
        """
        check_closure(closure)
        before = self._snapshot()
        try:
            loss = self._advance(closure)
        except BaseException:
            self._restore(before)
            raise
        finally:
            self.param_groups = self.inner.groups()
        return torch.tensor(loss, dtype=torch.float64)

    def _advance(self, closure: Closure) -> float:
        progress, x = self.progress, self.swarm.positions
        with torch.no_grad():
            start = x.mean(0) if self.mean_momentum is not None else None
            self._attract()
            self.swarm.publish()
        began = x.clone()
        draw = self._next_draw()

        def random(rows: slice, rademacher: bool) -> Tensor:
            return self._random(draw, rows, rademacher)

        losses, evaluations = self.inner.step(closure, random)
        with torch.no_grad():
            lost = self.inner.mend(began)
            if start is not None:
                progress["drift"] = x.mean(0) - start
        progress["evaluations"] += evaluations
        progress["steps"] += 1
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        if finite:
            top = min(finite, key=losses.__getitem__)
            if losses[top] < progress["best_loss"]:
                progress["best_loss"] = losses[top]
                progress["best_point"] = began[top].clone()
        ranked = self._rank(losses, lost)
        if ranked:
            progress["leader"] = ranked[0]
            self._age(ranked)
        self._aggregate()
        with torch.no_grad():
            self.swarm.publish()
        return min((losses[i] for i in finite), default=math.nan)

    def _attract(self) -> None:
        """Move all members before they step: momentum of the mean, gravity, noise."""
        x, progress = self.swarm.positions, self.progress
        if self.mean_momentum is not None and progress["drift"] is not None:
            x.add_(progress["drift"], alpha=self.mean_momentum)
        if self.gravity is not None:
            centre = x[progress["leader"]] if self.gravity_mode == "best" else x.mean(0)
            distance = x - centre
            x.sub_(distance.sign() * distance.abs().pow(self.gravity_p), alpha=self.gravity)
        if self.noise is not None:
            everyone = slice(0, self.swarm.particles)
            z = self._random(self._next_draw(), everyone, self.noise_sampler == "rademacher")
            x.add_(z, alpha=self.noise)

    def _rank(self, losses: list[float], lost: list[int]) -> list[int]:
        """Return the members that have a finite loss, best first; note their averages."""
        scores = list(self.progress["scores"])
        usable = [i for i, x in enumerate(losses) if math.isfinite(x) and i not in lost]
        for i in usable:
            old = scores[i]
            known = self.smoothing > 0 and not math.isnan(old)
            scores[i] = losses[i] + (self.smoothing * (old - losses[i]) if known else 0.0)
        self.progress["scores"] = scores
        return sorted(usable, key=scores.__getitem__)

    def _age(self, ranked: list[int]) -> None:
        """Let members grow older, and put children in the place of those that die."""
        progress = self.progress
        ages = [age + 1 for age in progress["ages"]]
        streaks, dying = list(progress["streaks"]), []
        for i in range(len(ages)):
            old = self.old_steps is not None and ages[i] > self.old_steps
            streaks[i] = streaks[i] + 1 if old and i != ranked[0] else 0
            if streaks[i] > self.die_after or i not in ranked:
                dying.append(i)
        if dying:
            with torch.no_grad():
                self._replace(dying, ranked)
            for i in dying:
                ages[i], streaks[i], progress["scores"][i] = 0, 0, math.nan
            progress["deaths"] += len(dying)
        progress["ages"], progress["streaks"] = ages, streaks

    def _replace(self, dying: list[int], ranked: list[int]) -> None:
        x, best = self.swarm.positions, ranked[0]
        second = ranked[1] if len(ranked) > 1 else best
        # The second best may be among the dying: children come before anybody is replaced.
        parents = self.swarm._split(x[best].clone()), self.swarm._split(x[second].clone())
        children = []
        draw = self._next_draw()
        for i in dying:
            generator = Source(self.seed, draw, i).generator(torch.device("cpu"))
            parts = cross(self.crossover, parents, self.crossover_p, generator)
            children.append(torch.cat([part.flatten() for part in parts]))
        for i, child in zip(dying, children, strict=True):
            x[i].copy_(child)
            self.inner.renew(i, best)

    def _aggregate(self) -> None:
        x, leader = self.swarm.positions, self.progress["leader"]
        if self.agg_mode == "last":
            leader = self.swarm.particles - 1
        self.swarm.write(x.mean(0) if self.agg_mode == "mean" else x[leader])
        self.inner.show_buffers(leader)

    def _snapshot(self) -> Any:
        own = [p.detach().clone() for p in self.swarm.parameters.values()]
        positions = self.swarm.positions.clone()
        return copy.copy(self.progress), positions, own, self.inner.snapshot()

    @torch.no_grad()
    def _restore(self, before: Any) -> None:
        self.progress, positions, own, inner = before
        self.swarm.positions.copy_(positions)
        for p, value in zip(self.swarm.parameters.values(), own, strict=True):
            p.copy_(value)
        self.inner.restore(inner)
        self.swarm.publish()

    # ---- what was found ------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        """Losses of members evaluated so far."""
        return self.progress["evaluations"]

    @property
    def best_loss(self) -> float:
        """The lowest loss with which a member began a step; infinite before any."""
        return self.progress["best_loss"]

    def best(self) -> list[Tensor]:
        """Return a copy of the parameters that had :attr:`best_loss`; as they are before any."""
        point = self.progress["best_point"]
        point = self.swarm.read() if point is None else point
        parts = zip(self.swarm._split(point), self.swarm.parameters.values(), strict=True)
        return [part.to(p.dtype, copy=True) for part, p in parts]

    @property
    def stats(self) -> dict[str, float | int]:
        """Numbers for a log: steps, evaluations, deaths so far, best_loss, and who leads."""
        names = ("steps", "evaluations", "deaths", "best_loss", "leader")
        return {name: self.progress[name] for name in names}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the model's parameters."""
        for p in self.swarm.parameters.values():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.detach_().zero_()

    # ---- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all members, their optimizers and counters: plain numbers and tensors."""
        return {
            "positions": self.swarm.positions.clone(),
            "inner": copy.deepcopy(self.inner.state()),
            "progress": copy.deepcopy(self.progress),
            "seed": self.seed,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit; the model's parameters are set as well.

        Raises:
            TypeError: no dictionary.
            ValueError: entries missing or unknown, or another number of members or parameters.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                "state_dict must be a dict from SwarmOfOptimizers.state_dict, got "
                f"{type(state_dict).__name__}"
            )
        names = {"positions", "inner", "progress", "seed"}
        check_entries("state_dict", state_dict, names)
        if set(state_dict) != names or set(state_dict["progress"]) != set(self.progress):
            raise ValueError(
                f"state_dict must have the entries {sorted(names)} of a SwarmOfOptimizers, got "
                f"{sorted(state_dict)}"
            )
        check_tensor("state_dict['positions']", state_dict["positions"], self.swarm.positions)
        self._check_progress(state_dict["progress"])
        seed = as_seed(state_dict["seed"])
        held = self.inner.snapshot()
        with undone_by(lambda: self.inner.restore(held)):
            self.inner.load(copy.deepcopy(state_dict["inner"]))
        self.swarm.positions.copy_(state_dict["positions"])
        self.progress = copy.deepcopy(state_dict["progress"])
        for name in ("drift", "best_point"):
            if self.progress[name] is not None:
                self.progress[name] = self.progress[name].to(self.swarm.positions)
        self.seed = seed
        self.param_groups = self.inner.groups()
        self._aggregate()
        self.swarm.publish()

    def _check_progress(self, progress: dict[str, Any]) -> None:
        """Raise unless saved progress, whose entries are those of here, can be gone on from."""
        count, start = self.swarm.particles, self._start()
        for name, own in start.items():
            place, value = f"progress[{name!r}]", progress[name]
            if name in ("best_point", "drift"):
                if value is not None:
                    check_tensor(place, value, self.swarm.positions[0])
                continue
            check_like(place, value, own)
            if isinstance(own, list):
                if len(value) != count:
                    raise ValueError(f"{place} must have {count} entries, got {len(value)}")
                for item in value:
                    check_like(place, item, own[0])
        if progress["leader"] >= count:
            raise ValueError(f"progress['leader'] must be below {count}, got {progress['leader']}")


def _as_module(parameters: Any) -> nn.Module:
    """Return Parameters as a module that holds the very same."""
    several = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
    held = list(parameters) if several else []
    if not held or not all(isinstance(p, nn.Parameter) for p in held):
        raise TypeError(
            "model must be a PerturbedModel, an nn.Module or a list of nn.Parameters, got "
            f"{type(parameters).__name__}"
        )
    return nn.ParameterList(held)


def _count(name: str, value: object) -> int:
    count = as_int(name, value)
    if count < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")
    return count


def _choice(name: str, value: Any, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
    return value
