"""PerturbedModel: a model, its population, and the estimate that comes back from it."""

from __future__ import annotations

import copy
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attach, match_members
from .checks import as_int, check_entries, check_flag
from .memory import is_out_of_memory, with_advice
from .nn.base import PerturbedLayer
from .nn.convert import revert
from .nn.fused import without_fused_layers
from .noise.state import NoiseState, check_seed
from .rows import MemberRows
from .summary import summarise

# Parameter by id, the layer that uses it first, and its name there.
Uses = dict[int, tuple[nn.Parameter, tuple[PerturbedLayer, str]]]


class PerturbedModel(MemberRows, nn.Module):
    """Evaluate a population of perturbed copies of ``model`` in one forward.

    ``pm(x)`` and ``pm.any_method(x)`` run the base model with noise; ``model(x)`` stays
    unperturbed. Rows of the batch map to members as ``docs/conventions.md`` says: row b has
    direction ``b % D`` and repeat ``b // D``, and the second half of the repeats is negated if the
    sampling is antithetic.

    The wrapper owns the draw (seed, generation, sigma), not the noise, which is drawn again
    wherever it is needed; the global random state is never read or written. Where a name exists
    here and on the base model, this class wins; ``pm.model`` is the base model. After NESgpu's
    class of the same name (Amand, 2020).

    Every ``set_noise`` looks at the model anew: parameters with ``requires_grad=False`` are not
    perturbed and get no gradient, and a parameter that several layers share is perturbed once,
    alike in all.

    With :class:`~perturbed.Explicit` layers the members are tensors that :meth:`set_members` is
    given: there is no draw, no sign, and sigma has no meaning.

    Args:
        model: a module with perturbed layers (see :func:`perturbed.convert`). They leave the
            PerturbedModel they belong to, which then refuses to work.
        directions: D, the same for all of its layers.
        antithetic: None (default) pairs members where the number of repeats R is even and refuses
            an odd R > 1; True and False force it.
        sigma: noise scale, the standard deviation of every element of E_d.
        seed: of the noise; None takes one from the operating system.

    Raises:
        ValueError: no perturbed layer or none with a parameter to perturb, layers with other
            directions, a parameter shared by layers of different noise, layers of noise beside
            Explicit ones, ``antithetic=True`` with those, sigma negative or not finite.
        TypeError: arguments of another type.

    Example:
        >>> import torch, perturbed
        >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=16)
        >>> pm = perturbed.PerturbedModel(net, directions=16, sigma=0.1)
        >>> pm.set_noise()
        >>> losses = pm(pm.replicate(torch.ones(3, 8))).square().mean(-1)  # (S * n * D,)
        >>> plus, minus = pm.member_mean(losses)                           # (S, D)
        >>> pm.set_grad(plus - minus)
        >>> net.weight.grad.shape
        torch.Size([4, 8])
    """

    model: nn.Module
    _found: Uses | None = None  # what _perturbed() returned last

    def __init__(
        self,
        model: nn.Module,
        directions: int,
        antithetic: bool | None = None,
        sigma: float = 0.02,
        seed: int | None = 0,
    ) -> None:
        """Find the perturbed layers and give each parameter its stream."""
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if any(isinstance(m, PerturbedModel) for m in model.modules()):
            raise ValueError("model must not contain a PerturbedModel; pass its .model")
        self.state = NoiseState(directions, antithetic, sigma, seed)
        self.model = model
        self._attach()

    def _attach(self) -> None:
        """Look at the model anew: which parameters are perturbed, and what they draw from."""
        attach(self.model, self.state)
        self._found = None

    def layers(self) -> Iterator[PerturbedLayer]:
        """Iterate over the perturbed layers, in the order of ``model.modules()``."""
        return (m for m in self.model.modules() if isinstance(m, PerturbedLayer))

    # ---- evaluation ----------------------------------------------------------------------------

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Switch the noise on for a block; off again after it, whatever happens in it.

        In the block any call of the base model or of a part of it sees noise. Unlike ``pm(x)`` it
        does not know the batch, and so cannot refuse a model that folds other dimensions into the
        rows.
        """
        self._check_owner()
        if not self.state.has_tensors:  # after free_memory and unpickling
            self._make_tensors()
        with self.state.turn.taken():
            before = self.state.active
            try:
                self.state.active = True
                with without_fused_layers():
                    yield
            finally:
                self.state.active = before

    def _run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` with noise, holding its layers to the rows of its arguments."""
        state = self.state
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        rows = tuple(a.shape[0] for a in leaves if isinstance(a, Tensor) and a.dim() > 0)
        with state.turn.taken():
            before = state.rows
            try:
                state.rows = rows
                with self.perturbed():
                    result = function(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise with_advice(error, self._advice()) from error
            finally:
                state.rows = before
        if inspect.isgenerator(result) or inspect.iscoroutine(result):
            result.close()
            raise TypeError(
                f"{getattr(function, '__name__', function)} returns a {type(result).__name__}, "
                "whose body would run after the noise is off; run it in `with pm.perturbed():`"
            )
        return result

    def _advice(self) -> str:
        """Say what would take less memory."""
        advice = (
            f"That was for {self.directions} directions; `with pm.window(first, count):` takes "
            "fewer at a time, as optimizers do with chunk= or max_memory=."
        )
        if any(getattr(layer.noise, "storage", "") == "stored" for layer in self.layers()):
            advice += (
                " Noise with storage='stored' is held for all of them; storage='regenerate' holds "
                "none."
            )
        return advice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model with noise; every row sees its own member.

        The rows of every layer must be those of an argument (of the first layer, if no argument
        holds a tensor): a model that folds other dimensions into the rows is refused.
        """
        return self._run(self.model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Offer the base model's own attributes; its methods run with noise."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__:
                raise
        value = getattr(super().__getattr__("model"), name)
        if not callable(value) or isinstance(value, (nn.Module, type)):
            return value
        return functools.wraps(value)(functools.partial(self._run, value))

    # ---- the draw ------------------------------------------------------------------------------

    @property
    def sigma(self) -> float:
        """The noise scale."""
        return self.state.sigma

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self.state.seed

    def set_noise(self, sigma: float | None = None) -> None:
        """Draw fresh noise: move on to the next generation, with a new ``sigma`` if given.

        Raises:
            RuntimeError: a model whose members are given.
        """
        self._check_owner()
        if self.state.absolute:
            raise RuntimeError(
                "the members of this model are not drawn; give them to set_members()"
            )
        self._attach()
        self.state.next_generation(sigma)
        self._make_tensors()

    def set_seed(self, seed: int | None = None) -> None:
        """Start the sequence of draws of ``seed``; the next ``set_noise`` is its first.

        None takes a seed from the operating system.
        """
        self.state.move(check_seed(seed), -1, self.sigma)

    def set_noise_scale(self, sigma: float) -> None:
        """Change the scale of the current draw; its random numbers stay."""
        self.state.move(self.seed, self.state.generation, sigma)

    # Not in inference mode means with gradients, too: the views belong to the graph of the members.
    @torch.inference_mode(False)
    def set_members(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the members of a model whose layers have :class:`~perturbed.Explicit` noise.

        The tensors are held and not copied: what is written into them is what the next forward
        sees. Those that require grad get gradients from a backward through it. Members are not part
        of the ``state_dict``, of copies and of pickles, and ``free_memory`` and moves to another
        device or dtype let go of them.

        Args:
            tensors: (D, *shape) of every perturbed parameter, by its name in
                ``pm.model.named_parameters()``; entry d belongs to member d. Of the parameter's
                dtype and device, contiguous in a member, with any stride from one to the next.

        Raises:
            TypeError: no mapping from names to tensors.
            ValueError: a parameter that is missing or none of the perturbed ones, or a tensor of
                another shape, dtype, device or layout.
            RuntimeError: layers of other noise.

        Example:
            >>> import torch, perturbed
            >>> from perturbed import Explicit
            >>> net = perturbed.convert(torch.nn.Linear(8, 4), directions=3, noise=Explicit())
            >>> pm = perturbed.PerturbedModel(net, directions=3)
            >>> pm.set_members({"weight": torch.randn(3, 4, 8), "bias": torch.zeros(3, 4)})
            >>> pm(pm.replicate(torch.ones(5, 8))).shape  # (n * D, out)
            torch.Size([15, 4])
        """
        self._check_owner()
        if not self.state.absolute:
            raise RuntimeError(
                "set_members needs layers with noise=Explicit(); the members of this model are "
                "drawn by set_noise()"
            )
        # All that can fail comes first: refused members leave those that are held as they are.
        members, matrices = match_members(self.model, tensors, self.population)
        self._attach()
        explicit = {
            layer.perturbed_parameters()[key][1]: matrix
            for (layer, key), matrix in matrices.items()
        }
        self.state.set_members(members, explicit)
        self._make_tensors()

    def members(self) -> dict[str, Tensor]:
        """Return the tensors that :meth:`set_members` was given, by name: (D, *shape) each.

        Raises:
            RuntimeError: before ``set_members``.
        """
        self._need_noise("members")
        if not self.state.absolute:
            raise RuntimeError("members: those of this model are drawn; see member(d, sign)")
        return dict(self.state.members)

    def allocate_memory(self) -> None:
        """Hold now what ``storage="stored"`` families hold; they would do so at their first use.

        A forward under ``torch.compile`` does not count as a use: call this after ``set_noise``
        then.
        """
        self._need_noise("allocate_memory")
        try:
            for layer in self.layers():
                layer.allocate()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise with_advice(error, self._advice()) from error

    def free_memory(self) -> None:
        """Drop all noise and tensors that the draw holds; the next forward makes them again.

        Members that were given are let go, and the next forward asks for ``set_members``.
        """
        self.state.drop_memory()

    def _make_tensors(self) -> None:
        """Have the draw's tensors on every device of the model, ahead of a traced forward."""
        for device in {p.device for p, _ in self._perturbed().values()}:
            self.state.tensors(device)

    def _apply(self, fn: Callable, recurse: bool = True) -> PerturbedModel:
        """Follow a move to another device or dtype; held noise is drawn again there.

        Members that were given stay where they are, and are let go.
        """
        super()._apply(fn, recurse)
        self.state.drop_memory()
        self._make_tensors()
        return self

    def _check_owner(self) -> None:
        if self.state.released:
            raise RuntimeError(
                "the layers of this PerturbedModel were reverted or serve a newer PerturbedModel"
            )

    def _need_noise(self, what: str) -> None:
        self._check_owner()
        if not self.state.drawn:
            raise RuntimeError(f"{what}: {self.state.undrawn()}")

    # ---- the estimate --------------------------------------------------------------------------

    def _perturbed(self) -> Uses:
        """Each perturbed parameter once: id -> (parameter, (layer, name of its first use))."""
        known = self._found
        # Kept until the next look at the model, or until one of the parameters is another.
        if known is not None and all(
            id(layer._parameters.get(name)) == key for key, (_, (layer, name)) in known.items()
        ):
            return known
        found: Uses = {}
        for layer in self.layers():
            for name, (parameter, _) in layer.perturbed_parameters().items():
                found.setdefault(id(parameter), (parameter, (layer, name)))
        self._found = found
        return found

    # Out of inference mode, so that gradients and members are ordinary tensors anywhere.
    @torch.inference_mode(False)
    @torch.no_grad()
    def set_grad(self, weights: Tensor, accumulate: bool = False) -> None:
        """Set ``.grad`` of every perturbed parameter to ``sum_d weights[d] E_d``.

        E_d includes sigma; nothing is divided by D or sigma. With weights of a loss, gradient
        descent descends; with antithetic sampling pass the folded pair ``loss_plus - loss_minus``.

        Args:
            weights: (D,) floating point, on the parameters' device.
            accumulate: add to existing gradients instead of replacing them.

        Raises:
            TypeError: weights that are no floating-point tensor.
            ValueError: weights of another length or on another device.
            RuntimeError: before the first ``set_noise``.
        """
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weights must be a floating-point tensor of shape (D,), got {got}")
        if weights.shape != (self.directions,):
            raise ValueError(
                f"weights must have shape (D,) = ({self.directions},), got {tuple(weights.shape)}"
            )
        check_flag("accumulate", accumulate)
        self._need_noise("set_grad")
        perturbed = self._perturbed()
        for parameter, _ in perturbed.values():
            if parameter.device != weights.device:
                raise ValueError(
                    f"weights must be on the parameters' device {parameter.device}, got "
                    f"{weights.device}"
                )
        for parameter, (layer, name) in perturbed.values():
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            grad = parameter.grad
            if grad is None or not grad.is_contiguous():
                fresh = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                grad = fresh if grad is None else fresh.copy_(grad)
            layer.add_estimate(name, grad, weights.to(wide).contiguous(), accumulate)
            parameter.grad = grad

    # ---- rows and members ----------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def member(self, d: int, sign: int = 1) -> nn.Module:
        """Return the plain module that member (sign, d) is: a copy with weights ``W + sign E_d``.

        Where members are given, its weights are E_d, bit for bit.

        Raises:
            ValueError: a direction outside 0 .. D - 1, or a sign other than 1 and -1 (than 1, where
                members are given).
            TypeError: a direction that is no integer.
            RuntimeError: before the first ``set_noise``.
        """
        d = as_int("d", d)
        if not 0 <= d < self.directions:
            raise ValueError(f"d must be between 0 and {self.directions - 1}, got {d}")
        # By type first: comparing an array with a number is no yes or no.
        if isinstance(sign, bool) or not (isinstance(sign, numbers.Real) and sign in (1, -1)):
            raise ValueError(f"sign must be 1 or -1, got {sign!r}")
        self._need_noise("member")
        if self.state.absolute and sign != 1:
            raise ValueError("sign must be 1: members that are given have no other, got -1")
        plain = copy.deepcopy(self.model)
        copies = dict(zip(map(id, self.model.parameters()), plain.parameters(), strict=True))
        for key, (_, (layer, name)) in self._perturbed().items():
            noise = layer.parameter_noise(name, d, 1)[0]
            if self.state.absolute:
                copies[key].copy_(noise)
            else:
                copies[key].add_(noise * self.state.sigma, alpha=sign)
        return revert(plain)

    def summary(self, *args: Any, **kwargs: Any) -> str:
        """Return a table of the layers, and of what has parameters but no noise, with the reason.

        For each layer: family, perturbed parameters, bytes of noise held between forwards, and its
        share of the cost, which is its share of the multiply-adds of all perturbed layers' weights.
        Example inputs are needed to know how often each is used, in how many positions; without
        any, each weight is taken to be used once.

        Args:
            *args: example inputs of the base model, any number of rows; it runs on them once,
                unperturbed and in evaluation mode. Layers that are not called then, though they may
                have their weights read, say so.
            **kwargs: the same.
        """
        return summarise(self.model, self.state, args, kwargs)

    # ---- saving --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict:
        """Part of ``state_dict``: the draw, so that a loaded model continues with its noise."""
        s = self.state
        return {"seed": s.seed, "generation": s.generation, "sigma": s.sigma}

    def set_extra_state(self, state: dict) -> None:
        """Restore :meth:`get_extra_state`."""
        check_entries("state", state, ("seed", "generation", "sigma"))
        self.state.move(state["seed"], state["generation"], state["sigma"])
