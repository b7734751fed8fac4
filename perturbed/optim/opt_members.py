"""The members of a swarm of optimizers: all in one forward, or one after the other."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_like, check_number
from .base import member_values, to_numbers
from .composite import CompositeOptimizer, Optimizer, checked, uses_gradients
from .swarm import Swarm
from .zeroth.closure import Closure, call, to_loss

# (members, rademacher) -> (count, N) random numbers of some members.
Random = Callable[[slice, bool], Tensor]


@dataclass(frozen=True)
class SignGrad:
    """The gradient of a swarm's members from signs of random moves: torchzero's RandomGrad.

    With a random z for each member the losses of p and of ``p + magn z`` are compared; the gradient
    is ``+z`` if the move raises the loss, ``-z`` if it lowers it, 0 if it is the same. NaN counts
    as raised; where the loss before is no number, too, the gradient is 0. 2 evaluations a step.

    Attributes:
        magn: scale of the move, above 0.
        sampler: "normal" or "rademacher".
        step_opposite: whether moves that raise the loss give a gradient.
    """

    magn: float = 1e-5
    sampler: str = "normal"
    step_opposite: bool = True

    def __post_init__(self) -> None:
        """Check the attributes."""
        check_number("magn", self.magn, above=True)
        if not isinstance(self.sampler, str) or self.sampler not in ("normal", "rademacher"):
            raise ValueError(f"sampler must be 'normal' or 'rademacher', got {self.sampler!r}")
        if not isinstance(self.step_opposite, bool):
            raise TypeError(f"step_opposite must be True or False, got {self.step_opposite!r}")

    def signs(self, before: Tensor, after: Tensor) -> Tensor:
        """Return -1, 0 or 1 for each member from its two losses, (M,)."""
        before, after = (torch.where(t.isfinite(), t, math.inf) for t in (before, after))
        higher = (after > before).to(before.dtype) if self.step_opposite else 0.0
        return higher - (after < before).to(before.dtype)


class Members(ABC):
    """How the members of a swarm step; their parameters are the rows of ``swarm.positions``."""

    swarm: Swarm

    @abstractmethod
    def step(self, closure: Closure, random: Random) -> tuple[list[float], int]:
        """Step every member; return the losses with which they began, and evaluations."""

    @abstractmethod
    def renew(self, i: int, best: int) -> None:
        """Give member i a fresh optimizer, and the buffers of the best."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Return the groups of the optimizers."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""

    def show_buffers(self, i: int) -> None:  # noqa: B027 (a batch has none of its own)
        """Set the model's buffers to those of a member."""

    def snapshot(self) -> Any:
        """Return what :meth:`restore` takes."""
        return _copied(self.state())

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot."""
        self.load(snapshot)

    def mend(self, began: Tensor) -> list[int]:
        """Put members with parameters that are no numbers back where they began; say which."""
        x = self.swarm.positions
        lost = (~(x - x).sum(1).isfinite()).nonzero().flatten().tolist()  # inf - inf is NaN
        for i in lost:
            x[i].copy_(began[i])
            self.renew(i, i)
        return lost


class Batch(Members):
    """All members in one forward of a PerturbedModel, and one optimizer for all of them.

    The optimizer's parameters are the rows of the positions, so that it keeps a state for each
    member, counters of steps included, and a member's can be dropped.

    Args:
        swarm: of a PerturbedModel.
        optimizers: a function, parameters -> optimizer.
        gradients: "backward" or a SignGrad; default: "backward".

    Raises:
        TypeError: what is no such function.
        ValueError: an optimizer that is not one of single elements, as far as is known; gradients
            that a batch cannot have.
    """

    def __init__(self, swarm: Swarm, optimizers: Any, gradients: str | SignGrad | None) -> None:
        """Make the optimizer."""
        self.swarm = swarm
        self.gradients = "backward" if gradients is None else gradients
        if self.gradients != "backward" and not isinstance(self.gradients, SignGrad):
            raise ValueError(
                f"gradients of a batch must be 'backward' or a SignGrad, got {gradients!r}"
            )
        if not callable(optimizers):
            raise TypeError(
                "optimizers of a batch must be one function, parameters -> optimizer, got "
                f"{type(optimizers).__name__}"
            )
        self.rows = [row.detach().requires_grad_() for row in swarm.positions]
        self.optimizer = _check_made(optimizers(self.rows), self.rows)
        one = isinstance(self.optimizer, (CompositeOptimizer, torch.optim.LBFGS))
        if one or not uses_gradients(self.optimizer):
            raise ValueError(
                "optimizers of a batch must work on single elements, such as SGD or AdamW, got "
                f"{type(self.optimizer).__name__}; pass the plain module to step one by one"
            )

    def step(self, closure: Closure, random: Random) -> tuple[list[float], int]:
        """See :class:`Members`."""
        if isinstance(self.gradients, SignGrad):
            losses, evaluations = self._signs(self.gradients, closure, random)
        else:
            losses, evaluations = self._backward(closure)
        self.optimizer.step()
        for row in self.rows:
            row.grad = None
        return losses.tolist(), evaluations

    @torch.no_grad()
    def _signs(self, signs: SignGrad, closure: Closure, random: Random) -> tuple[Tensor, int]:
        x, count = self.swarm.positions, len(self.rows)
        before = self._values(call(closure))
        z = random(slice(0, count), signs.sampler == "rademacher")
        began = x.clone()
        try:
            x.add_(z, alpha=signs.magn)
            self.swarm.publish()
            after = self._values(call(closure))
        finally:
            x.copy_(began)
            self.swarm.publish()
        self._give(z.mul_(signs.signs(before, after).to(z.dtype)[:, None]))
        return before, 2 * count

    def _backward(self, closure: Closure) -> tuple[Tensor, int]:
        pm, swarm = self.swarm.pm, self.swarm
        assert pm is not None
        with torch.enable_grad():
            leaf = swarm.positions.detach().requires_grad_()
            parts = zip(swarm.parameters, swarm._split(leaf), strict=True)
            pm.set_members({n: t.to(swarm.parameters[n].dtype) for n, t in parts})
            try:
                values = closure()
                losses = self._values(values)
                if not isinstance(values, Tensor) or not values.requires_grad:
                    raise ValueError(
                        "closure must return losses that can be differentiated, with "
                        "gradients='backward'; it must not call backward or detach"
                    )
                shaped = values[0] if values.dim() == 2 else pm.member_mean(values)[0]
                # A member whose loss is no number has no gradient that is one.
                shaped[losses.isfinite()].sum().backward()
            finally:
                # Members that belong to a graph are let go.
                swarm._shown = {}, 0
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        self._give(torch.where((grad - grad).sum(1, keepdim=True).isfinite(), grad, 0))
        return losses, len(self.rows)

    def _values(self, values: Any) -> Tensor:
        assert self.swarm.pm is not None
        if values is None:
            raise TypeError("closure must return losses, got None; does it lack a return?")
        # Means of rows in float64: in float32 they round the effect of small moves away.
        wide = to_numbers(values, self.swarm.positions.device).double()
        return member_values(wide, self.swarm.pm, wide.device)[0]

    def _give(self, gradients: Tensor) -> None:
        for row, gradient in zip(self.rows, gradients, strict=True):
            row.grad = gradient

    def renew(self, i: int, best: int) -> None:
        """See :class:`Members`."""
        self.optimizer.state.pop(self.rows[i], None)

    def groups(self) -> list[dict[str, Any]]:
        """See :class:`Members`."""
        return self.optimizer.param_groups

    def state(self) -> dict[str, Any]:
        """See :class:`Members`."""
        return {"optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """See :class:`Members`."""
        if set(state) != {"optimizer"}:
            raise ValueError(f"state_dict must be of members in a batch, got {sorted(state)}")
        self.optimizer.load_state_dict(state["optimizer"])


class OneByOne(Members):
    """One member after the other, in the model's own parameters and buffers.

    Args:
        swarm: of a plain module.
        optimizers: a function, parameters -> optimizer, or a list of functions or optimizers.
        gradients: "closure", "backward" or a SignGrad; default: "closure".

    Raises:
        TypeError: what is no function and no optimizer.
        ValueError: another number of them, or parameters narrower than float32.
    """

    def __init__(self, swarm: Swarm, optimizers: Any, gradients: str | SignGrad | None) -> None:
        """Make the optimizers."""
        self.swarm = swarm
        self.gradients = "closure" if gradients is None else gradients
        known = isinstance(self.gradients, str) and self.gradients in ("closure", "backward")
        if not known and not isinstance(gradients, SignGrad):
            raise ValueError(
                f"gradients must be 'closure', 'backward' or a SignGrad, got {gradients!r}"
            )
        parameters = list(swarm.parameters.values())
        for name, p in swarm.parameters.items():
            if p.element_size() < 4:
                raise ValueError(
                    f"{name} must be float32 or wider, got {p.dtype}, in which small moves are "
                    "lost; a PerturbedModel keeps wider numbers"
                )
        count = swarm.particles
        made = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers] * count
        if len(made) != count:
            raise ValueError(
                f"optimizers must have one for each of {count} members, got {len(made)}"
            )
        self.optimizers = [
            _check_made(o(parameters) if _is_factory(o) else o, parameters) for o in made
        ]
        if len({id(o) for o in self.optimizers}) != count:
            raise ValueError("optimizers must be different objects, one for each member")
        self._fresh = [copy.deepcopy(o.state_dict()) for o in self.optimizers]
        self.buffers = [self._read_buffers() for _ in range(count)]

    def step(self, closure: Closure, random: Random) -> tuple[list[float], int]:
        """See :class:`Members`."""
        losses, evaluations = [], 0
        for i, optimizer in enumerate(self.optimizers):
            self.swarm.write(self.swarm.positions[i])
            self.show_buffers(i)
            seen = _Watch(closure)
            if self.gradients == "closure":
                run: Callable[..., Any] = optimizer.step
                run(seen)
            elif self.gradients == "backward":
                self._backward(seen)
                optimizer.step()
            else:
                assert isinstance(self.gradients, SignGrad)
                self._signs(self.gradients, seen, random(slice(i, i + 1), self._rademacher()))
                optimizer.step()
            losses.append(seen.first)
            evaluations += seen.calls
            with torch.no_grad():
                self.swarm.positions[i].copy_(self.swarm.read())
            self.buffers[i] = self._read_buffers()
        return losses, evaluations

    def _rademacher(self) -> bool:
        return isinstance(self.gradients, SignGrad) and self.gradients.sampler == "rademacher"

    def _backward(self, closure: Closure) -> None:
        parameters = list(self.swarm.parameters.values())
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(
                "closure must return a loss that can be differentiated, with "
                "gradients='backward'; it must not call backward or detach"
            )
        if not bool(loss.detach().isfinite()):  # as in a batch: no gradient that is a number
            self._give(torch.zeros_like(self.swarm.positions[0]))
            return
        loss.sum().backward()
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if not all(
            bool((p.grad - p.grad).sum().isfinite()) for p in parameters if p.grad is not None
        ):
            self._give(torch.zeros_like(self.swarm.positions[0]))

    @torch.no_grad()
    def _signs(self, signs: SignGrad, closure: Closure, z: Tensor) -> None:
        began = self.swarm.read()
        before = torch.tensor([to_loss(call(closure))], dtype=torch.float64)
        try:
            self.swarm.write(began + signs.magn * z[0])
            after = torch.tensor([to_loss(call(closure))], dtype=torch.float64)
        finally:
            self.swarm.write(began)
        self._give(z[0] * signs.signs(before, after).to(z.dtype))

    def _give(self, gradient: Tensor) -> None:
        parts = self.swarm._split(gradient)
        for p, part in zip(self.swarm.parameters.values(), parts, strict=True):
            p.grad = part.clone()

    def renew(self, i: int, best: int) -> None:
        """See :class:`Members`; learning rates and other options stay what schedulers made them."""
        optimizer = self.optimizers[i]
        state = copy.deepcopy(self._fresh[i])
        _keep(optimizer.state_dict(), state)
        optimizer.load_state_dict(state)
        self.buffers[i] = {name: t.clone() for name, t in self.buffers[best].items()}

    def groups(self) -> list[dict[str, Any]]:
        """See :class:`Members`."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def show_buffers(self, i: int) -> None:
        """See :class:`Members`."""
        held = dict(self.swarm.module.named_buffers())
        for name, value in self.buffers[i].items():
            held[name].copy_(value)

    def _read_buffers(self) -> dict[str, Tensor]:
        return {name: b.detach().clone() for name, b in self.swarm.module.named_buffers()}

    def state(self) -> dict[str, Any]:
        """See :class:`Members`."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"optimizers": states, "buffers": self.buffers}

    def load(self, state: dict[str, Any]) -> None:
        """See :class:`Members`."""
        if set(state) != {"optimizers", "buffers"}:
            raise ValueError(f"state_dict must be of members one by one, got {sorted(state)}")
        check_like("buffers", state["buffers"], self.buffers)
        if len(state["buffers"]) != len(self.buffers):
            raise ValueError(
                f"buffers must be of {len(self.buffers)} members, got {len(state['buffers'])}"
            )
        for i, (buffers, own) in enumerate(zip(state["buffers"], self.buffers, strict=True)):
            check_like(f"buffers[{i}]", buffers, own)
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.buffers = state["buffers"]


def _copied(state: Any) -> Any:
    """Copy numbers and tensors in dicts and lists, in a third of the time of deepcopy."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if type(state) is dict:
        return {name: _copied(value) for name, value in state.items()}
    if type(state) is list:
        return [_copied(value) for value in state]
    return copy.deepcopy(state)


class _Watch:
    """A closure that notes the first loss and counts its calls."""

    def __init__(self, closure: Closure) -> None:
        function = checked(closure)
        assert function is not None
        self.function, self.first, self.calls = function, math.nan, 0

    def __call__(self) -> Any:
        loss = self.function()
        self.calls += 1
        if self.calls == 1:
            self.first = to_loss(loss)
        return loss


def _keep(now: Any, fresh: Any) -> None:
    """Carry options of groups, and positions in random numbers, over into a fresh state."""
    for name in ("optimizers", "opt"):
        inner, target = now.get(name), fresh.get(name)
        pairs = zip(inner, target, strict=True) if isinstance(inner, list) else [(inner, target)]
        for a, b in pairs:
            if isinstance(a, dict) and isinstance(b, dict):
                _keep(a, b)
    if "param_groups" in now:
        fresh["param_groups"] = copy.deepcopy(now["param_groups"])
    if "progress" in now:  # other random numbers than the last time
        for name in ("draws", "evaluations", "steps"):
            if name in now["progress"]:
                fresh["progress"][name] = now["progress"][name]


def _is_factory(optimizer: object) -> bool:
    return callable(optimizer) and not isinstance(optimizer, Optimizer)


def _check_made(optimizer: object, parameters: Sequence[Tensor]) -> Optimizer:
    """Return an optimizer if it has the right parameters and no others."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizers must be optimizers or functions, parameters -> optimizer, got "
            f"{type(optimizer).__name__}"
        )
    known = {id(p) for p in parameters}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizers must have the parameters of the model and no others")
    return optimizer
