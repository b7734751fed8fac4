"""CompositeOptimizer: an optimizer of torch that is made of others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_like, undone_by
from .zeroth.base import ScalarOptimizer, own_attributes
from .zeroth.closure import check_closure, to_loss

Optimizer = torch.optim.Optimizer
Closure = Callable[[], Any]
Mode = str | Callable[[Optimizer, Closure | None], Any]


class CompositeOptimizer(Optimizer):
    """Base of optimizers that are made of others.

    ``param_groups`` holds the very groups of the others, so that learning-rate schedulers attach
    here or there; ``state_dict`` has the state of each. Gradients are on or off in a closure as the
    member that calls it wants them, as if it were alone.

    Args:
        optimizers: the members, any optimizers of torch or of others.
        params: groups of its own, if it does not share those of its members.
        defaults: options of such groups.

    Raises:
        TypeError: what is no list of optimizers.
        ValueError: no member, or no parameter that requires grad.

    Attributes:
        optimizers: the members.
        progress: plain numbers that a resumed run needs.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        params: Any = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """Check the members."""
        self.optimizers = check_optimizers(optimizers)
        self.progress: dict[str, Any] = {}
        held = self._held()
        self._made = False  # while torch's constructor adds groups
        super().__init__(list(held) if params is None else params, defaults or {})
        self._made = True
        self._share_groups()

    def _groups(self) -> list[dict[str, Any]]:
        """Return the groups that schedulers see."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _share_groups(self) -> None:
        self.param_groups = self._groups()

    def _held(self) -> dict[Tensor, None]:
        """Return the parameters of all members that require grad, once each, in order.

        Raises:
            ValueError: there is none.
        """
        found = {p: None for o in self.optimizers for p in parameters_of(o) if p.requires_grad}
        if not found:
            raise ValueError(
                "optimizers must have a parameter that requires grad, got none: all are frozen"
            )
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to every member, each with its own defaults for what it leaves open."""
        if not self._made:
            super().add_param_group(param_group)
            return
        group = dict(param_group)
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])  # an iterator would serve the first only
        for optimizer in self.optimizers:
            optimizer.add_param_group(dict(group))
        self._share_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all members' parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    # ---- what was found ------------------------------------------------------------------------

    def _keeper(self) -> ScalarOptimizer | CompositeOptimizer | None:
        """Return the member with the lowest loss, of those that keep one of all parameters."""
        own = set(parameters_of(self))
        keepers = [
            optimizer
            for optimizer in self.optimizers
            if isinstance(optimizer, (ScalarOptimizer, CompositeOptimizer))
            and own == set(parameters_of(optimizer))
        ]
        return min(keepers, key=lambda keeper: keeper.best_loss, default=None)

    @property
    def best_loss(self) -> float:
        """The lowest loss that a member has kept with its parameters; infinite if there is none.

        Searches keep theirs; optimizers that step along gradients keep nothing, nor do members that
        have only some of the parameters count.
        """
        keeper = self._keeper()
        return math.inf if keeper is None else keeper.best_loss

    def best(self) -> list[Tensor]:
        """Return a copy of the parameters that had :attr:`best_loss`, once each.

        In the order of the groups; as they are while :attr:`best_loss` is infinite.
        """
        keeper, own = self._keeper(), parameters_of(self)
        if keeper is None or keeper.best_loss == math.inf:
            return clones(own)
        found = dict(zip(parameters_of(keeper), keeper.best(), strict=True))
        return [found[parameter] for parameter in own]

    @torch.no_grad()
    def load_best(self) -> None:
        """Set the parameters to :meth:`best`."""
        for parameter, best in zip(parameters_of(self), self.best(), strict=True):
            parameter.copy_(best)

    # ---- resuming ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the members, and plain numbers."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": copy.deepcopy(self.progress),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            TypeError: no dictionary.
            ValueError: a state of other members. Then nothing has changed.
        """
        name = type(self).__name__
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"state_dict must be a dict from {name}.state_dict, got {type(state_dict).__name__}"
            )
        if set(state_dict) != {"optimizers", "progress"}:
            raise ValueError(
                f"state_dict must have the entries optimizers and progress of a {name}, got "
                f"{sorted(state_dict)}"
            )
        states, progress = state_dict["optimizers"], state_dict["progress"]
        if len(states) != len(self.optimizers) or set(progress) != set(self.progress):
            raise ValueError(
                f"state_dict must be of {len(self.optimizers)} optimizers with progress "
                f"{sorted(self.progress)}, got {len(states)} with {sorted(progress)}"
            )
        self._check_progress(progress)
        before = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]
        try:
            with undone_by(lambda: self._load_members(before)):
                self._load_members(states)
        finally:
            self._share_groups()
        self.progress = copy.deepcopy(progress)

    def _load_members(self, states: Sequence[Any]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def _check_progress(self, progress: dict[str, Any]) -> None:
        """Raise unless saved numbers, whose entries are those of here, can be gone on from."""
        check_like("progress", progress, self.progress)

    def __getstate__(self) -> dict[str, Any]:
        """Take along the members, which torch's own would leave out."""
        return own_attributes(self)


# ---- running a member --------------------------------------------------------------------------


def run(optimizer: Optimizer, mode: Mode, closure: Closure | None) -> Any:
    """Do one step of a member.

    Args:
        optimizer: the member.
        mode: "closure": it is given the closure. "step": the closure, if there is one, is called
            here with gradients, and the member's ``step`` without. A function is called as
            ``mode(optimizer, closure)``.
        closure: or None.

    Returns:
        The loss: what the member returned, or the closure in mode "step".
    """
    if callable(mode):
        return mode(optimizer, closure)
    step: Callable[..., Any] = optimizer.step
    if mode == "step":
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step()
        return loss
    return step() if closure is None else step(closure)


def checked(closure: Closure | None) -> Closure | None:
    """Wrap a closure so that what it returns is checked, without waiting for a device.

    Raises:
        TypeError: no function; when called, a loss that is None, complex or no number.
        ValueError: when called, several losses.
    """
    if closure is None:
        return None
    function = check_closure(closure)

    def call() -> Any:
        loss = function()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
            to_loss(loss)  # raises unless it is a number
        return loss

    return call


def check_mode(mode: object) -> Mode:
    """Return ``mode`` if :func:`run` knows it."""
    if callable(mode) or (isinstance(mode, str) and mode in ("closure", "step")):
        return mode
    raise ValueError(
        f"mode must be 'closure', 'step' or a function (optimizer, closure) -> loss, got {mode!r}"
    )


def check_optimizers(optimizers: Any) -> list[Optimizer]:
    """Return a list of optimizers.

    Raises:
        TypeError: anything else.
        ValueError: an empty list.
    """
    single = isinstance(optimizers, (Optimizer, Tensor))
    if single or not isinstance(optimizers, Iterable):
        raise TypeError(f"optimizers must be a list of optimizers, got {type(optimizers).__name__}")
    members = list(optimizers)
    for i, member in enumerate(members):
        if not isinstance(member, Optimizer):
            raise TypeError(
                f"optimizers[{i}] must be a torch.optim.Optimizer, got {type(member).__name__}"
            )
    if not members:
        raise ValueError("optimizers must have at least one, got an empty list")
    return members


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer, once each, in the order of its groups."""
    if isinstance(optimizer, CompositeOptimizer):
        own = [p for o in optimizer.optimizers for p in parameters_of(o)]
    else:
        own = [p for group in optimizer.param_groups for p in group["params"]]
    return list(dict.fromkeys(own))


def per_member(name: str, value: Any, count: int) -> list[Any]:
    """Return one option for each of ``count`` members: a list as it is, else the same for all.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must have {count} entries, got {len(value)}")
    return list(value)


def uses_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps along gradients, as far as is known of it."""
    return not isinstance(optimizer, ScalarOptimizer)


def clones(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of parameters that nobody else holds."""
    return [p.detach().clone() for p in parameters]
