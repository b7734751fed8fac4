"""ClipUp: normalised gradients, momentum and a speed limit, made for evolution strategies.

Toklu, Liskowski, Srivastava: "ClipUp: A Simple and Powerful Optimizer for Distribution-based Policy
Evolution" (PPSN 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_flag, check_number


class ClipUp(torch.optim.Optimizer):
    """Descend with steps whose length does not depend on the gradient's.

    With ``|.|`` the Euclidean norm over all parameters of a group together,

        v <- momentum v + lr g / |g|
        v <- v min(1, max_speed / |v|)
        p <- p - v

    so that ``lr`` and ``max_speed`` are lengths in parameter space, and a gradient tells only where
    to go. That suits estimates of a gradient, whose scale hangs on sigma, the shaping and the
    losses. A gradient of zeros lets the velocity run out. As in other optimizers of torch, one that
    is not finite spoils what it moves; the estimates of this package are always finite.

    Args:
        params: parameters, or groups of them.
        lr: length of what a step adds to the velocity, above 0. Schedulers may set it to 0.
        momentum: 0 up to, but not, 1.
        max_speed: the longest step; default: twice the ``lr`` of the moment, the paper's advice.
        maximize: ascend instead.
        foreach: work on lists of tensors at once, which is faster on GPUs, or tensor by tensor,
            which needs less memory; default: at once. The results are the same.

    Raises:
        TypeError: arguments of another type.
        ValueError: numbers out of range.

    Example:
        >>> import torch
        >>> from perturbed.optim import ClipUp
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> clipup = ClipUp([p], lr=1.0)
        >>> p.grad = torch.tensor([300.0, 400.0])
        >>> clipup.step()
        >>> p.data
        tensor([2.4000, 3.2000])
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        momentum: float = 0.9,
        max_speed: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        """Check the defaults; no velocity yet."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "max_speed": max_speed,
            "maximize": maximize,
            "foreach": foreach,
        }
        check_number("lr", lr, above=True)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults for what it leaves open; its numbers are checked."""
        options = {**self.defaults, **param_group}
        check_number("lr", options["lr"])
        if check_number("momentum", options["momentum"], high=1.0) == 1.0:
            raise ValueError("momentum must be below 1, got 1")
        if options["max_speed"] is not None:
            check_number("max_speed", options["max_speed"], above=True)
        check_flag("maximize", options["maximize"])
        if options["foreach"] is not None and not isinstance(options["foreach"], bool):
            raise TypeError(f"foreach must be True, False or None, got {options['foreach']!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step along the gradients that are there.

        Args:
            closure: evaluates the model with gradients and returns the loss, as in torch.

        Returns:
            What ``closure`` returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        if any(g.layout != torch.strided for g in gradients):
            raise RuntimeError("ClipUp does not support sparse gradients")
        velocities = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            velocities.append(state["velocity"])
        lr = float(group["lr"])
        limit = 2 * lr if group["max_speed"] is None else group["max_speed"]
        length = _norm(gradients)
        length = torch.where(length > 0, length, 1.0)
        batches = _batches(parameters, gradients, velocities, group["foreach"] is not False)
        for _, g, v in batches:
            torch._foreach_mul_(v, group["momentum"])
            # Not lr / length in one: that would overflow for the smallest gradients.
            torch._foreach_add_(v, torch._foreach_div(g, length.to(v[0].device)), alpha=lr)
        speed = _norm(velocities)
        shrink = torch.where(speed > limit, limit / speed, 1.0)
        for p, _, v in batches:
            torch._foreach_mul_(v, shrink.to(v[0].device))
            torch._foreach_add_(p, v, alpha=1 if group["maximize"] else -1)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, () float64 on the first one's device."""
    # In float64 no square of a float32 overflows.
    parts = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.stack([part.to(tensors[0].device) for part in parts]).norm()


def _batches(
    parameters: list[Tensor], gradients: list[Tensor], velocities: list[Tensor], foreach: bool
) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Group what torch._foreach may take together, one device each; singles if not ``foreach``."""
    found: dict[Any, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for i, tensors in enumerate(zip(parameters, gradients, velocities, strict=True)):
        key = tensors[0].device if foreach else i
        for batch, tensor in zip(found.setdefault(key, ([], [], [])), tensors, strict=True):
            batch.append(tensor)
    return list(found.values())
