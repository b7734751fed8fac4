"""GradChain: what one optimizer would do is the gradient of the next, after torchzero.

Any optimizer becomes a transform of gradients this way: momentum for methods that have none, Lion
on Nesterov's gradient, L-BFGS with Adam's scaling of its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag, check_like, check_number
from .composite import (
    Closure,
    CompositeOptimizer,
    Mode,
    Optimizer,
    check_mode,
    check_optimizers,
    checked,
    clones,
    parameters_of,
    per_member,
    run,
    uses_gradients,
)

GradMode = str | Callable[[Tensor, Tensor], Tensor]


class UpdateToGrad(CompositeOptimizer):
    """Let an optimizer step, take the step back, and leave it in ``.grad``.

    ``.grad = lr (before - after)``, which SGD with learning rate 1 / lr would turn into the same
    step. A parameter that the optimizer does not have, or did not touch for want of a gradient,
    keeps the gradient that it has.

    Its own ``param_groups`` have "lr", the factor; those of ``opt`` are ``opt.param_groups``.

    Args:
        params: parameters or groups of them, with "lr" if they are to differ; all that are to get
            a gradient.
        opt: the optimizer, of the same parameters or of some of them.
        lr: factor of the step.
        mode: how it is run. "closure": ``opt.step(closure)``, or ``opt.step()`` where there is no
            closure. "step": the closure, if any, is called once with gradients, then
            ``opt.step()``. "grad": as "closure", for an optimizer that moves nothing and leaves
            gradients itself; those times ``lr`` are passed on. Or a function (opt, closure) ->
            loss.
        grad_mode: "set" replaces the gradient, "add" adds to the one that the optimizer had, a
            function (gradient, update) -> gradient does as it likes.
        reset: whether the step is taken back; False leaves the parameters where it led.

    Raises:
        TypeError: arguments of another type.
        ValueError: an unknown mode, parameters of ``opt`` that are not in ``params``, parameters
            narrower than float32, in which the difference of two points is no step.

    Example:
        >>> import torch
        >>> from perturbed.optim import UpdateToGrad
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> link = UpdateToGrad([p], torch.optim.SGD([p], lr=0.5))
        >>> p.grad = torch.tensor([4.0, -2.0])
        >>> link.step()
        >>> p.grad, p.data
        (tensor([ 2., -1.]), tensor([1., 2.]))
    """

    def __init__(
        self,
        params: Any,
        opt: Optimizer,
        lr: float = 1.0,
        mode: Mode = "closure",
        grad_mode: GradMode = "set",
        reset: bool = True,
    ) -> None:
        """Check the arguments."""
        self.mode = "grad" if isinstance(mode, str) and mode == "grad" else check_mode(mode)
        self.grad_mode = _check_grad_mode(grad_mode)
        self.reset = check_flag("reset", reset)
        check_number("lr", lr)
        super().__init__([opt], params, {"lr": float(lr)})
        own = {p for group in self.param_groups for p in group["params"]}
        if any(p not in own for p in parameters_of(opt)):
            raise ValueError("params must have all parameters of opt, got fewer")
        for group in self.param_groups:
            check_number("lr", group["lr"])
            _check_wide(group["params"])

    def _share_groups(self) -> None:
        """Keep its own groups."""

    def _held(self) -> dict[Tensor, None]:
        return {p: None for p in parameters_of(self.optimizers[0]) if p.requires_grad}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group here and to ``opt``, each with its own defaults."""
        super().add_param_group(param_group)
        if self._made:
            added = self.optimizers[0].param_groups[-1]
            _check_wide(added["params"])
            Optimizer.add_param_group(self, {"params": added["params"]})

    @property
    def opt(self) -> Optimizer:
        """The optimizer whose steps become gradients."""
        return self.optimizers[0]

    def step(self, closure: Closure | None = None) -> Any:
        """Leave the optimizer's step in the gradients.

        Args:
            closure: returns the loss, and calls ``backward`` if the optimizer needs gradients.

        Returns:
            What the optimizer returned.
        """
        inner = {p for p in parameters_of(self.opt) if p.requires_grad}
        held = [(p, g["lr"]) for g in self.param_groups for p in g["params"] if p in inner]
        if self.mode == "grad":
            loss = run(self.opt, "closure", checked(closure))
            with torch.no_grad():
                for p, lr in held:
                    p.grad = None if p.grad is None else p.grad * lr
            return loss
        before = clones([p for p, _ in held])
        try:
            loss = run(self.opt, self.mode, checked(closure))
        except BaseException:
            _put([p for p, _ in held], before)
            raise
        with torch.no_grad():
            for (p, lr), start in zip(held, before, strict=True):
                # Without a gradient most optimizers pass over a parameter, and so do those after.
                if p.grad is not None or not torch.equal(p, start):
                    p.grad = self._gradient(p, (start - p) * lr)
        if self.reset:
            _put([p for p, _ in held], before)
        return loss

    def _gradient(self, parameter: Tensor, update: Tensor) -> Tensor:
        if self.grad_mode == "set":
            return update
        grad = torch.zeros_like(update) if parameter.grad is None else parameter.grad
        if self.grad_mode == "add":
            return update + grad
        assert callable(self.grad_mode)
        result = self.grad_mode(grad, update)
        if not isinstance(result, Tensor) or result.shape != update.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"grad_mode must return a gradient of shape {tuple(update.shape)}, got {got}"
            )
        return result.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of ``opt``, and the factors."""
        factors = [group["lr"] for group in self.param_groups]
        return {**super().state_dict(), "progress": {"lr": factors}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; raises as that of a composite optimizer."""
        self.progress = {"lr": []}  # what a state must have
        try:
            super().load_state_dict(state_dict)
            factors = self.progress["lr"]
        finally:
            self.progress = {}
        for group, factor in zip(self.param_groups, factors, strict=True):
            group["lr"] = factor

    def _check_progress(self, progress: dict[str, Any]) -> None:
        super()._check_progress(progress)
        for factor in per_member("lr", progress["lr"], len(self.param_groups)):
            if not isinstance(factor, Tensor):
                check_like("progress['lr']", factor, 1.0)


class GradChain(CompositeOptimizer):
    """Chain optimizers: each but the last turns its step into the gradient of the next.

    The first one sees the gradient, or the closure, of the loss. The second sees as gradient what
    the first would have done, and so on; only the last one moves the parameters.

    With ``step(closure)`` the first one calls the closure, as often as it likes, L-BFGS and
    searches with losses alone included. Those after it do not: asked for a loss they are
    told the first one's, and their gradient stays the chained one. Without a closure the first
    steps along the gradients that are there.

    ``param_groups`` are those of the last one, whose learning rate is that of the chain. Schedulers
    of the others attach to ``chain.optimizers[i]`` (the factor) or to the optimizer itself.

    Args:
        params: parameters or groups of them, of all optimizers together.
        optimizers: two or more, from first to last.
        lrs: factor of each step but the last, a number or a list, of one entry less.
        mode: how each optimizer is run, see :class:`UpdateToGrad`: one for all, or a list with an
            entry for each; the last may have one too.
        grad_mode: what each one's step does to the gradient: one for all or a list of one entry
            less.
        reset: whether each one's step is taken back: the same.

    Raises:
        TypeError: arguments of another type.
        ValueError: fewer than two optimizers, a method of losses alone that is not the first, lists
            of another length, and what UpdateToGrad refuses.

    Example:
        Lion and its like have no Nesterov momentum; any optimizer can be given it:

        >>> import torch
        >>> from torch.optim import SGD, Adagrad
        >>> from perturbed.optim import GradChain
        >>> net = torch.nn.Linear(2, 1)
        >>> nesterov = SGD(net.parameters(), lr=1.0, momentum=0.9, nesterov=True)
        >>> chain = GradChain(net.parameters(), [nesterov, Adagrad(net.parameters(), lr=0.1)])
        >>> def closure():
        ...     chain.zero_grad()
        ...     loss = (net(torch.ones(1, 2)) - 3).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(100):
        ...     loss = chain.step(closure)
        >>> bool(loss < 0.01)
        True
    """

    def __init__(
        self,
        params: Any,
        optimizers: list[Optimizer],
        lrs: float | list[float] = 1.0,
        mode: Mode | list[Mode] = "closure",
        grad_mode: GradMode | list[GradMode] = "set",
        reset: bool | list[bool] = True,
    ) -> None:
        """Make the links."""
        members = check_optimizers(optimizers)
        if len(members) < 2:
            raise ValueError(f"optimizers must have at least two, got {len(members)}")
        if isinstance(params, Tensor):
            raise TypeError("params must be a list of parameters or groups, got a tensor")
        groups = [_normal(entry) for entry in params]
        for i, member in enumerate(members[1:], 1):
            if not uses_gradients(member):
                raise ValueError(
                    f"optimizers[{i}] must step along gradients; {type(member).__name__} uses "
                    "losses alone and can only be the first"
                )
        links = len(members) - 1
        modes = per_member("mode", mode, len(members))
        if isinstance(modes[-1], str) and modes[-1] == "grad":
            raise ValueError("mode of the last optimizer must not be 'grad': it has to move")
        self._last_mode = check_mode(modes[-1])
        made: list[Optimizer] = [
            UpdateToGrad([dict(g) if isinstance(g, dict) else g for g in groups], *options)
            for options in zip(
                members[:-1],
                per_member("lrs", lrs, links),
                modes[:-1],
                per_member("grad_mode", grad_mode, links),
                per_member("reset", reset, links),
                strict=True,
            )
        ]
        super().__init__([*made, members[-1]])

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizers[-1].param_groups

    def step(self, closure: Closure | None = None) -> Any:
        """Step all optimizers once; the last one moves the parameters.

        Args:
            closure: returns the loss, and calls ``backward`` if the first optimizer needs
                gradients.

        Returns:
            The first optimizer's loss; None without a closure.
        """
        first, *middle = self.optimizers[:-1]
        loss = run(first, "closure", closure)
        told = None if closure is None else (lambda: loss)
        for link in middle:
            run(link, "closure", told)
        run(self.optimizers[-1], self._last_mode, told)
        return loss


def with_momentum(
    optimizer: Optimizer,
    momentum: float = 0.9,
    nesterov: bool = False,
    where: str = "gradient",
) -> GradChain:
    """Give any optimizer momentum.

    Args:
        optimizer: any, also one of losses alone with ``where="update"``.
        momentum: 0 up to, but not, 1.
        nesterov: whether the gradient looks ahead.
        where: "gradient": the optimizer sees an average of gradients; its learning rate is that of
            the result. "update": its steps add up, so that they grow by 1 / (1 - momentum).

    Returns:
        The chain of the optimizer and ``SGD(lr=1)``.

    Raises:
        ValueError: momentum out of range, an unknown ``where``.
        TypeError: no optimizer.

    Example:
        >>> import torch
        >>> from perturbed.optim import with_momentum
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> chain = with_momentum(torch.optim.Rprop([p], lr=0.1), 0.5, where="update")
        >>> for _ in range(2):
        ...     p.grad = torch.tensor([3.0])
        ...     chain.step()
        >>> p.data  # 0.1, then 0.12 + 0.5 * 0.1
        tensor([0.7300])
    """
    (optimizer,) = check_optimizers([optimizer])
    if check_number("momentum", momentum, high=1.0) == 1.0:
        raise ValueError("momentum must be below 1, got 1")
    check_flag("nesterov", nesterov)
    if not isinstance(where, str) or where not in ("gradient", "update"):
        raise ValueError(f"where must be 'gradient' or 'update', got {where!r}")
    parameters = parameters_of(optimizer)
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=momentum, nesterov=nesterov)
    chain: list[Optimizer] = [sgd, optimizer] if where == "gradient" else [optimizer, sgd]
    return GradChain(parameters, chain)


@torch.no_grad()
def _put(parameters: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _normal(entry: Any) -> Any:
    """Return a group's parameters alone, of which every link makes a group; others as they are."""
    if not isinstance(entry, dict):
        return entry
    held = entry["params"]
    return {"params": held if isinstance(held, Tensor) else list(held)}


def _check_wide(parameters: list[Tensor]) -> None:
    for p in parameters:
        if p.is_floating_point() and p.element_size() < 4:
            raise ValueError(
                f"params must be float32 or wider, got {p.dtype}: the difference of two points "
                "would lose the step; keep float32 copies of them"
            )


def _check_grad_mode(grad_mode: object) -> GradMode:
    if callable(grad_mode) or (isinstance(grad_mode, str) and grad_mode in ("set", "add")):
        return grad_mode
    raise ValueError(
        f"grad_mode must be 'set', 'add' or a function (gradient, update) -> gradient, got "
        f"{grad_mode!r}"
    )
