"""Swarm: the parameters of P particles as one matrix, and ways to score all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..candidate import evaluate_one_by_one
from ..checks import as_count, as_int
from ..model import PerturbedModel
from ..nn.convert import revert
from .base import member_values, to_numbers
from .evaluation import Evaluation
from .share import Share


class Swarm:
    """P parameter vectors of one model, row p of :attr:`positions` being those of particle p.

    A vector holds the parameters that the swarm moves, flattened and joined in the order of
    ``named_parameters()``. A :class:`~perturbed.PerturbedModel` of :class:`~perturbed.Explicit`
    layers evaluates all particles in one forward; any other module one by one, or in a
    :class:`~perturbed.WorkerPool`. The model's own parameters are none of the particles:
    optimizers keep the best or the mean there.

    Args:
        model: a PerturbedModel whose layers have Explicit noise, or a plain module. Its parameters
            with ``requires_grad=False`` are no part of the vectors.
        particles: P; default: the directions of a PerturbedModel. Needed for a plain module.
        chunk: particles of a forward, at most: closures are then called several times, each time
            for others (``pm.directions`` of them), with the same data. Default: all.
        max_memory: bytes that a forward may take, a number or a text such as "4 GB"; the chunk then
            follows from what forwards take.
        distributed: whether to share the particles with other processes, each scoring its part of
            them: a process group of torch.distributed, True or None for the default group (None: if
            there is one), False for no. Every process holds and moves all of them.
        called: name of the particles in messages, as the optimizer has it.

    Attributes:
        module: the plain model; for a PerturbedModel, its base model.
        pm: the PerturbedModel, or None.
        parameters: by name, in the order of the vectors.
        positions: (P, N) on the parameters' device, in the widest of their dtypes, float32 at
            least. Change it in place and :meth:`publish`.
        evaluation: which particles this process scores, and in which forwards.

    Raises:
        TypeError: no module, parameters that are not real floating point.
        ValueError: nothing to move, parameters on several devices, particles missing, below 1, or
            other than the directions; chunk or max_memory for a plain module, which has no forward
            of several particles; more processes than particles.

    Example:
        >>> import torch
        >>> from perturbed.optim import Swarm
        >>> swarm = Swarm(torch.nn.Linear(2, 1), particles=3)
        >>> swarm.positions.shape
        torch.Size([3, 3])
        >>> swarm.score(lambda net: net(torch.ones(1, 2)).square().item()).shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: PerturbedModel | nn.Module,
        particles: int | None = None,
        chunk: int | None = None,
        max_memory: int | float | str | None = None,
        distributed: torch.distributed.ProcessGroup | bool | None = None,
        called: str = "particles",
    ) -> None:
        """Find the parameters; every particle starts where the model is."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.pm = model if isinstance(model, PerturbedModel) else None
        if self.pm is not None:
            particles = _check_population(self.pm, particles, called)
            self.module = self.pm.model
        else:
            self.module = model
            if particles is None:
                raise ValueError(f"{called} must be given for a plain module, got None")
        count = as_count(called, particles)
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        _check_parameters(self.parameters)
        self.evaluation: Share
        if self.pm is not None:
            self.evaluation = Evaluation(self.pm, chunk, max_memory, distributed, "full")
        elif chunk is not None or max_memory is not None:
            raise ValueError(
                "chunk and max_memory bound the forwards of a PerturbedModel; a plain module is "
                "scored one particle at a time, and they must be None"
            )
        else:
            self.evaluation = Share(count, None, distributed)
        self._kinds = self._read_kinds()
        start = self.read()
        wide = torch.float64 if start.dtype == torch.float64 else torch.float32
        self.positions = start.to(wide).expand(count, -1).contiguous()
        # What the model was given: its members, where their vectors are, and copies of other dtype.
        self._shown: tuple[dict[str, Tensor], int] = {}, 0
        self._rounded: list[tuple[Tensor, Tensor]] = []
        # The vector that was written last, and its parts.
        self._written: tuple[Tensor | None, list[Tensor]] = None, []
        self.publish()

    @property
    def particles(self) -> int:
        """P."""
        return self.positions.shape[0]

    def publish(self) -> None:
        """Have the model see what :attr:`positions` holds now; a plain module has nothing to see.

        Parameters of the positions' dtype are views and need no copy, narrower ones are rounded.
        """
        self._check_kinds()
        if self.pm is not None:
            self._show(self.positions)

    def _read_kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(p.dtype, p.device) for p in self.parameters.values()]

    def _check_kinds(self) -> None:
        """Refuse a model that was moved or converted since, whose members would not fit it."""
        for name, was, now in zip(self.parameters, self._kinds, self._read_kinds(), strict=True):
            if was != now:
                raise ValueError(
                    f"{name} was {was[0]} on {was[1]} when the optimizer was made and is {now[0]} "
                    f"on {now[1]}; convert or move the model first, and make the optimizer then"
                )

    def _show(self, vectors: Tensor) -> None:
        """Give the PerturbedModel the members that vectors are, (P, N)."""
        assert self.pm is not None
        held, (ours, shown) = self.pm.state.members, self._shown
        # Otherwise: the first time, after free_memory, after other vectors or somebody else's.
        if not held or held is not ours or shown != vectors.data_ptr():
            parts = dict(zip(self.parameters, self._split(vectors), strict=True))
            members = {n: part.to(self.parameters[n].dtype) for n, part in parts.items()}
            self.pm.set_members(members)
            self._shown = self.pm.state.members, vectors.data_ptr()
            self._rounded = [(members[n], t) for n, t in parts.items() if members[n] is not t]
            return
        for member, part in self._rounded:
            member.copy_(part)

    def _split(self, vectors: Tensor) -> list[Tensor]:
        """(..., N) -> one view for each parameter, (..., *shape)."""
        parameters = list(self.parameters.values())
        parts = vectors.split([p.numel() for p in parameters], -1)
        return [
            part.view((*vectors.shape[:-1], *p.shape))
            for part, p in zip(parts, parameters, strict=True)
        ]

    # ---- the model's own parameters ------------------------------------------------------------

    def read(self) -> Tensor:
        """Return the model's own parameters as a vector, (N,), in their widest dtype."""
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the model's own parameters to a vector, (N,)."""
        written, parts = self._written
        # Mostly the vector of the last time, whose parts are known; not so in an unpickled copy.
        if written is not vector or parts[0].data_ptr() != vector.data_ptr():
            parts = self._split(vector)
            self._written = vector, parts
        torch._foreach_copy_(list(self.parameters.values()), parts)

    def member(self, vector: Tensor) -> nn.Module:
        """Return a plain copy of the model with the parameters of a vector, (N,)."""
        plain = copy.deepcopy(self.module)
        if self.pm is not None:
            plain = revert(plain)
        parts = dict(zip(self.parameters, self._split(vector), strict=True))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name in parts:
                    parameter.copy_(parts[name])
        return plain

    # ---- scoring -------------------------------------------------------------------------------

    def score(self, closure: Callable[..., Any], vectors: Tensor | None = None) -> Any:
        """Score the particles, of several processes this one's; returns what :meth:`values` takes.

        Args:
            closure: for a PerturbedModel, called without arguments: values of its rows or members.
                For a plain module, called with the module once per particle, which it then is: one
                number. A :class:`~perturbed.WorkerPool` of the plain module, or another object with
                ``evaluate(members)``, does the same elsewhere, for either.
            vectors: (P, N), other vectors to score instead of the positions.

        Raises:
            ValueError: a pool beside chunk or max_memory, which are of forwards; parameters that
                have been frozen since this was made.
        """
        frozen = [name for name, p in self.parameters.items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"parameters {frozen} were frozen after the optimizer was made, which moves them; "
                "make it anew"
            )
        self._check_kinds()
        shown = self.positions if vectors is None else vectors
        evaluation = self.evaluation
        if hasattr(closure, "evaluate"):  # a pool of any kind
            if isinstance(evaluation, Evaluation) and evaluation.bounded:
                raise ValueError(
                    "chunk and max_memory must be None with a pool, which runs no forward"
                )
            return closure.evaluate(shown[evaluation.here])
        if not isinstance(evaluation, Evaluation):
            return evaluate_one_by_one(closure, self.module, shown[evaluation.here])
        try:
            self._show(shown)
            return evaluation.score(closure, self.positions.device)
        finally:
            if vectors is not None:
                self.publish()

    def windows(self) -> Iterator[PerturbedModel]:
        """Iterate over the forwards of this process's particles, for values from elsewhere.

        Raises:
            RuntimeError: a plain module.
        """
        if not isinstance(self.evaluation, Evaluation):
            raise RuntimeError("windows: a plain module has no forward of several particles")
        return self.evaluation.windows()

    def gather(self, values: Tensor) -> Tensor:
        """Join what the processes' particles scored: (..., count) -> (..., P), on every process."""
        return self.evaluation.gather(values.view(-1, values.shape[-1])).view(
            *values.shape[:-1], -1
        )

    def values(self, values: Any) -> Tensor:
        """Bring values to one per particle, (P,), floating point on the positions' device.

        Of several processes, to one for each particle that this one scores.

        Raises:
            ValueError: another number of values.
            TypeError: what is no tensor of real numbers.
        """
        device = self.positions.device
        if self.pm is not None:
            return member_values(values, self.pm, device)[0]
        values = to_numbers(values, device)
        count = self.evaluation.split.count
        if values.shape != (count,):
            raise ValueError(
                f"values must be one per particle, ({count},), got {tuple(values.shape)}"
            )
        return values


def _check_population(pm: PerturbedModel, particles: int | None, called: str) -> int:
    """Return the directions of a model whose every trainable parameter is a member's own."""
    if not pm.state.absolute:
        raise ValueError(
            "the layers of a swarm's model must have noise=Explicit(): make it with "
            "perturbed.convert(net, particles, perturbed.Explicit())"
        )
    if particles is not None and as_int(called, particles) != pm.population:
        raise ValueError(
            f"{called} must be the model's directions, {pm.population}, or None, got {particles}"
        )
    own = {id(p) for p, _ in pm._perturbed().values()}
    named = pm.model.named_parameters()
    shared = [name for name, p in named if p.requires_grad and id(p) not in own]
    if shared:
        raise ValueError(
            f"every trainable parameter must be a member's own, but {shared} are of layers that "
            "are not converted; freeze them, or pass the plain module"
        )
    return pm.population


def _check_parameters(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse what cannot be one matrix of numbers."""
    if sum(p.numel() for p in parameters.values()) == 0:
        raise ValueError("model has nothing to move: no parameter has requires_grad=True")
    first = next(iter(parameters))
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {parameter.dtype}")
        if parameter.device != parameters[first].device:
            raise ValueError(
                f"all parameters must be on one device, got {first} on {parameters[first].device} "
                f"and {name} on {parameter.device}"
            )
