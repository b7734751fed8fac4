"""From observations to actions: normalisation, the policy and its state, what its output means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .env import BatchEnv, kind
from .normalize import ObservationNorm


class Actor:
    """Act in every lane of an environment.

    Args:
        policy: function of observations (lanes, n), or of observations and state; returns the
            output, or output and state.
        module: whose parameters say on which device and in which dtype the policy computes.
        env: where to act.
        norm: applied to the observations first.
        state: of a recurrent policy when an episode begins: a tensor or a nest of them, lanes
            first. None: the policy has none.
        act: makes actions of the policy's output.

    Raises:
        TypeError: a policy or act that cannot be called, a norm that is no ObservationNorm.
        ValueError: a state whose tensors do not have lanes first, a norm of another size.
    """

    def __init__(
        self,
        policy: Callable[..., Any],
        module: object,
        env: BatchEnv,
        norm: ObservationNorm | None,
        state: Any,
        act: Callable[[Any], Tensor] | None,
    ) -> None:
        """Check the arguments."""
        if not callable(policy):
            raise TypeError(f"policy must be callable, got {type(policy).__name__}")
        if act is not None and not callable(act):
            raise TypeError(f"act must be callable, got {type(act).__name__}")
        if norm is not None and not isinstance(norm, ObservationNorm):
            raise TypeError(f"norm must be an ObservationNorm, got {type(norm).__name__}")
        if norm is not None and norm.size != env.observation_size:
            raise ValueError(
                f"norm must be of the environment's {env.observation_size} numbers, got {norm.size}"
            )
        for leaf in leaves(state):
            if not isinstance(leaf, Tensor) or leaf.dim() < 1 or leaf.shape[0] != env.lanes:
                got = tuple(leaf.shape) if isinstance(leaf, Tensor) else kind(leaf)
                raise ValueError(
                    f"state must hold tensors of shape (lanes, ...), lanes = {env.lanes}, got {got}"
                )
        self.policy, self.env, self.norm, self.act = policy, env, norm, act
        self.device, self.dtype = placement(module, env.device)
        self.initial = self.state = state
        self._affine: tuple[Tensor, Tensor] | None = None

    def begin(self) -> None:
        """Start all lanes: state as at the beginning."""
        self.state = self.initial

    def refresh(self) -> None:
        """Read the normalisation, which then holds until the next call."""
        self._affine = None
        if self.norm is not None:
            mean, scale = self.norm.affine(self.dtype)
            self._affine = mean.to(self.device), scale.to(self.device)

    def restore(self, tensors: list[Tensor]) -> None:
        """Put saved ``leaves(state)`` back."""
        if self.initial is not None:
            self.state = pytree.tree_unflatten(tensors, pytree.tree_flatten(self.initial)[1])

    def clear(self, mask: Tensor) -> None:
        """Put the state of some lanes, (lanes,) bool, back to the beginning."""
        if self.initial is None:
            return

        def cleared(initial: Tensor, now: Tensor) -> Tensor:
            rows = mask.to(now.device).view(-1, *(1,) * (now.dim() - 1))
            return torch.where(rows, initial, now)

        self.state = pytree.tree_map(cleared, self.initial, self.state)

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return actions for ``env.step``, and which lanes had no usable output.

        Returns:
            Actions; (lanes,) bool, true where the output was NaN (or infinite, for continuous
            actions) and the action is a stand-in; None if indices came.
        """
        x = observations.to(self.device, self.dtype)
        if self._affine is not None:
            x = (x - self._affine[0]) * self._affine[1]
        if self.state is None:
            output = self.policy(x)
        else:
            output = self._recur(x)
        if self.act is not None:
            output = self.act(output)
        return self._actions(output)

    def _recur(self, x: Tensor) -> Any:
        pair = self.policy(x, self.state)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"policy must return (output, state) where it has state, got {kind(pair)}"
            )
        output, state = pair
        before, after = (pytree.tree_flatten(nest) for nest in (self.state, state))
        shapes = [
            [tuple(leaf.shape) if isinstance(leaf, Tensor) else kind(leaf) for leaf in leaves]
            for leaves, _ in (before, after)
        ]
        if before[1] != after[1] or shapes[0] != shapes[1]:
            raise ValueError(
                f"policy must return a state like the one it was given, tensors of {shapes[0]}, "
                f"got {shapes[1]}"
            )
        self.state = state
        return output

    def _actions(self, output: Any) -> tuple[Tensor, Tensor | None]:
        env = self.env
        if not isinstance(output, Tensor):
            raise TypeError(
                f"policy must return a tensor, or act make one of it, got {kind(output)}"
            )
        output = output.detach()
        if env.discrete and output.dtype == torch.int64 and output.dim() == 1:
            low, high = output.aminmax() if output.numel() else (0, 0)
            if low < 0 or high >= env.action_size:
                raise ValueError(
                    f"actions must be between 0 and {env.action_size - 1}, got {int(low)} to "
                    f"{int(high)}"
                )
            return output.to(env.device), None
        if output.shape != (env.lanes, env.action_size) or not output.is_floating_point():
            raise ValueError(
                f"policy must return floating-point numbers of shape (lanes, action_size) = "
                f"({env.lanes}, {env.action_size}), got {kind(output)} of shape "
                f"{tuple(output.shape)}"
            )
        output = output.to(env.device)
        if env.discrete:  # infinities may mask actions
            return output.argmax(1), output.isnan().any(1)
        broken = ~output.isfinite().all(1)
        usable = torch.where(broken[:, None], 0.0, output)
        return usable.clamp(env.action_low, env.action_high), broken


def leaves(state: Any) -> list[Any]:
    """Return the tensors of a policy's state, none of None."""
    return [] if state is None else pytree.tree_leaves(state)


def placement(module: object, device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a module's parameters; ``device`` and float32 without any."""
    if isinstance(module, nn.Module):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return device, torch.float32
